"""FiffDepth in 8 bits: the same calibration, plan, graphs and engines as FE2E's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from densegeo.calibration.plan import load_plan
from densegeo.export.build import build_bundle
from densegeo.export.build_options import BuildOptions
from densegeo.export.engine_builder import EngineOptions
from densegeo.export.sources import SourceOptions
from densegeo.models.chain import relative_error
from densegeo.models.rewrites import stage_of
from densegeo.runtime.backends.torch_fused import FusedAttention, fuse
from densegeo.runtime.backends.torch_modules import load_networks
from densegeo.runtime.bundle import read_manifest
from densegeo.runtime.engine_log import parse_log, read_log
from densegeo.runtime.verify import verify
from tests.support.calibration import run, stage_error
from tests.support.diffusers_checkpoint import Case
from tests.support.shared import Once

pytestmark = [pytest.mark.usefixtures("graphs_once"), pytest.mark.thorough]
CASE = Case("8-bit", {"use_linear_projection": True, "attention_head_dim": [1, 2]}, size=(48, 32))


@pytest.fixture(scope="session")
def files(diffusers_files: Callable[[Case], Path]) -> Path:
    return diffusers_files(CASE)


def build(files: Path, output: Path, precision: str, **options: object) -> Path:
    given = SourceOptions(checkpoint=str(files))
    values = {"model": "fiffdepth", "output": output, "source": given, "sizes": (CASE.size,), "precision": precision}
    return build_bundle(BuildOptions(**(values | options)))  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def calibration(once: Once, fiffdepth_bundle: Callable[..., Path], images: Path) -> Path:
    """Statistics and both formats' plans, int8's with errors measured, fp8's with attentions."""
    bundle = fiffdepth_bundle(CASE)

    def make(folder: Path) -> None:
        run(bundle, images, folder, kind="fp8", backend="torch", stream=True, attention=True)
        run(bundle, images, folder, kind="int8", max_depth_error=0.05)

    return once("calibrated-fiffdepth", make)


def test_what_is_planned(calibration: Path) -> None:
    plan = load_plan(calibration, "int8")
    assert plan.error is not None
    assert 0 < plan.error.depth <= 0.05
    assert plan.error.normals is None
    assert len(plan.sensitivity) == len(load_plan(calibration, "fp8").ranges)
    planned, attentions = load_plan(calibration, "fp8").ranges, load_plan(calibration, "fp8").attentions
    assert {name.split("transformer_blocks.0.")[1] for name in attentions} == {"attn1.attention"}
    assert len(attentions) == len(planned) / 6
    assert all(".transformer_blocks." in name for name in planned)
    assert {name.split("transformer_blocks.0.")[1] for name in planned} == {
        "attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2",
    }  # fmt: skip


@pytest.mark.parametrize("kind", [pytest.param("fp8", marks=pytest.mark.slow), "int8"])
def test_bundles_run_as_they_were_emulated(files: Path, calibration: Path, tmp_path: Path, kind: str) -> None:
    bundle = build(files, tmp_path / kind, kind, base="fp32", calibration=calibration)
    for backend in ("onnxruntime", "torch"):
        assert verify(bundle, backend).good
        error = stage_error(bundle, backend, "denoiser")
        assert error > 1e-4  # really 8-bit
    unet = load_networks(bundle, read_manifest(bundle), CASE.size, "cpu").denoiser
    fused = fuse(unet)
    assert any(isinstance(module, FusedAttention) for module in fused.modules()) == (kind == "fp8")
    latent = torch.randn(1, 4, CASE.size[1] // 8, CASE.size[0] // 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert relative_error(fused(latent), unet(latent)) <= error


def test_the_unets_convolutions_too(
    files: Path, fiffdepth_bundle: Callable[..., Path], images: Path, tmp_path: Path
) -> None:
    run(fiffdepth_bundle(CASE), images, tmp_path / "plan", kind="int8", backend="torch", stream=True, convolutions=True)
    plan = load_plan(tmp_path / "plan", "int8")
    last = {name.rpartition(".")[2] for name in plan.convolutions if stage_of(name) == "denoiser"}
    assert last == {"conv1", "conv2", "conv"}  # of residual blocks, and of changes of resolution
    assert {"conv_in", "conv_out", "encoder.conv_in", "decoder.conv_out"} <= set(plan.left)
    bundle = build(files, tmp_path / "made", "int8", base="fp32", calibration=tmp_path / "plan", backend="openvino")
    for backend in ("openvino", "torch"):
        assert verify(bundle, backend, "cpu").good
        assert stage_error(bundle, backend, "encoder") > 1e-4


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("kind", "architectures", "engines"),
    [
        ("fp8", (89,), [["sm_89"]]),
        ("fp8", (89, 120), [["sm_89"], ["sm_120"]]),  # as FE2E's by default
        ("int8", (86,), [["sm_86"]]),
    ],
)
def test_products_of_engines_are_8_bit(
    files: Path, calibration: Path, tmp_path: Path, kind: str, architectures: tuple[int, ...], engines: list[list[str]]
) -> None:
    pytest.importorskip("tensorrt_rtx")
    made = build(
        files,
        tmp_path / kind,
        kind,
        calibration=calibration,
        sizes=((128, 96),),
        backend="tensorrt",
        architectures=architectures,
        engines=EngineOptions(library="tensorrt_rtx", weights="constant"),
    )
    manifest = read_manifest(made)
    assert manifest.quantization is not None
    built = [engine for engine in manifest.engines if engine.stage == "denoiser"]
    assert [engine.architectures for engine in built] == engines
    for engine in built:
        log = parse_log(read_log(made / engine.log))
        products = [layer for layer in log.layers if layer.role == "matmul"]
        expected = {"fp8": "FP8", "int8": "Int8"}[kind]
        assert sum(expected in layer.dtype for layer in products) > 0, [layer.dtype for layer in products]
        # The builder fuses no fp8 attention of one head, or to a handful of keys, as this small network has some.
        fused = [layer for layer in log.layers if layer.role == "attention" and layer.dtype == "FP8"]
        parts = [layer for layer in products if layer.dtype == "FP8" and len(layer.inputs[0].shape) == 3]
        assert len(fused) + len(parts) / 2 == len(manifest.quantization.attentions)
        assert bool(fused) == (kind == "fp8")
