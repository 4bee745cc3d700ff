"""Training pictures: rendered once into chunks on disk, then read as what the autoencoder sees."""

from __future__ import annotations

import itertools
import multiprocessing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import Progress
from torch import Tensor

from densegeo.files import atomic_write
from densegeo.size import Size
from densegeo.training.render import View, view

CHUNK = 250  # views a file


def log_depth(depth: NDArray[np.float32], valid: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Metres (H, W) -> the target in [-1, 1]: ln(depth + 1e-6) between its 2nd and 98th percentile; 1 where invalid.

    FE2E's log quantization (arXiv 2509.04338). The sky is as far as anything gets.
    """
    logarithm = np.log(np.where(valid, depth, 1) + np.float32(1e-6))
    low, high = (float(np.percentile(logarithm[valid], share)) for share in (2, 98))
    scaled = 2 * (logarithm - np.float32(low)) / np.float32(max(high - low, 1e-6)) - 1
    return np.where(valid, np.clip(scaled, -1, 1), np.float32(1)).astype(np.float32)


@dataclass(frozen=True)
class Chunk:
    """Compact pictures of N views: rgb uint8 (N, H, W, 3), depth float16 (N, H, W), normals int8 (N, H, W, 3)."""

    rgb: NDArray[np.uint8]
    depth: NDArray[np.float16]
    normals: NDArray[np.int8]


def compact(rendered: View) -> tuple[NDArray[np.uint8], NDArray[np.float16], NDArray[np.int8]]:
    """A view's three pictures; normals in the network's axes (left, up, back), facing the camera in the sky."""
    normals = np.where(rendered.valid[..., None], -rendered.normals, np.array([0, 0, 1], dtype=np.float32))
    depth = log_depth(rendered.depth, rendered.valid).astype(np.float16)
    return rendered.rgb, depth, np.rint(normals * 127).astype(np.int8)


def pictures(chunk: Chunk, index: NDArray[np.int64]) -> Tensor:
    """Views `index` -> (3, n, 3, H, W) float32 in [-1, 1]: rgb, depth (three equal channels), normals."""
    rgb = torch.from_numpy(chunk.rgb[index]).float().permute(0, 3, 1, 2) / 127.5 - 1
    depth = torch.from_numpy(chunk.depth[index]).float()[:, None].expand(-1, 3, -1, -1)
    normals = torch.from_numpy(chunk.normals[index]).float().permute(0, 3, 1, 2) / 127
    return torch.stack([rgb, depth, normals])


def _render(job: tuple[int, str, int, int, int]) -> tuple[NDArray[np.uint8], NDArray[np.float16], NDArray[np.int8]]:
    return compact(view(*job))


def render_chunks(folder: Path, seed: int, split: str, count: int, size: Size) -> list[Path]:
    """Render views 0..count-1 of a split into chunk files; those already there are kept. Returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    starts = range(0, count, CHUNK)
    files = [
        folder / f"{split}-seed{seed}-{size[0]}x{size[1]}-{start:06d}-{min(CHUNK, count - start)}.npz"
        for start in starts
    ]
    missing = [(file, start) for file, start in zip(files, starts, strict=True) if not file.exists()]
    if not missing:
        return files
    spans = [range(start, min(start + CHUNK, count)) for _, start in missing]
    jobs = ((seed, split, index, *size) for index in itertools.chain.from_iterable(spans))
    with multiprocessing.get_context("spawn").Pool() as pool, Progress() as progress:
        task = progress.add_task("rendering scenes", total=sum(map(len, spans)))
        rendered = pool.imap(_render, jobs, chunksize=5)
        for (file, _), span in zip(missing, spans, strict=True):
            views = []
            for _ in span:
                views.append(next(rendered))
                progress.advance(task)
            rgb, depth, normals = (np.stack(part) for part in zip(*views, strict=True))
            with atomic_write(file) as partial:
                np.savez(partial, rgb=rgb, depth=depth, normals=normals)
    return files


def read_chunks(files: list[Path]) -> Chunk:
    """All of them in memory, as one."""
    parts = [np.load(file) for file in files]
    return Chunk(*(np.concatenate([part[name] for part in parts]) for name in ("rgb", "depth", "normals")))


def batches(count: int, size: int, seed: int, start: int = 0) -> Iterator[NDArray[np.int64]]:
    """Endless shuffled batches of indices below `count`; `start` skips that many batches, so that a run resumes."""
    per_epoch = count // size
    for epoch in itertools.count(start // per_epoch):
        order = np.random.default_rng([seed, epoch]).permutation(count)
        first = start % per_epoch if epoch == start // per_epoch else 0
        for index in range(first, per_epoch):
            yield np.sort(order[index * size : (index + 1) * size])
