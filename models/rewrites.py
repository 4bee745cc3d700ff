"""Exact rewrites (DESIGN section 4): each gives the same function with less work, and can be switched off alone.

The prompt is constant, the timestep is constant and half of the canvas is zero. Each rewrite is one small function over
a `Pipeline` in float32; REWRITES lists them in the order in which they are applied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from densegeo.errors import ConfigError
from densegeo.models.connector import ConstantText
from densegeo.models.layers import Branch, FoldedModulation
from densegeo.models.prompt import Prompt
from densegeo.models.transformer import (
    ConstantInputBlock,
    DoubleBlock,
    SingleBlock,
    Transformer,
    TrimmedSingleBlock,
)
from densegeo.models.vae import VAE, Level, PhaseUpsample, Upsample


@dataclass
class Pipeline:
    """The three networks of one model, and how many latents one decoder run takes."""

    transformer: Transformer  # bound to a prompt
    vae: VAE
    prompt: Prompt
    decoder_batch: int = 1

    def eval(self) -> Pipeline:
        for module in (self.transformer, self.vae):
            module.eval().requires_grad_(False)
        return self


def collapse_guidance(pipeline: Pipeline) -> None:
    """Batch 2 -> 1: the guided and the unguided prompt are the same, so guidance returns the conditional velocity."""
    pipeline.transformer.guidance = None


def _scale_rows(linear: nn.Module, gate: Tensor) -> None:
    """Multiply a linear's outputs by a constant gate (features,)."""
    assert isinstance(linear, nn.Linear)
    linear.weight.data *= gate[:, None]
    linear.bias.data *= gate


def fold_modulation(pipeline: Pipeline) -> None:
    """AdaLN vectors depend on t and the pooled prompt alone: norms become affine, gates move into linears' rows."""
    model = pipeline.transformer
    guidance, model.guidance = model.guidance, None
    _, vec = model.conditioning()
    model.guidance = guidance
    assert vec is not None

    def folded(modulation: nn.Module, *gated: nn.Module) -> FoldedModulation:
        branches: tuple[Branch, ...] = modulation(vec)
        for branch, linear in zip(branches, gated, strict=False):
            assert branch.gate is not None
            _scale_rows(linear, branch.gate[0, 0])
        return FoldedModulation(branches)

    for double in model.double_blocks:
        assert isinstance(double, DoubleBlock)
        double.img_mod = folded(double.img_mod, double.img_attn.proj, double.img_mlp[2])
        double.txt_mod = folded(double.txt_mod, double.txt_attn.proj, double.txt_mlp[2])
    for single in model.single_blocks:
        assert isinstance(single, SingleBlock)
        single.modulation = folded(single.modulation, single.linear2)
    model.final_layer.adaLN_modulation = folded(model.final_layer.adaLN_modulation)
    model.time_in = model.vector_in = None


def fold_connector(pipeline: Pipeline) -> None:
    """Text tokens after the connector and txt_in, and the pooled vector, are constants."""
    model = pipeline.transformer
    text, pooled = model.connector(model.prompt_embeds, model.prompt_mask, model.timestep)
    model.connector = ConstantText(model.txt_in(text), pooled)
    model.txt_in = nn.Identity()


def merge_padding(pipeline: Pipeline) -> None:
    """Padding tokens with equal embeddings stay equal through every block: keep one of each group.

    It stands for the others by ln(multiplicity), added to its logit as a key, in float32 (DESIGN 4.4).
    """
    model = pipeline.transformer
    rows, counts = pipeline.prompt.merge_padding()
    if (counts == 1).all():
        return
    kept = torch.from_numpy(rows)
    if isinstance(model.connector, ConstantText):
        model.connector.text = model.connector.text[:, kept].clone()
    else:
        model.text_rows = kept
    tokens = len(rows)
    dropped = len(pipeline.prompt.mask) - tokens
    model.rope_cos, model.rope_sin = model.rope_cos[dropped:].clone(), model.rope_sin[dropped:].clone()
    bias = torch.zeros(1, 1, 1, tokens + model.image_tokens)
    bias[..., :tokens] = torch.from_numpy(counts).double().log().float()
    model.key_bias = bias


def fold_constants(pipeline: Pipeline) -> None:
    """The left half and the text enter the first block as constants: project the image half alone."""
    model = pipeline.transformer
    model.constant_canvas = True
    first = model.double_blocks[0]
    assert isinstance(first, DoubleBlock)
    text, _ = model.conditioning()
    model.double_blocks[0] = ConstantInputBlock(first, text[:1], model.img_in.bias[None, None])


def trim_last_block(pipeline: Pipeline) -> None:
    """After the last attention only image tokens are needed: text is projected to keys and values alone."""
    model = pipeline.transformer
    if model.single_blocks:
        last = model.single_blocks[-1]
        assert isinstance(last, SingleBlock)
        model.single_blocks[-1] = TrimmedSingleBlock(last, model.text_tokens)


def batch_decoder(pipeline: Pipeline) -> None:
    """Both halves decode as one batch of two."""
    pipeline.decoder_batch = 2


def fold_upsampling(pipeline: Pipeline) -> None:
    """Nearest x2 followed by a 3x3 convolution is four 2x2 convolutions on the small image."""
    for level in pipeline.vae.decoder.up:
        assert isinstance(level, Level)
        if level.resample == "up" and isinstance(level.upsample, Upsample):
            level.upsample = PhaseUpsample(level.upsample)


@dataclass(frozen=True)
class Rewrite:
    name: str
    apply: Callable[[Pipeline], None]
    requires: tuple[str, ...] = ()
    summary: str = ""
    network: str = "transformer"  # which one it changes, or "vae"


REWRITES = (
    Rewrite("guidance", collapse_guidance, summary="batch of two identical prompts -> one"),
    Rewrite("modulation", fold_modulation, summary="AdaLN vectors become constants"),
    Rewrite("connector", fold_connector, summary="text tokens become constants"),
    Rewrite("padding", merge_padding, summary="equal padding tokens merge into one"),
    Rewrite("constants", fold_constants, ("modulation", "connector"), "first block projects the image half alone"),
    Rewrite("trim", trim_last_block, summary="last block updates image tokens alone"),
    Rewrite("decoder", batch_decoder, summary="both halves decode as one batch", network="vae"),
    Rewrite("upsample", fold_upsampling, summary="upsampling convolutions work on the small image", network="vae"),
)
NAMES = tuple(rewrite.name for rewrite in REWRITES)


def select(without: Iterable[str] = ()) -> tuple[Rewrite, ...]:
    """The rewrites to apply when those named in `without` are off; what requires one of them is off too.

    Raises ConfigError for a name that is no rewrite.
    """
    off = set(without)
    if unknown := sorted(off - set(NAMES)):
        raise ConfigError(f"no rewrite is called {', '.join(unknown)}; there are {', '.join(NAMES)}")
    return tuple(r for r in REWRITES if r.name not in off and not off.intersection(r.requires))


@torch.no_grad()
def apply(pipeline: Pipeline, rewrites: Iterable[Rewrite]) -> Pipeline:
    """Apply rewrites in place, in order, to a float32 pipeline; returns it."""
    for rewrite in rewrites:
        rewrite.apply(pipeline)
    return pipeline.eval()
