"""Graphs that are the same are traced once a run: tracing takes most of a small build's time.

What `export_graph` writes follows from the modules' classes and attributes, their tables that are not stored, the
weight file and the options. Those together are the key here; a module with anything else (a function, say) is always
traced. Every build still compares its graphs with PyTorch: one that were not the module's could not pass.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn
from torch.onnx._internal.exporter import _registration

from densegeo.export import onnx_graph
from densegeo.runtime.bundle import sha256_file

OF_EVERY_MODULE = set(vars(nn.Module()))


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        return hashlib.sha256(value.detach().contiguous().cpu().numpy().tobytes()).hexdigest() + str(value.dtype)
    return repr(value)


def key(module: nn.Module, example: Tensor, weights: Path, *others: object) -> str | None:
    """Of everything that the graph follows from; None when that cannot be told."""
    lines = [repr((tuple(example.shape), example.dtype, onnx_graph.CHUNK_LOGITS, weights.name, others))]
    for name, part in module.named_modules():
        own = {key: _described(value) for key, value in vars(part).items() if key not in OF_EVERY_MODULE}
        lines.append(f"{name} {type(part).__module__}.{type(part).__qualname__} {own}")
        if any(vars(part)[hooks] for hooks in OF_EVERY_MODULE if hooks.endswith("_hooks")):
            return None
    stored = module.state_dict()  # `weights` holds these; their values may be on no device
    lines += [f"{name} {_described(table)}" for name, table in module.named_buffers() if name not in stored]
    text = "\n".join([*lines, sha256_file(weights)])
    return None if " at 0x" in text else hashlib.sha256(text.encode()).hexdigest()


def remembering(export: Callable[..., None], folder: Path) -> Callable[..., None]:
    """`onnx_graph.export_graph`, which copies a graph that this run traced before."""

    def graph(
        module: nn.Module, example: Tensor, names: tuple[str, str], weights: Path, path: Path, **options: Any
    ) -> None:
        name = key(module, example, weights, names, sorted(options.items()))
        if name is None:
            export(module, example, names, weights, path, **options)
            return
        stored = folder / f"{name}.onnx"
        if stored.exists():
            shutil.copyfile(stored, path)
            return
        export(module, example, names, weights, path, **options)
        partial = folder / f"{name}.{os.getpid()}"
        shutil.copyfile(path, partial)
        partial.replace(stored)

    return graph


def sharing_operators(patch: pytest.MonkeyPatch) -> None:
    """torch reads its table of translations anew for every graph, 1.3 s each: let one process read it once."""
    registry = _registration.ONNXRegistry
    read = functools.cache(registry.from_torchlib)

    def copied(opset_version: int = onnx_graph.OPSET) -> Any:
        own_copy = copy.copy(read(opset_version=opset_version))
        own_copy.functions = {target: list(entries) for target, entries in own_copy.functions.items()}  # ours are added
        return own_copy

    patch.setattr(registry, "from_torchlib", staticmethod(copied))


PROGRAM = """
import sys
from pathlib import Path
import pytest
from densegeo.cli import main
from densegeo.export import graphs
from tests.support.traced_graphs import remembering, sharing_operators
graphs.export_graph = remembering(graphs.export_graph, Path(sys.argv[1]))
sharing_operators(pytest.MonkeyPatch())
main(sys.argv[2:])
"""


def command(folder: Path) -> list[str]:
    """`densegeo` in a process of its own, started in the repository, that shares graphs through this folder."""
    return [sys.executable, "-c", PROGRAM, str(folder)]
