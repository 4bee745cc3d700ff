"""`densegeo engines`: engines for other GPUs in a bundle that is there, without torch, onnx and the checkpoint."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from densegeo.errors import ConfigError, DigestError, EngineError, KernelError, ResourceError
from densegeo.export import engine_builder, engines_command, renewal
from densegeo.export.engine_builder import EngineOptions
from densegeo.export.renewal import renew
from densegeo.extras import install_hint
from densegeo.runtime import measured, ready, state
from densegeo.runtime.bundle import (
    STAGES,
    Engine,
    Manifest,
    check_files,
    read_manifest,
)
from densegeo.runtime.engine_log import parse_log, read_log
from densegeo.runtime.engines import check_engine, fingerprint, select_engine
from densegeo.runtime.measured import Conditions
from densegeo.runtime.verified import is_verified, remember
from tests.support.absent import BUILD_SIDE, run_without, start_without
from tests.support.checkpoints import leftovers

pytest.importorskip("tensorrt_rtx")
pytest.importorskip("triton")
pytestmark = [pytest.mark.timeout(900), pytest.mark.integration]
RTX = EngineOptions(library="tensorrt_rtx", weights="input")


def contents(bundle: Path) -> dict[str, str]:
    return {
        path.relative_to(bundle).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(bundle.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def bundle(engines_for_86: Path, tmp_path: Path) -> Path:
    """With engines for sm_86 and kernels for sm_89 too; the test may change it."""
    return shutil.copytree(engines_for_86, tmp_path / "bundle")


@pytest.mark.thorough
def test_engines_are_made_where_torch_and_onnx_are_not(engines_for_86: Path, bundle_with_kernels: Path) -> None:
    bundle = engines_for_86
    loaded = set((bundle.parent / "printed").read_text().rpartition("loaded:")[2].split())
    assert loaded.isdisjoint(BUILD_SIDE)
    assert "densegeo" in loaded
    manifest, before = read_manifest(bundle), read_manifest(bundle_with_kernels)
    check_files(bundle, manifest)
    assert [engine.stage for engine in manifest.engines] == list(STAGES)
    for engine in manifest.engines:
        assert engine.fingerprint == fingerprint(engine)
        assert engine.architectures == ["sm_86"]
        check_engine(bundle, manifest, engine, library="tensorrt_rtx", version=engine.version, architecture=86)
        assert parse_log(read_log(bundle / engine.log)).layers
    assert "single_blocks.0.linear2.weight" in manifest.engines[1].weight_inputs
    assert {name: file for name, file in manifest.files.items() if name in before.files} == before.files
    assert manifest.build_key == before.build_key
    assert manifest.options["--backend"] == ["tensorrt"]
    assert manifest.options["--gpu-arch"] == ["86"]
    assert contents(bundle).keys() == {*manifest.files, "manifest.json"}
    assert leftovers(bundle.parent) == []


def test_the_same_again_is_nothing_to_do(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(bundle)
    engines_command.engines(bundle, [86], builder="tensorrt_rtx", weights="input")
    assert "Nothing to do" in capsys.readouterr().out
    assert contents(bundle) == before


@pytest.mark.thorough
def test_another_architecture_is_added_and_other_settings_replace(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was verified and measured with engines that are gone says nothing any more; other engines stay."""
    first = read_manifest(bundle)
    remembered(first)
    remember(bundle, "tensorrt", "cuda:0")
    done = renew(bundle, (89,), RTX, Console(quiet=True))
    assert [engine.architectures for engine in done.added] == [["sm_89"]] * 3
    assert done.replaced == []
    second = read_manifest(bundle)
    check_files(bundle, second)
    assert second == done.manifest
    assert {engine.fingerprint for engine in first.engines} < {engine.fingerprint for engine in second.engines}
    assert second.build_key == first.build_key
    assert not is_verified(bundle, "tensorrt")
    assert len(list(state.folder("measured").glob("*.json"))) == 1
    remember(bundle, "tensorrt", "cuda:0")
    other = msgspec.structs.replace(RTX, optimization_level=0)
    again = renew(bundle, (86,), other, Console(quiet=True))
    third = read_manifest(bundle)
    check_files(bundle, third)
    assert [engine.fingerprint for engine in again.replaced] == [engine.fingerprint for engine in first.engines]
    assert sorted(contents(bundle)) == sorted({*third.files, "manifest.json"})
    assert [engine.architectures[0] for engine in third.engines] == ["sm_86"] * 3 + ["sm_89"] * 3
    assert third.build_key != first.build_key
    assert not is_verified(bundle, "tensorrt")
    assert not list(state.folder("measured").glob("*.json"))
    chosen = select_engine(
        bundle,
        third,
        "encoder",
        third.buckets[0],
        library="tensorrt_rtx",
        version=third.engines[0].version,
        architecture=86,
    )
    assert chosen.options["optimization_level"] == 0


def remembered(manifest: Manifest) -> None:
    good = Conditions(runs=100, variation=0.01)
    measured.remember(measured.measured(manifest, manifest.buckets[0], "tensorrt", "GPU", 1.0, 1.1, good))
    assert list(state.folder("measured").glob("*.json"))


@pytest.fixture(autouse=True)
def own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(signal.SIGINT, marks=pytest.mark.thorough),
        pytest.param(signal.SIGKILL, marks=pytest.mark.thorough),
        pytest.param(signal.SIGTERM, marks=pytest.mark.slow),
    ],
    ids=lambda number: number.name,
)
def test_interrupted_it_leaves_the_bundle_as_it_was(bundle: Path, tmp_path: Path, number: signal.Signals) -> None:
    """And the next run goes on from the engine that was finished; the builder does not go on by itself."""
    before = contents(bundle)
    arguments = ("engines", bundle, "--gpu-arch", 89, "--builder", "tensorrt_rtx", "--weights", "input")
    with start_without(tmp_path, BUILD_SIDE, *arguments) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("engines/encoder"):
                break
        process.send_signal(number)
        process.stdout.read()
        code = process.wait(timeout=60)
    assert code == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -signal.SIGKILL}[number]
    assert contents(bundle) == before
    code, out, err = run_without(tmp_path, BUILD_SIDE, *arguments)
    assert code == 0, err
    assert "1 engine taken over from an interrupted run" in out
    manifest = read_manifest(bundle)
    check_files(bundle, manifest)
    assert len(manifest.engines) == 6
    assert leftovers(bundle.parent) == []


@pytest.mark.parametrize("when", ["manifest", "first file", "kernels"])
def test_a_failure_while_it_is_put_in_place_leaves_the_bundle_as_it_was(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    before, replace = contents(bundle), os.replace

    def fail(source: Path, target: Path) -> None:
        name = {"manifest": "manifest.json", "first file": ".engine", "kernels": ".cubin"}[when]
        if Path(target).is_relative_to(bundle.resolve()) and Path(target).name.endswith(name):
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(renewal.os, "replace", fail)
    monkeypatch.setattr(renewal, "build_engines", copied_engines)
    with pytest.raises(ResourceError, match=r"No space left on device.*The bundle is what it was"):
        renew(bundle, (120 if when == "kernels" else 89,), RTX, Console(quiet=True))
    assert contents(bundle) == before
    assert leftovers(bundle.parent) == []


def copied_engines(work: Path, wanted: list[engine_builder.PlannedEngine], *_: object, **__: object) -> list[Engine]:
    """In the place of building: files of the right names."""
    for one in wanted:
        for name in (one.engine.file, one.engine.log):
            (work / name).write_bytes(name.encode())
    return [one.engine for one in wanted]


def test_a_build_that_fails_leaves_the_bundle_as_it_was(bundle: Path) -> None:
    before = contents(bundle)
    with pytest.raises(EngineError, match="took longer than 0 s"):
        renew(bundle, (89,), msgspec.structs.replace(RTX, timeout_s=0), Console(quiet=True))
    assert contents(bundle) == before
    assert leftovers(bundle.parent) == []


@pytest.mark.thorough
def test_kernels_that_are_missing_need_triton_but_no_torch(bundle: Path, tmp_path: Path) -> None:
    before = contents(bundle)
    arguments = ("engines", bundle, "--gpu-arch", 120, "--builder", "tensorrt_rtx", "--weights", "input")
    code, _, err = run_without(tmp_path, (*BUILD_SIDE, "triton"), *arguments)
    assert code == 1
    assert "no GPU kernels for sm_120" in err
    assert install_hint("kernels") in err
    assert contents(bundle) == before
    code, _, err = run_without(tmp_path, BUILD_SIDE, "engines", bundle, "--gpu-arch", 120, "--kernels-only")
    assert code == 0, err
    manifest = read_manifest(bundle)
    check_files(bundle, manifest)
    added = [one for one in manifest.kernels if one.architecture == 120]
    assert sorted(one.name for one in added) == sorted(one.name for one in manifest.kernels if one.architecture == 86)
    assert manifest.target_architectures == ["sm_86", "sm_89", "sm_120"]
    assert len(manifest.engines) == 3


def test_a_damaged_kernel_is_made_again_and_not_taken_for_there(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    kernel = next(one for one in manifest.kernels if one.architecture == 89)
    path = bundle / "kernels" / kernel.file
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    done = renew(bundle, (89,), None, Console(quiet=True))
    assert {one.architecture for one in done.kernels} == {89}
    check_files(bundle, read_manifest(bundle))


def test_a_damaged_graph_or_engine_is_noticed(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = read_manifest(bundle)
    engine = bundle / manifest.engines[0].file
    engine.write_bytes(engine.read_bytes()[:-1] + b"?")
    monkeypatch.setattr(renewal, "build_engines", copied_engines)
    done = renew(bundle, (86,), RTX, Console(quiet=True))
    assert manifest.engines[0] in done.replaced
    check_files(bundle, read_manifest(bundle))
    graph = bundle / manifest.buckets[0].denoiser.file
    graph.write_bytes(graph.read_bytes()[:-1] + b"?")
    with pytest.raises(DigestError, match=r"denoiser.*corrupted"):
        renew(bundle, (89,), RTX, Console(quiet=True))


def test_what_cannot_be_is_refused_before_anything_is_made(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quiet = Console(quiet=True)
    with pytest.raises(ConfigError, match=r"no target for sm_90.*--builder tensorrt"):
        renew(bundle, (90,), RTX, quiet)
    with pytest.raises(ConfigError, match=r"no kernel can be compiled for sm_42"):
        renew(bundle, (42,), RTX, quiet)
    with pytest.raises(ConfigError, match=r"comes with densegeo.*cp -r"):
        renew(ready.find_bundle("fe2e-tiny"), (86,), RTX, quiet)
    monkeypatch.setattr(engines_command, "first_gpu", lambda: None)
    with pytest.raises(ConfigError, match=r"no GPU was found here.*--gpu-arch 89"):
        engines_command.engines(bundle)
    monkeypatch.setattr(renewal.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 0))
    with pytest.raises(ResourceError, match="free some space"):
        renew(bundle, (89,), RTX, quiet)
    with renewal.locked(bundle), pytest.raises(ResourceError, match="another build"):
        renew(bundle, (89,), RTX, quiet)


def test_kernels_without_a_compiler_are_an_error(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise KernelError("no compiler")

    monkeypatch.setattr(renewal, "write_cubins", fail)
    with pytest.raises(KernelError, match="no GPU kernels for sm_120"):
        renew(bundle, (120,), RTX, Console(quiet=True))
