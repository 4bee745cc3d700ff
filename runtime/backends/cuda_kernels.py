"""Launches the bundle's compiled kernels without torch or Triton, as their contracts say."""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from densegeo.errors import BackendError, DigestError
from densegeo.kernels.contract import LaunchContract, programs
from densegeo.runtime.bundle import KERNELS

LIMIT = 1 << 31
_SCALARS = {"i32": ctypes.c_int32, "fp32": ctypes.c_float}


def pack(contract: LaunchContract, values: Mapping[str, float]) -> list[Any]:
    """Values by argument name -> what `cuda.core.launch` takes, in order: C scalars, and pointers as addresses.

    Raises BackendError for a missing or unknown name, for an address or stride that breaks the alignment the kernel was
    compiled with, and for an integer of more than 32 bits.
    """
    names = [argument.name for argument in contract.arguments]
    if set(names) != set(values):
        wrong = sorted(set(names) ^ set(values))
        raise BackendError(f"{contract.name} takes {', '.join(names)}; wrong: {', '.join(wrong)}")
    packed: list[Any] = []
    for argument in contract.arguments:
        value = values[argument.name]
        if argument.alignment and int(value) % argument.alignment:
            raise BackendError(f"{contract.name}: {argument.name} must be a multiple of {argument.alignment}")
        if argument.type == "i32" and not -LIMIT <= value < LIMIT:  # ctypes would take its lower 32 bits
            raise BackendError(f"{contract.name}: {argument.name} is {value}, and has 32 bits: use a smaller batch")
        pointer = argument.type.startswith("*")
        packed.append(int(value) if pointer else _SCALARS[argument.type](value))  # type: ignore[arg-type]
    return packed + [0] * len(contract.hidden)


class Kernels:
    """The binaries of one bundle for one architecture, loaded when first launched."""

    def __init__(self, directory: Path, contracts: list[LaunchContract], architecture: int) -> None:
        """Raises BackendError when the bundle has none for this architecture."""
        self._contracts = {c.name: c for c in contracts if c.architecture == architecture}
        self._directory, self._loaded = directory / KERNELS, dict[str, Any]()
        if not self._contracts:
            raise BackendError(
                f"{directory} has no kernels for sm_{architecture}: `densegeo engines {directory} --gpu-arch "
                f"{architecture}` makes them"
            )

    def launch(self, name: str, stream: Any, arguments: NamedTuple, batch: int = 1) -> None:
        """Launch one kernel with its `Arguments`; batch: pictures in the tensors, where no argument says so.

        Raises BackendError for a kernel the bundle lacks and for arguments that do not fit its contract.
        """
        from cuda.core import LaunchConfig, launch

        contract = self._contracts.get(name)
        if contract is None:
            raise BackendError(f"the bundle lacks the kernel {name}: rebuild it with this version of densegeo")
        values = arguments._asdict()
        grid = programs(contract.grid, **{"batch": batch, **values})
        config = LaunchConfig(grid=grid, block=32 * contract.warps, shmem_size=contract.shared)
        launch(stream, config, self._kernel(contract), *pack(contract, values))

    def close(self) -> None:
        """Unload the binaries."""
        self._loaded.clear()

    def _kernel(self, contract: LaunchContract) -> Any:
        if contract.name not in self._loaded:
            from cuda.core import ObjectCode

            path = self._directory / contract.file
            data = path.read_bytes()
            if hashlib.sha256(data).hexdigest() != contract.digest:
                raise DigestError(f"{path} is not what its contract says: copy the bundle again or rebuild it")
            code = ObjectCode.from_cubin(data)
            self._loaded[contract.name] = (code, code.get_kernel(contract.symbol))
        return self._loaded[contract.name][1]
