"""The connector against a second implementation: float64, one head and one query at a time, boolean masks."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from densegeo.benchmarks.synthetic import random_pipeline
from densegeo.errors import CheckpointError
from densegeo.models import chain, fe2e, rewrites
from densegeo.models.config import TransformerConfig, VAEConfig
from densegeo.models.prompt import Prompt
from densegeo.size import Size

pytestmark = pytest.mark.integration

BOUND = 1e-5
TOKENS, FEATURES, HIDDEN, HEADS = 14, 20, 24, 3

TRANSFORMER = TransformerConfig(
    hidden_size=32,
    num_heads=2,
    axes_dim=(4, 6, 6),
    depth=2,
    depth_single_blocks=2,
    context_in_dim=HIDDEN,
    vec_in_dim=16,
    prompt_dim=FEATURES,
    connector_hidden=HIDDEN,
    connector_heads=HEADS,
    connector_depth=2,
    mlp_hidden=128,
    connector_mlp_hidden=40,
    in_channels=64,
)
VAE = VAEConfig(ch=32, ch_mult=(1, 1), num_res_blocks=1, z_channels=16)


def _affine(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def _silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def _layer_norm(state: dict[str, Tensor], name: str, row: Tensor) -> Tensor:
    centred = row - row.mean()
    return centred / (centred.square().mean() + 1e-6).sqrt() * state[f"{name}.weight"] + state[f"{name}.bias"]


def plain_connector(
    weights: dict[str, Tensor], embeds: NDArray[np.float32], mask: NDArray[np.bool_], heads: int
) -> tuple[Tensor, Tensor]:
    """Text tokens (T, hidden) and the pooled vector, in float64; weights under the connector's own names."""
    state = {name: tensor.double() for name, tensor in weights.items()}
    rows = torch.from_numpy(embeds).double()
    total = torch.zeros(rows.shape[1], dtype=torch.float64)
    for row, valid in zip(rows, mask, strict=True):
        if valid:
            total += row
    mean = total / int(mask.sum())
    pooled = _affine(state, "global_proj_out", mean * (1 + state["scale_factor"]))

    wave = torch.tensor([1000 * 10000 ** (-i / 128) for i in range(128)], dtype=torch.float64)
    condition = _affine(
        state,
        "S.t_embedder.mlp.2",
        _silu(_affine(state, "S.t_embedder.mlp.0", torch.cat([wave.cos(), wave.sin()]))),
    )
    condition = condition + _affine(
        state, "S.c_embedder.linear_2", _silu(_affine(state, "S.c_embedder.linear_1", mean))
    )

    tokens = [_affine(state, "S.input_embedder", row) for row in rows]
    width = tokens[0].shape[0]
    size = width // heads
    index = 0
    while f"S.individual_token_refiner.blocks.{index}.norm1.weight" in state:
        name = f"S.individual_token_refiner.blocks.{index}"
        gates = _affine(state, f"{name}.adaLN_modulation.1", _silu(condition))
        projected = [
            _affine(state, f"{name}.self_attn_qkv", _layer_norm(state, f"{name}.norm1", token)) for token in tokens
        ]
        mixed = []
        for query_index, query_valid in enumerate(mask):
            # Key 0 is always seen; any other key only if it and the query are valid.
            seen = [k for k in range(len(tokens)) if k == 0 or (bool(query_valid) and bool(mask[k]))]
            outputs = []
            for head in range(heads):
                start = head * size
                query = projected[query_index][start : start + size]
                keys = torch.stack([projected[k][width + start : width + start + size] for k in seen])
                values = torch.stack([projected[k][2 * width + start : 2 * width + start + size] for k in seen])
                weights_of_keys = torch.softmax(keys @ query / math.sqrt(size), dim=0)
                outputs.append(weights_of_keys @ values)
            mixed.append(_affine(state, f"{name}.self_attn_proj", torch.cat(outputs)))
        tokens = [token + gates[:width] * update for token, update in zip(tokens, mixed, strict=True)]
        for position, token in enumerate(tokens):
            inner = _silu(_affine(state, f"{name}.mlp.fc1", _layer_norm(state, f"{name}.norm2", token)))
            tokens[position] = token + gates[width:] * _affine(state, f"{name}.mlp.fc2", inner)
        index += 1
    return torch.stack(tokens), pooled


def prompt_for(name: str) -> Prompt:
    """Prompts that differ in where the padding is and what it holds."""
    rng = np.random.default_rng(7)
    embeds = rng.standard_normal((TOKENS, FEATURES)).astype(np.float32)
    same = rng.standard_normal(FEATURES).astype(np.float32)
    mask = np.arange(TOKENS) < 5
    if name == "holes":
        mask = np.isin(np.arange(TOKENS), [0, 2, 3, 7, 11])
        embeds[~mask] = 0
    elif name == "key-0-masked":
        mask = np.isin(np.arange(TOKENS), [3, 4, 8])
        embeds[~mask] = same
    elif name == "zero-padding":
        embeds[~mask] = 0
    elif name == "equal-padding":
        embeds[~mask] = same
    elif name == "two-groups":
        embeds[~mask] = same
        embeds[8:11] = -same
    elif name == "padding-equals-a-valid-row":
        embeds[~mask] = embeds[2]
    elif name == "one-valid":
        mask = np.arange(TOKENS) == 9
        embeds[~mask] = same
    elif name == "no-padding":
        mask = np.ones(TOKENS, dtype=np.bool_)
    else:
        assert name == "differing-padding"
    return Prompt(embeds, mask)


PROMPTS = {  # name -> text tokens that stay when equal padding is merged
    "holes": 6,
    "key-0-masked": 4,
    "zero-padding": 6,
    "equal-padding": 6,
    "two-groups": 7,
    "padding-equals-a-valid-row": 6,
    "one-valid": 2,
    "no-padding": TOKENS,
    "differing-padding": TOKENS,
}


@torch.no_grad()
@pytest.mark.parametrize("name", PROMPTS)
def test_connector_equals_the_second_implementation(name: str) -> None:
    prompt = prompt_for(name)
    model = random_pipeline(TRANSFORMER, VAE, prompt, Size(32, 32), seed=3).denoiser
    weights = {key.removeprefix("connector."): value for key, value in model.state_dict().items() if "connector" in key}
    tokens, pooled = plain_connector(weights, prompt.embeds, prompt.mask, HEADS)
    ours, our_pooled = model.connector(model.prompt_embeds, model.prompt_mask, model.timestep)
    assert tokens.std() > 0.05
    assert chain.relative_error(ours[0], tokens) <= BOUND
    assert chain.relative_error(our_pooled[0], pooled) <= BOUND
    for row in range(TOKENS):  # a wrong row must not drown among right ones
        assert chain.relative_error(ours[0, row], tokens[row]) <= BOUND


@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize("on", [("padding",), ("connector", "padding"), fe2e.NAMES], ids=len)
def test_merging_padding_is_exact_for_the_whole_transformer(name: str, on: tuple[str, ...]) -> None:
    prompt = prompt_for(name)
    plain = random_pipeline(TRANSFORMER, VAE, prompt, Size(48, 32), seed=4)
    latent = torch.randn(1, 16, 4, 6, generator=torch.Generator().manual_seed(5))
    expected = chain.denoise(plain, latent)
    assert expected.std() > 0.05
    merged = rewrites.apply(copy.deepcopy(plain), [rewrite for rewrite in fe2e.REWRITES if rewrite.name in on])
    assert chain.relative_error(chain.denoise(merged, latent), expected.double()) <= BOUND
    text, _ = merged.denoiser.conditioning()
    assert text.shape[1] == PROMPTS[name]


def test_no_valid_row_is_an_error() -> None:
    with pytest.raises(CheckpointError, match="no valid token"):
        Prompt(np.ones((TOKENS, FEATURES), dtype=np.float32), np.zeros(TOKENS, dtype=np.bool_))
