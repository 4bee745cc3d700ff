"""Published files through real downloads from a server on this machine: plan, resumption, digests, and what is said."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from densegeo.cli import main
from densegeo.errors import CheckpointError
from densegeo.export import downloads
from densegeo.models.presets import PRESETS, write_random_checkpoint
from densegeo.models.published import PUBLICATIONS, Published
from densegeo.runtime import Estimator
from densegeo.runtime.bundle import read_manifest
from tests.support.checkpoints import CONFIG, SMALL, SMALL_VAE
from tests.support.hub import Hub, serve

FILES = PUBLICATIONS["fe2e"].files
NAMES = {row.role: f"{row.repository}/{row.path}" for row in FILES}
BIG = 34_000_000  # bytes: several of the chunks that are written at once


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """Small random files under the real names."""
    folder = tmp_path / "published"
    write_random_checkpoint(folder, SMALL, SMALL_VAE, text_tokens=5, valid_tokens=2, seed=1)
    width, generator = SMALL.hidden_size, torch.Generator().manual_seed(3)
    update = {
        "lora_down.weight": torch.randn(2, width, generator=generator),
        "lora_up.weight": 0.1 * torch.randn(3 * width, 2, generator=generator),
    }
    save_file(
        {f"lora_unet_double_blocks_0_img_attn_qkv.{key}": value for key, value in update.items()},
        folder / "LDRN.safetensors",
    )
    files = {
        "dit": "step1x-edit-i1258.safetensors",
        "vae": "vae.safetensors",
        "lora": "LDRN.safetensors",
        "prompt": "no_info.npz",
    }
    with serve(Hub({NAMES[role]: folder / name for role, name in files.items()})) as served:
        yield served


def environment(address: str, tmp_path: Path, **more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    mine = {"HF_ENDPOINT": address, downloads.GITHUB: address, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": "hf_secret"}
    return kept | mine | {"XDG_CACHE_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1"} | more


def start(command: list[str], hub: Hub, tmp_path: Path, **more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "densegeo", *command],
        env=environment(hub.address, tmp_path, **more),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def say(command: list[str], hub: Hub, tmp_path: Path, code: int = 0, **more: str) -> str:
    process = start(command, hub, tmp_path, **more)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == code, output
    assert "Traceback" not in output
    assert "hf_secret" not in output
    return " ".join(output.split())


def fetched(hub: Hub) -> set[str]:
    """Names of the files that were sent."""
    return {Path(path).name for method, path, _ in hub.requests if method == "GET" and not path.startswith("api/")}


@pytest.mark.thorough
def test_one_line_from_nothing_to_a_bundle(hub: Hub, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(CONFIG)
    output = tmp_path / "bundle"
    line = ["build", "--model", "fe2e", "--config", str(config), "--size", "48x32", "--output", str(output)]
    refused = say(line, hub, tmp_path, code=1)
    assert "is not the recorded file" in refused
    assert "--any-digest" in refused
    assert not output.exists()
    said = say([*line, "--any-digest"], hub, tmp_path)
    for text in ("to download: 4 of 4 files", "Apache-2.0", "not recorded here", "MIT", "no_info.npz: SHA-256"):
        assert text in said
    for text in ("for another choice: --backend", "depth off by", "degrees", f'Estimator("{output}")("photo.jpg")'):
        assert text in said
    manifest = read_manifest(output)
    assert manifest.choice is not None
    assert manifest.choice.what in said
    assert {source.role: source.path for source in manifest.sources}["dit"] == FILES[0].origin
    with Estimator(output, device="cpu") as estimator:
        assert np.isfinite(estimator(np.zeros((32, 48, 3), np.uint8)).prediction).all()
    hub.requests.clear()
    again = say([*line, "--any-digest"], hub, tmp_path)
    assert "Nothing to do" in again
    assert not fetched(hub)


@pytest.mark.thorough
def test_a_download_goes_on_in_another_process(hub: Hub, tmp_path: Path) -> None:
    file = tmp_path / "big"
    file.write_bytes(np.random.default_rng(0).bytes(BIG))
    hub.files[NAMES["dit"]], hub.pause = file, 0.2
    command = ["fetch", "fe2e", "--any-digest"]
    process = start(command, hub, tmp_path)
    partial: list[Path] = []
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not partial:
        partial = [path for path in (tmp_path / "hf").rglob("*.densegeo") if path.stat().st_size > BIG // 4]
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    kept = partial[0].stat().st_size
    assert BIG // 4 < kept < BIG
    hub.requests.clear()
    hub.pause = 0.0
    said = say(command, hub, tmp_path)
    first = next(request for request in hub.requests if request[0] == "GET" and "i1258" in request[1])
    assert first[2] == f"bytes={kept}-"
    assert "Everything is here" in said
    (local,) = (tmp_path / "hf").rglob("step1x-edit-i1258.safetensors")
    assert local.read_bytes() == file.read_bytes()
    assert not list((tmp_path / "hf").rglob("*.densegeo"))


@pytest.mark.thorough
def test_a_slow_line_that_breaks_off(hub: Hub, tmp_path: Path) -> None:
    """It is waited for, shown, and asked for again; only the Hub sees the token."""
    file = tmp_path / "big"
    file.write_bytes(np.random.default_rng(1).bytes(BIG))
    hub.files[NAMES["dit"]], hub.pause = file, 0.1
    hub.break_after[f"exander/FE2E/resolve/{FILES[0].revision}/{FILES[0].path}"] = BIG // 2
    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-m", "densegeo", "fetch", "fe2e", "--any-digest"],
        env=environment(hub.address, tmp_path),
        stdout=subprocess.DEVNULL,
        stderr=terminal,
    )
    os.close(terminal)
    shown = ""
    with contextlib.suppress(OSError):  # the terminal is gone when the process is
        while part := os.read(controller, 1 << 16):
            shown += part.decode(errors="replace")
    assert process.wait(timeout=120) == 0
    assert "100%" in shown
    assert "hf_secret" not in shown
    (local,) = (tmp_path / "hf").rglob("step1x-edit-i1258.safetensors")
    assert local.read_bytes() == file.read_bytes()
    assert hub.tokens == {"", "Bearer hf_secret"}
    assert not downloads._same_host("https://elsewhere.example/file")


def test_a_missing_file_is_named(hub: Hub, tmp_path: Path) -> None:
    del hub.files[NAMES["lora"]]
    said = say(["fetch", "fe2e", "--any-digest"], hub, tmp_path, code=1)
    assert f"{FILES[2].origin} is not there any more" in said
    assert "--checkpoint checkpoints/fe2e" in said


@pytest.mark.thorough
def test_a_cache_that_holds_half(hub: Hub, tmp_path: Path) -> None:
    del hub.files[NAMES["lora"]]
    say(["fetch", "fe2e", "--any-digest", "--no-lora"], hub, tmp_path)
    offline = say(["build", "--model", "fe2e", "--offline"], hub, tmp_path, code=1)
    assert "1 of fe2e's 4 files are not here" in offline
    assert "LDRN.safetensors" in offline
    assert "vae.safetensors" not in offline
    hub.files[NAMES["lora"]] = tmp_path / "other"
    hub.files[NAMES["lora"]].write_bytes(b"another file")
    hub.requests.clear()
    assert "to download: 1 of 4 files" in say(["fetch", "fe2e", "--any-digest"], hub, tmp_path)
    assert fetched(hub) == {"LDRN.safetensors"}


def test_without_a_network(hub: Hub, tmp_path: Path) -> None:
    said = say(["fetch", "fe2e"], dataclasses.replace(hub, address="http://127.0.0.1:9"), tmp_path, code=1)
    assert "cannot download fe2e's files" in said
    for row in FILES:
        assert f"{Path(row.path).name} ({row.page})" in said


@pytest.mark.thorough
def test_a_dry_run_fetches_nothing(hub: Hub, tmp_path: Path) -> None:
    said = say(["build", "--model", "fe2e", "--dry-run"], hub, tmp_path)
    assert "to download: 4 of 4 files" in said
    assert "GiB more for the bundle" in said
    assert not fetched(hub)


def test_models_without_published_files(capsys: pytest.CaptureFixture[str]) -> None:
    for command, code, text in (
        (["fetch", "fiffdepth"], 1, "has no licence"),
        (["build", "--model", "fiffdepth"], 1, "has no licence"),
        (["fetch", "fe2e-tiny"], 0, "nothing to fetch"),
        (["fetch", "fe3e"], 2, "there are fe2e, fiffdepth, fe2e-tiny"),
    ):
        with pytest.raises(SystemExit) as end:
            main(command)
        assert end.value.code == code
        shown = capsys.readouterr()
        assert text in " ".join((shown.out + shown.err).split())


def test_fetching_needs_no_torch() -> None:
    code = "import sys, densegeo.export.fetch_command; print([n for n in ('torch', 'onnx') if n in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_digests(tmp_path: Path) -> None:
    """A file is taken by the digest that is recorded: SHA-256, or git's."""
    file = tmp_path / "file"
    file.write_bytes(b"densegeo\n")
    git = subprocess.run(["git", "hash-object", str(file)], capture_output=True, text=True, check=True).stdout.strip()
    assert downloads.git_blob(file) == git
    quiet = Console(quiet=True)
    row = Published("vae", "acme/it", "0" * 40, "file", "", sha256=hashlib.sha256(b"densegeo\n").hexdigest())
    downloads.check(row, file, quiet, any_digest=False)
    downloads.check(dataclasses.replace(row, sha256="", git_blob=git), file, quiet, any_digest=False)
    with pytest.raises(CheckpointError, match="is not the recorded file"):
        downloads.check(dataclasses.replace(row, sha256="0" * 64), file, quiet, any_digest=False)
    assert not file.exists()


def test_rows_are_complete() -> None:
    assert set(PUBLICATIONS) == set(PRESETS)
    for name, row in PUBLICATIONS.items():
        assert row.carried == (PRESETS[name].weights is not None)
        assert row.carried or row.files or row.nowhere
        for file in row.files:
            assert len(file.revision) == 40
            assert len(file.sha256) == 64 or len(file.git_blob) == 40
        if row.files:
            assert {file.role for file in row.files} == {role.name for role in row.roles if not role.optional}
        assert row.roles == PRESETS[name].family.roles
