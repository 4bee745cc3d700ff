"""Numbers computed by the authors' code, through PyTorch: from the released files' layout to depth and normals."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from densegeo.models import chain, fe2e, rewrites
from densegeo.models.checkpoint import load_weights
from densegeo.models.config import read_config_file, transformer_config, vae_config
from densegeo.models.families import FE2E
from densegeo.models.loading import bound
from densegeo.models.prompt import load_prompt
from densegeo.models.rewrites import Pipeline
from densegeo.models.transformer import Transformer
from densegeo.models.vae import VAE
from densegeo.models.weight_file import read_entries
from densegeo.size import Size

pytestmark = pytest.mark.integration

BOUND = 1e-5


@pytest.fixture(scope="module")
def folder(each_golden: Path) -> Path:
    return each_golden / "fe2e_small"


@pytest.fixture(scope="module", params=["base", "lora"])
def loaded(request: pytest.FixtureRequest, folder: Path) -> tuple[str, Pipeline]:
    """The golden checkpoint without any rewrite, with or without its LoRA."""
    given = read_config_file(folder / "config.json")
    shapes = {
        name: {key: entry.shape for key, entry in read_entries(folder / f"{name}.safetensors").items()}
        for name in ("dit", "vae")
    }
    with torch.device("meta"):
        transformer = Transformer(transformer_config(shapes["dit"], given))
        vae = VAE(vae_config(shapes["vae"], given["vae"]))
    lora = folder / "lora.safetensors" if request.param == "lora" else None
    load_weights(transformer, folder / "dit.safetensors", lora=lora)
    load_weights(vae, folder / "vae.safetensors")
    prompt = load_prompt(folder / "no_info.npz")
    assert (len(prompt.mask), prompt.valid) == (given["text_tokens"], given["valid_text_tokens"])
    return request.param, bound(FE2E, transformer, vae, prompt, Size(given["width"], given["height"]))


def run(pipeline: Pipeline, folder: Path) -> dict[str, Tensor]:
    """Every stage's output under the golden file's names."""
    image = torch.from_numpy(np.load(folder / "image_u8_hwc.npy")).permute(2, 0, 1)[None] / 255
    height, width = image.shape[-2:]
    out = {"rgb_latent": chain.encode(pipeline, 2 * image - 1)}
    out["velocity"] = chain.denoise(pipeline, out["rgb_latent"])
    latents = chain.split(pipeline.decode, out["velocity"], Size(width, height))
    decoded = chain.decode(pipeline, latents)
    config = pipeline.vae.config
    for index, name in enumerate(("depth", "normal")):
        scaled = (latents[index : index + 1] - config.shift_factor) * config.scale_factor  # as the authors keep them
        out[f"{name}_latent"] = scaled
        out[f"{name}_decoded"] = decoded[index : index + 1]
    out["normal_clamped"] = decoded[1:].clamp(-1, 1)
    maps = chain.assemble(pipeline.decode, decoded, Size(width, height))
    assert maps.prediction is not None
    assert maps.normals is not None
    out["depth01"] = maps.prediction[None]
    out["normal_unit"] = -maps.normals.permute(2, 0, 1)[None]  # OpenCV's axes -> the network's
    return out


def check(ours: dict[str, Tensor], folder: Path, variant: str, names: set[str] | None = None) -> None:
    expected = load_file(folder / "expected.safetensors")
    wanted = {key.partition(".")[2]: value for key, value in expected.items() if key.startswith(variant + ".")}
    assert set(ours) == (names or set(wanted) - {"connector_tokens", "connector_pooled"})
    for name, tensor in ours.items():
        assert tensor.shape == wanted[name].shape, name
        error = float((tensor - wanted[name]).norm() / wanted[name].norm())
        assert error <= BOUND, f"{variant}.{name}: {error:.1e}"


@torch.no_grad()
def test_connector(loaded: tuple[str, Pipeline], folder: Path) -> None:
    variant, pipeline = loaded
    model = pipeline.denoiser
    tokens, pooled = model.connector(model.prompt_embeds, model.prompt_mask, model.timestep)
    check(
        {"connector_tokens": tokens, "connector_pooled": pooled},
        folder,
        variant,
        {"connector_tokens", "connector_pooled"},
    )


@pytest.mark.parametrize("off", [(), *((name,) for name in fe2e.NAMES), fe2e.NAMES], ids="-".join)
def test_every_intermediate(loaded: tuple[str, Pipeline], folder: Path, off: tuple[str, ...]) -> None:
    """All rewrites on, each one off, none on."""
    variant, plain = loaded
    pipeline = rewrites.apply(copy.deepcopy(plain), rewrites.select(fe2e.REWRITES, without=off))
    check(run(pipeline, folder), folder, variant)


def test_lora_changes_the_numbers(loaded: tuple[str, Pipeline], folder: Path) -> None:
    """Otherwise the LoRA's golden numbers would prove nothing."""
    variant, pipeline = loaded
    other = "base" if variant == "lora" else "lora"
    with pytest.raises(AssertionError, match=rf"{other}\.velocity"):
        check({"velocity": run(pipeline, folder)["velocity"]}, folder, other, {"velocity"})
