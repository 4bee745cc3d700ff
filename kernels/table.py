"""The kernels that are compiled ahead of time, one typed row a binary."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from densegeo.kernels.attention import kernel as attention
from densegeo.kernels.contract import Axis
from densegeo.kernels.gated_residual import kernel as gated_residual
from densegeo.kernels.group_norm_silu import kernel as group_norm_silu
from densegeo.kernels.launch import BOX, WARPS
from densegeo.kernels.layer_norm import kernel as layer_norm
from densegeo.kernels.log_dequantize import kernel as log_dequantize
from densegeo.kernels.normals import kernel as normals
from densegeo.kernels.preprocess import kernel as preprocess
from densegeo.kernels.qk_norm_rope import kernel as qk_norm_rope
from densegeo.kernels.quantize import kernel as quantize
from densegeo.kernels.split import kernel as split
from densegeo.kernels.unproject import kernel as unproject

FLOATS = ("fp32", "bf16", "fp16")
INPUT_STRIDES = ("batch_stride", "channel_stride", "row_stride", "column_stride")
NEEDS = {  # type -> first architecture with it, and what to say of earlier ones
    "*bf16": (80, "no bf16 before sm_80"),
    "*fp8e4nv": (89, "no fp8 before sm_89"),
}
LIMITS = {"fp8e4nv": 448, "i8": 127}  # largest magnitudes of 8-bit types
MATRIX = tuple(f"m{row}{column}" for row in range(3) for column in range(3))


@dataclass(frozen=True)
class Variant:
    """One kernel with its argument types and constants.

    name: unique, operation.types. kernel: the Triton function. types: argument -> Triton type, in launch order.
    aligned: pointers whose address is a multiple of 16 bytes, as every CUDA allocation is, and integers (strides,
    lengths) that are multiples of 16, so that memory is read in whole vectors.
    since: the first architecture, where it is not the types that decide, and what to say of earlier ones.
    """

    name: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, int | bool]
    grid: tuple[Axis, ...]
    aligned: tuple[str, ...]
    warps: int = WARPS
    since: tuple[int, str] = (0, "")

    def unsupported(self, architecture: int) -> str | None:
        """Why this architecture cannot run the variant, or None."""
        needs = [self.since, *(NEEDS[kind] for kind in self.types.values() if kind in NEEDS)]
        return next((reason for first, reason in needs if architecture < first), None)


def _types(pointers: Mapping[str, str], integers: tuple[str, ...], floats: tuple[str, ...] = ()) -> dict[str, str]:
    return (
        {name: f"*{kind}" for name, kind in pointers.items()}
        | dict.fromkeys(integers, "i32")
        | dict.fromkeys(floats, "fp32")
    )


def _split(source: str, target: str, features: int = 64) -> Variant:
    return Variant(
        name=f"split.{source}_{target}",
        kernel=split.split_kernel,
        types=_types(
            {"velocity": source, "latents": target},
            ("batch", "rows", "columns", "features", "batch_stride", "token_stride"),
            ("scale", "shift", "depth_sign", "normal_sign"),
        ),
        constants={"BLOCK_T": split.BLOCK_T, "BLOCK_F": features},
        grid=split.GRID,
        aligned=("velocity", "latents"),
    )


def _log_dequantize(source: str, channels: int, clamp_first: bool) -> Variant:
    order = "clamp_mean" if clamp_first else "mean_clamp"
    return Variant(
        name=f"log_dequantize.{order}{channels}_{source}",
        kernel=log_dequantize.log_dequantize_kernel,
        types=_types(
            {"decoded": source, "depth": "fp32", "valid": "u8", "prediction": "fp32"},
            (*INPUT_STRIDES, *BOX),
            ("scale", "shift", "low", "high"),
        ),
        constants={
            "CHANNELS": channels,
            "CLAMP_FIRST": clamp_first,
            "WITH_PREDICTION": True,
            "BLOCK_X": log_dequantize.BLOCK_X,
            "BLOCK_Y": log_dequantize.BLOCK_Y,
        },
        grid=log_dequantize.GRID,
        aligned=("decoded", "depth", "valid", "prediction"),
    )


def _normals(source: str) -> Variant:
    return Variant(
        name=f"normals.{source}",
        kernel=normals.normals_kernel,
        types=_types({"decoded": source, "normals": "fp32"}, (*INPUT_STRIDES, *BOX), MATRIX),
        constants={"BLOCK_X": normals.BLOCK_X, "BLOCK_Y": normals.BLOCK_Y},
        grid=normals.GRID,
        aligned=("decoded", "normals"),
    )


def _preprocess(target: str) -> Variant:
    return Variant(
        name=f"preprocess.u8_{target}",
        kernel=preprocess.preprocess_kernel,
        types=_types(
            {"frame": "u8", "rgb": target},
            ("source_width", "source_height", "row_stride", "pixel_stride", "red", *BOX, "taps_x", "taps_y"),
        ),
        constants={"BLOCK_X": preprocess.BLOCK_X, "BLOCK_Y": preprocess.BLOCK_Y},
        grid=preprocess.GRID,
        aligned=("rgb",),  # a camera's frame may begin anywhere
    )


def _unproject(with_normals: bool) -> Variant:
    return Variant(
        name="unproject.cloud" if with_normals else "unproject.points",
        kernel=unproject.unproject_kernel,
        types=_types(
            {"depth": "fp32", "normals": "fp32", "cloud": "fp32"},
            ("width", "height", "depth_stride", "normals_stride"),
            ("fx", "fy", "cx", "cy"),
        ),
        constants={"WITH_NORMALS": with_normals, "BLOCK_X": unproject.BLOCK_X, "BLOCK_Y": unproject.BLOCK_Y},
        grid=unproject.GRID,
        aligned=("depth", "normals", "cloud"),
    )


def _layer_norm(kind: str, target: str = "", hidden: int = 4096) -> Variant:
    return Variant(
        name=f"layer_norm.{kind}{target and '_'}{target}",
        kernel=layer_norm.layer_norm_kernel,
        types=_types(
            {"x": kind, "weight": "fp32", "bias": "fp32", "normed": target or kind},
            ("tokens", "hidden", "batch_stride", "token_stride"),
            ("eps", "inverse_scale"),
        ),
        constants={"LIMIT": LIMITS.get(target, 0), "BLOCK_H": hidden},
        grid=layer_norm.GRID,
        aligned=("weight", "bias", "normed"),
    )


def _qk_norm_rope(kind: str, target: str = "", size: int = 128) -> Variant:
    return Variant(
        name=f"qk_norm_rope.{kind}{target and '_'}{target}",
        kernel=qk_norm_rope.qk_norm_rope_kernel,
        types=_types(
            {
                "qkv": kind,
                **dict.fromkeys(("query_scale", "key_scale", "cos", "sin"), "fp32"),
                "query": target or kind,
                "key": target or kind,
            },
            ("tokens", "heads", "size", "batch_stride", "token_stride"),
            ("eps", "query_inverse_scale", "key_inverse_scale"),
        ),
        constants={"LIMIT": LIMITS.get(target, 0), "BLOCK_T": qk_norm_rope.BLOCK_T, "BLOCK_S": size},
        grid=qk_norm_rope.GRID,
        aligned=("query", "key"),
    )


def _gated_residual(kind: str, gated: bool, norm: bool, target: str = "", hidden: int = 4096) -> Variant:
    """target: of the norm, if not kind. hidden: rounded up to a power of two; it and strides are multiples of 16."""
    strides = tuple(f"{tensor}_{axis}_stride" for tensor in ("x", "update") for axis in ("batch", "token"))
    pointers = {
        "x": kind,
        "update": kind,
        **dict.fromkeys(("gate", "weight", "bias"), "fp32"),
        "residual": kind,
        "normed": target or kind,
    }
    return Variant(
        name=f"gated_residual.{'gated' if gated else 'plain'}{'_norm' if norm else ''}_{kind}{target and '_'}{target}",
        kernel=gated_residual.gated_residual_kernel,
        types=_types(pointers, ("tokens", "hidden", *strides), ("eps", "inverse_scale")),
        constants={"GATED": gated, "NORM": norm, "LIMIT": LIMITS.get(target, 0), "BLOCK_H": hidden},
        grid=gated_residual.GRID,
        aligned=(*pointers, "hidden", *strides),
    )


def _quantize(source: str, target: str, gelu: bool) -> Variant:
    strides = tuple(f"{tensor}_{axis}_stride" for tensor in ("x", "result") for axis in ("batch", "token"))
    return Variant(
        name=f"{'gelu_quantize' if gelu else 'quantize'}.{source}_{target}",
        kernel=quantize.quantize_kernel,
        types=_types({"x": source, "result": target}, ("tokens", "features", *strides), ("inverse_scale",)),
        constants={"GELU": gelu, "LIMIT": LIMITS.get(target, 0), "BLOCK_F": quantize.BLOCK_F},
        grid=quantize.GRID,
        aligned=("x", "result", "features", *strides),
    )


def _attention(kind: str, size: int, target: str = "") -> Variant:
    """Heads of `size` features; strides are multiples of 16. target: of the result, if not kind."""
    element = {"fp32": 4, "fp8e4nv": 1}.get(kind, 2)
    largest, summed = attention.SCALED[element]
    strides = tuple(f"{tensor}_{axis}" for tensor in "qkv" for axis in ("batch", "head", "token"))
    return Variant(
        name=f"attention.bias{size}_{kind}{target and '_'}{target}",
        kernel=attention.attention_kernel,
        types=_types(
            {"q": kind, "k": kind, "v": kind, "bias": "fp32", "out": target or kind},
            ("heads", "queries", "keys", "biased", *strides),
            ("scale", "out_scale"),
        ),
        constants={"SIZE": size, "BLOCK_S": size, "LARGEST": largest, "SUMMED": summed}
        | attention.blocks_of(element, size),
        grid=attention.grid_of(element, size),
        aligned=("q", "k", "v", "bias", "out", *strides),
        warps=attention.warps_of(element, size),
        since=(80, "no attention before sm_80, where its tiles spill"),
    )


def _add_keys(kind: str, size: int) -> Variant:
    strides = tuple(f"{tensor}_{axis}" for tensor in ("q", "k", "v", "out") for axis in ("batch", "head", "token"))
    pointers = {"q": kind, "k": kind, "v": kind, "out": kind, "logsum": "fp32", "further": "i32", "bias": "fp32"}
    return Variant(
        name=f"attention.add{size}_{kind}",
        kernel=attention.add_keys_kernel,
        types=_types(
            pointers | {"result": kind},
            ("heads", "queries", "count", *strides, "logsum_batch", "logsum_head"),
            ("scale",),
        ),
        constants={"SIZE": size, "BLOCK_S": size, "BLOCK_A": attention.BLOCK_A},
        grid=attention.ADD_GRID,
        aligned=(*pointers, "result", *strides),
    )


def _group_norm_silu(kind: str, channels: int) -> Iterator[Variant]:
    """The launches of a picture of `channels` in 32 groups; merging does not see the picture's type."""
    blocks: dict[str, int | bool] = {"BLOCK_P": group_norm_silu.rows_of(channels), "BLOCK_C": channels}
    yield Variant(
        name=f"group_norm_silu.statistics{channels}_{kind}",
        kernel=group_norm_silu.statistics_kernel,
        types=_types({"x": kind, "partial": "fp32"}, ("pixels", "channels", "runs", "run")),
        constants=blocks,
        grid=group_norm_silu.STATISTICS_GRID,
        aligned=("x", "partial"),
    )
    yield Variant(
        name=f"group_norm_silu.apply{channels}_{kind}",
        kernel=group_norm_silu.apply_kernel,
        types=_types({"x": kind, "affine": "fp32", "result": kind}, ("pixels", "channels")),
        constants={"SILU": True, **blocks},
        grid=group_norm_silu.apply_grid(channels),
        aligned=("x", "affine", "result"),
    )
    if kind == "fp32":
        width = channels // 32
        yield Variant(
            name=f"group_norm_silu.merge{channels}",
            kernel=group_norm_silu.merge_kernel,
            types=_types(
                dict.fromkeys(("partial", "weight", "bias", "affine"), "fp32"),
                ("pixels", "channels", "runs", "run"),
                ("eps",),
            ),
            constants={"WIDTH": width, "BLOCK_R": group_norm_silu.RUNS, "BLOCK_G": width},
            grid=group_norm_silu.merge_grid(width),
            aligned=("partial", "weight", "bias", "affine"),
        )


def _rows() -> Iterator[Variant]:
    for kind in FLOATS:
        yield _split(kind, kind)
    for kind in ("bf16", "fp16"):
        yield _split(kind, "fp32")
    for kind in FLOATS:
        yield _log_dequantize(kind, 3, clamp_first=True)
    for kind in FLOATS:
        yield _log_dequantize(kind, 3, clamp_first=False)
    yield _log_dequantize("fp32", 1, clamp_first=False)  # the mean folded into the decoder's last convolution
    for kind in FLOATS:
        yield _normals(kind)
    for kind in FLOATS:
        yield _preprocess(kind)
    yield _unproject(False)
    yield _unproject(True)
    for kind in FLOATS:
        yield _layer_norm(kind)
        yield _qk_norm_rope(kind)
        for gated in (False, True):
            for norm in (False, True):
                yield _gated_residual(kind, gated, norm)
        yield _quantize(kind, kind, gelu=True)
        if kind != "fp32":
            yield _qk_norm_rope(kind, "fp8e4nv")
            for size in (32, 64, 128):  # a head of fe2e-tiny, of FiffDepth and of fe2e
                yield _attention("fp8e4nv", size, kind)
        for target in LIMITS if kind != "fp32" else ():
            yield _quantize(kind, target, gelu=True)
            yield _quantize(kind, target, gelu=False)
            yield _layer_norm(kind, target)
            yield _gated_residual(kind, False, True, target)
        for size in (32, 128):  # a head of fe2e-tiny and of fe2e
            yield _attention(kind, size)
            yield _add_keys(kind, size)
        for channels in (128, 512):  # the autoencoder's narrowest and widest
            yield from _group_norm_silu(kind, channels)


VARIANTS = tuple(_rows())
