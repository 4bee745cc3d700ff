"""The torch backend: rebuilt networks give what the bundle's graphs give, with one set of weights for all sizes."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from densegeo.errors import BackendError, ConfigError  # noqa: E402
from densegeo.export.onnx_graph import write_weights  # noqa: E402
from densegeo.models import fe2e, rewrites  # noqa: E402
from densegeo.models.casting import cast  # noqa: E402
from densegeo.models.families import FE2E  # noqa: E402
from densegeo.models.loading import Files, load_pipeline, load_rewritten  # noqa: E402
from densegeo.models.presets import AUTHORS_FILES  # noqa: E402
from densegeo.models.rewrites import Pipeline  # noqa: E402
from densegeo.models.vae import PhaseUpsample, TransposedUpsample  # noqa: E402
from densegeo.runtime import Estimator  # noqa: E402
from densegeo.runtime.backends import torch_choice, torch_modules  # noqa: E402
from densegeo.runtime.bundle import STAGES, Bucket, Stage, read_manifest  # noqa: E402
from densegeo.runtime.verify import verify  # noqa: E402
from densegeo.size import Size  # noqa: E402
from tests.support.shared import BUILT_SIZES  # noqa: E402


def seeded(bucket: Bucket, stage: Stage, seed: int = 0) -> np.ndarray:
    shape = getattr(bucket, stage).inputs[0].shape
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


def stages_of(pipeline: Pipeline) -> dict[str, torch.nn.Module]:
    vae = pipeline.vae
    return {"encoder": vae.encoder, "denoiser": pipeline.denoiser, "decoder": vae.decoder}


@pytest.mark.parametrize(
    ("without", "precision"),
    [
        *((without, "fp32") for without in ((), fe2e.NAMES, *((name,) for name in fe2e.NAMES))),
        *((without, "bf16") for without in ((), fe2e.NAMES)),
    ],
)
def test_stored_weights_give_back_the_pipeline(
    small_checkpoint: Path, tmp_path: Path, without: tuple[str, ...], precision: str
) -> None:
    paths = {role: small_checkpoint / AUTHORS_FILES[role][0] for role in ("dit", "vae", "prompt")}
    pipeline = load_pipeline(Files.of("fe2e", **paths, config=small_checkpoint / "config.json"), Size(*BUILT_SIZES[0]))
    applied = rewrites.select(fe2e.REWRITES, without)
    cast(rewrites.apply(pipeline, applied), precision)
    files = {stage: tmp_path / f"{stage}.safetensors" for stage in STAGES}
    for stage, module in stages_of(pipeline).items():
        write_weights(module, files[stage])
    configs = pipeline.denoiser.config, pipeline.vae.config
    loaded = load_rewritten(FE2E, configs, pipeline.prompt, applied, files, Size(*BUILT_SIZES[0]))
    assert loaded.decoder_batch == pipeline.decoder_batch
    pairs = zip(stages_of(pipeline).values(), stages_of(loaded).values(), strict=True)
    with torch.no_grad():
        for (module, twin), shape in zip(pairs, ((1, 3, 32, 48), (1, 16, 4, 6), (2, 16, 4, 6)), strict=True):
            given = torch.randn(shape, generator=torch.Generator().manual_seed(0))
            expected = module(given)  # equal but for where the tensors lie in memory, which decides on vector code
            assert (twin(given) - expected).norm() <= (1e-6 if precision == "fp32" else 1e-2) * expected.norm()


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.thorough)])
def test_every_size_is_within_the_bundles_bound(built: dict[str, Path], precision: str) -> None:
    verdict = verify(built[precision], "torch", "cpu")
    assert len({check.bucket for check in verdict.served}) == len(read_manifest(built[precision]).buckets)
    assert verdict.good, verdict


@pytest.mark.thorough
def test_auto_runs_a_bf16_bundle_without_a_gpu(built: dict[str, Path]) -> None:
    with Estimator(built["bf16"], device="cpu") as estimator:
        assert estimator.backend != "onnxruntime"
        image = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        assert np.isfinite(estimator(image).prediction).all()


def test_sizes_share_every_weight(built: dict[str, Path]) -> None:
    manifest = read_manifest(built["fp32"])
    backend = torch_modules.open_backend(built["fp32"], manifest, "cpu")
    first, second = (backend._module(bucket, "denoiser") for bucket in manifest.buckets)
    assert first is not second
    assert first.rope_cos.shape != second.rope_cos.shape
    for name, tensor in first.state_dict().items():
        assert second.state_dict()[name].data_ptr() == tensor.data_ptr()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("faster", ["phases", "transposed"])
def test_upsampling_on_a_cpu_is_what_was_timed_fastest(
    built: dict[str, Path], precision: str, faster: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What is timed is what runs: both ways are there, and right, and the faster one is the decoder's."""
    raced: list[str] = []

    def fastest(ways: dict[str, Any], device: torch.device) -> str:
        raced.extend(ways)
        return faster

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch_choice, "fastest", fastest)
    manifest = read_manifest(built[precision])
    for again in (False, True):  # the second time it is remembered
        backend = torch_modules.TorchBackend(built[precision], manifest, "cpu")
        decoder = backend._module(manifest.buckets[0], "decoder")
        upsamples = [module for module in decoder.modules() if isinstance(module, PhaseUpsample)]
        ready = [isinstance(module, TransposedUpsample) and module.ready is not None for module in upsamples]
        assert set(ready) == {faster == "transposed"}, again
    widths = {module.conv.weight.shape for module in upsamples}
    assert raced == ["phases", "transposed"] * len(widths)


def test_threads_get_their_own_results(built: dict[str, Path]) -> None:
    manifest = read_manifest(built["fp32"])
    backend = torch_modules.open_backend(built["fp32"], manifest, "cpu")
    jobs = [(bucket, seed) for seed in range(6) for bucket in manifest.buckets]

    def run(job: tuple[Bucket, int]) -> np.ndarray:
        return backend.run(job[0], "denoiser", seeded(job[0], "denoiser", job[1]))

    alone = [run(job) for job in jobs]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(run, jobs))
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_bad_use_is_a_typed_error(built: dict[str, Path]) -> None:
    manifest = read_manifest(built["fp32"])
    bucket = manifest.buckets[0]
    backend = torch_modules.open_backend(built["fp32"], manifest, "cpu")
    with pytest.raises(BackendError, match=r"shape \[1, 3, 32, 48\], not \[1, 3, 8, 8\]"):
        backend.run(bucket, "encoder", np.zeros((1, 3, 8, 8), np.float32))
    backend.close()
    with pytest.raises(BackendError, match="closed"):
        backend.run(bucket, "encoder", seeded(bucket, "encoder"))
    for device in ("tpu", "cpu:1", "cuda:x"):
        with pytest.raises(ConfigError, match="device must be"):
            torch_modules.open_backend(built["fp32"], manifest, device)
    with pytest.raises(BackendError, match="no cuda:99"):
        torch_modules.open_backend(built["fp32"], manifest, "cuda:99")


def test_a_bundle_that_does_not_fit_is_refused(built: dict[str, Path], tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(built["fp32"], copy)
    manifest = json.loads((copy / "manifest.json").read_text())

    def refused(match: str, **changes: object) -> None:
        (copy / "manifest.json").write_text(json.dumps(manifest | changes))
        with pytest.raises(BackendError, match=match):
            Estimator(copy, backend="torch", check_digests=False)

    refused("graphs alone", networks=None)
    refused("cannot be rebuilt", networks=manifest["networks"] | {"vae": {"ch": 32}})
    refused("does not hold this", rewrites=[])
    (copy / "prompt.safetensors").write_bytes(b"x" * (copy / "prompt.safetensors").stat().st_size)
    refused("cannot be rebuilt")


@pytest.mark.thorough
def test_a_fresh_process_needs_no_onnxruntime(built: dict[str, Path]) -> None:
    code = f"""
import sys, numpy
from densegeo import Estimator
from densegeo.size import Size
Estimator({str(built["fp32"])!r}, "torch", "cpu")(numpy.zeros((32, 48, 3), numpy.uint8))
print(sorted(sys.modules.keys() & {{"torch", "onnx", "onnxruntime", "diffusers", "densegeo.export"}}))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "['torch']"
