"""What a kernel's own folder is enough for: it is found, dispatched, launched and compiled, and listed nowhere else."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import densegeo.kernels
from densegeo.errors import KernelError
from densegeo.kernels import dispatch, table
from densegeo.kernels.contract import Axis

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

PUBLIC = '''
from densegeo.kernels.dispatch import implementation


def toy_scale(x, factor):
    """x (N,) float32 -> factor * x."""
    return implementation(__name__, x).toy_scale(x, factor)
'''
KERNEL = """
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from densegeo.kernels.contract import Axis, Pointer
from densegeo.kernels.launch import kind_of, launch
from densegeo.kernels.table import Variant


@triton.jit
def toy_scale_kernel(x, result, length, factor, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(result + index, factor * tl.load(x + index, mask=index < length), mask=index < length)


class Arguments(NamedTuple):
    x: Pointer
    result: Pointer
    length: int
    factor: float


def variant(kind, bundled=True):
    pointers, grid = {"x": kind, "result": kind}, (Axis("length", 16),)
    name = f"toy_scale.{kind}"
    return Variant(name, toy_scale_kernel, Arguments, pointers, {"BLOCK": 16}, grid, ("result",), bundled=bundled)


VARIANTS = variant("fp32"), variant("bf16", bundled=False)


def toy_scale(x, factor):
    result = torch.empty_like(x)
    launch(variant(kind_of(x.dtype)), Arguments(x, result, len(x), factor))
    return result
"""
REFERENCE = """
def toy_scale(x, factor):
    return (factor * x.double()).to(x.dtype)
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A new operation in a folder that the package's path has besides; its public module."""
    folder = tmp_path / "toy_scale"
    folder.mkdir()
    for name, text in (("__init__", PUBLIC), ("kernel", KERNEL), ("reference", REFERENCE)):
        (folder / f"{name}.py").write_text(text)
    monkeypatch.setattr(densegeo.kernels, "__path__", [*densegeo.kernels.__path__, str(tmp_path)])
    yield import_module("densegeo.kernels.toy_scale")
    for name in [name for name in sys.modules if name.startswith("densegeo.kernels.toy_scale")]:
        del sys.modules[name]
    del densegeo.kernels.toy_scale  # type: ignore[attr-defined]
    dispatch._load.cache_clear()


@pytest.mark.usefixtures("toy")
def test_a_folder_is_found() -> None:
    assert "toy_scale" in table.operations()
    rows = {row.name: row for row in table.variants()}
    assert rows["toy_scale.fp32"].types == {"x": "*fp32", "result": "*fp32", "length": "i32", "factor": "fp32"}
    assert rows["toy_scale.fp32"].bundled
    assert not rows["toy_scale.bf16"].bundled
    assert rows["toy_scale.bf16"].unsupported(75) == "no bf16 before sm_80"
    assert {row.name for row in table.variants() if row.bundled} >= {"toy_scale.fp32", "normals.fp32"}


@pytest.mark.integration
@pytest.mark.usefixtures("poisoned")
def test_it_is_dispatched_and_launched(device: str, toy: Any) -> None:
    x = torch.arange(37, dtype=torch.float32, device=device)
    kernel = import_module("densegeo.kernels.toy_scale.kernel")
    assert torch.equal(kernel.toy_scale(x, 2.5), 2.5 * x)
    ran = []
    for name in ("kernel", "reference"):
        module = import_module(f"densegeo.kernels.toy_scale.{name}")
        module.toy_scale = lambda x, factor, name=name: ran.append(name)  # type: ignore[attr-defined]
    toy.toy_scale(SimpleNamespace(is_cuda=True), 2.5)
    toy.toy_scale(SimpleNamespace(is_cuda=False), 2.5)
    assert ran == ["kernel", "reference"]


def test_names_of_rows_are_unique() -> None:
    names = [row.name for row in table.variants()]
    assert len(set(names)) == len(names)
    assert {name.partition(".")[0] for name in names} == set(table.operations()) - {"sampling"}


@pytest.mark.usefixtures("toy")
def test_a_row_that_is_not_its_kernels_is_refused() -> None:
    kernel = import_module("densegeo.kernels.toy_scale.kernel")
    pointers = {"x": "fp32", "result": "fp32"}

    def row(
        pointers: dict[str, str], constants: dict[str, int], grid: tuple[Axis, ...] = (Axis("length", 16),)
    ) -> table.Variant:
        return table.Variant("toy", kernel.toy_scale_kernel, kernel.Arguments, pointers, constants, grid, ())

    assert row(pointers, {"BLOCK": 16}).warps == table.WARPS
    with pytest.raises(KernelError, match=r"toy has x, result, length, factor, WIDTH; its kernel takes x, .*, BLOCK"):
        row(pointers, {"WIDTH": 16})
    with pytest.raises(KernelError, match="toy needs the types of x, result"):
        row({"x": "fp32"}, {"BLOCK": 16})
    with pytest.raises(KernelError, match="grid of the row toy needs tokens, which is no argument"):
        row(pointers, {"BLOCK": 16}, (Axis("tokens"),))


def test_arguments_of_another_kernel_are_refused() -> None:
    from densegeo.kernels.launch import launch
    from densegeo.kernels.layer_norm import kernel as layer_norm
    from densegeo.kernels.quantize import kernel as quantize

    given = quantize.Arguments(*[0] * len(quantize.Arguments._fields))
    with pytest.raises(AssertionError):
        launch(layer_norm.VARIANTS[0], given)
