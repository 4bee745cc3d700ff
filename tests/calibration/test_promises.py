"""What a plan promises, what it says when nothing fits, and a calibration that was interrupted."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import pytest
import torch

from densegeo.calibration.collect import Images
from densegeo.calibration.command import _pictures
from densegeo.calibration.plan import Budget, Error, Judge, load_plan, plan_file
from densegeo.calibration.statistics import FILE, Statistics
from densegeo.errors import ConfigError, QuantizationError
from densegeo.export.build import build_bundle
from densegeo.inputs import find_images
from densegeo.models import chain
from densegeo.models.casting import cast
from densegeo.models.layer_plans import quantize_block
from densegeo.models.quantized import FORMATS
from densegeo.runtime.backends.torch_modules import load_networks
from densegeo.runtime.bundle import read_manifest
from densegeo.size import Size
from tests.support.calibration import run
from tests.support.checkpoints import options


def test_a_promise_holds_for_what_is_built(bundle: Path, images: Path, calibrated: Path) -> None:
    """Layers in 8 bits with all else in bf16 are off by no more than the plan says, of which bf16 is a part."""
    plan, manifest = load_plan(calibrated, "fp8"), read_manifest(bundle)
    assert plan.base == "bf16"
    pipeline = load_networks(bundle, manifest, manifest.buckets[0].size, "cpu")
    pictures = _pictures(Images(find_images([str(images)])), manifest)
    layers = plan.layers(Statistics.load(calibrated / FILE))
    judge = Judge(pipeline, pictures, FORMATS["fp8"], layers)
    alone = judge.base_error("bf16")
    assert plan.base_error is not None
    assert plan.error is not None
    assert alone.normals == pytest.approx(plan.base_error.normals, rel=1e-3)
    assert judge.base_error("fp32") == Error(0.0, 0.0)
    expected = [torch.from_numpy(rgb) for rgb in pictures]
    size = Size(expected[0].shape[3], expected[0].shape[2])
    exact = [chain.assemble(pipeline.decode, chain.run(pipeline, rgb, size), size) for rgb in expected]
    for name, block in pipeline.denoiser.parts():
        quantize_block(block, name, layers, FORMATS["fp8"], torch.bfloat16)
    built = cast(pipeline, "bf16")
    actual = [chain.assemble(built.decode, chain.run(built, rgb, size), size) for rgb in expected]
    depths = [
        float((one.prediction - two.prediction).square().mean().sqrt()) for one, two in zip(actual, exact, strict=True)
    ]
    assert plan.error.depth is not None
    assert alone.depth is not None
    assert 0 < alone.depth < plan.error.depth
    assert sum(depths) / len(depths) <= plan.error.depth


@pytest.mark.thorough
def test_no_layer_is_an_answer(
    small_checkpoint: Path,
    bundle: Path,
    images: Path,
    calibrated: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = shutil.copytree(calibrated, tmp_path / "copy")
    alone = load_plan(folder, "fp8").base_error
    assert alone is not None
    assert alone.normals is not None
    for limit, words in (
        (1.02 * alone.normals, "Build with --precision bf16"),
        (alone.normals / 2, "bf16 alone is off by"),
    ):
        run(bundle, images, folder, max_normal_error=limit)
        plan = load_plan(folder, "fp8")
        assert plan.empty
        assert plan.error == alone
        said = " ".join(capsys.readouterr().out.split())
        assert "no layer fits into the budget" in said
        assert words in said
        assert "Now: densegeo build" not in said
        with pytest.raises(QuantizationError, match=f"leaves every layer as it is.*{words}"):
            build_bundle(options(small_checkpoint, tmp_path / "made", precision="fp8", calibration=folder))
    run(bundle, images, folder, max_normal_error=alone.normals / 2, base="fp32")  # its own error is none
    assert not load_plan(folder, "fp8").empty
    with pytest.raises(ConfigError, match="--base fp16 is none of"):
        run(bundle, images, folder, base="fp16")


@pytest.mark.thorough
def test_it_goes_on_with_the_next_layer(
    bundle: Path, images: Path, calibrated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(calibrated, folder)
    (folder / "measured-fp8.json").unlink()
    (folder / "plan-fp8.json").unlink()
    asked: list[Sequence[str]] = []
    genuine: Callable[[Judge, Sequence[str]], Error] = Judge.error

    def counted(judge: Judge, names: Sequence[str]) -> Error:
        if len(asked) == stop:
            raise KeyboardInterrupt
        asked.append(names)
        return genuine(judge, names)

    monkeypatch.setattr(Judge, "error", counted)
    stop = 4
    with pytest.raises(KeyboardInterrupt):
        run(bundle, images, folder)
    first, stop = list(asked), 1000
    asked.clear()
    run(bundle, images, folder)
    expected = load_plan(calibrated, "fp8")
    assert load_plan(folder, "fp8") == expected
    one_by_one = [names[0] for names in asked if len(names) == 1]
    assert [names[0] for names in first] + one_by_one == [row.layer for row in expected.sensitivity]
    asked.clear()
    run(bundle, images, folder, max_depth_error=1.0)  # another budget measures no layer again
    assert [len(names) for names in asked] == [len(expected.sensitivity)]
    assert load_plan(folder, "fp8").budget == Budget(1.0, None)
    asked.clear()
    run(bundle, images, folder, method="max")  # other ranges do
    assert len(asked) > len(expected.sensitivity)
    assert msgspec.json.decode((folder / "measured-fp8.json").read_bytes())["rows"]


@pytest.mark.parametrize("damaged", [b"", b"{", b'{"format": "\xff"}'])
def test_a_damaged_plan_is_named(tmp_path: Path, damaged: bytes) -> None:
    plan_file(tmp_path, "int8").write_bytes(damaged)
    with pytest.raises(QuantizationError, match="is no plan of `densegeo calibrate`"):
        load_plan(tmp_path, "int8")
