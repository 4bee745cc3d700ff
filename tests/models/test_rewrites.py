"""Each rewrite changes parameters and floating-point operations by the amount that the architecture predicts."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from densegeo.benchmarks.synthetic import random_pipeline, random_prompt
from densegeo.errors import ConfigError
from densegeo.models import chain, fe2e, rewrites
from densegeo.models.config import TransformerConfig, VAEConfig
from densegeo.models.fe2e import NAMES, REWRITES
from densegeo.models.prompt import Prompt
from densegeo.models.rewrites import Pipeline
from densegeo.size import Size

# Sizes that differ from each other wherever they may, so that no formula is right by accident.
C = TransformerConfig(
    hidden_size=96,
    num_heads=3,
    axes_dim=(4, 14, 14),
    depth=2,
    depth_single_blocks=3,
    context_in_dim=40,
    vec_in_dim=28,
    prompt_dim=36,
    connector_hidden=40,
    connector_heads=2,
    connector_depth=2,
    mlp_hidden=360,
    connector_mlp_hidden=72,
    in_channels=64,
)
V = VAEConfig(ch=32, ch_mult=(1, 2, 3), num_res_blocks=1, z_channels=16)
WIDTH, HEIGHT = 64, 48
TEXT, VALID = 18, 5
KEPT = VALID + 1  # all padding rows are equal
HALF = (WIDTH // 16) * (HEIGHT // 16)  # image tokens of one half


@pytest.fixture(scope="module")
def plain() -> Pipeline:
    return random_pipeline(C, V, random_prompt(TEXT, VALID, C.prompt_dim, 0), Size(WIDTH, HEIGHT), seed=1)


def with_names(plain: Pipeline, names: frozenset[str]) -> Pipeline:
    return rewrites.apply(copy.deepcopy(plain), [rewrite for rewrite in REWRITES if rewrite.name in names])


def combinations() -> list[frozenset[str]]:
    """None; all; all but one (and what requires it); one alone (and what it requires)."""
    actual = [frozenset[str](), frozenset(NAMES)]
    actual += [frozenset(rewrite.name for rewrite in rewrites.select(fe2e.REWRITES, without=[name])) for name in NAMES]
    actual += [frozenset({rewrite.name, *rewrite.requires}) for rewrite in REWRITES]
    return list(dict.fromkeys(actual))


def label(names: frozenset[str]) -> str:
    if len(names) > len(NAMES) / 2:
        return "all-but-" + "-".join(name for name in NAMES if name not in names)
    return "-".join(name for name in NAMES if name in names) or "none"


def linear(inputs: int, outputs: int) -> int:
    """Parameters of a linear with bias."""
    return inputs * outputs + outputs


def predicted_size(on: frozenset[str]) -> int:
    """Numbers that the transformer stores: parameters and folded constants."""
    h, v, c = C.hidden_size, C.vec_in_dim, C.connector_hidden
    qk_norm = 2 * C.head_size
    stream = linear(h, 3 * h) + qk_norm + linear(h, h) + linear(h, C.mlp_hidden) + linear(C.mlp_hidden, h)
    single = linear(h, 3 * h + C.mlp_hidden) + qk_norm + linear(h + C.mlp_hidden, h)
    size = linear(C.in_channels, h) + C.depth * 2 * stream + C.depth_single_blocks * single + linear(h, C.in_channels)
    if "modulation" in on:
        size += C.depth * 4 * 2 * h + C.depth_single_blocks * 2 * h + 2 * h  # an affine pair a branch
    else:
        size += C.depth * 2 * linear(h, 6 * h) + C.depth_single_blocks * linear(h, 3 * h) + linear(h, 2 * h)
        size += linear(256, h) + linear(h, h) + linear(v, h) + linear(h, h)
    kept = KEPT if "padding" in on else TEXT
    if "connector" in on:
        size += kept * h + v
    else:
        block = 4 * c + linear(c, 3 * c) + linear(c, c) + linear(c, 2 * c)
        block += linear(c, C.connector_mlp_hidden) + linear(C.connector_mlp_hidden, c)
        size += linear(C.prompt_dim, c) + linear(256, c) + linear(c, c) + linear(C.prompt_dim, c) + linear(c, c)
        size += C.connector_depth * block + 1 + linear(C.prompt_dim, v) + linear(C.context_in_dim, h)
    if "constants" in on:
        size += 3 * kept * h + 3 * h - linear(h, 3 * h) - qk_norm
    return size


def predicted_flops(on: frozenset[str]) -> int:
    """Floating-point operations of matrix products in the transformer; a multiply-add is two."""
    h, mlp, v, c = C.hidden_size, C.mlp_hidden, C.vec_in_dim, C.connector_hidden
    batch = 1 if "guidance" in on else 2
    text = KEPT if "padding" in on else TEXT
    image = 2 * HALF
    tokens = text + image
    macs = (HALF if "constants" in on else image) * C.in_channels * h  # before the batch is made
    pooled_rows = 1
    if "connector" not in on:
        pooled_rows = batch
        block = TEXT * (4 * c * c + 2 * c * C.connector_mlp_hidden) + 2 * TEXT * TEXT * c + 2 * c * c
        macs += 256 * c + c * c  # the timestep's embedding has no batch
        macs += batch * (TEXT * C.prompt_dim + C.prompt_dim * c + c * c + TEXT * C.prompt_dim * c)
        macs += batch * (C.connector_depth * block + C.prompt_dim * v + TEXT * C.context_in_dim * h)
    if "modulation" not in on:
        macs += 256 * h + h * h + pooled_rows * (v * h + h * h)
        macs += batch * h * h * (12 * C.depth + 3 * C.depth_single_blocks + 2)
    attention = 2 * tokens * tokens * h
    macs += batch * C.depth * (tokens * (4 * h * h + 2 * h * mlp) + attention)
    if "constants" in on:
        macs -= batch * (text + HALF) * 3 * h * h
    macs += batch * C.depth_single_blocks * (tokens * (4 * h * h + 2 * h * mlp) + attention)
    if "trim" in on:  # no query, MLP and output of the text
        macs -= batch * text * (h * (h + mlp) + (h + mlp) * h) + batch * 2 * text * tokens * h
    return 2 * (macs + batch * image * h * C.in_channels)


def predicted_decoder(on: frozenset[str]) -> tuple[int, int]:
    """Change of the decoder's parameters and of its operations for two images, by phase-wise upsampling."""
    if "upsample" not in on:
        return 0, 0
    widths = [mult * V.ch for mult in V.ch_mult]
    parameters = flops = 0
    for level in range(1, len(widths)):  # the level's input is 1 / 2^level of the image
        width, height, row = widths[level], HEIGHT >> level, WIDTH >> level
        parameters += 16 * width**2 + 4 * width - (9 * width**2 + width)
        flops += 2 * 2 * (16 * width**2 * (height + 1) * (row + 1) - 9 * width**2 * 4 * height * row)
    return parameters, flops


def stored(module: nn.Module) -> int:
    return sum(tensor.numel() for tensor in module.state_dict().values())


def sdpa_flops(
    query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...], *_: Any, out_shape: Any = None, **__: Any
) -> int:
    batch, heads, queries, size = query
    return 2 * batch * heads * queries * key[2] * (size + value[3])


def measured_flops(run: Any) -> int:
    mapping = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flops}
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        run()
    return int(counter.get_total_flops())


@pytest.mark.parametrize("names", combinations(), ids=label)
def test_transformer_shrinks_as_predicted(plain: Pipeline, names: frozenset[str]) -> None:
    pipeline = with_names(plain, names)
    assert stored(pipeline.denoiser) == predicted_size(names)
    latent = torch.zeros(1, 16, HEIGHT // 8, WIDTH // 8)
    assert measured_flops(lambda: pipeline.denoiser(latent)) == predicted_flops(names)


@pytest.mark.parametrize("names", [frozenset[str](), frozenset({"upsample"}), frozenset({"decoder"})], ids=label)
def test_decoder_changes_as_predicted(plain: Pipeline, names: frozenset[str]) -> None:
    pipeline = with_names(plain, names)
    latents = torch.zeros(2, 16, HEIGHT // 4, WIDTH // 4)  # this toy autoencoder has three levels
    calls: list[int] = []
    pipeline.vae.decoder.register_forward_pre_hook(lambda _, args: calls.append(args[0].shape[0]))
    flops = measured_flops(lambda: chain.decode(pipeline, latents))
    parameters_more, flops_more = predicted_decoder(names)
    assert stored(pipeline.vae) - stored(plain.vae) == parameters_more
    assert flops - measured_flops(lambda: chain.decode(plain, latents)) == flops_more
    assert calls == ([2] if "decoder" in names else [1, 1])
    if names == {"upsample"}:
        assert flops_more < 0


def test_every_rewrite_changes_something(plain: Pipeline) -> None:
    """No row of the table is empty."""
    everything = frozenset(NAMES)
    for name in NAMES:
        rest = frozenset(rewrite.name for rewrite in rewrites.select(fe2e.REWRITES, without=[name]))
        assert name not in rest
        if name == "upsample":
            assert predicted_decoder(rest) != predicted_decoder(everything)
        elif name == "decoder":
            assert with_names(plain, rest).decoder_batch != with_names(plain, everything).decoder_batch
        else:
            assert predicted_flops(rest) > predicted_flops(everything)


def test_what_requires_an_absent_rewrite_is_off_too() -> None:
    for rewrite in REWRITES:
        for required in rewrite.requires:
            assert rewrite.name not in [kept.name for kept in rewrites.select(fe2e.REWRITES, without=[required])]
    with pytest.raises(ConfigError, match="nonsense"):
        rewrites.select(fe2e.REWRITES, without=["nonsense"])


def test_rewrites_leave_the_original_alone(plain: Pipeline) -> None:
    before = copy.deepcopy(plain.denoiser.state_dict())
    with_names(plain, frozenset(NAMES))
    assert all(torch.equal(before[key], tensor) for key, tensor in plain.denoiser.state_dict().items())


@given(
    st.lists(st.tuples(st.booleans(), st.integers(0, 3)), min_size=1, max_size=24).filter(
        lambda rows: any(r[0] for r in rows)
    )
)
def test_merge_padding_partitions_the_rows(rows: list[tuple[bool, int]]) -> None:
    """Valid rows all stay; of masked rows exactly the first of each distinct embedding; counts add up."""
    values = np.array([[0.0, -0.0, 1.5, 0.1][value] for _, value in rows], dtype=np.float32)
    embeds = np.stack([values, -values * 2], axis=1)
    mask = np.array([valid for valid, _ in rows])
    kept, counts = Prompt(embeds, mask).merge_padding()
    assert counts.sum() == len(rows)
    assert (np.diff(kept) > 0).all()
    assert set(np.flatnonzero(mask)) <= set(kept)
    assert (counts[mask[kept]] == 1).all()
    masked_kept = [row for row in kept if not mask[row]]
    for row in np.flatnonzero(~mask):
        equal = [other for other in np.flatnonzero(~mask) if (embeds[other] == embeds[row]).all()]
        representative = [other for other in masked_kept if (embeds[other] == embeds[row]).all()]
        assert representative == equal[:1]
        assert counts[list(kept).index(representative[0])] == len(equal)
