"""Files that a diffusers directory may lack, made from what it has: safetensors from pickles, the empty prompt's
embedding from the text encoder. They are kept in the user's cache under the digest of what they were made from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from densegeo.errors import CheckpointError
from densegeo.export import digests
from densegeo.files import atomic_write, cache_directory


def converted(path: Path) -> Path:
    """A `.bin` file's tensors as safetensors. Raises CheckpointError for what is no plain dictionary of tensors."""

    def read() -> Mapping[str, Tensor]:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # of unpickling, zip files and torch: one message for all
            raise CheckpointError(f"{path} cannot be read as weights alone: {error}") from error
        if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
            raise CheckpointError(f"{path} does not hold a dictionary of tensors")
        return {name: tensor.contiguous() for name, tensor in state.items()}

    return _cached("weights", digests.sha256(path), read)


def empty_prompt(directory: Path) -> Path:
    """The embedding of an empty text by `text_encoder/` and `tokenizer/` of a diffusers directory, not padded.

    Raises CheckpointError when transformers is missing, or cannot read them.
    """
    weights = sorted((directory / "text_encoder").glob("*.safetensors"))
    if not weights:
        raise CheckpointError(f"{directory / 'text_encoder'} has no safetensors file: give --prompt FILE")

    def compute() -> Mapping[str, Tensor]:
        try:
            from transformers import CLIPTextModel, CLIPTokenizer
        except ImportError:
            raise CheckpointError(
                f"the empty prompt's embedding must be computed with {directory / 'text_encoder'}, which needs "
                "transformers: pip install densegeo[text-encoder], or give --prompt FILE"
            ) from None
        try:
            tokenizer = CLIPTokenizer.from_pretrained(directory / "tokenizer")
            encoder = CLIPTextModel.from_pretrained(directory / "text_encoder").float().eval()
            tokens = tokenizer("", padding="do_not_pad", return_tensors="pt").input_ids
            with torch.no_grad():
                return {"empty_prompt": encoder(tokens)[0].contiguous()}
        except Exception as error:  # of files, configurations and shapes: one message for all
            raise CheckpointError(f"{directory}: the text encoder cannot be run: {error}") from error

    return _cached("prompt", digests.sha256(weights[0]), compute)


def _cached(kind: str, digest: str, make: Callable[[], Mapping[str, Tensor]]) -> Path:
    """The file of this digest; made when it is not there, whole or not at all."""
    path = cache_directory() / kind / f"{digest}.safetensors"
    if not path.is_file():
        tensors = dict(make())
        with atomic_write(path) as partial:
            save_file(tensors, partial)
    return path
