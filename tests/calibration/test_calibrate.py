"""From a bundle and images to 8-bit bundles, through the command; and what it refuses."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree

import msgspec
import numpy as np
import pytest
import typer
from rich.console import Console
from safetensors import safe_open

from densegeo.calibration import command
from densegeo.calibration.collect import MINIMUM, Images, collect, open_statistics
from densegeo.calibration.histogram import Histogram
from densegeo.calibration.layer_inputs import OnnxInputs, TorchInputs
from densegeo.calibration.plan import Budget, load_plan, plan_file
from densegeo.calibration.statistics import FILE, Identity, Statistics
from densegeo.errors import BackendError, ConfigError, QuantizationError
from densegeo.export.build import build_bundle
from densegeo.export.build_options import BuildOptions
from densegeo.export.sources import SourceOptions
from densegeo.inspection import print_manifest
from densegeo.runtime import Estimator
from densegeo.runtime.backends.torch_modules import load_networks
from densegeo.runtime.bundle import read_manifest
from densegeo.runtime.verify import verify
from densegeo.size import Size
from tests.support.calibration import run, stage_error
from tests.support.checkpoints import options, write_checkpoint

pytestmark = pytest.mark.usefixtures("graphs_once")
QUIET = Console(quiet=True)
ATTENTIONS = {"double_blocks.0.attention", "single_blocks.0.attention"}


def test_bad_images_are_refused_or_counted(
    bundle: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty, few, broken = (tmp_path / name for name in ("empty", "few", "broken"))
    empty.mkdir()
    with pytest.raises(typer.BadParameter, match="matches no image"):
        run(bundle, empty, tmp_path / "out")
    few.mkdir()
    shutil.copy(images / "00.png", few)
    with pytest.raises(typer.BadParameter, match=f"1 image is too few .* at least {MINIMUM}"):
        run(bundle, few, tmp_path / "out")
    for name in range(MINIMUM):
        shutil.copy(images / "00.png", few / f"copy{name}.png")
    with pytest.raises(typer.BadParameter, match=r"1 image is too few to calibrate with \(8 more files hold the same"):
        run(bundle, few, tmp_path / "out")
    shutil.copytree(images, broken)
    (broken / "05.png").write_bytes(b"no picture")
    run(bundle, broken, tmp_path / "out")
    assert "1 images could not be read" in capsys.readouterr().out
    assert len(Statistics.load(tmp_path / "out" / FILE).counted) == 11
    for name in ("01", "02", "03"):
        (broken / f"{name}.png").write_bytes(b"no picture")
    with pytest.raises(QuantizationError, match=r"3 of 12 images cannot be read, the last one: .*03"):
        run(bundle, broken, tmp_path / "again")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / FILE).write_bytes(b"\x00" * 20)
    with pytest.raises(QuantizationError, match="is no file of `densegeo calibrate`"):
        run(bundle, images, tmp_path / "bad")


def test_every_linear_of_the_blocks_is_planned(calibrated: Path, bundle: Path) -> None:
    plan = load_plan(calibrated, "fp8")
    with safe_open(bundle / "denoiser.safetensors", framework="numpy") as file:
        matrices = {
            name.removesuffix(".weight"): file.get_slice(name).get_shape()
            for name in file.keys()  # noqa: SIM118
            if len(file.get_slice(name).get_shape()) == 2
        }
    blocks = {name for name in matrices if name.startswith(("double_blocks", "single_blocks"))}
    assert set(plan.ranges) == blocks
    assert set(plan.left) == {"img_in", "final_layer.linear"}
    assert plan.parameters == sum(int(np.prod(matrices[name])) for name in blocks)
    assert {row.layer for row in plan.sensitivity} == blocks
    assert plan.attentions == {}
    assert plan.error is not None
    assert 0 < plan.error.normals < 20
    assert all(0 <= row.error.depth <= 3 * plan.error.depth for row in plan.sensitivity)


def test_onnxruntime_and_torch_see_the_same(bundle: Path, images: Path, tmp_path: Path) -> None:
    manifest = read_manifest(bundle)
    pipeline = load_networks(bundle, manifest, Size(48, 32), "cpu")
    streamed = load_networks(bundle, manifest, Size(48, 32), "cpu", streamed=True)
    kinds = {"ort": OnnxInputs(bundle, manifest), "torch": TorchInputs(pipeline), "streamed": TorchInputs(streamed)}
    identity, actual = Identity.of(manifest), []
    for name, inputs in kinds.items():
        path, shown = tmp_path / name, Images(sorted(images.iterdir()))
        actual.append(open_statistics(path, identity, 0.5, 0.0, attention=True, convolutions=False))
        collect(actual[-1], bundle, manifest, shown, inputs, streamed, path, QUIET)
    ours, theirs, last = actual
    for name, channels in theirs.channels.items():
        assert np.array_equal(channels, last.channels[name])
    assert set(ours.channels) == set(theirs.channels)
    assert {name for name in ours.channels if ".attention." in name} == {
        f"{name}.{part}" for name in ATTENTIONS for part in "qkv"
    }
    assert set(ours.factors) == set(theirs.factors) != set()
    for name, channels in ours.channels.items():
        np.testing.assert_allclose(channels, theirs.channels[name], rtol=1e-4, atol=1e-5)
        histogram, other = ours.histograms[name], theirs.histograms[name]
        assert histogram.counts.sum() == other.counts.sum()
        assert histogram.amax == pytest.approx(other.amax, rel=1e-4)
        assert np.abs(np.cumsum(histogram.counts) - np.cumsum(other.counts)).max() <= 0.01 * histogram.counts.sum()
    for factors in ours.factors.values():
        assert np.log(factors).mean() == pytest.approx(0, abs=1e-5)
    assert Statistics.load(tmp_path / "ort").measured == ours.measured


def test_inputs_are_seen_as_they_come(bundle: Path) -> None:
    """None is kept until the run ends: those of a full-size picture would not fit into memory."""
    manifest = read_manifest(bundle)
    pipeline = load_networks(bundle, manifest, Size(48, 32), "cpu")
    ran: list[str] = []
    for name, layer in pipeline.denoiser.named_modules():
        layer.register_forward_hook(lambda *_, name=name: ran.append(name))

    def see(name: str, rows: np.ndarray) -> None:
        assert ran.count(name) == 0
        if name == "double_blocks.0.img_mlp.0":
            raise QuantizationError(name)

    with pytest.raises(QuantizationError, match=r"img_mlp\.0"):
        TorchInputs(pipeline)(manifest.buckets[0], np.zeros((1, 3, 32, 48), np.float32), see)
    assert "double_blocks.0.img_attn.qkv" in ran
    assert not any(name.startswith("single_blocks") for name in ran)


@pytest.mark.thorough
def test_an_interrupted_run_goes_on(
    bundle: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(bundle, images, whole)
    add, calls = Histogram.add, []

    def interrupted(self: Histogram, values: np.ndarray, every: int) -> None:
        calls.append(1)
        if len(calls) == 100:
            raise KeyboardInterrupt
        add(self, values, every)

    monkeypatch.setattr(Histogram, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(bundle, images, parts)
    seen = len(Statistics.load(parts / FILE).counted)
    assert seen == 8  # saved after every eighth
    calls.clear()
    monkeypatch.setattr(Histogram, "add", lambda self, values, every: (calls.append(1), add(self, values, every)))
    run(bundle, images, parts)
    statistics = Statistics.load(parts / FILE)
    assert len(calls) == (12 - seen) * len(statistics.histograms)
    for name, histogram in Statistics.load(whole / FILE).histograms.items():
        assert np.array_equal(histogram.counts, statistics.histograms[name].counts)
    assert load_plan(whole, "fp8") == load_plan(parts, "fp8")  # reproducible, too


@pytest.mark.parametrize(
    ("kind", "plan", "base"),
    [
        pytest.param("int8", "calibrated", "fp32", marks=pytest.mark.thorough),
        pytest.param("fp8", "attentive", "fp32", marks=pytest.mark.thorough),
        # The same plans once more: a minute each where a CPU has no bf16.
        pytest.param("fp8", "calibrated", "fp32", marks=pytest.mark.slow),
        pytest.param("fp8", "attentive", "bf16", marks=pytest.mark.slow),
        pytest.param("fp8", "calibrated", "bf16", marks=pytest.mark.slow),
        pytest.param("int8", "calibrated", "bf16", marks=pytest.mark.slow),
    ],
)
def test_8_bit_bundles_run_within_their_bounds(
    small_checkpoint: Path,
    bundle: Path,
    tmp_path: Path,
    kind: str,
    plan: str,
    base: str,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calibration = request.getfixturevalue(plan)
    made = build_bundle(
        options(small_checkpoint, tmp_path / "made", precision=kind, base=base, calibration=calibration)
    )
    manifest = read_manifest(made)
    assert (manifest.precision, manifest.base) == (kind, base)
    assert manifest.quantization is not None
    assert manifest.quantization.share > 0.5
    assert set(manifest.quantization.attentions) == (ATTENTIONS if plan == "attentive" else set())
    with safe_open(made / "denoiser.safetensors", framework="pt") as file:
        for name in manifest.quantization.linears:
            assert str(file.get_slice(f"{name}.weight").get_dtype()) == {"fp8": "F8_E4M3", "int8": "I8"}[kind]
        assert "F8_E4M3" not in str(file.get_slice("img_in.weight").get_dtype())
    backends = ["torch", *(["openvino"] if find_spec("openvino") else []), *(["onnxruntime"] if base == "fp32" else [])]
    for backend in backends:
        verdict = verify(made, backend, "cpu")
        assert verdict.good, verdict
        assert stage_error(made, backend, "denoiser") > 1e-4  # it is quantized
    floats = read_manifest(bundle).buckets[0].denoiser.parameters
    assert floats < manifest.buckets[0].denoiser.parameters < 1.2 * floats  # and the scales
    inspected = Console(width=200)
    monkeypatch.setattr("densegeo.inspection.Console", lambda: inspected)
    with inspected.capture() as said:
        print_manifest(made, manifest)
    assert f"{kind}: 84.0% of the linears' parameters{' and 2 attentions' if plan == 'attentive' else ''}" in said.get()
    with Estimator(made, "torch", "cpu") as estimator:
        assert np.isfinite(estimator(np.zeros((32, 48, 3), np.uint8)).prediction).all()
    if base == "bf16":
        with pytest.raises(BackendError, match="no bf16"):
            Estimator(made, "onnxruntime", "cpu")


@pytest.mark.thorough
def test_everything_and_smoothing_build_too(small_checkpoint: Path, bundle: Path, images: Path, tmp_path: Path) -> None:
    run(bundle, images, tmp_path / "all", everything=True, smooth=0.5, kind="int8", method="max")
    plan = load_plan(tmp_path / "all", "int8")
    assert {"img_in", "final_layer.linear"} <= set(plan.ranges)
    assert plan.parameters == plan.linear_parameters
    made = build_bundle(
        options(small_checkpoint, tmp_path / "made", precision="int8", base="fp32", calibration=tmp_path / "all")
    )
    for backend in ("torch", "onnxruntime"):
        assert verify(made, backend, "cpu").good


def test_a_budget_leaves_the_most_harmful_as_they_are(
    bundle: Path, images: Path, calibrated: Path, tmp_path: Path
) -> None:
    free = load_plan(calibrated, "fp8")
    assert free.error is not None
    shutil.copytree(calibrated, tmp_path / "copy")
    run(bundle, images, tmp_path / "copy", max_normal_error=0.5 * free.error.normals)
    plan = load_plan(tmp_path / "copy", "fp8")
    assert plan.budget == Budget(None, 0.5 * free.error.normals)
    assert plan.error is not None
    assert plan.error.normals <= 0.5 * free.error.normals
    assert 0 < len(plan.ranges) < len(free.ranges)
    worst = max(plan.sensitivity, key=lambda row: row.error.normals / row.work)
    assert "budget" in plan.left[worst.layer]


@pytest.mark.thorough
def test_attentions_are_planned_as_linears_are(
    bundle: Path, images: Path, attentive: Path, calibrated: Path, tmp_path: Path
) -> None:
    plan, without = load_plan(attentive, "fp8"), load_plan(calibrated, "fp8")
    assert set(plan.attentions) == ATTENTIONS
    assert plan.ranges == without.ranges
    assert plan.parameters == without.parameters
    alone = {row.layer: row for row in plan.sensitivity}
    assert set(alone) == {*plan.ranges, *ATTENTIONS}
    assert all(alone[name].error.depth > 0 for name in ATTENTIONS)
    tokens, hidden = 2 * 3 * 2 + 3, 32  # both halves of 48x32, and merged text
    assert alone["double_blocks.0.attention"].work == 2 * tokens * tokens * hidden
    shutil.copytree(attentive, tmp_path / "copy")
    assert plan.error is not None
    run(bundle, images, tmp_path / "copy", attention=True, max_normal_error=0.5 * plan.error.normals)
    tight = load_plan(tmp_path / "copy", "fp8")
    assert tight.error is not None
    assert tight.error.normals <= 0.5 * plan.error.normals
    kept = {*tight.ranges, *tight.attentions}
    assert 0 < len(kept) < len(alone)
    assert set(tight.left) - set(plan.left) == set(alone) - kept
    run(bundle, images, tmp_path / "copy", kind="int8")  # statistics with attentions serve plans without
    assert load_plan(tmp_path / "copy", "int8").attentions == {}
    with pytest.raises(ConfigError, match="--attention is for fp8"):
        run(bundle, images, tmp_path / "copy", kind="int8", attention=True)
    with pytest.raises(QuantizationError, match="made without --attention"):
        run(bundle, images, calibrated, attention=True)


@pytest.mark.thorough
def test_a_plan_of_attentions_alone_builds(small_checkpoint: Path, attentive: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(attentive, folder)
    plan = load_plan(folder, "fp8").keep(ATTENTIONS)
    assert (plan.ranges, plan.parameters) == ({}, 0)
    plan_file(folder, "fp8").write_bytes(msgspec.json.encode(plan))
    made = build_bundle(options(small_checkpoint, tmp_path / "made", precision="fp8", base="fp32", calibration=folder))
    assert verify(made, "onnxruntime", "cpu").good


@pytest.mark.thorough
def test_statistics_of_another_model_are_refused(
    small_checkpoint: Path, calibrated: Path, bundle: Path, images: Path, tmp_path: Path
) -> None:
    other = write_checkpoint(tmp_path / "other", seed=9)
    with pytest.raises(QuantizationError, match="from another model: the digest of its dit file"):
        build_bundle(options(other, tmp_path / "made", precision="fp8", calibration=calibrated))
    second = build_bundle(options(other, tmp_path / "second"))
    folder = tmp_path / "copy"
    shutil.copytree(calibrated, folder)
    with pytest.raises(QuantizationError, match=r"statistics\.safetensors was made from another model"):
        run(second, images, folder)
    with pytest.raises(QuantizationError, match="rewritten by"):
        build_bundle(
            options(small_checkpoint, tmp_path / "made", precision="fp8", calibration=calibrated, without=("trim",))
        )
    with pytest.raises(QuantizationError, match="--smooth 0"):
        run(bundle, images, folder, smooth=0.5)
    assert not (tmp_path / "made").exists()


def test_contradictions_are_refused(
    small_checkpoint: Path, calibrated: Path, bundle: Path, images: Path, tmp_path: Path
) -> None:
    def build(**changes: object) -> None:
        build_bundle(options(small_checkpoint, tmp_path / "made", **changes))

    with pytest.raises(ConfigError, match="needs --calibration"):
        build(precision="fp8")
    with pytest.raises(ConfigError, match="overflow fp16"):
        build(precision="fp8", base="fp16", calibration=calibrated)
    with pytest.raises(ConfigError, match="not for bf16"):
        build(precision="bf16", calibration=calibrated)
    with pytest.raises(QuantizationError, match=r"plan-fp8\.json is not there: .*densegeo calibrate"):
        build(precision="fp8", calibration=tmp_path)
    (tmp_path / "plan-fp8.json").write_text("{")
    with pytest.raises(QuantizationError, match="is no plan"):
        build(precision="fp8", calibration=tmp_path)
    with pytest.raises(ConfigError, match="no format 'fp4'"):
        run(bundle, images, tmp_path, kind="fp4")
    with pytest.raises(ConfigError, match="no method 'luck'"):
        run(bundle, images, tmp_path, method="luck")
    with pytest.raises(ConfigError, match="above 0"):
        run(bundle, images, tmp_path, max_depth_error=0.0)


@pytest.mark.thorough
def test_nan_and_zeros_are_named(bundle: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Spoiled(OnnxInputs):
        value = np.nan

        def __call__(self, bucket, rgb, see):  # type: ignore[no-untyped-def]
            def spoil(name: str, rows: np.ndarray) -> None:
                see(name, np.full_like(rows, self.value) if name == "double_blocks.0.img_mlp.2" else rows)

            super().__call__(bucket, rgb, spoil)

    monkeypatch.setattr(command, "OnnxInputs", Spoiled)
    with pytest.raises(QuantizationError, match=r"NaN .* input of double_blocks\.0\.img_mlp\.2, for .*00\.png"):
        run(bundle, images, tmp_path / "nan")
    monkeypatch.setattr(Spoiled, "value", 0.0)
    run(bundle, images, tmp_path / "zero")
    plan = load_plan(tmp_path / "zero", "fp8")
    assert "zero in every image" in plan.left["double_blocks.0.img_mlp.2"]
    assert "double_blocks.0.img_mlp.2" not in plan.ranges


@pytest.mark.thorough
def test_a_bf16_bundle_is_calibrated_through_torch(
    small_bundle: Callable[..., Path], images: Path, tmp_path: Path
) -> None:
    low = small_bundle(precision="bf16")
    with pytest.raises(ConfigError, match="onnxruntime has no bf16, which the bundle is in: use --backend torch"):
        run(low, images, tmp_path / "out", backend="onnxruntime")
    run(low, images, tmp_path / "out", backend="")
    assert len(load_plan(tmp_path / "out", "fp8").ranges) > 5


@pytest.mark.thorough
def test_a_model_larger_than_memory_is_planned_without_errors(
    small_checkpoint: Path, small_bundle: Callable[..., Path], calibrated: Path, images: Path, tmp_path: Path
) -> None:
    low = small_bundle(precision="bf16")
    streaming = {"backend": "torch", "stream": True}
    run(low, images, tmp_path / "out", **streaming)
    plan = load_plan(tmp_path / "out", "fp8")
    assert (plan.error, plan.sensitivity) == (None, [])
    assert plan.parameters == load_plan(calibrated, "fp8").parameters
    made = build_bundle(options(small_checkpoint, tmp_path / "made", precision="fp8", calibration=tmp_path / "out"))
    assert verify(made, "torch", "cpu").good
    with pytest.raises(ConfigError, match="is fp8 already"):
        run(made, images, tmp_path / "twice")
    with pytest.raises(ConfigError, match="a budget needs errors"):
        run(low, images, tmp_path / "out", max_depth_error=0.1, **streaming)
    with pytest.raises(ConfigError, match="--stream needs --backend torch"):
        run(low, images, tmp_path / "out", stream=True)
    with pytest.raises(ConfigError, match="openvino does not show"):
        run(low, images, tmp_path / "out", backend="openvino")


def test_the_carried_model_takes_the_same_road(tmp_path: Path) -> None:
    """A build of the model that comes with the code checks its own files' digests against the calibration's."""
    plan = {"model": "fe2e-tiny", "output": tmp_path / "made", "source": SourceOptions(), "precision": "fp8"}
    with pytest.raises(QuantizationError, match="is not there"):
        build_bundle(BuildOptions(**plan, calibration=tmp_path))  # type: ignore[arg-type]


def test_sensitivities_are_drawn(calibrated: Path) -> None:
    plan = load_plan(calibrated, "fp8")
    picture = ElementTree.parse(calibrated / "sensitivity-fp8.svg").getroot()
    shown = [element.text for element in picture.iter("{http://www.w3.org/2000/svg}text")]
    order = [row.layer for row in sorted(plan.sensitivity, key=lambda row: -row.error.depth)]
    assert [text for text in shown if text in order] == order
    bars = [element for element in picture.iter("{http://www.w3.org/2000/svg}rect") if element.get("x")]
    assert len(bars) == 2 * len(order)  # depth and normals
    longest = max(float(bar.attrib["width"]) for bar in bars)
    assert all(0 <= float(bar.attrib["width"]) <= longest for bar in bars)
