"""Denoisers larger than memory: blocks lie in a file and take up memory only while they run or are rewritten.

The blocks' modules stay on the meta device. `BlockFile.attach` makes each block fill itself before it runs and empty
itself after, so the plain forward is what runs; `write_rewritten` folds and casts them one by one into a new file.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from densegeo.models import rewrites
from densegeo.models.casting import cast_module
from densegeo.models.checkpoint import LoraUpdate, Stored, as_is, read_lora
from densegeo.models.denoiser import AnyDenoiser
from densegeo.models.rewrites import Pipeline, Rewrite
from densegeo.models.weight_file import opened
from densegeo.precision import PRECISIONS

_NAMES: dict[torch.dtype, str] = {getattr(torch, row.torch): row.safetensors for row in PRECISIONS.values()}
Progress = Callable[[int], object]


class BlockFile:
    """A file of weights that modules on the meta device are filled from, LoRA merged in float32."""

    def __init__(
        self, path: Path, lora: Path | None = None, module: nn.Module | None = None, stored: Stored = as_is
    ) -> None:
        """module: the whole model, whose linears the LoRA names. Raises CheckpointError."""
        self._path, self._stored = path, stored
        self._updates: dict[str, LoraUpdate] = read_lora(lora, module) if lora and module is not None else {}
        self._read: set[str] = set()  # tensors that were looked through

    def fill(self, module: nn.Module, prefix: str, keys: Iterable[str] | None = None) -> None:
        """Give the module's tensors (or those named) their values, in the dtype that they have there."""
        target = module.state_dict()
        state = {}
        with opened(self._path) as file:
            for key in target if keys is None else keys:
                name = f"{prefix}.{key}" if prefix else key
                stored_name, _ = self._stored(name, tuple(target[key].shape))
                tensor = file.tensor(stored_name) if name in self._read else file.finite(stored_name)
                tensor = tensor.float().reshape(target[key].shape)
                self._read.add(name)
                if name in self._updates:
                    tensor = self._updates[name].merge(tensor)
                state[key] = tensor.to(target[key].dtype)
        module.load_state_dict(state, assign=True, strict=keys is None)
        module.requires_grad_(False)

    def fill_outside(self, denoiser: AnyDenoiser) -> None:
        """Give what lies outside the blocks its values."""
        self.fill(denoiser, "", [key for key in denoiser.state_dict() if not denoiser.is_block(key)])

    def attach(self, denoiser: AnyDenoiser) -> None:
        """From now on each block fills itself before it runs, and is emptied after. Copies of the model do so too."""
        for name, block in denoiser.blocks():
            # Plain functions, which a deep copy keeps, and which get the copy as their argument.
            block.register_forward_pre_hook(lambda module, _, name=name: self.fill(module, name))
            block.register_forward_hook(lambda module, *_: empty(module))


def empty(module: nn.Module) -> None:
    """Move a module's tensors back to the meta device, in place: their memory is free."""
    module.to(device="meta")


def write_rewritten(
    pipeline: Pipeline,
    source: BlockFile,
    final: AnyDenoiser,
    applied: tuple[Rewrite, ...],
    precision: str,
    path: Path,
    quantize: Callable[[nn.Module, str], object] = lambda block, name: None,
    progress: Progress = lambda count: None,
) -> None:
    """Rewrite and cast the denoiser of `pipeline` block by block into the safetensors file `path`.

    pipeline: bound, not rewritten, blocks empty, and filled from `source`. final: the rewritten, quantized and cast
    denoiser on the meta device, which tells what is stored. quantize: gets each rewritten block in float32 and its
    name, at last what is outside the blocks and "", and may replace linears. `progress` gets the elements of each
    tensor written.
    """
    shapes = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in final.state_dict().items()}
    with SafetensorsWriter(path, shapes) as writer:
        for name, part in rewritten_parts(pipeline, source, applied):
            quantize(part, name)
            cast_module(part, precision)
            for key, tensor in part.state_dict().items():
                writer.write(f"{name}.{key}" if name else key, tensor)
                progress(tensor.numel())


# Why streamed rewriting has three passes. Rewrites are written for a whole pipeline, and at full size a whole float32
# pipeline does not fit into memory. It need not: a block's rewrite reads the block itself and what lies outside the
# blocks (the connector's text, the modulation vectors of timestep and prompt), and never another block. `Rewrite.scope`
# says for each row what it touches, and the passes follow from that:
# 1. What lies outside and is read by the blocks is rewritten first, on a "shell": the denoiser without its blocks.
# 2. Each block alone is put into a copy of the shell and rewritten there as if it were the whole denoiser; then it is
#    written and dropped. The copy is made anew each time because rewrites of the whole denoiser also consume what they
#    find outside: `modulation` removes the time embedding that the next block still needs.
# 3. Those same rewrites are then applied to the shell, once, and what lies outside the blocks is written at last.
# Nothing is cast before it is rewritten, so that the file holds what rewriting and casting the whole in memory gives.
def rewritten_parts(
    pipeline: Pipeline, source: BlockFile, applied: tuple[Rewrite, ...]
) -> Iterator[tuple[str, nn.Module]]:
    """Each block of `pipeline`'s denoiser, filled and rewritten in float32, with its name; then the rest, named "".

    pipeline: as in `write_rewritten`. What is given is the caller's to change.
    """
    kinds, outer = pipeline.denoiser.BLOCKS, _without_blocks(pipeline.denoiser)
    shell = dataclasses.replace(pipeline, denoiser=outer)
    denoiser_rewrites = [rewrite for rewrite in applied if rewrite.scope.stage == "denoiser"]
    if not kinds:
        rewrites.apply(shell, denoiser_rewrites)
        yield "", copy.deepcopy(outer)
        return
    rewrites.apply(shell, [rewrite for rewrite in denoiser_rewrites if rewrite.scope.before_blocks])
    counts = {kind: len(getattr(pipeline.denoiser, kind)) for kind in kinds}
    for name, block in pipeline.denoiser.blocks():
        kind, index = name.split(".")
        block_rewrites = [
            rewrite for rewrite in denoiser_rewrites if rewrite.scope.touches(kind, int(index), counts[kind])
        ]
        holder = _without_blocks(outer)
        copied = copy.deepcopy(block)
        copied._forward_pre_hooks.clear()
        copied._forward_hooks.clear()
        source.fill(copied, name)
        setattr(holder, kind, nn.ModuleList([copied]))
        rewrites.apply(dataclasses.replace(pipeline, denoiser=holder), block_rewrites)
        yield name, getattr(holder, kind)[0]
        del copied, holder
    rewrites.apply(shell, [rewrite for rewrite in denoiser_rewrites if rewrite.scope.part == "denoiser"])
    yield "", copy.deepcopy(outer)  # changes must not reach the tensors that it shares


def _without_blocks(denoiser: AnyDenoiser) -> AnyDenoiser:
    """A copy that shares all tensors but has no blocks; rewriting it leaves the original as it is."""
    block_lists = {kind: getattr(denoiser, kind) for kind in denoiser.BLOCKS}
    memo: dict[int, Any] = {id(blocks): nn.ModuleList() for blocks in block_lists.values()}
    tensors = (*denoiser.parameters(), *denoiser.buffers())
    memo |= {id(tensor): tensor for tensor in tensors}
    return copy.deepcopy(denoiser, memo)


def safetensors_head(tensors: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> tuple[bytes, dict[str, int]]:
    """What stands before a safetensors file's data, and where each tensor ends in the data, one after the other."""
    header: dict[str, object] = {}
    ends: dict[str, int] = {}
    end = 0
    for name, (shape, dtype) in tensors.items():
        begin, end = end, end + dtype.itemsize * int(torch.Size(shape).numel())
        header[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [begin, end]}
        ends[name] = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # data begin aligned, as the format asks
    return len(encoded).to_bytes(8, "little") + encoded, ends


class SafetensorsWriter:
    """Writes a safetensors file tensor by tensor, in any order; names, shapes and dtypes are known beforehand."""

    def __init__(self, path: Path, tensors: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
        self._path, self._missing = path, set(tensors)
        self._head, ends = safetensors_head(tensors)
        begins = dict(zip(tensors, (0, *ends.values()), strict=False))
        self._offsets = {name: (begins[name], shape, dtype) for name, (shape, dtype) in tensors.items()}
        self._start, self._end = len(self._head), max(ends.values(), default=0)

    def __enter__(self) -> SafetensorsWriter:
        self._file: BinaryIO = open(self._path, "wb")
        self._file.write(self._head)
        self._file.truncate(self._start + self._end)
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._file.close()
        if kind is None and self._missing:
            raise ValueError(f"{self._path} lacks {len(self._missing)} tensors: {sorted(self._missing)[:5]}")

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor; its shape and dtype must be those announced."""
        begin, shape, dtype = self._offsets[name]
        if (tuple(tensor.shape), tensor.dtype) != (shape, dtype) or name not in self._missing:
            raise ValueError(f"{name}: {tensor.dtype} {tuple(tensor.shape)} is not {dtype} {shape}, or comes twice")
        self._file.seek(self._start + begin)
        self._file.write(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        self._missing.remove(name)
