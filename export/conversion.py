"""Files that a checkpoint may lack, made from what it has: safetensors from pickles, the empty prompt's embedding from
the text encoder. They are kept in the user's cache under the digest of all files that they were made from.

With a scratch folder (of a dry run) nothing is kept: what is made lies there, and weights are headers without tensors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from densegeo.errors import CheckpointError
from densegeo.export import digests
from densegeo.extras import install_hint
from densegeo.files import atomic_write, cache_directory
from densegeo.models.checkpoint import load_weights
from densegeo.models.containers import require_readable
from densegeo.models.streaming import safetensors_head
from densegeo.models.weight_file import parts, read_entries

_NESTED = ("state_dict", "model_state_dict", "module", "model", "params")  # where trainers keep the weights
_TEXT_MODEL = "text_model."


def converted(path: Path, scratch: Path | None = None) -> Path:
    """A pickle's tensors as safetensors. Raises CheckpointError for what holds no dictionary of tensors."""
    require_readable(path)
    if scratch is not None:
        target = scratch / f"{len(list(scratch.iterdir()))}.safetensors"
        _write_head(_unpickled(path), target)
        return target
    return _cached("weights", digests.sha256(path), lambda: _unpickled(path))


def _unpickled(path: Path) -> Mapping[str, Tensor]:
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError:  # files of before PyTorch 1.6 cannot be mapped
        state = _loaded(path)
    except Exception as error:  # of unpickling, zip files and torch: one message for all
        raise _unreadable(path, error) from error
    while isinstance(state, dict) and (inner := [state[key] for key in _NESTED if isinstance(state.get(key), dict)]):
        state = inner[0]
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        kind = f"one with {', '.join(map(str, list(state)[:5]))}" if isinstance(state, dict) else type(state).__name__
        raise CheckpointError(f"{path} does not hold a dictionary of tensors, but {kind}")
    return {str(name): tensor.contiguous() for name, tensor in state.items()}


def _loaded(path: Path) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path} cannot be read as weights alone: {str(error).partition(chr(10))[0]}")


def _write_head(tensors: Mapping[str, Tensor], path: Path) -> None:
    """A safetensors file of these names, shapes and types whose data are a hole."""
    head, ends = safetensors_head({name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()})
    with open(path, "wb") as file:
        file.write(head)
        file.truncate(len(head) + max(ends.values()))


def empty_prompt(directory: Path, weights: Path, scratch: Path | None = None) -> Path:
    """The embedding of an empty text by `text_encoder/` and `tokenizer/` of a diffusers directory, not padded.

    weights: the encoder's file, or an index of shards. Nothing is downloaded, and nothing that the files lack is made
    up. Raises CheckpointError when transformers is missing, and for files that do not fit each other.
    """
    if not (tokenizer := directory / "tokenizer").is_dir():
        raise CheckpointError(f"{tokenizer} is not there: the text encoder needs it. Or give --prompt FILE")
    files = [directory / "text_encoder" / "config.json", *parts(weights)]
    files += sorted(path for path in tokenizer.iterdir() if path.is_file())
    for path in files:
        require_readable(path)

    def compute() -> Mapping[str, Tensor]:
        return {"empty_prompt": _embedding(directory, weights)}

    if scratch is not None:
        target = scratch / "empty_prompt.safetensors"
        save_file(dict(compute()), target)
        return target
    digests_of_files = [f"{path.parent.name}/{path.name} {digests.sha256(path)}" for path in files]
    return _cached("prompt", hashlib.sha256("\n".join(digests_of_files).encode()).hexdigest(), compute)


def _embedding(directory: Path, weights: Path) -> Tensor:
    """(1, tokens, features) float32."""
    try:
        from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
    except ImportError:
        raise CheckpointError(
            f"the empty prompt's embedding must be computed with {directory / 'text_encoder'}, which needs "
            f"transformers: {install_hint('text-encoder')}, or give --prompt FILE"
        ) from None
    try:
        tokenizer = CLIPTokenizer.from_pretrained(str(directory / "tokenizer"), local_files_only=True)
        config = CLIPTextConfig.from_pretrained(str(directory / "text_encoder"), local_files_only=True)
        encoder = CLIPTextModel(config)
    except Exception as error:  # of files and configurations: one message for all
        raise CheckpointError(f"{directory}: the text encoder cannot be made: {error}") from error
    entries = read_entries(weights)

    def stored(key: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
        """transformers 5 dropped the first part of the names that it writes into files."""
        plain = key.removeprefix(_TEXT_MODEL)
        return (plain if plain in entries else _TEXT_MODEL + plain), shape

    load_weights(encoder, weights, stored=stored, computed=("position_ids",))
    tokens = tokenizer("", padding="do_not_pad", return_tensors="pt").input_ids
    if tokens.tolist() != [[tokenizer.bos_token_id, tokenizer.eos_token_id]] or int(tokens.max()) >= config.vocab_size:
        raise CheckpointError(
            f"{directory / 'tokenizer'} makes the tokens {tokens.tolist()} of an empty text, which should be a "
            f"beginning and an end below {config.vocab_size}: it is not this text encoder's"
        )
    with torch.no_grad():
        embedding: Tensor = encoder.eval()(tokens)[0].contiguous()
    return embedding


def _cached(kind: str, digest: str, make: Callable[[], Mapping[str, Tensor]]) -> Path:
    """The file of this digest; made when it is not there, whole or not at all."""
    path = cache_directory() / kind / f"{digest}.safetensors"
    if not path.is_file():
        tensors = dict(make())
        with atomic_write(path) as partial:
            save_file(tensors, partial)
    return path
