"""Whose tensors a file holds, told by their names, when they are not those that are wanted."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection

# (names that a file of this layout has one of each, what it is and what to do); the first row that fits counts.
_LAYOUTS: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        (r"model\.diffusion_model\.", r"(first_stage_model|vae|cond_stage_model|text_encoders|conditioner)\."),
        "a whole pipeline in one file (as ComfyUI and the first Stable Diffusion code write it). For FiffDepth, "
        "StableDiffusionPipeline.from_single_file(FILE).save_pretrained(DIR) of diffusers makes the directory for "
        "--checkpoint; FE2E takes transformer and autoencoder as files of their own",
    ),
    (
        (r".*\b(lora_[AB]|lora_down|lora_up|lora\.down|lora\.up)\b",),
        "a LoRA and no model: FE2E's goes to --lora, in kohya's form (lora_unet_<module>.lora_down.weight)",
    ),
    (
        (r"(single_)?transformer_blocks\.",),
        "a Flux-like transformer in diffusers' layout. FE2E takes the authors' (double_blocks, single_blocks): "
        "step1x-edit-i1258.safetensors of stepfun-ai/Step1X-Edit on the Hugging Face Hub",
    ),
    (
        (r"double_blocks\.", r"single_blocks\."),
        "a Flux-like transformer in its authors' layout, which is FE2E's part --dit",
    ),
    (
        (r"encoder\.down\.\d", r"decoder\.up\.\d"),
        "an autoencoder in the layout of Flux's and Stable Diffusion's authors, which FE2E takes as --vae; FiffDepth's "
        "lies in vae/ of a diffusers directory",
    ),
    (
        (r"encoder\.down_blocks\.", r"decoder\.up_blocks\."),
        "an autoencoder in diffusers' layout. FE2E takes its authors' vae.safetensors of stepfun-ai/Step1X-Edit on the "
        "Hugging Face Hub",
    ),
    (
        (r"input_blocks\.\d", r"output_blocks\.\d"),
        "a U-Net in the layout of Stable Diffusion's first code. FiffDepth's is diffusers' (down_blocks, up_blocks)",
    ),
    ((r"down_blocks\.", r"up_blocks\."), "a U-Net in diffusers' layout, which FiffDepth takes as unet/ of a directory"),
    ((r"(text_model|encoder\.block|model\.layers|layers)\.",), "a text encoder's"),
)
_QUANTIZED = re.compile(r".*\.(absmax|quant_map|quant_state\.\w+|scale_weight|weight_scale|scaled_fp8|qweight|qzeros)$")


def layout(names: Collection[str]) -> str:
    """What a file holds, in words: how many tensors of which parts, and whose layout it is, if it is a known one."""
    parts = Counter(".".join(name.split(".")[: 2 if name.startswith("model.") else 1]) for name in names)
    shown = ", ".join(f"{part} ({count})" for part, count in parts.most_common(6))
    more = f" and {len(parts) - 6} more" if len(parts) > 6 else ""
    contents = f"it holds {len(names)} tensors: {shown}{more}" if names else "it holds no tensor"
    owner = next(
        (text for patterns, text in _LAYOUTS if all(any(re.match(p, name) for name in names) for p in patterns)), ""
    )
    return contents + (f". That is {owner}" if owner else "")


def quantized(names: Collection[str], dtypes: Collection[str]) -> bool:
    """Whether weights are stored in so few bits that they must be read in another way than as they are."""
    return any(dtype in ("U8", "I8", "F8_E4M3", "F8_E5M2") for dtype in dtypes) or any(
        _QUANTIZED.match(name) for name in names
    )
