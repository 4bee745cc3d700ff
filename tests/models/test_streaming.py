"""Blocks that stay in their file: the same numbers as when all are loaded, stored exactly, and gone after each run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from densegeo.models import chain, fe2e, rewrites
from densegeo.models.casting import cast, cast_module
from densegeo.models.families import FE2E
from densegeo.models.fe2e import NAMES
from densegeo.models.loading import Files, load_pipeline, open_skeleton, open_streamed, rewritten_template
from densegeo.models.presets import AUTHORS_FILES
from densegeo.models.streaming import BlockFile, SafetensorsWriter, write_rewritten
from densegeo.models.transformer import Transformer
from densegeo.size import Size
from tests.support.checkpoints import write_checkpoint

pytestmark = pytest.mark.integration

WIDTH, HEIGHT = 64, 32


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """The smallest checkpoint, with a LoRA on two of its linears."""
    directory = write_checkpoint(tmp_path_factory.mktemp("streamed"))
    random = torch.Generator().manual_seed(0)
    update = {}
    for name, (rows, columns) in {
        "double_blocks_0_img_attn_qkv": (96, 32),
        "single_blocks_0_linear2": (32, 96),
    }.items():
        update[f"lora_unet_{name}.lora_down.weight"] = 0.3 * torch.randn(4, columns, generator=random)
        update[f"lora_unet_{name}.lora_up.weight"] = 0.3 * torch.randn(rows, 4, generator=random)
    save_file(update, directory / "lora.safetensors")
    paths = {role: directory / AUTHORS_FILES[role][0] for role in ("dit", "vae", "prompt")}
    return Files.of("fe2e", **paths, lora=directory / "lora.safetensors", config=directory / "config.json")


def test_a_streamed_transformer_computes_the_same(files: Files) -> None:
    latent = torch.randn(1, 16, HEIGHT // 8, WIDTH // 8, generator=torch.Generator().manual_seed(1))
    whole = load_pipeline(files, Size(WIDTH, HEIGHT))
    streamed, _ = open_streamed(open_skeleton(files), Size(WIDTH, HEIGHT))
    expected = chain.denoise(whole, latent)
    torch.testing.assert_close(chain.denoise(streamed, latent), expected, rtol=0, atol=0)
    for _, block in streamed.denoiser.blocks():
        assert {tensor.device.type for tensor in block.state_dict().values()} == {"meta"}
    without = Files(files.family, {role: path for role, path in files.paths.items() if role != "lora"})
    plain, _ = open_streamed(open_skeleton(without), Size(WIDTH, HEIGHT))
    assert not torch.allclose(chain.denoise(plain, latent), expected, rtol=1e-3)  # the LoRA counts


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.thorough)])
@pytest.mark.parametrize(
    "without", [(), NAMES, *((name,) for name in NAMES)], ids=lambda names: "+".join(names) or "all"
)
def test_what_is_written_block_by_block_is_what_rewriting_the_whole_gives(
    files: Files, without: tuple[str, ...], precision: str, tmp_path: Path
) -> None:
    applied = rewrites.select(fe2e.REWRITES, without)
    whole = cast(rewrites.apply(load_pipeline(files, Size(WIDTH, HEIGHT)), applied), precision)
    streamed, source = open_streamed(open_skeleton(files), Size(WIDTH, HEIGHT))
    configs = streamed.denoiser.config, streamed.vae.config
    final = rewritten_template(FE2E, configs, streamed.prompt, applied, Size(WIDTH, HEIGHT)).denoiser
    cast_module(final, precision)
    path = tmp_path / "transformer.safetensors"
    written = []
    write_rewritten(streamed, source, final, applied, precision, path, progress=written.append)
    stored, expected = load_file(path), whole.denoiser.state_dict()
    assert set(stored) == set(expected)
    assert sum(written) == sum(tensor.numel() for tensor in expected.values())
    for name, tensor in expected.items():
        assert stored[name].dtype == tensor.dtype
        torch.testing.assert_close(stored[name], tensor, rtol=1e-5 if precision == "fp32" else 1e-2, atol=1e-6)
    # The original is left as it was, and can be run again.
    latent = torch.randn(1, 16, HEIGHT // 8, WIDTH // 8, generator=torch.Generator().manual_seed(1))
    original = chain.denoise(load_pipeline(files, Size(WIDTH, HEIGHT)), latent)
    torch.testing.assert_close(chain.denoise(streamed, latent), original, rtol=0, atol=0)


def test_a_file_can_be_filled_from_again(files: Files, tmp_path: Path) -> None:
    """What was stored runs, again one block at a time."""
    applied = fe2e.REWRITES
    latent = torch.randn(1, 16, HEIGHT // 8, WIDTH // 8, generator=torch.Generator().manual_seed(1))
    expected = chain.denoise(load_pipeline(files, Size(WIDTH, HEIGHT)), latent)
    streamed, source = open_streamed(open_skeleton(files), Size(WIDTH, HEIGHT))
    template = rewritten_template(
        FE2E, (streamed.denoiser.config, streamed.vae.config), streamed.prompt, applied, Size(WIDTH, HEIGHT)
    )
    write_rewritten(streamed, source, template.denoiser, applied, "fp32", tmp_path / "t.safetensors")
    again = BlockFile(tmp_path / "t.safetensors")
    again.fill_outside(template.denoiser)
    again.attach(template.denoiser)
    assert chain.relative_error(chain.denoise(template, latent), expected) <= 1e-5


def test_a_writer_takes_tensors_in_any_order_and_misses_none(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 5), "b": torch.randn(7).bfloat16(), "c": torch.randn(2, 2, 2).half()}
    shapes = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    with SafetensorsWriter(tmp_path / "x.safetensors", shapes) as writer:
        for name in ("c", "a", "b"):
            writer.write(name, tensors[name])
    loaded = load_file(tmp_path / "x.safetensors")
    assert {name: bool((loaded[name] == tensor).all()) for name, tensor in tensors.items()} == dict.fromkeys(
        "abc", True
    )

    def write_some() -> None:
        with SafetensorsWriter(tmp_path / "y", shapes) as writer:
            writer.write("a", tensors["a"])
            writer.write("c", tensors["c"])

    with pytest.raises(ValueError, match=r"lacks 1 tensors: \['b'\]"):
        write_some()
    with pytest.raises(ValueError, match="is not"), SafetensorsWriter(tmp_path / "z", shapes) as writer:
        writer.write("a", tensors["a"].T)


def test_keys_of_blocks_are_told_from_others() -> None:
    assert Transformer.is_block("double_blocks.3.img_mod.lin.weight")
    assert Transformer.is_block("single_blocks.0.norm.query_norm.scale")
    assert not Transformer.is_block("connector.S.individual_token_refiner.blocks.0.norm1.weight")
    assert not Transformer.is_block("final_layer.linear.weight")
