"""The fetch command: a model's published files into the Hub's cache, from where `densegeo build` takes them.

It imports nothing heavy: it may run where there is a network and no torch.
"""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from densegeo.errors import CheckpointError, ConfigError
from densegeo.export import downloads
from densegeo.models.published import PUBLICATIONS


def fetch(
    model: Annotated[str, typer.Argument(help=f"{', '.join(PUBLICATIONS)}.", show_default=False)],
    offline: Annotated[bool, typer.Option("--offline", help="Only say what is here and what is missing.")] = False,
    any_digest: Annotated[
        bool, typer.Option("--any-digest", help="Take files whose digest is not the recorded one.")
    ] = False,
    no_lora: Annotated[bool, typer.Option("--no-lora", help="Leave the LoRA out.")] = False,
) -> None:
    """Download a model's files from where they are published, and check their digests.

    HF_ENDPOINT, HF_HOME and HF_TOKEN work as with huggingface_hub. A download that broke off goes on where it ended.
    """
    if model not in PUBLICATIONS:
        raise ConfigError(f"there is no model {model!r}; there are {', '.join(PUBLICATIONS)}")
    row, console = PUBLICATIONS[model], Console()
    if row.carried:
        console.print(f"{model} comes with densegeo: there is nothing to fetch.")
        return
    if not row.files:
        raise CheckpointError(row.nowhere)
    files = downloads.look(row, row.needed_roles(*(["no_lora"] if no_lora else [])), offline=offline)
    downloads.show(files, console)
    for path, origin in downloads.fetch(row, files, console, any_digest=any_digest).values():
        console.print(f"{path}  ({origin})", soft_wrap=True)
    console.print(f"Everything is here: densegeo build --model {model}")
