"""Builds that were interrupted or failed: what stays, what goes on from there, and what counts for nothing."""

from __future__ import annotations

import contextlib
import errno
import filecmp
import io
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import msgspec
import pytest
from rich.console import Console

from densegeo.errors import EngineError, ExportError, KernelError, ResourceError
from densegeo.export import digests, engine_builder, graphs, references, stages, weights
from densegeo.export.build import build_bundle
from densegeo.export.build_options import BuildOptions
from densegeo.export.engine_builder import EngineOptions
from densegeo.export.keys import StageKeys, stage_keys
from densegeo.export.staging import LOCK, staging_folder
from densegeo.runtime.bundle import STAGES, Engine, Source, check_files, read_manifest, sha256_file
from tests.support.checkpoints import leftovers, options, run_build, write_checkpoint
from tests.support.traced_graphs import command

pytestmark = pytest.mark.timeout(900)
STAGING = ".bundle.building"


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Digests that these tests make up stay out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that all tests here read."""
    return write_checkpoint(tmp_path_factory.mktemp("files"))


def files_of(bundle: Path) -> list[str]:
    return sorted(path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file())


@contextmanager
def hollow(checkpoint: Path) -> Iterator[None]:
    """The checkpoint's tensors are zeros meanwhile, which nobody notices who does not read them."""
    before = {path: path.read_bytes() for path in checkpoint.glob("*.safetensors")}
    assert len(before) == 2

    def write(path: Path, data: bytes) -> None:
        known = digests.sha256(path)
        path.write_bytes(data)
        digests.remember(path, known)

    for path, data in before.items():
        header = 8 + int.from_bytes(data[:8], "little")
        write(path, data[:header] + bytes(len(data) - header))
        assert sha256_file(path) != digests.sha256(path)
    try:
        yield
    finally:
        for path, data in before.items():
            write(path, data)


@pytest.fixture(scope="module")
def one_go(small: Path, tmp_path_factory: pytest.TempPathFactory, graphs_once: Path) -> Path:
    bundle = tmp_path_factory.mktemp("one") / "bundle"
    process = run_build(small, bundle, command(graphs_once))
    assert process.wait(timeout=600) == 0, process.communicate()[0]
    return bundle


def interrupted(process: subprocess.Popen[str], number: signal.Signals) -> str:
    """What it said until it ended. A library that is being imported can swallow an interruption: one asks again."""
    for _ in range(5):
        process.send_signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.communicate(timeout=20)[0]
    raise AssertionError("it cannot be interrupted")


@pytest.mark.thorough
@pytest.mark.parametrize(
    "number", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow)], ids=lambda number: number.name
)
def test_a_build_goes_on_without_its_checkpoint(
    number: signal.Signals, small: Path, one_go: Path, tmp_path: Path, graphs_once: Path
) -> None:
    output, folder = tmp_path / "bundle", tmp_path / STAGING
    program = command(graphs_once)  # traces no graph again
    process = run_build(small, output)
    deadline = time.monotonic() + 300
    while not (folder / "weights.json").exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    said = interrupted(process, number)
    assert process.returncode == (130 if number == signal.SIGINT else -number), said
    assert [path.name for path in tmp_path.iterdir()] == [STAGING]
    assert not (folder / "graphs.json").exists()
    if number == signal.SIGINT:
        assert "Finished: references, weights. The same command goes on from there" in said
        assert str(folder) in said
        assert not list((folder / "bundle").glob("*.onnx"))
    (folder / "bundle" / "half_a_graph.onnx").write_bytes(b"unfinished")
    with hollow(small):
        resumed = run_build(small, output, program)
        said, _ = resumed.communicate(timeout=600)
    assert resumed.returncode == 0, said
    assert "weights: taken over from an interrupted build" in said
    assert "graphs: taken over" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    assert files_of(output) == files_of(one_go)
    assert filecmp.cmpfiles(output, one_go, files_of(one_go), shallow=False) == (files_of(one_go), [], [])


Builder = Callable[..., Engine]


def fake_builder(built: list[str], failing: dict[str, BaseException]) -> Builder:
    """Writes "engines" of a few bytes, and notes their stages; raises at the stages named."""

    def build(
        directory: Path, graph: Path, planned: Engine, options: object, group: object, progress: object
    ) -> Engine:
        (directory / planned.log).write_bytes(b"log of " + planned.fingerprint.encode())
        if planned.stage in failing:
            raise failing[planned.stage]
        (directory / planned.file).write_bytes(b"engine of " + planned.fingerprint.encode())
        built.append(planned.stage)
        return msgspec.structs.replace(planned, seconds=1.0)

    return build


def with_engines(checkpoint: Path, output: Path, level: int | None = None, **changes: object) -> BuildOptions:
    settings = EngineOptions(library="tensorrt_rtx", weights="constant", optimization_level=level)
    return options(checkpoint, output, backend="tensorrt", engines=settings, **changes)


@pytest.fixture(scope="module")
def failed(small: Path, tmp_path_factory: pytest.TempPathFactory, graphs_once: Path) -> Path:
    """The staging folder of a build, with shared graphs, that failed in the last of its three engines."""
    pytest.importorskip("tensorrt_rtx")
    output = tmp_path_factory.mktemp("failed") / "bundle"
    built: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            engine_builder, "build_engine", fake_builder(built, {"decoder": EngineError("the builder crashed")})
        )
        with pytest.raises(EngineError) as caught:
            build_bundle(with_engines(small, output))
    assert built == ["encoder", "denoiser"]
    hint = "Finished: references, weights, graphs, 2 engines. The same command goes on from there; to give up, delete "
    assert str(caught.value) == f"the builder crashed\n{hint}{staging_folder(output)}."
    assert leftovers(output.parent) == [STAGING]
    assert len(list((output.parent / STAGING / "bundle" / "engines").iterdir())) == 4
    return output.parent / STAGING


@pytest.fixture
def built(failed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The stages of the engines that a build beside a copy of the failed one made; it reads and exports nothing."""
    shutil.copytree(failed, tmp_path / STAGING)
    stages_built: list[str] = []
    monkeypatch.setattr(engine_builder, "build_engine", fake_builder(stages_built, {}))
    monkeypatch.setattr(references, "open_streamed", refuse("the checkpoint was read"))
    monkeypatch.setattr(weights, "open_streamed", refuse("the checkpoint was read"))
    monkeypatch.setattr(graphs, "export_graph", refuse("a graph was exported"))
    return stages_built


def refuse(message: str) -> Callable[..., NoReturn]:
    def refused(*_: object, **__: object) -> NoReturn:
        raise ExportError(message)

    return refused


def build_aloud(build_options: BuildOptions) -> str:
    """What a build says where no terminal is."""
    said = io.StringIO()
    build_bundle(build_options, Console(file=said, width=200))
    return said.getvalue()


def require_whole(output: Path, engines_of: Sequence[str]) -> None:
    manifest = read_manifest(output)
    check_files(output, manifest)
    assert files_of(output) == sorted([*manifest.files, "manifest.json"])
    assert [engine.stage for engine in manifest.engines] == list(engines_of)
    assert leftovers(output.parent) == []


def test_only_the_missing_engine_is_built(small: Path, tmp_path: Path, built: list[str]) -> None:
    said = build_aloud(with_engines(small, tmp_path / "bundle"))
    assert built == ["decoder"]
    require_whole(tmp_path / "bundle", STAGES)
    assert "weights: taken over from an interrupted build" in said
    assert "graphs: taken over from an interrupted build" in said
    assert "engines: 2 taken over" in said


def test_interrupted_between_engines(
    small: Path, tmp_path: Path, built: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / STAGING / "engines.json").unlink()
    monkeypatch.setattr(engine_builder, "build_engine", fake_builder(built, {"denoiser": KeyboardInterrupt()}))
    with pytest.raises(KeyboardInterrupt):
        build_bundle(with_engines(small, tmp_path / "bundle"))
    assert built == ["encoder"]
    there = sorted(path.name for path in (tmp_path / STAGING / "bundle" / "engines").iterdir())
    assert [(name.split(".")[:2], name.split(".")[3:]) for name in there] == [  # between them, the fingerprint
        (["encoder_48x32", "ampere"], ["engine"]),
        (["encoder_48x32", "ampere"], ["log", "gz"]),
    ]
    monkeypatch.setattr(engine_builder, "build_engine", fake_builder(built, {}))
    build_bundle(with_engines(small, tmp_path / "bundle"))
    assert built == list(STAGES)
    require_whole(tmp_path / "bundle", STAGES)


def test_other_engine_options_go_on_from_the_graphs(small: Path, tmp_path: Path, built: list[str]) -> None:
    build_bundle(with_engines(small, tmp_path / "bundle", level=2))
    assert built == list(STAGES)
    require_whole(tmp_path / "bundle", STAGES)
    assert [engine.options for engine in read_manifest(tmp_path / "bundle").engines] == [
        {"tf32": 0, "optimization_level": 2}
    ] * 3


def test_no_engines_at_all_go_on_from_the_graphs(small: Path, tmp_path: Path, built: list[str]) -> None:
    build_bundle(options(small, tmp_path / "bundle"))
    assert built == []
    require_whole(tmp_path / "bundle", ())


def test_kernels_that_cannot_be_compiled_leave_the_graphs(
    small: Path, tmp_path: Path, built: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> NoReturn:
        raise KernelError("no compiler")

    monkeypatch.setattr(stages, "write_cubins", fail)
    with pytest.raises(KernelError, match=r"no compiler\nFinished: references, weights, graphs, 2 engines"):
        build_bundle(with_engines(small, tmp_path / "bundle", architectures=(80,)))
    assert leftovers(tmp_path) == [STAGING]


@pytest.mark.parametrize(
    "changes", [{"precision": "fp16"}, {"sizes": ((32, 48),)}, {"without": ("decoder",)}, {"allow_unexpected": True}]
)
def test_another_build_starts_anew(
    changes: dict[str, object], small: Path, tmp_path: Path, built: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    actual: list[list[str]] = []

    def look(*_: object, **__: object) -> NoReturn:
        actual.append(files_of(tmp_path / STAGING))
        raise ExportError("stop")

    monkeypatch.setattr(references, "open_streamed", look)
    with pytest.raises(ExportError, match="stop"):
        build_bundle(with_engines(small, tmp_path / "bundle", **changes))
    assert actual == [[LOCK]]  # nothing of the older build
    assert list(tmp_path.iterdir()) == []


def test_each_stage_depends_on_what_it_uses(tmp_path: Path) -> None:
    def keys(digest: str = "0" * 64, **changes: object) -> StageKeys:
        build_options = options(tmp_path, tmp_path / "bundle", **changes)
        return stage_keys(build_options, [Source("dit", "dit.safetensors", 1, digest)], "")

    plain, two, four = keys(), keys(batches=(2,)), keys(batches=(4,))
    assert plain == keys()
    assert plain.weights == two.weights == four.weights
    assert plain.references == two.references
    assert len({plain.graphs, two.graphs, four.graphs}) == 3
    assert keys(architectures=(80,)).graphs == plain.graphs
    assert keys(architectures=(80,)).kernels != plain.kernels
    assert plain.engines == ""
    engine_builder = EngineOptions(library="tensorrt_rtx")
    assert keys(backend="tensorrt", engines=engine_builder).engines == plain.graphs
    assert keys(digest="1" * 64).references != plain.references
    assert keys(digest="1" * 64).weights != plain.weights


@pytest.mark.parametrize(
    ("name", "work_again"),
    [
        ("references.json", "the checkpoint was read"),
        ("weights.json", "the checkpoint was read"),
        ("graphs.json", "a graph was exported"),
        ("bundle/denoiser.safetensors", "the checkpoint was read"),
        ("bundle/verification.safetensors", "the checkpoint was read"),
        ("bundle/decoder_48x32.onnx", "a graph was exported"),
    ],
)
@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
def test_damaged_stages_count_for_nothing(
    name: str, work_again: str, damage: str, small: Path, tmp_path: Path, built: list[str]
) -> None:
    damaged(tmp_path / STAGING / name, damage)
    with pytest.raises(ExportError, match=work_again):
        build_bundle(with_engines(small, tmp_path / "bundle"))
    assert list(tmp_path.iterdir()) == []  # and an error that is not of engines leaves nothing


def damaged(path: Path, damage: str) -> None:
    data = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
        return
    data[len(data) // 2] ^= 0x80
    path.write_bytes(data[: len(data) // 3] if damage == "cut" else data)


@pytest.mark.parametrize(
    ("name", "again"),
    [("bundle/engines/encoder_48x32.ampere.*.engine", ["encoder", "decoder"]), ("engines.json", list(STAGES))],
)
def test_a_damaged_engine_is_built_again(
    name: str, again: list[str], small: Path, tmp_path: Path, built: list[str]
) -> None:
    (path,) = (tmp_path / STAGING).glob(name)
    damaged(path, "flipped")
    build_bundle(with_engines(small, tmp_path / "bundle"))
    assert built == again
    require_whole(tmp_path / "bundle", STAGES)


def test_a_full_disk_leaves_nothing_even_of_finished_stages(
    small: Path, tmp_path: Path, built: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(engine_builder, "build_engine", fake_builder(built, {"decoder": full}))
    with pytest.raises(ResourceError, match=r"cannot write the bundle.*Nothing is left behind"):
        build_bundle(with_engines(small, tmp_path / "bundle"))
    assert list(tmp_path.iterdir()) == []


def test_too_little_memory_or_disk_leaves_finished_stages(
    small: Path, tmp_path: Path, built: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files_of(tmp_path / STAGING)
    with monkeypatch.context() as patch:
        patch.setattr("densegeo.export.build_plan.available_memory", lambda: 1 << 20)
        with pytest.raises(ResourceError, match="GiB of memory"):
            build_bundle(with_engines(small, tmp_path / "bundle"))
    with monkeypatch.context() as patch:
        usage = shutil.disk_usage(tmp_path)
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1 << 10))
        with pytest.raises(ResourceError, match="GiB on disk"):
            build_bundle(with_engines(small, tmp_path / "bundle"))
    assert set(files_of(tmp_path / STAGING)) <= set(before)
    build_bundle(with_engines(small, tmp_path / "bundle"))
    assert built == ["decoder"]


HOLD = """
import sys, time
from pathlib import Path
from densegeo.export.staging import locked
with locked(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(600)
"""


def test_two_builds_of_one_output(small: Path, tmp_path: Path, built: list[str]) -> None:
    output = tmp_path / "bundle"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(output)], stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "locked\n"
            with pytest.raises(ResourceError, match=r"another build of .*bundle is running.*another --output"):
                build_bundle(with_engines(small, output))
        finally:
            holder.kill()
    build_bundle(with_engines(small, output))  # the lock ended with its process, and what it guards was left
    assert built == ["decoder"]


def test_what_a_killed_build_left_after_its_end_is_removed(small: Path, tmp_path: Path, built: list[str]) -> None:
    output = tmp_path / "bundle"
    kept = tmp_path / "kept"
    shutil.copytree(tmp_path / STAGING, kept)
    build_bundle(with_engines(small, output))
    manifest = (output / "manifest.json").read_bytes()
    (tmp_path / STAGING).mkdir()  # killed before its records were removed
    for name in (LOCK, "references.json", "weights.json", "graphs.json"):
        shutil.copy(kept / name, tmp_path / STAGING / name)
    assert "up to date" in build_aloud(with_engines(small, output))
    assert leftovers(tmp_path) == []
    kept.rename(tmp_path / STAGING)  # but another build's stages stay for it
    assert "up to date" in build_aloud(with_engines(small, output))
    assert leftovers(tmp_path) == [STAGING]
    assert (output / "manifest.json").read_bytes() == manifest


def test_the_records_say_how_long_stages_took(failed: Path) -> None:
    for name in ("references", "weights", "graphs", "engines"):
        record = json.loads((failed / f"{name}.json").read_text())["record"]
        assert record["seconds"] > 0
        assert record["files"]


def test_an_older_bundle_is_replaced_whole_or_not_at_all(
    small: Path, tmp_path: Path, built: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "bundle"
    shutil.copytree(tmp_path / STAGING, tmp_path / "kept")
    build_bundle(options(small, output))
    before = (output / "manifest.json").read_bytes()
    (tmp_path / "kept").rename(tmp_path / STAGING)
    rename = Path.rename

    def fail(path: Path, target: Path) -> Path:
        if path.name == "bundle" and path.parent.name == STAGING:
            raise OSError("no")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(ResourceError, match="cannot write the bundle"):
        build_bundle(with_engines(small, output))
    assert (output / "manifest.json").read_bytes() == before
    assert leftovers(tmp_path) == []
