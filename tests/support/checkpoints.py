"""Checkpoints smaller than any real model, and the options that build them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from densegeo.export.build_options import BuildOptions
from densegeo.export.sources import SourceOptions
from densegeo.models.config import TransformerConfig, VAEConfig
from densegeo.models.presets import write_random_checkpoint

SMALL = TransformerConfig(
    hidden_size=32,
    num_heads=2,
    axes_dim=(2, 8, 6),
    depth=1,
    depth_single_blocks=1,
    context_in_dim=128,
    vec_in_dim=16,
    prompt_dim=24,
    connector_hidden=128,
    connector_heads=1,
    connector_depth=1,
    mlp_hidden=64,
    connector_mlp_hidden=32,
    in_channels=64,
)
SMALL_VAE = VAEConfig(ch=32, ch_mult=(1, 1, 1, 1), num_res_blocks=1, z_channels=16)
CONFIG = '{"axes_dim": [2, 8, 6]}'
SIZE = (48, 32)  # width, height


def write_checkpoint(folder: Path, seed: int = 1) -> Path:
    """A directory with the authors' file names."""
    directory = folder / "checkpoint"
    write_random_checkpoint(directory, SMALL, SMALL_VAE, text_tokens=5, valid_tokens=2, seed=seed)
    (directory / "config.json").write_text(CONFIG)
    return directory


def small_source(checkpoint: Path) -> SourceOptions:
    """The files of `write_checkpoint`."""
    return SourceOptions(checkpoint=str(checkpoint), config=str(checkpoint / "config.json"), no_lora=True)


def options(checkpoint: Path, output: Path, **changes: object) -> BuildOptions:
    """A build of `write_checkpoint`'s directory, in float32 and at one size unless told otherwise."""
    values: dict[str, object] = {"model": "fe2e", "source": small_source(checkpoint), "sizes": (SIZE,)}
    return BuildOptions(output=output, **(values | changes))  # type: ignore[arg-type]


def golden_source(golden: Path, *, lora: bool = True) -> SourceOptions:
    """The files of the FE2E configuration that the authors' code was run on."""
    folder = golden / "fe2e_small"
    return SourceOptions(
        checkpoint=str(folder),
        dit=str(folder / "dit.safetensors"),
        lora=str(folder / "lora.safetensors") if lora else None,
        config=str(folder / "config.json"),
        no_lora=not lora,
    )


def leftovers(directory: Path) -> list[str]:
    """What unfinished builds left in a directory."""
    return sorted(path.name for path in directory.iterdir() if "building" in path.name)


PROGRAM = (sys.executable, "-m", "densegeo")


def run_build(
    checkpoint: Path, output: Path, program: Sequence[str] = PROGRAM, **keywords: object
) -> subprocess.Popen[str]:
    """`densegeo build` of `write_checkpoint`'s directory, in a process of its own."""
    command = [*program, "build", "--model", "fe2e", "--checkpoint", str(checkpoint)]
    command += ["--config", str(checkpoint / "config.json"), "--no-lora", "--size", "48x32", "--output", str(output)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **keywords)  # type: ignore[call-overload]
