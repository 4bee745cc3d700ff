"""Ahead-of-time compilation, in processes of its own: Triton here may be in interpreter mode."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from densegeo.errors import KernelError
from densegeo.kernels.compile import Resources, check_resources
from densegeo.kernels.contract import Axis, LaunchContract, programs
from densegeo.kernels.table import operations
from tests.support.interpreter import INTERPRET, installed

pytestmark = [
    pytest.mark.skipif(not installed() or sys.platform != "linux", reason="needs torch and triton on Linux"),
    pytest.mark.integration,
]


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name != INTERPRET}
    return subprocess.run(
        [sys.executable, *arguments], env=inherited | environment, capture_output=True, text=True, check=False
    )


def compile_into(folder: Path, *architectures: str, **environment: str) -> list[LaunchContract]:
    chosen = ["--architectures", *architectures] if architectures else []
    done = run("-m", "densegeo.kernels.compile", "--output", str(folder), *chosen, **environment)
    assert done.returncode == 0, done.stderr
    assert "no spills" in done.stdout
    return msgspec.json.decode((folder / "contracts.json").read_bytes(), type=list[LaunchContract])


@pytest.mark.parametrize(
    "architecture", [pytest.param(75, marks=pytest.mark.slow), pytest.param(90, marks=pytest.mark.thorough)]
)
def test_every_kernel(architecture: int, tmp_path: Path) -> None:
    contracts = compile_into(tmp_path, str(architecture))
    names = [contract.name for contract in contracts]
    assert len(set(names)) == len(names)
    assert {contract.architecture for contract in contracts} == {architecture}
    assert {name.partition(".")[0] for name in names} == set(operations()) - {"sampling"}
    assert any("fp8" in name for name in names) == (architecture >= 89)
    for contract in contracts:
        cubin = (tmp_path / f"{contract.name}.sm_{contract.architecture}.cubin").read_bytes()
        assert contract.digest == hashlib.sha256(cubin).hexdigest()
        assert contract.symbol.encode() in cubin
        arguments = {argument.name: argument for argument in contract.arguments}
        assert {axis.extent for axis in contract.grid} <= {*arguments, "batch"}
        assert all(argument.type[0] in "*i" for argument in contract.arguments if argument.alignment)
        assert contract.hidden == ["global_scratch", "profile_scratch"]
        assert contract.fp_fusion == contract.name.startswith("attention.")


@pytest.mark.thorough
def test_fp8_attention_multiplies_fp8() -> None:
    """Both products of a head: on Ada and Blackwell's RTX as one instruction, on Hopper as another."""
    code = r"""
import re
from densegeo.kernels.compile import compile_kernel
from densegeo.kernels.table import variants
variant = next(row for row in variants() if row.name == "attention.bias128_fp8e4nv_bf16")
for architecture in (89, 90, 120):
    print(architecture, *set(re.findall(r"mma\S*m\d+n\d+k\d+\S*", compile_kernel(variant, architecture).ptx)))
"""
    done = run("-c", code)
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        architecture, *products = line.split()
        assert products, architecture
        assert all(".e4m3.e4m3" in product for product in products), line


@pytest.mark.thorough
def test_an_image_of_another_size_compiles_nothing() -> None:
    """What Triton would compile a kernel for (its key for the launch) is the same for every image of a bucket."""
    code = """
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.jit import create_function_from_signature
from densegeo.colors import COLORS
from densegeo.kernels.normals import kernel as normals
from densegeo.kernels.preprocess import kernel as preprocess
from densegeo.kernels.resize_depth import Metres
from densegeo.kernels.resize_depth import kernel as resize_depth

keys = {}

def watch(kernel):
    bind = create_function_from_signature(kernel.signature, kernel.params, make_backend(GPUTarget("cuda", 90, 32)))
    noted = keys.setdefault(kernel.fn.__name__, set())
    kernel.run = lambda *given, grid, warmup, **named: noted.add(str(bind(*given, **named)[1]))

around = (preprocess.preprocess_kernel, preprocess.preprocess_ycbcr_kernel, resize_depth.resize_depth_kernel)
for kernel in (*around, normals.normals_kernel):
    watch(kernel)
decoded = torch.zeros(2, 3, 48, 64)
images = (640, 480, 0, (0, 0, 64, 48)), (641, 479, 3, (1, 0, 63, 48)), (16, 1, 16, (0, 16, 1, 32))
for width, height, offset, box in images:
    frame = torch.zeros(offset + 3 * width * height, dtype=torch.uint8)[offset:].view(height, width, 3)
    preprocess.preprocess(frame, (64, 48), box, COLORS["bgr" if offset else "rgb"], torch.float32)
    camera = torch.zeros(offset + 2 * height * (width + 1), dtype=torch.uint8)[offset:].view(height, width + 1, 2)
    even, uyvy = camera[:, : width // 2 * 2], COLORS["uyvy-full" if offset else "yuyv"]
    preprocess.preprocess(even, (64, 48), box, uyvy, torch.float32)
    resize_depth.resize_depth(decoded, box, (width, height), "before_mean", Metres("affine", 1.0, 1.0))
    normals.normals(decoded, box, (width, height), ((1, 0, 0), (0, 1, 0), (0, 0, 1)))
print({name: len(noted) for name, noted in keys.items()})
"""
    done = run("-c", code)
    kernels = ("preprocess_kernel", "preprocess_ycbcr_kernel", "resize_depth_kernel", "normals_kernel")
    assert done.stdout.strip() == str(dict.fromkeys(kernels, 1)), done.stderr


@pytest.mark.thorough
def test_a_spill_is_an_error() -> None:
    code = """
from dataclasses import replace
from densegeo.errors import KernelError
from densegeo.kernels.compile import compile_kernel
from densegeo.kernels.table import variants
variant = next(row for row in variants() if row.name == "preprocess.u8_fp32")
try:
    compile_kernel(replace(variant, constants={"BLOCK_X": 128, "BLOCK_Y": 16}, warps=1), 80)
except KernelError as error:
    print(error)
"""
    done = run("-c", code)
    assert "preprocess.u8_fp32 for sm_80 spills registers" in done.stdout, done.stderr


def test_too_much_shared_memory_is_an_error() -> None:
    check_resources("toy", Resources(registers=32, stack=0, local=0, shared=64 * 1024), 75)
    with pytest.raises(KernelError, match="toy needs 65537 bytes of shared memory; a block has at most 65536"):
        check_resources("toy", Resources(registers=32, stack=0, local=0, shared=64 * 1024 + 1), 75)


def test_the_interpreter_cannot_compile() -> None:
    done = run("-m", "densegeo.kernels.compile", **{INTERPRET: "1"})
    assert done.returncode == 1
    assert "unset TRITON_INTERPRET" in done.stderr


def test_grid_rule() -> None:
    axes = (Axis("columns", 32), Axis("rows"), Axis("batch", times=2))
    assert programs(axes, columns=33, rows=7, batch=3) == (2, 7, 6)


@pytest.mark.slow
def test_every_kernel_for_every_architecture_twice(tmp_path: Path) -> None:
    """From an empty cache each time: the binaries' digests depend on nothing but the sources and Triton."""
    first, second = (
        compile_into(tmp_path / name, TRITON_CACHE_DIR=str(tmp_path / f"{name}-cache")) for name in ("first", "second")
    )
    assert first == second
    supported = {contract.architecture for contract in first}
    assert supported == {75, 80, 86, 87, 89, 90, 100, 110, 120, 121}
    bf16 = {contract.architecture for contract in first if "bf16" in contract.name}
    assert bf16 == supported - {75}
    fp8 = {contract.architecture for contract in first if "fp8" in contract.name}
    assert fp8 == supported - {75, 80, 86, 87}
