"""The prompt embedding a model runs with: one constant. FE2E's authors cache theirs as `no_info.npz`; FiffDepth's is
the text encoder's output for an empty text.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from densegeo.errors import CheckpointError


@dataclass(frozen=True)
class Prompt:
    """embeds: float32 (T, prompt features); mask: bool (T,), true for valid tokens."""

    embeds: NDArray[np.float32]
    mask: NDArray[np.bool_]

    def __post_init__(self) -> None:
        if self.embeds.ndim != 2 or self.mask.shape != self.embeds.shape[:1]:
            raise CheckpointError(
                f"the prompt's shapes do not fit: embeds {self.embeds.shape}, masks {self.mask.shape}; "
                "expected (tokens, features) and (tokens,)"
            )
        if not self.mask.any():
            raise CheckpointError("the prompt's mask has no valid token: its masked mean is undefined")
        if not np.isfinite(self.embeds).all():
            raise CheckpointError("the prompt embedding has NaN or infinite values")

    @property
    def valid(self) -> int:
        return int(self.mask.sum())

    def merge_padding(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Rows to keep and how many rows each stands for (DESIGN 4.4).

        Masked rows that hold equal embeddings stay equal through connector and transformer: the first of each group
        is kept. Valid rows are all kept. Order is preserved.
        """
        first: dict[bytes, int] = {}
        counts: dict[int, int] = {}
        for row, valid in enumerate(self.mask):
            key = b"" if valid else (self.embeds[row] + 0.0).tobytes()  # + 0.0: -0 equals 0
            representative = row if valid else first.setdefault(key, row)
            counts[representative] = counts.get(representative, 0) + 1
        rows = np.array(sorted(counts), dtype=np.int64)
        return rows, np.array([counts[row] for row in rows], dtype=np.int64)


def load_prompt(path: Path) -> Prompt:
    """Read a prompt from `.npz` or `.safetensors` with `embeds` (1, T, C) or (T, C) and `masks` (1, T) or (T,).

    One tensor alone, `empty_prompt` (1, T, C), is a prompt whose tokens are all valid.

    Raises CheckpointError when the file is missing, of another format, or lacks a tensor.
    """
    if not path.is_file():
        raise CheckpointError(f"the prompt embedding {path} does not exist")
    tensors: dict[str, NDArray[np.generic]]
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as archive:
                tensors = {name: archive[name] for name in archive.files}
        elif path.suffix == ".safetensors":
            import torch
            from safetensors.torch import load_file

            tensors = {name: tensor.to(torch.float32).numpy() for name, tensor in load_file(path).items()}
        else:
            raise CheckpointError(f"the prompt {path} must be an .npz or .safetensors file")
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"cannot read the prompt {path}: {error}") from error
    if set(tensors) == {"empty_prompt"}:
        alone = tensors["empty_prompt"]
        tensors = {"embeds": alone, "masks": np.ones(alone.shape[:-1])}
    missing = {"embeds", "masks"} - set(tensors)
    if missing:
        raise CheckpointError(f"the prompt {path} lacks {sorted(missing)}; it has {sorted(tensors)}")
    embeds, mask = (tensors[name] for name in ("embeds", "masks"))
    if embeds.ndim == 3 and embeds.shape[0] == 1:
        embeds = embeds[0]
    if mask.ndim == 2 and mask.shape[0] == 1:
        mask = mask[0]
    return Prompt(np.ascontiguousarray(embeds, dtype=np.float32), mask != 0)


def write_prompt(prompt: Prompt, path: Path) -> None:
    """Write a prompt to a `.safetensors` file that `load_prompt` reads."""
    from safetensors.numpy import save_file

    save_file({"embeds": prompt.embeds, "masks": prompt.mask.astype(np.uint8)}, path)
