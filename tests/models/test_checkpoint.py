"""Files that do not fit: each error is a typed one and names the tensor, the key or the file in the way."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from densegeo.benchmarks.synthetic import fill
from densegeo.errors import CheckpointError, ConfigError
from densegeo.models.checkpoint import load_weights, lora_ranks
from densegeo.models.config import TransformerConfig, VAEConfig, read_config_file, transformer_config, vae_config
from densegeo.models.prompt import load_prompt
from densegeo.models.transformer import Transformer
from densegeo.models.vae import VAE
from densegeo.models.weight_file import read_entries

CONFIG = TransformerConfig(
    hidden_size=64,
    num_heads=2,
    axes_dim=(4, 14, 14),
    depth=1,
    depth_single_blocks=1,
    context_in_dim=128,
    vec_in_dim=12,
    prompt_dim=20,
    connector_hidden=128,
    connector_heads=1,
    connector_depth=1,
    mlp_hidden=256,
    connector_mlp_hidden=32,
    in_channels=64,
)
QKV = "double_blocks.0.img_attn.qkv"
LORA = "lora_unet_double_blocks_0_img_attn_qkv"

State = dict[str, Tensor]


def empty(config: TransformerConfig = CONFIG) -> Transformer:
    with torch.device("meta"):
        return Transformer(config)


@pytest.fixture(scope="module")
def weights() -> State:
    model = empty()
    fill(model, 0)
    return dict(model.state_dict())


def saved(folder: Path, state: State, name: str = "dit.safetensors") -> Path:
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, folder / name)
    return folder / name


def lora(rank: int = 3, alpha: float | None = 1.5) -> State:
    generator = torch.Generator().manual_seed(1)
    state = {
        f"{LORA}.lora_down.weight": torch.randn(rank, 64, generator=generator),
        f"{LORA}.lora_up.weight": torch.randn(192, rank, generator=generator),
    }
    return state if alpha is None else state | {f"{LORA}.alpha": torch.tensor(alpha)}


def test_loads_what_fits_in_float32(weights: State, tmp_path: Path) -> None:
    halves = {key: tensor.to(torch.bfloat16 if "mlp" in key else torch.float32) for key, tensor in weights.items()}
    model, counts = empty(), list[int]()
    load_weights(model, saved(tmp_path, halves), progress=counts.append)
    for key, tensor in model.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, halves[key].float())
    assert sum(counts) == sum(tensor.numel() for tensor in weights.values())


def _drop(state: State) -> None:
    del state[f"{QKV}.weight"], state["img_in.bias"]


def _add(state: State) -> None:
    state["ema.decay"], state["double_blocks.7.extra"] = torch.zeros(1), torch.zeros(2)


def _reshape(state: State) -> None:
    state[f"{QKV}.weight"] = torch.zeros(190, 64)


def _fp8(state: State) -> None:
    state[f"{QKV}.weight"] = state[f"{QKV}.weight"].to(torch.float8_e4m3fn)


def _integer(state: State) -> None:
    state["img_in.bias"] = torch.zeros(64, dtype=torch.int32)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_drop, ["2 missing", f"{QKV}.weight", "img_in.bias"]),
        (_add, ["2 unexpected", "ema.decay", "double_blocks.7.extra", "--allow-unexpected"]),
        (_reshape, ["1 wrong shape", f"{QKV}.weight: (190, 64), expected (192, 64)"]),
        (_fp8, ["1 wrong dtype", f"{QKV}.weight: F8_E4M3", "F32"]),
        (_integer, ["1 wrong dtype", "img_in.bias: I32"]),
    ],
)
def test_misfits_are_listed(damage: Callable[[State], None], words: list[str], weights: State, tmp_path: Path) -> None:
    state = dict(weights)
    damage(state)
    path = saved(tmp_path, state)
    with pytest.raises(CheckpointError) as caught:
        load_weights(empty(), path)
    for word in [*words, str(path)]:
        assert word in str(caught.value)


def test_all_kinds_of_misfit_are_listed_at_once(weights: State, tmp_path: Path) -> None:
    state = dict(weights)
    for damage in (_drop, _add, _integer):
        damage(state)
    with pytest.raises(CheckpointError) as caught:
        load_weights(empty(), saved(tmp_path, state), allow_unexpected=True)
    assert "missing" in str(caught.value)
    assert "wrong dtype" in str(caught.value)
    assert "unexpected" not in str(caught.value)


def test_unexpected_keys_can_be_allowed(weights: State, tmp_path: Path) -> None:
    state = dict(weights)
    _add(state)
    model = empty()
    load_weights(model, saved(tmp_path, state), allow_unexpected=True)
    assert torch.equal(model.state_dict()[f"{QKV}.weight"], weights[f"{QKV}.weight"])


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".ckpt", ".bin"])
def test_pickles_are_refused_unread(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match=r"pickle.*safetensors"):
        read_entries(path)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_file(keep: int, weights: State, tmp_path: Path) -> None:
    path = saved(tmp_path, weights)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="truncated"):
        load_weights(empty(), path)


def test_absent_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere\.safetensors does not exist"):
        read_entries(tmp_path / "nowhere.safetensors")


@pytest.mark.parametrize(("alpha", "factor"), [(1.5, 0.5), (3.0, 1.0), (None, 1.0), (0.0, 1.0)])
def test_lora_scale(alpha: float | None, factor: float, weights: State, tmp_path: Path) -> None:
    """Absent and zero alpha mean alpha = rank; other modules are untouched."""
    state, model = lora(alpha=alpha), empty()
    path = saved(tmp_path, state, "lora.safetensors")
    assert lora_ranks(path) == {LORA: 3}
    load_weights(model, saved(tmp_path, weights), lora=path)
    loaded = model.state_dict()
    update = state[f"{LORA}.lora_up.weight"].double() @ state[f"{LORA}.lora_down.weight"].double()
    expected = weights[f"{QKV}.weight"].double() + factor * update
    torch.testing.assert_close(loaded[f"{QKV}.weight"].double(), expected, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(loaded[key], weights[key]) for key in weights if key != f"{QKV}.weight")


def test_lora_is_merged_in_float32(weights: State, tmp_path: Path) -> None:
    """A bf16 checkpoint is widened first: an update below half a bf16 step must not be lost."""
    halves = {key: tensor.to(torch.bfloat16) for key, tensor in weights.items()}
    state = lora(alpha=None)
    state[f"{LORA}.lora_up.weight"] *= 1e-4
    model = empty()
    load_weights(model, saved(tmp_path, halves), lora=saved(tmp_path, state, "lora.safetensors"))
    change = model.state_dict()[f"{QKV}.weight"] - halves[f"{QKV}.weight"].float()
    update = state[f"{LORA}.lora_up.weight"] @ state[f"{LORA}.lora_down.weight"]
    assert float((change - update).norm() / update.norm()) < 1e-2


def _other_model(state: State) -> None:
    state["lora_unet_double_blocks_9_img_attn_qkv.lora_down.weight"] = torch.zeros(3, 64)


def _other_form(state: State) -> None:
    state["transformer.blocks.0.attn.to_q.lora_A.weight"] = torch.zeros(3, 64)


def _half(state: State) -> None:
    del state[f"{LORA}.lora_up.weight"]


def _ranks_differ(state: State) -> None:
    state[f"{LORA}.lora_up.weight"] = torch.zeros(192, 4)


def _too_wide(state: State) -> None:
    state[f"{LORA}.lora_down.weight"] = torch.zeros(3, 80)


def _empty(state: State) -> None:
    state.clear()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_other_model, ["lora_unet_double_blocks_9_img_attn_qkv.lora_down.weight", "no such module"]),
        (_other_form, ["transformer.blocks.0.attn.to_q.lora_A.weight", "no kohya LoRA key"]),
        (_half, [LORA, "lora_up or lora_down is missing"]),
        (_ranks_differ, [LORA, "(192, 4)", "(3, 64)"]),
        (_too_wide, [LORA, "(3, 80)", "(192, 64)"]),
        (_empty, ["holds no LoRA tensors"]),
    ],
)
def test_lora_misfits(damage: Callable[[State], None], words: list[str], weights: State, tmp_path: Path) -> None:
    state = lora()
    damage(state)
    path = saved(tmp_path, state, "lora.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load_weights(empty(), saved(tmp_path, weights), lora=path)
    for word in [*words, str(path)]:
        assert word in str(caught.value)


def shapes(state: State) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in state.items()}


def test_architecture_from_shapes(weights: State) -> None:
    assert transformer_config(shapes(weights)) == CONFIG
    assert transformer_config(shapes(weights), {"theta": 500.0, "axes_dim": [8, 12, 12]}).axes_dim == (8, 12, 12)


@pytest.mark.parametrize(
    ("stated", "words"),
    [
        ({"hidden_size": 128}, ["hidden_size = 128", "64"]),
        ({"depth": 2}, ["depth = 2", "1"]),
        ({"axes_dim": [8, 8, 8]}, ["axes_dim", "head size 32"]),
        ({"axes_dim": [3, 14, 15]}, ["axes_dim", "even"]),
        ({"connector_heads": 3}, ["3 connector heads", "128"]),
    ],
)
def test_contradictions(stated: dict[str, Any], words: list[str], weights: State) -> None:
    with pytest.raises(ConfigError) as caught:
        transformer_config(shapes(weights), stated)
    for word in words:
        assert word in str(caught.value)


def test_underivable_values_are_asked_for(weights: State) -> None:
    odd_head = shapes(weights) | {"double_blocks.0.img_attn.norm.query_norm.scale": (16,)}
    with pytest.raises(ConfigError, match="axes_dim"):
        transformer_config(odd_head)
    odd_connector = shapes(weights) | {"connector.S.input_embedder.weight": (96, 20)}
    with pytest.raises(ConfigError, match=r"connector_heads with --config"):
        transformer_config(odd_connector)
    indivisible = shapes(weights) | {"double_blocks.0.img_attn.norm.query_norm.scale": (48,)}
    with pytest.raises(ConfigError, match="64 is no multiple of the head size 48"):
        transformer_config(indivisible)


def test_another_models_tensors(weights: State) -> None:
    with pytest.raises(CheckpointError, match=r"img_in\.weight.*down_blocks"):
        transformer_config({"down_blocks.0.weight": (3, 3)})
    with pytest.raises(CheckpointError, match=r"encoder\.conv_in\.weight"):
        vae_config(shapes(weights))


def test_vae_contradiction() -> None:
    with torch.device("meta"):
        state = shapes(dict(VAE(VAEConfig(ch=32, ch_mult=(1, 2), num_res_blocks=1, z_channels=16)).state_dict()))
    assert vae_config(state, {"ch_mult": [1, 2], "scale_factor": 0.5}).scale_factor == 0.5
    with pytest.raises(ConfigError, match=r"ch_mult.*\(1, 4\).*\(1, 2\)"):
        vae_config(state, {"ch_mult": [1, 4]})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (json.dumps({"hiden_size": 3}), "hiden_size"),
        (json.dumps({"vae": {"chh": 3}}), r"vae\.chh"),
        ("[1, 2]", "cannot read"),
        ("{", "cannot read"),
    ],
)
def test_config_file(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        read_config_file(path)
    with pytest.raises(ConfigError, match="cannot read"):
        read_config_file(tmp_path / "absent.json")


def write_prompt(path: Path, **arrays: np.ndarray[Any, Any]) -> Path:
    if path.suffix == ".npz":
        np.savez(path, **arrays)  # type: ignore[arg-type]
    else:
        save_file({name: torch.from_numpy(array) for name, array in arrays.items()}, path)
    return path


EMBEDS = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)
MASK = np.array([1, 0, 1, 0, 0])


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("mask_dtype", [np.int64, np.float32, np.bool_])
def test_prompt_files(suffix: str, batched: bool, mask_dtype: type, tmp_path: Path) -> None:
    lead = (None,) if batched else ()
    path = write_prompt(tmp_path / f"p{suffix}", embeds=EMBEDS[lead], masks=MASK.astype(mask_dtype)[lead])
    prompt = load_prompt(path)
    np.testing.assert_array_equal(prompt.embeds, EMBEDS)
    np.testing.assert_array_equal(prompt.mask, MASK.astype(bool))
    assert prompt.valid == 2


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"embeds": EMBEDS}, "masks"),
        ({"masks": MASK}, "embeds"),
        ({"embeds": EMBEDS, "masks": MASK[:3]}, r"\(5, 4\).*\(3,\)"),
        ({"embeds": EMBEDS[0], "masks": MASK[:4]}, r"\(4,\)"),
        ({"embeds": np.stack([EMBEDS, EMBEDS]), "masks": MASK}, r"\(2, 5, 4\)"),
        ({"embeds": np.where(EMBEDS > 1, np.nan, EMBEDS).astype(np.float32), "masks": MASK}, "NaN"),
        ({"embeds": np.full_like(EMBEDS, np.inf), "masks": MASK}, "infinite"),
        ({"embeds": EMBEDS, "masks": 0 * MASK}, "no valid token"),
    ],
)
def test_prompt_misfits(suffix: str, arrays: dict[str, Any], words: str, tmp_path: Path) -> None:
    path = write_prompt(tmp_path / f"p{suffix}", **arrays)
    with pytest.raises(CheckpointError, match=words):
        load_prompt(path)


def test_prompt_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        load_prompt(tmp_path / "absent.npz")
    for name, words in (("p.npy", "npz or .safetensors"), ("p.npz", "cannot read"), ("p.safetensors", "cannot read")):
        (tmp_path / name).write_bytes(b"no prompt at all")
        with pytest.raises(CheckpointError, match=words):
            load_prompt(tmp_path / name)
    np.savez(tmp_path / "pickled.npz", embeds=np.array([{}], dtype=object), masks=MASK)
    with pytest.raises(CheckpointError, match="pickle"):
        load_prompt(tmp_path / "pickled.npz")
