"""A bundle's kernels, as the stand-in driver runs them: arguments by the cubin's own layout, then the reference."""

from __future__ import annotations

import ctypes
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from densegeo.colors import COLORS
from densegeo.kernels.contract import Argument, LaunchContract, programs
from densegeo.kernels.normals import normals
from densegeo.kernels.preprocess import preprocess
from densegeo.kernels.resize_depth import resize_depth
from densegeo.kernels.resize_depth.arguments import Metres
from densegeo.kernels.split import split
from densegeo.outputs import SPACES, Clamp
from densegeo.runtime.bundle import KERNELS
from tests.cuda.standin import Driver

SCALARS = {"i32": np.int32, "fp32": np.float32}


class References:
    """Takes the place of the kernels of a bundle's contracts. launches: their names, as they ran."""

    def __init__(self, driver: Driver, bundle: Path, contracts: list[LaunchContract]) -> None:
        self._driver = driver
        self._contracts = {fnv1a((bundle / KERNELS / contract.file).read_bytes()): contract for contract in contracts}
        self.launches: list[str] = []

    def run(self, image: int, launch: tuple[int, ...], arguments: int, layout: list[tuple[int, int]]) -> None:
        contract = self._contracts[image]
        self.launches.append(contract.name)
        values = decode(contract, arguments, layout)
        extents = {axis.extent: values.get(axis.extent, 1) for axis in contract.grid}  # "batch" may be no argument
        grid = programs(contract.grid, **extents)
        assert launch == (*grid, *[1] * (3 - len(grid)), 32 * contract.warps, 1, 1, contract.shared), launch
        operation, _, variant = contract.name.partition(".")
        assert "fp32" in variant.split("_"), f"{contract.name} has no float32 in and out"
        getattr(self, f"_{operation}")(values, contract)

    def _view(self, address: int, shape: Any, dtype: Any = np.float32) -> Any:
        return self._driver.view(address, shape, dtype, what=self.launches[-1])

    def _preprocess(self, v: dict[str, Any], contract: LaunchContract) -> None:
        rows, columns, strides = v["source_height"], v["source_width"], (v["row_stride"], v["pixel_stride"], 1)
        color, channels = "bgr" if v.get("red") else "rgb", 3
        if "chroma" in v:
            color, channels = ycbcr_color(v), strides[1]
            rows = rows * 3 // 2 if color.startswith("nv12") else rows
        raw = self._view(v["frame"], ((rows - 1) * strides[0] + (columns - 1) * strides[1] + channels,), np.uint8)
        frame = np.lib.stride_tricks.as_strided(raw, (rows, columns, channels), strides).copy()
        made = preprocess(
            torch.from_numpy(frame[..., 0] if channels == 1 else frame),
            (v["width"], v["height"]),
            box=(v["left"], v["top"], v["box_width"], v["box_height"]),
            color=color,  # type: ignore[arg-type]
        )
        self._view(v["rgb"], made.shape)[:] = made.numpy()

    def _split(self, v: dict[str, Any], contract: LaunchContract) -> None:
        velocity = self._view(v["velocity"], (v["batch"], 2 * v["rows"] * v["columns"], v["features"]))
        names = ("scale", "shift", "first_factor", "second_factor")
        size = 16 * v["rows"], 16 * v["columns"]
        made = split(torch.from_numpy(velocity), *size, **{name: v[name] for name in names})
        self._view(v["latents"], made.shape)[:] = made.numpy()

    def _decoded(self, v: dict[str, Any]) -> tuple[torch.Tensor, tuple[int, ...], tuple[int, int]]:
        """One picture, the box that is resized, and the size that it gets."""
        plane, columns = v["channel_stride"], v["row_stride"]
        shape = (1, v["batch_stride"] // plane, plane // columns, columns)
        box = tuple(v[name] for name in ("left", "top", "box_width", "box_height"))
        return torch.from_numpy(self._view(v["decoded"], shape)), box, (v["width"], v["height"])

    def _resize_depth(self, v: dict[str, Any], contract: LaunchContract) -> None:
        decoded, box, size = self._decoded(v)
        assert decoded.shape[1] == contract.constants["CHANNELS"]
        clamp: Clamp = "before_mean" if contract.constants["BEFORE_MEAN"] else "after_mean"
        space = (None, *SPACES)[contract.constants["SPACE"]]
        metres = Metres(space, *(v[name] for name in ("scale", "shift", "near", "far"))) if space else None
        made = resize_depth(decoded, box, size, clamp=clamp, metres=metres)  # type: ignore[arg-type]
        self._view(v["resized"], made.shape)[:] = made.numpy()

    def _normals(self, v: dict[str, Any], contract: LaunchContract) -> None:
        decoded, box, size = self._decoded(v)
        matrix = tuple(tuple(v[f"m{row}{column}"] for column in range(3)) for row in range(3))
        made = normals(decoded, box, size, matrix=matrix)  # type: ignore[arg-type]
        self._view(v["normals"], made.shape)[:] = made.numpy()


def ycbcr_color(v: dict[str, Any]) -> str:
    """The one color whose places and conversion a launch was given."""
    places = (v["luma"], v["chroma"], v["rows_shared"])
    (actual,) = (
        row.name
        for row in COLORS.values()
        if row.ycbcr is not None
        and places == (row.ycbcr.luma, row.ycbcr.chroma(v["source_height"], v["row_stride"]), row.ycbcr.rows_shared)
        and all(np.float32(value) == np.float32(v[name]) for name, value in asdict(row.ycbcr.conversion).items())
    )
    return actual


def decode(contract: LaunchContract, arguments: int, layout: list[tuple[int, int]]) -> dict[str, Any]:
    """A launch's values by argument name; sizes must be those of the contract's types, hidden pointers null."""
    hidden = [Argument(name, "*u8") for name in contract.hidden]
    assert len(layout) == len(contract.arguments) + len(hidden), (contract.name, len(layout))
    values = {}
    for argument, (offset, size) in zip([*contract.arguments, *hidden], layout, strict=True):
        dtype = np.dtype(np.uint64 if argument.type.startswith("*") else SCALARS[argument.type])
        assert dtype.itemsize == size, (contract.name, argument, size)
        values[argument.name] = np.frombuffer(ctypes.string_at(arguments + offset, size), dtype)[0].item()
    assert not any(values.pop(argument.name) for argument in hidden), "a hidden pointer is not null"
    return values


def fnv1a(data: bytes) -> int:
    """The 64-bit hash by which the driver names a cubin (driver/modules.c)."""
    value = 0xCBF29CE484222325
    for byte in data:
        value = (value ^ byte) * 0x100000001B3 & (1 << 64) - 1
    return value
