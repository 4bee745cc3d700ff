"""FE2E's exact rewrites (DESIGN section 4): the prompt and the timestep are constant, half of the canvas is zero."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from densegeo.models.connector import ConstantText
from densegeo.models.layers import Branch, FoldedModulation
from densegeo.models.rewrites import UPSAMPLE, Pipeline, Rewrite, Scope, block
from densegeo.models.transformer import (
    ConstantInputBlock,
    DoubleBlock,
    SingleBlock,
    Transformer,
    TrimmedSingleBlock,
)


def _transformer(pipeline: Pipeline) -> Transformer:
    assert isinstance(pipeline.denoiser, Transformer)
    return pipeline.denoiser


def collapse_guidance(pipeline: Pipeline) -> None:
    """Batch 2 -> 1: the guided and the unguided prompt are the same, so guidance returns the conditional velocity."""
    _transformer(pipeline).guidance = None


def _scale_rows(linear: nn.Module, gate: Tensor) -> None:
    """Multiply a linear's outputs by a constant gate (features,)."""
    assert isinstance(linear, nn.Linear)
    linear.weight.data *= gate[:, None]
    linear.bias.data *= gate


def fold_modulation(pipeline: Pipeline) -> None:
    """AdaLN vectors depend on t and the pooled prompt alone: norms become affine, gates move into linears' rows."""
    model = _transformer(pipeline)
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
    model = _transformer(pipeline)
    text, pooled = model.connector(model.prompt_embeds, model.prompt_mask, model.timestep)
    model.connector = ConstantText(model.txt_in(text), pooled)
    model.txt_in = nn.Identity()


# Why merging padding is exact. Let m masked prompt rows hold the same embedding.
# - They are equal when they enter: same embedding; and text tokens all have the position (0, 0, 0), hence one rotation.
# - A layer keeps them equal: linears, norms and gates work on each token alone, and attention gives equal queries equal
#   results, because every query sees the same keys under the same mask. By induction they are equal behind every block.
# - As keys they count m times: their m equal terms exp(l) in a softmax's sum are m exp(l) = exp(l + ln m), and so are
#   their equal values' weights. One row with ln m added to its logit is all of them.
# - Nobody reads their own outputs: only image tokens leave the network.
# The text mask is used in the connector alone, where the refiner's mask makes equal rows equal too. In the joint
# attention masked rows are keys like others, which is why they cannot simply be dropped. ln m stays float32: in bf16 it
# would put the padding's weight off by about 1 %. Valid rows are not merged, even equal ones: in the connector's masked
# mean each of them counts.
def merge_padding(pipeline: Pipeline) -> None:
    """Padding tokens with equal embeddings stay equal through every block: keep one of each group.

    It stands for the others by ln(multiplicity), added to its logit as a key, in float32 (DESIGN 4.4).
    """
    model = _transformer(pipeline)
    rows, counts = pipeline.prompt.merge_padding()
    if (counts == 1).all():
        return
    kept_rows = torch.from_numpy(rows)
    if isinstance(model.connector, ConstantText):
        model.connector.text = model.connector.text[:, kept_rows].clone()
    else:
        model.text_rows = kept_rows
    tokens = len(rows)
    dropped = len(pipeline.prompt.mask) - tokens
    model.rope_cos, model.rope_sin = model.rope_cos[dropped:].clone(), model.rope_sin[dropped:].clone()
    bias = torch.zeros(1, 1, 1, tokens + model.image_tokens)
    bias[..., :tokens] = torch.from_numpy(counts).double().log().float()
    model.key_bias = bias


def fold_constants(pipeline: Pipeline) -> None:
    """The left half and the text enter the first block as constants: project the image half alone."""
    model = _transformer(pipeline)
    model.constant_canvas = True
    first = model.double_blocks[0]
    assert isinstance(first, DoubleBlock)
    text, _ = model.conditioning()
    model.double_blocks[0] = ConstantInputBlock(first, text[:1], model.img_in.bias[None, None])


def trim_last_block(pipeline: Pipeline) -> None:
    """After the last attention only image tokens are needed: text is projected to keys and values alone."""
    model = _transformer(pipeline)
    if model.single_blocks:
        last = model.single_blocks[-1]
        assert isinstance(last, SingleBlock)
        model.single_blocks[-1] = TrimmedSingleBlock(last, model.text_tokens)


def batch_decoder(pipeline: Pipeline) -> None:
    """Both halves decode as one batch of two."""
    pipeline.decoder_batch = 2


REWRITES = (
    Rewrite("guidance", collapse_guidance, summary="batch of two identical prompts -> one", scope=Scope("outside")),
    Rewrite("modulation", fold_modulation, summary="AdaLN vectors become constants"),
    Rewrite("connector", fold_connector, summary="text tokens become constants", scope=Scope("prompt")),
    Rewrite("padding", merge_padding, summary="equal padding tokens merge into one", scope=Scope("prompt")),
    Rewrite(
        "constants",
        fold_constants,
        requires=("modulation", "connector"),
        summary="first block projects the image half alone",
        scope=block("double_blocks", 0),
    ),
    Rewrite("trim", trim_last_block, summary="last block updates image tokens alone", scope=block("single_blocks", -1)),
    Rewrite("decoder", batch_decoder, summary="both halves decode as one batch", scope=Scope("decoder")),
    UPSAMPLE,
)
NAMES = tuple(rewrite.name for rewrite in REWRITES)
