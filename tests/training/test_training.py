"""The training's pieces: targets, resuming, and files that the loader takes."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn

from densegeo.models import chain
from densegeo.models.families import FE2E
from densegeo.models.layers import attention
from densegeo.models.loading import Files, load_pipeline
from densegeo.models.presets import AUTHORS_FILES, PRESETS, TINY_TRANSFORMER, TINY_VAE
from densegeo.size import Size
from densegeo.training import autoencoder, diffusion, publish
from densegeo.training.data import Chunk, pictures
from densegeo.training.loop import Schedule, fit, make_optimizers

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]


def test_the_target_splits_into_the_two_latents() -> None:
    depth, normals = torch.randn(2, 3, 16, 4, 6).unbind()
    velocity, decode = diffusion.target(depth, normals), FE2E.decode(TINY_VAE)
    for index in range(3):
        unscaled = chain.split(decode, velocity[index : index + 1], Size(48, 32))
        latents = (unscaled - decode.latent_shift) * decode.latent_scale
        torch.testing.assert_close(latents[0], depth[index])
        torch.testing.assert_close(latents[1], normals[index])


@pytest.mark.parametrize("biased", [True, False])
def test_attention_is_the_same_with_gradients(biased: bool) -> None:
    q, k, v = torch.randn(3, 2, 4, 7, 16).unbind()
    bias = torch.randn(1, 1, 1, 7) if biased else None
    plain = attention(q, k, v, bias)
    trained = attention(q.clone().requires_grad_(), k, v, bias)
    assert trained.requires_grad
    torch.testing.assert_close(trained.detach(), plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("muon", [pytest.param(False, marks=pytest.mark.thorough), True])
def test_a_run_that_was_cut_off_ends_where_an_uninterrupted_one_does(tmp_path: Path, muon: bool) -> None:
    data = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    schedule = Schedule(steps=8, batch=4, rate=0.1, warmup=2, every=3)

    def train(folder: str, *stops: int | None) -> dict[str, Tensor]:
        averaged = {}
        for until in stops:
            torch.manual_seed(0)
            linear = nn.Linear(4, 1)

            def loss(indices: NDArray[np.int64], step: int, linear: nn.Linear = linear) -> dict[str, Tensor]:
                return {"loss": (linear(data[indices]) - 1).square().mean()}

            matrices = [linear.weight] if muon else []
            averaged = fit("toy", linear, loss, 20, schedule, tmp_path / folder, seed=5, until=until, muon=matrices)
        return averaged

    whole, parts = train("whole", None), train("parts", 5, None)
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=0, atol=0)
    assert np.loadtxt(tmp_path / "parts" / "toy.csv", skiprows=1).shape == (8,)
    assert (tmp_path / "parts" / "toy.png").stat().st_size > 1000


def test_a_loss_that_is_not_a_number_stops_the_run(tmp_path: Path) -> None:
    linear = nn.Linear(1, 1)
    with pytest.raises(RuntimeError, match="step 0"):
        fit(
            "bad",
            linear,
            lambda indices, step: {"loss": linear.weight.sum() * float("nan")},
            4,
            Schedule(steps=2, batch=2, rate=0.1),
            tmp_path,
            seed=0,
        )


def random_chunk(count: int = 4) -> Chunk:
    rng = np.random.default_rng(0)
    shape = (count, 192, 256)
    return Chunk(
        rng.integers(0, 256, (*shape, 3)).astype(np.uint8),
        rng.uniform(-1, 1, shape).astype(np.float16),
        rng.integers(-127, 128, (*shape, 3)).astype(np.int8),
    )


@pytest.mark.slow
def test_both_stages_run_and_their_files_load_strictly(tmp_path: Path) -> None:
    device, chunk = torch.device("cpu"), random_chunk()
    short = Schedule(steps=2, batch=2, rate=1e-3, warmup=1)
    vae = autoencoder.train(chunk, tmp_path, seed=0, device=device, schedules=(short, short))
    latents = torch.randn(3, 4, 16, 24, 32)
    transformer = diffusion.train(
        vae,
        latents,
        tmp_path,
        weights=torch.randn(16),
        seed=0,
        device=device,
        compiled=False,
        schedule=short,
    )
    prompt = diffusion.prompt(0)
    dit, autoencoder_file, prompt_file = publish.write(transformer, vae, prompt, tmp_path / "out")
    pipeline = load_pipeline(Files.of("fe2e", dit=dit, vae=autoencoder_file, prompt=prompt_file), Size(256, 192))
    assert pipeline.denoiser.config == TINY_TRANSFORMER, TINY_VAE
    # Guidance and merged padding are exact, so the published files give what was trained, but for bf16's rounding.
    rounded = {key: value.bfloat16().float() for key, value in transformer.state_dict().items()}
    transformer.load_state_dict(rounded)
    with torch.no_grad():
        expected, got = transformer(latents[0, :1]), chain.denoise(pipeline, latents[0, :1])
    assert (got - expected).norm() <= 1e-5 * expected.norm()


def test_text_tokens_are_scaled_into_fp16() -> None:
    """As trained, text tokens may grow without end; the published ones keep below 2^14, for the same velocity."""
    transformer = diffusion.make(0, autoencoder.make(0), Size(64, 48)).eval()
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
        for parameter in transformer.connector.S.input_embedder.parameters():
            parameter *= 3e5
        latent = torch.randn(1, 16, 6, 8, generator=torch.Generator().manual_seed(0))
        expected, large = transformer(latent), transformer.conditioning()[0].abs().max()
        assert large > 65504
        factor = publish.rescale_text(transformer)
        small = transformer.conditioning()[0].abs().max()
        tokens, _ = transformer.connector(transformer.prompt_embeds, transformer.prompt_mask, transformer.timestep)
        assert 2**13 < max(small, tokens.abs().max()) <= 2**14
        torch.testing.assert_close(small, factor * large)
        assert expected.std() > 0.05
        assert (transformer(latent) - expected).norm() <= 1e-3 * expected.norm()
        assert publish.rescale_text(transformer) == 1.0


def test_the_carried_weights_are_small_and_load() -> None:
    directory = PRESETS["fe2e-tiny"].weights
    assert directory is not None
    assert sum(path.stat().st_size for path in directory.iterdir()) <= 12e6
    paths = {role: directory / AUTHORS_FILES[role][0] for role in ("dit", "vae", "prompt")}
    for path in (paths["dit"], paths["vae"]):
        assert {tensor.dtype for tensor in load_file(path).values()} == {torch.bfloat16}
    pipeline = load_pipeline(Files.of("fe2e", **paths), Size(256, 192))
    assert pipeline.denoiser.config == TINY_TRANSFORMER, TINY_VAE
    assert pipeline.vae.config == autoencoder.make(0).config
    assert "@" not in (directory / "README.md").read_text()  # every figure of the card is filled in


def test_the_readout_finds_the_depth_in_latents() -> None:
    vae = autoencoder.make(0).eval().requires_grad_(False)
    chunk = random_chunk()
    smooth = np.cumsum(np.cumsum(np.random.default_rng(1).normal(0, 1, (4, 192, 256)), 1), 2)
    chunk = dataclasses.replace(chunk, depth=(smooth / abs(smooth).max()).astype(np.float16))
    weights = diffusion.readout(vae, chunk)
    assert weights.shape == (16,)
    depth = pictures(chunk, np.arange(4))[1]
    read = (vae.encoder(depth) * weights[:, None, None]).sum(1)
    blocks = torch.nn.functional.avg_pool2d(depth[:, 0], 8)
    residual = (read - read.mean()) - (blocks - blocks.mean())
    assert residual.var() < blocks.var()  # least squares: no other combination of the same channels does better
    other = (vae.encoder(depth) * (weights + 0.1 * torch.randn(16))[:, None, None]).sum(1)
    assert ((other - other.mean()) - (blocks - blocks.mean())).var() > residual.var()


def test_every_parameter_has_one_optimizer() -> None:
    vae = autoencoder.make(0)
    transformer = diffusion.make(0, vae, Size(64, 64))
    hidden = diffusion.hidden_matrices(transformer)
    names = {id(parameter): name for name, parameter in transformer.named_parameters()}
    assert {names[id(p)].split(".")[0] for p in hidden} == {"double_blocks", "single_blocks"}
    assert {p.ndim for p in hidden} == {2}
    assert sum(p.numel() for p in hidden) == 2457600  # per block: 12 hidden^2 a stream, and as many in a single block
    for module, muon in ((transformer, hidden), (vae, [])):
        optimizers = make_optimizers(module, Schedule(steps=1, batch=1, rate=0.1), muon)
        actual = [id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
        assert sorted(actual) == sorted(id(p) for p in module.parameters())
        assert len(optimizers) == 1 + bool(muon)


def test_latents_get_unit_deviation_and_pictures_stay_the_same() -> None:
    vae = autoencoder.make(0).eval().requires_grad_(False)
    images = torch.rand(2, 3, 64, 64) * 2 - 1

    def decoded() -> Tensor:
        moments = vae.encoder.moments(images)
        result: Tensor = vae.decoder(moments[:, : vae.config.z_channels])
        return result

    before = decoded()
    autoencoder.normalise(vae, images)
    assert float(vae.encoder(images).std()) == pytest.approx(1, abs=1e-3)
    torch.testing.assert_close(decoded(), before, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_two_hundred_steps_reproduce_the_committed_losses(tmp_path: Path) -> None:
    committed = json.loads((ROOT / "training" / "losses_200.json").read_text())
    command = [sys.executable, *committed["command"].split()[1:], "--folder", str(tmp_path)]
    subprocess.run([*command, "--output", str(tmp_path / "out")], cwd=ROOT, check=True)
    for stage, expected in committed["mean_of_last_50"].items():
        losses = np.loadtxt(tmp_path / f"{stage}.csv", delimiter=",", skiprows=1)[:, 0]
        assert len(losses) == 200
        assert losses[-50:].mean() == pytest.approx(expected, rel=committed["tolerance"])
