"""The exported bundle on ONNX Runtime against numbers computed by the authors' code, every rewrite on and off."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from densegeo.models.fe2e import NAMES
from densegeo.runtime import Estimator
from densegeo.runtime.decode import split_velocity
from densegeo.runtime.verify import relative_error

BOUND = 1e-5  # relative L2 norm (DESIGN section 9)
CASES = [("lora", ()), ("base", ()), ("lora", NAMES), *(("lora", (name,)) for name in NAMES)]


@pytest.mark.parametrize(("weights", "without"), CASES, ids=lambda value: str(value))
def test_bundle_matches_the_authors_numbers(golden, golden_bundle, expected, weights, without):
    image = np.load(golden / "fe2e_small" / "image_u8_hwc.npy")
    rgb = (image.astype(np.float32) / 255 * 2 - 1).transpose(2, 0, 1)[None]
    with Estimator(golden_bundle(lora=weights == "lora", without=without)) as estimator:
        outputs = estimator.replay(np.ascontiguousarray(rgb))
        geometry = estimator(image)
        decode = estimator.manifest.decode
    unscaled = split_velocity(outputs["denoiser"], 64, 96, decode)
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


def test_the_lora_changes_the_result(expected):
    """Guards the tests above: a build that ignored the LoRA could not pass both."""
    assert relative_error(expected["lora.velocity"], expected["base.velocity"]) > 100 * BOUND


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_bundles_stay_within_twice_eager(golden_bundle, precision):
    bundle: Path = golden_bundle(precision=precision)
    from densegeo.runtime.bundle import read_manifest

    checks = read_manifest(bundle).verification.checks
    assert {check.output for check in checks} == {"encoder", "denoiser", "decoder", "prediction", "normals"}
    for check in checks:
        assert 1e-6 < check.error <= check.bound < 0.1, check  # really low precision, and not a loose bound
