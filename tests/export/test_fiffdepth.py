"""FiffDepth from a diffusers directory to a bundle: the numbers, the options, and what is said of odd files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch
from typer.testing import CliRunner

from densegeo.cli import app
from densegeo.errors import CheckpointError, ConfigError
from densegeo.export.build import build_bundle
from densegeo.export.build_options import BuildOptions
from densegeo.export.command import bucket_sizes
from densegeo.export.sources import SourceOptions
from densegeo.models.fiffdepth import NAMES
from densegeo.runtime import Estimator
from densegeo.runtime.bundle import read_manifest
from densegeo.runtime.verify import relative_error, verify
from tests.support.diffusers_checkpoint import CASES, Case, oracle, picture, prompt, write
from tests.support.shared import Build

BOUND = 1e-5  # relative L2 norm (DESIGN section 9)
WEIGHTS = "diffusion_pytorch_model.safetensors"


def build(checkpoint: Path, output: Path, **options: Any) -> Path:
    given = SourceOptions(checkpoint=str(checkpoint), **options.pop("source", {}))
    return build_bundle(BuildOptions(model="fiffdepth", output=output, source=given, **options))


# Left to `slow`: by default PyTorch is held to all numbers in all these ways, bundles to the smaller ones with all
# rewrites, and to diffusers' modules in the variants whose graphs differ most.
ALONE = [pytest.param((name,), marks=pytest.mark.slow) for name in NAMES]
MARKS: dict[str, tuple[pytest.MarkDecorator, ...]] = {
    **dict.fromkeys(("sd2-like", "odd-latent"), (pytest.mark.thorough,)),
    **dict.fromkeys(
        ("three-tokens", "four-levels", "two-token-layers", "sd1-like", "no-latent-convolutions"), (pytest.mark.slow,)
    ),
}


@pytest.mark.thorough
@pytest.mark.parametrize("without", [(), pytest.param(NAMES, marks=pytest.mark.slow), *ALONE], ids="-".join)
def test_bundle_matches_the_authors_numbers(golden: Path, tmp_path: Path, without: tuple[str, ...]) -> None:
    check(golden / "fiffdepth_small", tmp_path / "bundle", without)


@pytest.mark.slow
@pytest.mark.parametrize("without", [(), NAMES, *ALONE], ids="-".join)
def test_bundle_matches_the_larger_numbers(larger_golden: Path, tmp_path: Path, without: tuple[str, ...]) -> None:
    check(larger_golden / "fiffdepth_small", tmp_path / "bundle", without)


def check(folder: Path, output: Path, without: tuple[str, ...]) -> None:
    image = np.load(folder / "image_u8_hwc.npy")
    bundle = build(folder, output, sizes=((image.shape[1], image.shape[0]),), without=without)
    rgb = np.ascontiguousarray((image.astype(np.float32) / 255 * 2 - 1).transpose(2, 0, 1)[None])
    with Estimator(bundle, backend="onnxruntime") as estimator:
        outputs, geometry = estimator.replay(rgb), estimator(image)
    expected = load_file(folder / "expected.safetensors")
    actual = {
        "rgb_latent": outputs["encoder"],
        "depth_latent": outputs["denoiser"],
        "depth": geometry.prediction[None, None],
    }
    errors = {name: relative_error(array, expected[name]) for name, array in actual.items()}
    assert max(errors.values()) <= BOUND, errors
    assert geometry.normals is None
    assert geometry.depth_kind == "affine"


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=MARKS[case.name], id=case.name) for case in CASES],
)
def test_bundle_agrees_with_diffusers(case: Case, fiffdepth_bundle: Build) -> None:
    """All rewrites on, or all off in every other case; one at a time they are left out above."""
    without = NAMES if CASES.index(case) % 2 else ()
    bundle = fiffdepth_bundle(case, without=without)
    rgb = picture(case.size)
    wanted = oracle(case, rgb)
    for backend in ("onnxruntime", "torch"):
        with Estimator(bundle, backend=backend) as estimator:
            outputs = estimator.replay(rgb.numpy())
        for name, key in (("encoder", "latent"), ("denoiser", "depth_latent"), ("prediction", "depth")):
            expected = wanted[key].numpy()
            expected = expected[None] if name == "prediction" else expected
            assert relative_error(outputs[name], expected) <= BOUND, (backend, name)


@pytest.mark.thorough
@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=pytest.mark.slow)])
def test_low_precision_stays_within_twice_eager(precision: str, fiffdepth_bundle: Build) -> None:
    case = CASES[0]
    bundle = fiffdepth_bundle(case, precision=precision)
    checks = read_manifest(bundle).verification.checks
    assert [check.output for check in checks] == ["encoder", "denoiser", "decoder", "prediction"]
    for check in checks:
        assert 1e-6 < check.error <= check.bound < 0.1, check
    assert verify(bundle, "torch").good


@pytest.mark.thorough
def test_sides_that_are_no_multiple_of_8(tmp_path: Path) -> None:
    """The picture is decoded at the next smaller multiples and stretched: 70x45 at 64x40, as the authors' code does."""
    case = CASES[0]
    files, size = write(tmp_path / "files", case), (70, 45)
    with pytest.raises(ConfigError, match=r"multiples of 8, at least 32 \(nearest: 72x48\)"):
        build(files, tmp_path / "bundle", sizes=(size,))
    bundle = build(files, tmp_path / "bundle", sizes=(size,), any_size=True)
    rgb = picture(size)
    expected = oracle(case, rgb)["depth"]
    assert expected.shape == (40, 64)
    stretched = torch.nn.functional.interpolate(expected[None, None], (45, 70), mode="bilinear")[0, 0].numpy()
    with Estimator(bundle) as estimator:
        assert relative_error(estimator.replay(rgb.numpy())["prediction"][0], stretched) <= BOUND
        assert estimator(np.zeros((90, 140, 3), np.uint8)).prediction.shape == (90, 140)


@pytest.mark.thorough
def test_geometry_without_normals(fiffdepth_bundle: Build, tmp_path: Path) -> None:
    bundle = fiffdepth_bundle(CASES[0])
    image = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    with Estimator(bundle) as estimator:
        results = [estimator(image), *estimator.batch([image]), estimator.submit(image).result(30)]
    assert all(np.array_equal(result.prediction, results[0].prediction) for result in results)
    geometry = results[0]
    assert geometry.normals_in("ros_body") is None
    assert geometry.visualize(image).size == (160, 60)  # the image and its depth
    metric = geometry.to_metric(near=1.0, far=4.0)
    assert np.nanmin(metric.depth) == pytest.approx(1.0)
    assert np.nanmax(metric.depth) == pytest.approx(4.0)
    written = {
        path.name
        for path in metric.save(tmp_path / "saved", ("npy", "png", "png16", "ply"), intrinsics=(80, 80, 40, 30))
    }
    assert not [name for name in written if "normal" in name]


@pytest.mark.thorough
def test_every_command_takes_it(tmp_path: Path) -> None:
    case = CASES[0]
    files, bundle = write(tmp_path / "files", case), tmp_path / "bundle"
    runner = CliRunner()

    def say(*arguments: str) -> str:
        result = runner.invoke(app, list(arguments), catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return re.sub(r"\s+", " ", result.output)

    options = ("build", "--model", "fiffdepth", "--checkpoint", str(files), "--max-edge", "64", "--aspect", "4:3")
    planned = say(*options, "--output", str(bundle), "--dry-run")
    for text in ("U-Net: channels 16 with 1 heads", "64x48", "time, prompt, gates", "denoiser GFLOP"):
        assert text in planned
    assert "LoRA" not in planned
    say(*options, "--output", str(bundle))
    assert "fiffdepth" in say("inspect", str(bundle))
    assert "verified" in say("verify", str(bundle))
    assert "total" in say("bench", str(bundle), "--runs", "2")
    from PIL import Image

    Image.new("RGB", (40, 30), (90, 120, 60)).save(tmp_path / "image.png")
    say("infer", str(bundle), str(tmp_path / "image.png"), "--output", str(tmp_path / "out"))
    assert [path.name for path in (tmp_path / "out").glob("*depth*")]


def test_sizes_from_an_edge_and_aspects() -> None:
    assert bucket_sizes(768, ["4:3", "16:9", "3:4", "1:1"], 8) == [(768, 576), (768, 432), (576, 768), (768, 768)]
    assert bucket_sizes(768, ["37:24"], 8) == [(768, 496)]
    assert bucket_sizes(768, ["37:24"], 1) == [(768, 498)]  # 498.16, cut
    with pytest.raises(ConfigError, match="WIDTH:HEIGHT"):
        bucket_sizes(768, ["wide"], 8)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"lora": "some.safetensors"}, r"--lora: fiffdepth has no such file"),
        ({"no_lora": True}, r"--no-lora: fiffdepth has no such file"),
        ({"dit": "some.safetensors", "config": "c.json"}, r"--dit, --config: fiffdepth has no such file"),
    ],
)
def test_options_of_the_other_model_are_refused(given: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        build(tmp_path, tmp_path / "bundle", source=given)


def test_what_is_missing_is_listed(tmp_path: Path) -> None:
    files = write(tmp_path / "files", CASES[0])
    (files / "unet" / "config.json").unlink()
    (files / "empty_prompt.safetensors").unlink()
    with pytest.raises(CheckpointError) as caught:
        build(files, tmp_path / "bundle")
    assert "unet_config: put unet/config.json in --checkpoint DIR" in str(caught.value)
    assert "prompt: give --prompt FILE, or put empty_prompt.safetensors or prompt.safetensors" in str(caught.value)


@pytest.mark.thorough
def test_pickles_are_converted_on_request_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    case = CASES[0]
    files = write(tmp_path / "files", case)
    weights = files / "unet" / WEIGHTS
    torch.save(load_torch(weights), weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"\.bin is a pickle file.*--convert-bin"):
        build(files, tmp_path / "bundle", sizes=(case.size,))
    bundle = build(files, tmp_path / "bundle", sizes=(case.size,), source={"convert_bin": True})
    source = next(source for source in read_manifest(bundle).sources if source.role == "unet")
    assert source.path.endswith(".bin (converted)")
    torch.save({"weights": [1, 2]}, weights.with_suffix(".bin"))
    with pytest.raises(CheckpointError, match="does not hold a dictionary of tensors"):
        build(files, tmp_path / "bundle", sizes=(case.size,), source={"convert_bin": True})
    torch.save(Case, weights.with_suffix(".bin"))  # a class: what weights alone never hold
    with pytest.raises(CheckpointError, match="cannot be read as weights alone"):
        build(files, tmp_path / "bundle", sizes=(case.size,), source={"convert_bin": True})


@pytest.mark.thorough
def test_the_empty_prompt_is_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    case = CASES[0]
    files = write(tmp_path / "files", case)
    (files / "empty_prompt.safetensors").unlink()
    (files / "tokenizer").mkdir()
    vocabulary = ["<|startoftext|>", "<|endoftext|>", "a", "a</w>"]
    (files / "tokenizer" / "vocab.json").write_text(
        "{" + ", ".join(f'"{token}": {index}' for index, token in enumerate(vocabulary)) + "}"
    )
    (files / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    features = prompt(case).shape[2]
    config = transformers.CLIPTextConfig(
        vocab_size=4, hidden_size=features, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    torch.manual_seed(1)
    encoder = transformers.CLIPTextModel(config).eval()
    encoder.save_pretrained(files / "text_encoder")
    with torch.no_grad():
        expected = encoder(torch.tensor([[0, 1]]))[0]
    bundle = build(files, tmp_path / "bundle", sizes=(case.size,))
    source = next(source for source in read_manifest(bundle).sources if source.role == "prompt")
    assert source.path.startswith("computed with ")
    (cached,) = (tmp_path / "cache" / "densegeo" / "prompt").iterdir()
    torch.testing.assert_close(load_torch(cached)["empty_prompt"], expected)
    stamp = cached.stat().st_mtime_ns
    build(files, tmp_path / "again", sizes=(case.size,))
    assert cached.stat().st_mtime_ns == stamp
