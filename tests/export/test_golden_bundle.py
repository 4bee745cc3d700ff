"""The exported bundle on ONNX Runtime against numbers computed by the authors' code, every rewrite on and off."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from densegeo.models.fe2e import NAMES
from densegeo.runtime import Estimator
from densegeo.runtime.bundle import read_manifest
from densegeo.runtime.decode import latents_of
from densegeo.runtime.verify import relative_error
from densegeo.size import Size
from tests.support.checkpoints import golden_source
from tests.support.shared import Build

BOUND = 1e-5  # relative L2 norm
ALONE = [pytest.param("lora", (name,), marks=pytest.mark.slow) for name in NAMES]
CASES = [("lora", ()), pytest.param("base", (), marks=pytest.mark.thorough), ("lora", NAMES), *ALONE]


@pytest.mark.parametrize(("weights", "without"), CASES, ids=str)
def test_bundle_matches_the_authors_numbers(golden, build_once, weights, without):
    check(golden, build_once, weights, without)


@pytest.mark.slow  # by default PyTorch is held to the larger numbers in all these ways, and bundles to the smaller ones
@pytest.mark.parametrize(("weights", "without"), CASES, ids=str)
def test_bundle_matches_the_larger_numbers(larger_golden, build_once, weights, without):
    check(larger_golden, build_once, weights, without)


def check(golden: Path, build_once: Build, weights: str, without: tuple[str, ...]) -> None:
    image = np.load(golden / "fe2e_small" / "image_u8_hwc.npy")
    expected = load_file(golden / "fe2e_small" / "expected.safetensors")
    height, width = image.shape[:2]
    given = golden_source(golden, lora=weights == "lora")
    bundle = build_once(model="fe2e", source=given, sizes=((width, height),), without=without)
    rgb = (image.astype(np.float32) / 255 * 2 - 1).transpose(2, 0, 1)[None]
    with Estimator(bundle) as estimator:
        outputs = estimator.replay(np.ascontiguousarray(rgb))
        geometry = estimator(image)
        decode = estimator.manifest.decode
    unscaled = latents_of(outputs["denoiser"], Size(width, height), decode)
    latents = (unscaled - decode.latent_shift) * decode.latent_scale
    actual = {
        "rgb_latent": outputs["encoder"],
        "velocity": outputs["denoiser"],
        "depth_latent": latents[:1],
        "normal_latent": latents[1:],
        "depth_decoded": outputs["decoder"][:1],
        "normal_decoded": outputs["decoder"][1:],
        "depth01": geometry.prediction[None],
        "normal_unit": -geometry.normals.transpose(2, 0, 1)[None],  # OpenCV's axes -> the network's
    }
    errors = {name: relative_error(array, expected[f"{weights}.{name}"]) for name, array in actual.items()}
    assert max(errors.values()) <= BOUND, errors


def test_the_lora_changes_the_result(each_golden):
    """Guards the tests above: a build that ignored the LoRA could not pass both."""
    expected = load_file(each_golden / "fe2e_small" / "expected.safetensors")
    assert relative_error(expected["lora.velocity"], expected["base.velocity"]) > 100 * BOUND


@pytest.mark.thorough
@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=pytest.mark.slow)])
def test_low_precision_bundles_stay_within_twice_eager(golden_bundle, precision):
    checks = read_manifest(golden_bundle(precision=precision)).verification.checks
    assert {check.output for check in checks} == {"encoder", "denoiser", "decoder", "prediction", "normals"}
    for check in checks:
        assert 1e-6 < check.error <= check.bound < 0.1, check  # really low precision, and not a loose bound
