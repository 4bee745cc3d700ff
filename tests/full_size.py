"""The one line at full size: `make one-line` (an hour on two cores, 65 GB of disk).

A server on this machine stands for the Hub: it has FE2E's files under their real names, 24 GB, and makes their random
content while it is fetched. `python export/build_engine.py --model fe2e` plans, fetches and builds; it is broken off
when the weights are done, and started again with zeros in the place of the checkpoint's tensors. Peak memory and disk,
time by stage and what both runs said are reported.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
import typer

from densegeo.benchmarks.environment import environment, write_json
from densegeo.benchmarks.fullsize import (
    INTERRUPTED,
    Shapes,
    checkpoint_shapes,
    measure,
    random_tensor,
    write_random_prompt,
)
from densegeo.benchmarks.setups import FULL
from densegeo.errors import ResourceError
from densegeo.export import digests
from densegeo.export.downloads import GITHUB
from densegeo.export.staging import folder_bytes, staging_folder
from densegeo.models.published import PUBLICATIONS
from densegeo.models.streaming import safetensors_head
from densegeo.runtime.bundle import read_manifest
from tests.support.hub import Content, Hub, serve

FILES = {row.role: row for row in PUBLICATIONS["fe2e"].files}


class RandomFile:
    """A safetensors file of `random_tensor`s that lies nowhere."""

    def __init__(self, shapes: Shapes) -> None:
        self.shapes = shapes
        self.head, ends = safetensors_head({name: (shape, torch.bfloat16) for name, shape in shapes.items()})
        self.etag = hashlib.sha256(self.head).hexdigest()  # what a cache tells files apart by
        begins = (0, *ends.values())
        self.lengths = {name: end - begin for (name, end), begin in zip(ends.items(), begins, strict=False)}

    def __len__(self) -> int:
        return len(self.head) + sum(self.lengths.values())

    def pieces(self, start: int, largest: int) -> Iterator[bytes]:
        """Tensor by tensor; those before `start` are not made."""
        at = 0
        for name in (None, *self.shapes):
            length = len(self.head) if name is None else self.lengths[name]
            if at + length > start:
                data = self.head if name is None else self.content(name)
                for begin in range(max(start - at, 0), length, largest):
                    yield data[begin : begin + largest]
            at += length

    def content(self, name: str) -> bytes:
        return random_tensor(name, self.shapes[name]).reshape(-1).view(torch.uint8).numpy().tobytes()


def hollow(hub: Path) -> None:
    """Put zeros in place of all large files' tensors, as nobody notices who does not read them."""
    for path in hub.rglob("*"):
        if path.is_symlink() or not path.is_file() or path.stat().st_size < 10**8:
            continue
        known, size = digests.sha256(path), path.stat().st_size
        with open(path, "r+b") as file:
            header = 8 + int.from_bytes(file.read(8), "little")
            file.truncate(header)
            file.truncate(size)
        digests.remember(path, known)


def stages(log: str) -> dict[str, str]:
    """What a run said of its stages."""
    return dict(re.findall(r"^(fetching|weights|graphs|kernels|engines): (.+)$", log, flags=re.MULTILINE))


def run(folder: Path, size: str, arguments: list[str], json_file: Path | None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    machine = environment(("torch", "onnx", "onnxruntime", "huggingface-hub", "tensorrt-rtx-cu13"))
    prompt, output = folder / "no_info.npz", folder / "fe2e"
    write_random_prompt(prompt, FULL.transformer.prompt_dim, FULL.tokens, FULL.valid)
    contents: dict[str, Path | Content] = {
        role: RandomFile(shapes) for role, shapes in checkpoint_shapes(FULL.transformer, FULL.vae).items()
    }
    hub = Hub({f"{row.repository}/{row.path}": contents.get(role, prompt) for role, row in FILES.items()})
    command = [sys.executable, "export/build_engine.py", "--model", "fe2e", "--any-digest", "--size", size]
    command += ["--output", str(output), *arguments]
    largest = 0

    def watch(process: subprocess.Popen[bytes]) -> None:
        nonlocal largest
        largest = max(largest, sum(folder_bytes(part) for part in (folder / "hub", staging_folder(output), output)))

    def until_weights(process: subprocess.Popen[bytes]) -> None:
        watch(process)
        if (staging_folder(output) / "weights.json").exists():
            process.send_signal(signal.SIGINT)

    with serve(hub):
        os.environ |= {
            "HF_ENDPOINT": hub.address,
            GITHUB: hub.address,
            "HF_HOME": str(folder / "hub"),
            "HF_HUB_DISABLE_XET": "1",
            "XDG_CACHE_HOME": str(folder / "cache"),
        }
        first = measure(command, folder / "first.log", until_weights)
        if first.exit_code != INTERRUPTED:
            raise ResourceError(f"the first run was not interrupted: {(folder / 'first.log').read_text()[-2000:]}")
        hub.requests.clear()
        hollow(folder / "hub")
        second = measure(command, folder / "second.log", watch)
    manifest = read_manifest(output)
    logs = {name: (folder / f"{name}.log").read_text() for name in ("first", "second")}
    report: dict[str, Any] = {
        **machine,
        "line": " ".join(["python", *command[1:]]),
        "checkpoint_bytes": sum(len(content) for content in contents.values() if isinstance(content, RandomFile)),
        "largest_on_disk_bytes": largest,
        "bundle_bytes": sum(file.bytes for file in manifest.files.values()),
        "runs": [
            {"seconds": run.seconds, "anonymous_gib": run.anonymous_gib, "stages": stages(logs[name])}
            for name, run in (("first", first), ("second", second))
        ],
        "fetched_by_the_second_run": [path for method, path, _ in hub.requests if method == "GET"],
        "said": {name: log.splitlines()[-40:] for name, log in logs.items()},
        "checks": msgspec.to_builtins(manifest.verification.checks),
    }
    if json_file is not None:
        write_json(json_file, report)
    typer.echo(json.dumps(report, indent=1))


def main(
    folder: Annotated[Path, typer.Option(help="Where downloads and bundle go: 65 GB.")] = Path("out/one-line"),
    size: Annotated[str, typer.Option(help="WIDTHxHEIGHT of the bundle's bucket.")] = "256x192",
    arch: Annotated[list[str] | None, typer.Option("--gpu-arch", help="Engines for it; else what suits here.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the result to this file.")] = None,
) -> None:
    """Build FE2E at full size by the one line, from a server on this machine."""
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # else a shell's background job hands on that it is ignored
    if folder.exists():
        shutil.rmtree(folder)
    run(folder, size, [f"--gpu-arch={number}" for number in arch or ()], json_file)


if __name__ == "__main__":
    typer.run(main)
