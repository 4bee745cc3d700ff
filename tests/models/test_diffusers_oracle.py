"""Random weights through diffusers' Flux transformer and autoencoder: an independent oracle of the whole pipeline."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch

from densegeo.benchmarks.baseline import make_baseline
from densegeo.benchmarks.synthetic import random_image, random_pipeline, random_prompt
from densegeo.models import chain, fe2e, rewrites
from densegeo.models.config import TransformerConfig, VAEConfig, transformer_config, vae_config
from densegeo.models.transformer import Transformer
from densegeo.models.vae import VAE
from densegeo.size import Size

pytestmark = pytest.mark.integration

BOUND = 1e-5


@dataclass(frozen=True)
class Case:
    """One configuration; sizes in features, pixels and tokens."""

    name: str
    head: int
    heads: int
    depths: tuple[int, int] = (1, 2)
    axes: tuple[int, int, int] | None = None  # None: 16:56:56 of the head size
    size: tuple[int, int] = (96, 64)  # width, height
    tokens: tuple[int, int] = (20, 6)  # prompt rows, valid ones
    connector: tuple[int, int] = (48, 3)  # features, heads
    context: int = 48
    pooled: int = 40
    vae: tuple[int, tuple[int, ...], int] = (32, (1, 1, 2, 2), 1)  # base width, multipliers, blocks

    def configs(self) -> tuple[TransformerConfig, VAEConfig]:
        hidden, (connector, connector_heads) = self.head * self.heads, self.connector
        ch, mult, blocks = self.vae
        transformer = TransformerConfig(
            hidden_size=hidden,
            num_heads=self.heads,
            axes_dim=self.axes or (self.head // 8, self.head * 7 // 16, self.head * 7 // 16),
            depth=self.depths[0],
            depth_single_blocks=self.depths[1],
            context_in_dim=connector,
            vec_in_dim=self.pooled,
            prompt_dim=self.context,
            connector_hidden=connector,
            connector_heads=connector_heads,
            connector_depth=2,
            mlp_hidden=4 * hidden,
            connector_mlp_hidden=4 * connector,
            in_channels=64,
        )
        return transformer, VAEConfig(ch=ch, ch_mult=mult, num_res_blocks=blocks, z_channels=16)


CASES = (
    Case("head-32-axes-given", 32, 2, axes=(8, 12, 12)),
    Case("head-16-one-valid", 16, 4, axes=(4, 6, 6), tokens=(24, 1)),
    Case("head-48-portrait-all-valid", 48, 2, axes=(12, 16, 20), size=(32, 112), tokens=(12, 12)),
    Case("head-64-one-head-panorama", 64, 1, (2, 1), size=(160, 16), tokens=(33, 32)),
    Case("head-128-deep", 128, 1, (2, 4), size=(48, 48), connector=(64, 4), context=56, pooled=24),
    Case("head-96-one-token", 96, 2, (1, 1), tokens=(1, 1), size=(16, 16)),
    Case("head-32-odd-widths", 32, 3, (3, 1), (4, 8, 20), (80, 48), (40, 7), (60, 5), 36, 72),
    Case("vae-two-blocks-a-level", 32, 2, (1, 1), vae=(32, (1, 1, 2, 3), 2), size=(32, 48)),
    Case("vae-wide", 32, 2, (1, 1), vae=(64, (1, 2, 2, 3), 1), size=(48, 16)),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_agrees_with_diffusers(case: Case) -> None:
    transformer, vae = case.configs()
    width, height = case.size
    prompt = random_prompt(*case.tokens, transformer.prompt_dim, seed=len(case.name))
    plain = random_pipeline(transformer, vae, prompt, Size(width, height), seed=len(case.name) + 1)
    rgb = random_image(width, height, seed=2)
    oracle = make_baseline(plain, vae)
    latent = oracle.encode(rgb)
    velocity = oracle.transform(latent)
    decoded = oracle.decode(velocity, height, width)
    for tensor in (latent, velocity, decoded):
        assert tensor.std() > 0.05
    assert (decoded.abs() > 1).float().mean() < 0.1  # not saturated

    for applied in ((), fe2e.REWRITES):
        ours = rewrites.apply(copy.deepcopy(plain), applied)
        our_latent = chain.encode(ours, rgb)
        assert chain.relative_error(our_latent, latent) <= BOUND
        our_velocity = chain.denoise(ours, our_latent)
        assert chain.relative_error(our_velocity, velocity) <= BOUND
        our_decoded = chain.decode(ours, chain.split(ours.decode, our_velocity, Size(width, height)))
        assert chain.relative_error(our_decoded, decoded) <= BOUND
        # What DESIGN calls p and the unit normals, spelled out.
        clamped = decoded.clamp(-1, 1)
        maps = chain.assemble(ours.decode, our_decoded, Size(width, height))
        assert chain.relative_error(maps.prediction, (clamped[0].sum(0) / 3 + 1) / 2) <= BOUND
        length = clamped[1].square().sum(0).sqrt().clamp(min=1e-9)
        assert chain.relative_error(-maps.normals.permute(2, 0, 1), clamped[1] / length) <= BOUND  # left, up, back


def test_architecture_is_read_from_the_shapes() -> None:
    for case in CASES:
        transformer, vae = case.configs()
        with torch.device("meta"):
            models = Transformer(transformer), VAE(vae)
        shapes, vae_shapes = ({key: tuple(t.shape) for key, t in model.state_dict().items()} for model in models)
        given = {"connector_heads": transformer.connector_heads}
        if case.axes:
            given |= {"axes_dim": case.axes}  # type: ignore[dict-item]
        assert transformer_config(shapes, given) == transformer
        assert vae_config(vae_shapes) == vae


@pytest.mark.parametrize("stage", ["transformer", "vae"])
def test_oracle_notices_a_small_mistake(stage: str) -> None:
    """A bound that an erf GELU, or GroupNorm's default eps, would pass proves nothing."""
    transformer, vae = CASES[0].configs()
    pipeline = random_pipeline(transformer, vae, random_prompt(20, 6, transformer.prompt_dim, 0), Size(96, 64), 1)
    rgb, oracle = random_image(96, 64, 2), make_baseline(pipeline, vae)
    latent = oracle.encode(rgb)
    if stage == "transformer":
        velocity = oracle.transform(latent)
        for block in pipeline.denoiser.double_blocks:
            block.img_mlp[1].approximate = "none"  # type: ignore[union-attr, index]
        assert chain.relative_error(chain.denoise(pipeline, latent), velocity) > BOUND
    else:
        for module in pipeline.vae.encoder.modules():
            if isinstance(module, torch.nn.GroupNorm):
                module.eps = 1e-4
        assert chain.relative_error(chain.encode(pipeline, rgb), latent) > BOUND
