"""FiffDepth in PyTorch: the authors' numbers, diffusers' own modules, each rewrite on and off."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from densegeo.errors import CheckpointError, ConfigError
from densegeo.models import chain, fiffdepth, rewrites
from densegeo.models.config import read_json
from densegeo.models.diffusers_format import sd_vae_config, unet_config
from densegeo.models.loading import Files, load_pipeline
from densegeo.models.rewrites import Pipeline
from densegeo.models.unet import ConstantCrossAttention, CrossAttention, GatedCrossAttention, TokenBlock
from densegeo.size import Size
from tests.support.diffusers_checkpoint import CASES, Case, oracle, picture, write

pytestmark = pytest.mark.integration

BOUND = 1e-5  # relative L2 norm (DESIGN section 9)
WEIGHTS = "diffusion_pytorch_model.safetensors"
OFF = ((), *((name,) for name in fiffdepth.NAMES), fiffdepth.NAMES)


def files(directory: Path, prompt: str = "empty_prompt.safetensors") -> Files:
    paths = {
        "unet": directory / "unet" / WEIGHTS,
        "unet_config": directory / "unet" / "config.json",
        "vae": directory / "vae" / WEIGHTS,
        "vae_config": directory / "vae" / "config.json",
        "prompt": directory / prompt,
    }
    return Files.of("fiffdepth", **paths)


def run(pipeline: Pipeline, rgb: Tensor) -> dict[str, Tensor]:
    size = Size(rgb.shape[3], rgb.shape[2])
    latent = chain.encode(pipeline, rgb)
    output = chain.denoise(pipeline, latent)
    decoded = chain.decode(pipeline, chain.split(pipeline.decode, output, size))
    maps = chain.assemble(pipeline.decode, decoded, size)
    assert maps.prediction is not None
    return {"latent": latent, "depth_latent": output, "depth": maps.prediction}


def errors(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    return {name: chain.relative_error(ours[name], expected[name]) for name in expected}


@pytest.mark.parametrize("off", OFF, ids="-".join)
def test_the_authors_numbers(each_golden: Path, off: tuple[str, ...]) -> None:
    folder = each_golden / "fiffdepth_small"
    image = torch.from_numpy(np.load(folder / "image_u8_hwc.npy")).permute(2, 0, 1)[None].float()
    loaded = load_pipeline(files(folder, "prompt.safetensors"), Size(image.shape[3], image.shape[2]))
    actual = run(rewrites.apply(loaded, rewrites.select(fiffdepth.REWRITES, off)), image / 255 * 2 - 1)
    expected = load_file(folder / "expected.safetensors")
    wanted = {name: expected[key] for name, key in (("latent", "rgb_latent"), ("depth_latent", "depth_latent"))}
    assert max(errors(actual, wanted | {"depth": expected["depth"][0, 0]}).values()) <= BOUND


@pytest.mark.parametrize(
    "case",
    [*CASES[:3], *(pytest.param(case, marks=pytest.mark.thorough) for case in CASES[3:])],
    ids=lambda case: case.name,
)
def test_agrees_with_diffusers(case: Case, tmp_path: Path) -> None:
    rgb = picture(case.size)
    expected = oracle(case, rgb)
    assert expected["depth"].std() > 0.05  # not saturated
    directory = write(tmp_path, case)
    for off in OFF:
        loaded = load_pipeline(files(directory), Size(*case.size))
        actual = errors(run(rewrites.apply(loaded, rewrites.select(fiffdepth.REWRITES, off)), rgb), expected)
        assert max(actual.values()) <= BOUND, (off, actual)


def test_gates_are_for_two_tokens(tmp_path: Path) -> None:
    kinds = {}
    for case in CASES:
        if case.tokens == 3 or case.name == "sd2-like":
            loaded = load_pipeline(files(write(tmp_path / case.name, case)), Size(*case.size))
            blocks = [module for module in loaded.denoiser.modules() if isinstance(module, TokenBlock)]
            assert {type(block.attn2) for block in blocks} == {CrossAttention}
            rewrites.apply(loaded, fiffdepth.REWRITES)
            kinds[case.tokens] = {type(block.attn2) for block in blocks}
            assert loaded.denoiser.time() is None
    assert kinds == {2: {GatedCrossAttention}, 3: {ConstantCrossAttention}}


def test_rewriting_removes_what_it_says(tmp_path: Path) -> None:
    case = CASES[0]
    loaded = load_pipeline(files(write(tmp_path, case)), Size(*case.size))
    rewrites.apply(loaded, fiffdepth.REWRITES)
    keys = loaded.denoiser.state_dict()
    gone = ("time_embedding", "time_emb_proj", "attn2.to_k", "attn2.to_v", "attn2.to_q", "attn2.to_out")
    assert not [key for key in keys if any(part in key for part in gone)]
    assert loaded.vae.decoder.conv_out.out_channels == 1
    assert loaded.vae.encoder.conv_out.out_channels == 4


def test_legacy_attention_names(tmp_path: Path) -> None:
    case = CASES[0]
    directory, rgb = write(tmp_path, case), picture(case.size)
    path = directory / "vae" / WEIGHTS
    renamed = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}
    tensors = {}
    for key, tensor in load_file(path).items():
        for new, old in renamed.items():
            key = key.replace(new, old)
        tensors[key] = tensor
    assert "encoder.mid_block.attentions.0.proj_attn.weight" in tensors
    save_file(tensors, path)
    assert max(errors(run(load_pipeline(files(directory), Size(*case.size)), rgb), oracle(case, rgb)).values()) <= BOUND


@pytest.mark.parametrize(
    ("part", "key", "value", "said"),
    [
        ("unet", "act_fn", "gelu", r"act_fn = 'gelu' \(built: 'silu'\)"),
        ("unet", "class_embed_type", "timestep", "class_embed_type"),
        ("unet", "dual_cross_attention", True, "dual_cross_attention"),
        ("unet", "down_block_types", ["DownBlock2D"], "down_block_types"),
        ("unet", "down_block_types", ["DownBlock2D", "DownBlock2D", "AttnDownBlock2D"], "AttnDownBlock2D"),
        ("unet", "attention_head_dim", [3, 3], r"\(3, 3\) heads do not divide"),
        ("unet", "attention_head_dim", [1, 2, 2], "attention_head_dim"),
        ("unet", "norm_num_groups", 7, "multiples of 7"),
        ("unet", "layers_per_block", "two", "does not describe a UNet"),
        ("unet", "_class_name", "AutoencoderKL", "_class_name"),
        ("vae", "block_out_channels", [8, 8, 16], "four multiples"),
        ("vae", "use_quant_conv", False, "both true or both false"),
        ("vae", "mid_block_add_attention", False, "mid_block_add_attention"),
        ("vae", "latent_channels", "four", "does not describe a VAE"),
    ],
)
def test_settings_that_are_not_built_are_refused(tmp_path: Path, part: str, key: str, value: Any, said: str) -> None:
    directory = write(tmp_path, CASES[0])
    path = directory / part / "config.json"
    values = read_json(path) | {key: value}
    read = {"unet": unet_config, "vae": sd_vae_config}[part]
    with pytest.raises(ConfigError, match=said):
        read(values, path)


def test_a_broken_configuration_is_named(tmp_path: Path) -> None:
    directory = write(tmp_path, CASES[0])
    (directory / "unet" / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"unet/config\.json"):
        load_pipeline(files(directory), Size(64, 48))


def test_a_unet_for_other_inputs_is_refused(tmp_path: Path) -> None:
    """Marigold's takes noise beside the picture's latent: eight channels."""
    directory = write(tmp_path, Case("eight", {"in_channels": 8}))
    with pytest.raises(ConfigError, match=r"takes 8 channels and gives 4; .* another depth model's"):
        load_pipeline(files(directory), Size(64, 48))


def test_tensors_in_the_way_are_named_as_in_the_file(tmp_path: Path) -> None:
    directory = write(tmp_path, CASES[0])
    path = directory / "vae" / WEIGHTS
    tensors = load_file(path)
    del tensors["encoder.mid_block.attentions.0.to_q.weight"]
    save_file(tensors | {"extra": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError) as caught:
        load_pipeline(files(directory), Size(64, 48))
    assert "missing: encoder.mid_block.attentions.0.to_q.weight" in str(caught.value)
    assert "unexpected: extra" in str(caught.value)


def test_a_prompt_of_another_width_is_refused(tmp_path: Path) -> None:
    directory = write(tmp_path, CASES[0])
    save_file({"empty_prompt": torch.zeros(1, 2, 7)}, directory / "empty_prompt.safetensors")
    with pytest.raises(CheckpointError, match="7 features a token, the network wants 24"):
        load_pipeline(files(directory), Size(64, 48))


def test_configurations_without_defaults_read_as_diffusers_does(tmp_path: Path) -> None:
    """Early checkpoints leave out what later versions of diffusers write."""
    path = write(tmp_path, CASES[1]) / "unet" / "config.json"
    whole = read_json(path)
    early = {
        key: whole[key]
        for key in (
            "block_out_channels", "down_block_types", "up_block_types", "layers_per_block", "norm_num_groups",
            "cross_attention_dim", "attention_head_dim",
        )
    }  # fmt: skip
    assert unet_config(json.loads(json.dumps(early)), path) == unet_config(whole, path)


@pytest.mark.parametrize("damaged", [b"", b"{", b"[]", b'{"a": "\xff"}'])
def test_a_damaged_configuration_is_named(tmp_path: Path, damaged: bytes) -> None:
    (path := tmp_path / "config.json").write_bytes(damaged)
    with pytest.raises(ConfigError, match=r"cannot read the configuration .*config\.json"):
        read_json(path)
