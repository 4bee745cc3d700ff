"""Ahead-of-time compilation of every kernel's rows, on machines without a GPU.

`python -m densegeo.kernels.compile` (or `make kernels`) compiles for all architectures, reads what the binaries use,
prints a table, and fails when one spills registers or needs more shared memory than its architecture has.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import msgspec

from densegeo.architectures import ARCHITECTURES
from densegeo.errors import KernelError
from densegeo.extras import install_hint
from densegeo.kernels.contract import Argument, LaunchContract
from densegeo.kernels.table import Variant, variants

ALIGNMENT = 16  # of what a row calls aligned: bytes of a pointer, the number itself of an integer
HIDDEN = ("global_scratch", "profile_scratch")  # pointers Triton appends to every kernel's arguments
CONTRACTS = "contracts.json"


@dataclass(frozen=True)
class Resources:
    """What one binary uses: registers of a thread, bytes of stack and local memory of a thread, shared of a block.

    shared: from sm_90 on with the 1 KiB that the system takes.
    """

    registers: int
    stack: int
    local: int
    shared: int


@dataclass(frozen=True)
class Compiled:
    contract: LaunchContract
    resources: Resources
    cubin: bytes
    ptx: str


def compile_kernels(rows: Iterable[Variant], architectures: Sequence[int]) -> list[Compiled]:
    """Every row for every architecture that supports it, in the rows' order; raises KernelError as `compile_kernel`."""
    return [
        compile_kernel(row, architecture)
        for row in rows
        for architecture in architectures
        if row.unsupported(architecture) is None
    ]


def compile_kernel(variant: Variant, architecture: int) -> Compiled:
    """One binary.

    Raises KernelError when Triton is missing or in interpreter mode, when the kernel does not compile, spills, exceeds
    the architecture's shared memory, or has hidden arguments this runtime does not know.
    """
    _require_compiler()
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    label = f"{variant.name} for sm_{architecture}"
    types = variant.types
    source = ASTSource(
        fn=variant.kernel,
        signature=types | dict.fromkeys(variant.constants, "constexpr"),
        constexprs=dict(variant.constants),
        attrs={(list(types).index(name),): [["tt.divisibility", ALIGNMENT]] for name in variant.aligned},
    )
    options = {"num_warps": variant.warps, "enable_fp_fusion": variant.fp_fusion}
    try:
        binary = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    except Exception as error:  # Triton raises many kinds, none of them its own
        raise KernelError(f"Triton {triton.__version__} cannot compile {label}: {error}") from error
    cubin: bytes = binary.asm["cubin"]
    _check_hidden(label, binary.asm["ptx"], len(types))
    for scratch in HIDDEN:
        if getattr(binary.metadata, f"{scratch}_size", 0):
            raise KernelError(f"{label} needs a {scratch} buffer, which the runtime does not allocate.")
    used = read_resources(cubin)
    resources = Resources(used.registers, used.stack, used.local, used.shared + binary.metadata.shared)
    check_resources(label, resources, architecture)
    contract = LaunchContract(
        name=variant.name,
        symbol=binary.metadata.name,
        architecture=architecture,
        arguments=arguments_of(variant),
        constants=dict(variant.constants),
        warps=variant.warps,
        shared=binary.metadata.shared,
        grid=list(variant.grid),
        hidden=list(HIDDEN),
        fp_fusion=variant.fp_fusion,
        triton=triton.__version__,
        digest=hashlib.sha256(cubin).hexdigest(),
    )
    return Compiled(contract, resources, cubin, binary.asm["ptx"])


def arguments_of(variant: Variant) -> list[Argument]:
    """A row's launch arguments, as its contract has them."""
    return [Argument(name, kind, ALIGNMENT if name in variant.aligned else 0) for name, kind in variant.types.items()]


def check_resources(label: str, resources: Resources, architecture: int) -> None:
    """Raises KernelError on spilled registers and on more shared memory than a block of the architecture may have."""
    if resources.stack or resources.local:
        raise KernelError(
            f"{label} spills registers: {resources.stack} bytes of stack and {resources.local} of local memory a "
            "thread. Use smaller blocks or more warps."
        )
    limit = ARCHITECTURES[architecture].shared_kib * 1024
    if resources.shared > limit:
        raise KernelError(f"{label} needs {resources.shared} bytes of shared memory; a block has at most {limit}.")


def read_resources(cubin: bytes) -> Resources:
    """What `cuobjdump`, from the installed Triton, says about a binary with one kernel; shared is the static part."""
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    if not tool.is_file():
        raise KernelError(f"The installed Triton has no cuobjdump at {tool}; install a Linux wheel of it.")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        process = subprocess.run(
            [str(tool), "--dump-resource-usage", str(file)], capture_output=True, text=True, check=False
        )
    resources = dict(re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", process.stdout))
    if process.returncode or len(resources) != 4:
        raise KernelError(f"cuobjdump cannot read a compiled kernel: {(process.stderr or process.stdout).strip()}")
    return Resources(int(resources["REG"]), int(resources["STACK"]), int(resources["LOCAL"]), int(resources["SHARED"]))


def resource_table(compiled: Sequence[Compiled], architectures: Sequence[int]) -> str:
    """Registers a thread / bytes of shared memory a block, one row a variant; "-" where a type does not exist."""
    cells = {
        (kernel.contract.name, kernel.contract.architecture): f"{kernel.resources.registers}/{kernel.resources.shared}"
        for kernel in compiled
    }
    names = list(dict.fromkeys(kernel.contract.name for kernel in compiled))
    wide = max(len(name) for name in names)
    lines = [f"{'registers/shared bytes':{wide}}" + "".join(f"{f'sm_{a}':>9}" for a in architectures)]
    lines += [f"{name:{wide}}" + "".join(f"{cells.get((name, a), '-'):>9}" for a in architectures) for name in names]
    return "\n".join(lines)


def main() -> int:
    """The command: compiles, optionally writes NAME.sm_N.cubin files and contracts.json, prints the table."""
    parser = argparse.ArgumentParser(prog="python -m densegeo.kernels.compile", description=main.__doc__)
    parser.add_argument("--architectures", type=int, nargs="+", help="for example 80 90; default: all")
    parser.add_argument("--bundled", action="store_true", help="only what a runtime without torch launches")
    parser.add_argument("--names", nargs="+", help="for example split.fp32_fp32 normals.fp32; default: all")
    parser.add_argument("--output", type=Path, help="write binaries and contracts into this folder")
    options = parser.parse_args()
    try:
        _require_compiler(torch=not options.bundled)
        architectures = options.architectures or list(ARCHITECTURES)
        unknown = sorted(set(architectures) - set(ARCHITECTURES))
        if unknown:
            raise KernelError(f"Unknown architectures {unknown}; choose from {', '.join(map(str, ARCHITECTURES))}.")
        rows = _chosen(options.names, variants(bundled=options.bundled))
        compiled = compile_kernels(rows, architectures)
        if options.output:
            _write(compiled, options.output)
    except KernelError as error:
        print(error, file=sys.stderr)
        return 1
    print(resource_table(compiled, architectures))
    for architecture in architectures:
        for reason in sorted({row.unsupported(architecture) or "" for row in rows} - {""}):
            print(f"sm_{architecture}: - is {reason}")
    fused = sum(kernel.contract.fp_fusion for kernel in compiled)
    print(f"{len(compiled)} binaries, no spills, {fused} with fused multiply-add")
    return 0


def _chosen(names: Sequence[str] | None, rows: Sequence[Variant]) -> Sequence[Variant]:
    """The rows of these names, or all; raises KernelError for a name that none has."""
    existing = [row.name for row in rows]
    if unknown := sorted(set(names or ()) - set(existing)):
        raise KernelError(f"Unknown kernels {', '.join(unknown)}; choose from {', '.join(existing)}.")
    return [row for row in rows if not names or row.name in names]


def _write(compiled: Iterable[Compiled], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    contracts = []
    for kernel in compiled:
        (folder / kernel.contract.file).write_bytes(kernel.cubin)
        contracts.append(kernel.contract)
    (folder / CONTRACTS).write_bytes(msgspec.json.format(msgspec.json.encode(contracts)))


def _check_hidden(label: str, ptx: str, arguments: int) -> None:
    entry = re.search(r"\.entry\s+\w+\s*\((.*?)\)", ptx, re.DOTALL)
    count = entry.group(1).count(".param") if entry else 0
    if count != arguments + len(HIDDEN):
        raise KernelError(f"{label} takes {count} parameters, not its {arguments} and {', '.join(HIDDEN)}.")


def _require_compiler(*, torch: bool = False) -> None:
    """torch: whether kernels are wanted whose modules need it, as those of the torch backend do."""
    if os.environ.get("TRITON_INTERPRET", "0") not in ("0", ""):
        raise KernelError("Kernels cannot be compiled in Triton's interpreter mode: unset TRITON_INTERPRET.")
    # Before Triton is imported: no source paths in the binaries, so that a checkout's folder does not change digests.
    os.environ["TRITON_DISABLE_LINE_INFO"] = "1"
    try:
        import_module("triton")
        if torch:
            import_module("torch")
    except ImportError as error:
        extras = ("kernels", "export") if torch else ("kernels",)
        raise KernelError(f"{error.name} is not installed: {install_hint(*extras)}.") from error


if __name__ == "__main__":
    sys.exit(main())
