"""8-bit graphs as TensorRT engines: the products are 8-bit there too, and architectures without fp8 are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from densegeo.benchmarks.convolution_engines import conversions, in_8_bits, scaled_after, surrounded
from densegeo.calibration.plan import load_plan
from densegeo.errors import ConfigError
from densegeo.export.build import build_bundle
from densegeo.export.engine_builder import EngineOptions
from densegeo.models.rewrites import stage_of
from densegeo.runtime.bundle import read_manifest
from densegeo.runtime.engine_log import parse_log, read_log, warnings
from tests.support.checkpoints import options

pytest.importorskip("tensorrt_rtx")
pytestmark = [pytest.mark.thorough, pytest.mark.timeout(900), pytest.mark.usefixtures("graphs_once")]


@pytest.mark.parametrize(
    ("kind", "plan", "weights", "architectures", "engines"),
    [
        ("fp8", "attentive", "constant", (89,), [["sm_89"]]),
        # The same on another architecture, without the attentions, and the same graph with its weights elsewhere.
        pytest.param("fp8", "attentive", "constant", (120,), [["sm_120"]], marks=pytest.mark.slow),
        pytest.param("fp8", "calibrated", "constant", (89, 120), [["sm_89"], ["sm_120"]], marks=pytest.mark.slow),
        pytest.param("fp8", "attentive", "input", (89,), [["sm_89"]], marks=pytest.mark.slow),
        pytest.param(
            "int8",
            "calibrated",
            "constant",
            (80, 86, 89, 120),
            [["sm_80", "sm_86", "sm_89", "sm_120"]],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_products_are_8_bit(
    small_checkpoint: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    kind: str,
    plan: str,
    weights: str,
    architectures: tuple[int, ...],
    engines: list[list[str]],
) -> None:
    made = build_bundle(
        options(
            small_checkpoint,
            tmp_path / "made",
            sizes=((128, 96),),  # the builder fuses no attention to a handful of fp8 keys
            precision=kind,
            calibration=request.getfixturevalue(plan),
            backend="tensorrt",
            architectures=architectures,
            engines=EngineOptions(library="tensorrt_rtx", weights=weights),  # type: ignore[arg-type]
        )
    )
    manifest = read_manifest(made)
    assert manifest.quantization is not None
    transformers = [engine for engine in manifest.engines if engine.stage == "denoiser"]
    assert [engine.architectures for engine in transformers] == engines
    expected = {"fp8": "FP8", "int8": "Int8"}[kind]
    for engine in transformers:
        log = parse_log(read_log(made / engine.log))
        products = [layer for layer in log.layers if layer.role == "matmul"]
        assert sum(expected in layer.dtype for layer in products) == len(manifest.quantization.linears)
        assert len(products) == len(manifest.quantization.linears) + 2  # img_in and final_layer.linear
        attentions = [layer.dtype for layer in log.layers if layer.role == "attention"]
        assert len(attentions) == 2
        assert attentions.count("FP8") == len(manifest.quantization.attentions) == (2 if plan == "attentive" else 0)
        assert not [line for line in warnings(log, kind, float_tail=False) if "float32" in line]
        if weights == "input":
            assert "single_blocks.0.linear2.weight" in engine.weight_inputs


def test_convolutions_are_8_bit(small_checkpoint: Path, doubled: Path, tmp_path: Path) -> None:
    """One engine of each network for four architectures; rounding joins the layer before, but around attention."""
    made = build_bundle(
        options(
            small_checkpoint,
            tmp_path / "made",
            precision="int8",
            calibration=doubled,
            backend="tensorrt",
            architectures=(80, 86, 89, 120),
            engines=EngineOptions(library="tensorrt_rtx", weights="constant"),
        )
    )
    plan = load_plan(doubled, "int8")
    for engine in (engine for engine in read_manifest(made).engines if engine.stage != "denoiser"):
        log = parse_log(read_log(made / engine.log))
        planned = sum(stage_of(name) == engine.stage for name in (*plan.convolutions, *plan.twice))
        assert len(in_8_bits(log)) == planned
        assert len(conversions(log)) <= 4  # of q, k, v and proj_out
        assert surrounded(log) == []
        assert scaled_after(log) == 0


@pytest.mark.parametrize("architecture", [89, pytest.param(120, marks=pytest.mark.slow)])
def test_convolutions_are_fp8(small_checkpoint: Path, convolved_fp8: Path, tmp_path: Path, architecture: int) -> None:
    """None writes float32, and rounding joins the layer before, but around attention."""
    made = build_bundle(
        options(
            small_checkpoint,
            tmp_path / "made",
            precision="fp8",
            calibration=convolved_fp8,
            backend="tensorrt",
            architectures=(architecture,),
            engines=EngineOptions(library="tensorrt_rtx", weights="constant"),
        )
    )
    plan = load_plan(convolved_fp8, "fp8")
    engines = [engine for engine in read_manifest(made).engines if engine.stage != "denoiser"]
    assert [engine.architectures for engine in engines] == [[f"sm_{architecture}"]] * 2
    for engine in engines:
        log = parse_log(read_log(made / engine.log))
        eight = in_8_bits(log)
        assert len(eight) == sum(stage_of(name) == engine.stage for name in plan.convolutions)
        assert all("FP8" in layer.dtype for layer in eight)
        assert len(conversions(log)) <= 4  # of q, k, v and proj_out
        assert surrounded(log) == []
        assert scaled_after(log) == 0


@pytest.mark.parametrize("plan", ["calibrated", "convolved_fp8"])
def test_fp8_is_refused_where_there_is_none(
    small_checkpoint: Path, plan: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    with pytest.raises(ConfigError, match=r"no fp8 before sm_89, so no engine for sm_80, sm_86.*int8"):
        build_bundle(
            options(
                small_checkpoint,
                tmp_path / "made",
                precision="fp8",
                calibration=request.getfixturevalue(plan),
                backend="tensorrt",
                architectures=(80, 86, 89),
                engines=EngineOptions(library="tensorrt_rtx"),
            )
        )
