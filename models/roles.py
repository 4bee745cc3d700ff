"""The files of a model, by role. Imports nothing heavy: `densegeo fetch` runs without torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Role:
    """One file of a model. files: the names under which the authors publish it, in order of preference; safetensors may
    be in shards and variants too, see `export.sources`.

    flag: whether an option of its name takes another file. optional: whether it may be missing. skip: the switch that
    leaves it out on purpose. merged_into: the role of the weights that it changes (a LoRA). made_from: the folder of a
    diffusers directory that it can be computed from.
    """

    name: str
    files: tuple[str, ...]
    where: str  # where it is published
    hint: str = ""  # what else to know when it is missing
    flag: bool = True
    optional: bool = False
    skip: str = ""
    merged_into: str = ""
    made_from: str = ""


_STEP1X = "published as stepfun-ai/Step1X-Edit on the Hugging Face Hub"
_DIFFUSERS = "in a diffusers directory, as FiffDepth's authors publish it"
_WEIGHTS = "diffusion_pytorch_model.safetensors"

FE2E_ROLES = (
    Role(
        "dit",
        (
            "step1x-edit-i1258.safetensors",
            "step1x-edit-v1p1-official.safetensors",
            "step1x-edit-i1258-v1p1-official.safetensors",
        ),
        _STEP1X,
    ),
    Role("vae", ("vae.safetensors",), _STEP1X),
    Role(
        "lora",
        ("LDRN.safetensors",),
        "published as exander/FE2E on the Hugging Face Hub",
        hint="Without the FE2E LoRA the base model edits images instead: --no-lora skips it on purpose.",
        skip="no_lora",
        merged_into="dit",
    ),
    Role(
        "prompt",
        ("no_info.npz", "no_info.safetensors", "latent/no_info.npz"),
        "in the authors' code repository AMAP-ML/FE2E, folder latent/",
    ),
    Role("config", (), "what the tensors do not tell, as JSON", optional=True),
)
FIFFDEPTH_ROLES = (
    Role("unet", (f"unet/{_WEIGHTS}",), _DIFFUSERS, flag=False),
    Role("unet_config", ("unet/config.json",), _DIFFUSERS, flag=False),
    Role("vae", (f"vae/{_WEIGHTS}",), _DIFFUSERS, flag=False),
    Role("vae_config", ("vae/config.json",), _DIFFUSERS, flag=False),
    Role(
        "prompt",
        ("empty_prompt.safetensors", "prompt.safetensors"),
        "the text encoder's output for no text",
        made_from="text_encoder",
    ),
)
