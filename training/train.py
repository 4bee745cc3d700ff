"""Trains fe2e-tiny from nothing: `python training/train.py`, in two stages that resume where they were cut off."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from densegeo.cli import guarded
from densegeo.size import Size
from densegeo.training import autoencoder, diffusion, publish
from densegeo.training.data import CHUNK, read_chunks, render_chunks

SEED = 0
SIZE = Size(256, 192)
VIEWS, AUTOENCODER_VIEWS = 24000, 3000
MIRRORED = 8000  # of the views, whose mirror images are views too


def run(folder: Path, output: Path, views: int, until: int | None, compiled: bool, device: torch.device) -> None:
    console = Console()
    files = render_chunks(folder / "views", SEED, "train", min(views, AUTOENCODER_VIEWS), SIZE)
    chunk = read_chunks(files)
    vae = autoencoder.train(chunk, folder, seed=SEED, device=device, until=until)
    console.print("autoencoder, errors on its training views:", autoencoder.validate(vae, chunk))
    weights = diffusion.readout(vae, chunk)
    del chunk
    files = render_chunks(folder / "views", SEED, "train", views, SIZE)
    latents = diffusion.encode(vae, files, folder / "latents", device, mirrored=min(views, MIRRORED) // CHUNK)
    transformer = diffusion.train(
        vae, latents, folder, weights=weights, seed=SEED, device=device, compiled=compiled, until=until
    )
    for file in publish.write(transformer, vae, diffusion.prompt(SEED), output):
        console.print(f"wrote {file} ({file.stat().st_size / 1e6:.2f} MB)")


def main(
    folder: Annotated[Path, typer.Option(help="Where views, checkpoints and curves go; a run resumes from it.")] = Path(
        "out/training"
    ),
    output: Annotated[Path, typer.Option(help="Where the trained files go.")] = Path("out/training/fe2e-tiny"),
    views: Annotated[int, typer.Option(min=8, help="Scenes to render.")] = VIEWS,
    until: Annotated[int | None, typer.Option(min=1, help="Stop each stage at this step of its schedule.")] = None,
    compiled: Annotated[
        bool, typer.Option("--compile/--no-compile", help="torch.compile: twice as fast, needs a C++ compiler.")
    ] = True,
    device: Annotated[str, typer.Option(help="A torch device.")] = "cuda" if torch.cuda.is_available() else "cpu",
) -> None:
    """Render scenes, train the autoencoder, encode the scenes, train the transformer, write the weights.

    About two and a half hours on two CPU cores, minutes on a GPU. Run it again to resume.
    """
    guarded(lambda: run(folder, output, views, until, compiled, torch.device(device)))


if __name__ == "__main__":
    typer.run(main)
