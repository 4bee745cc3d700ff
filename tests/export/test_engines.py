"""TensorRT engines, really built (TensorRT-RTX needs no GPU): what is in them, what is reused, and what is refused."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import onnx
import pytest
from onnx import TensorProto, helper

from densegeo.errors import ConfigError, DigestError, EngineError, ResourceError
from densegeo.export import engine_builder
from densegeo.export.build import build_bundle
from densegeo.export.engine_builder import (
    EngineOptions,
    build_engine,
    build_engines,
    choose_weights,
    planned_engines,
    target_groups,
)
from densegeo.export.sources import SourceOptions
from densegeo.inspection import print_layers, print_manifest
from densegeo.models.presets import PRESETS
from densegeo.runtime.bundle import STAGES, Engine, Manifest, check_files, read_manifest, write_manifest
from densegeo.runtime.engine_log import parse_log, read_log, warnings
from densegeo.runtime.engines import check_engine, fingerprint, read_engine, runs_on, select_engine
from tests.support.checkpoints import leftovers, options, small_source
from tests.support.shared import Build

pytest.importorskip("tensorrt_rtx")
pytestmark = [pytest.mark.timeout(900), pytest.mark.integration]
TARGETS = (80, 86, 89, 120)


# By default each precision and place of weights once, of the smallest model; the others take as long again.
KINDS = [
    pytest.param(("small", "bf16", "input"), marks=pytest.mark.thorough),
    pytest.param(("small", "fp16", "constant"), marks=pytest.mark.slow),
    pytest.param(("fe2e-tiny", "fp16", "constant"), marks=pytest.mark.slow),
    pytest.param(("fe2e-tiny", "bf16", "input"), marks=pytest.mark.slow),
]


@pytest.fixture(scope="session", params=KINDS, ids="-".join)
def bundle(request: pytest.FixtureRequest, build_once: Build, small_checkpoint: Path) -> tuple[Path, Manifest]:
    """Engines for SM80 to SM120 of the trained small model and of the smallest one."""
    name, precision, weights = request.param
    model, given = (name, SourceOptions()) if name in PRESETS else ("fe2e", small_source(small_checkpoint))
    directory = build_once(
        model=model,
        source=given,
        sizes=((96, 64),),
        precision=precision,
        backend="tensorrt",
        architectures=TARGETS,
        engines=EngineOptions(library="tensorrt_rtx", weights=weights),
    )
    return directory, read_manifest(directory)


def test_every_graph_has_an_engine_for_all_targets(bundle: tuple[Path, Manifest]) -> None:
    directory, manifest = bundle
    check_files(directory, manifest)
    assert [engine.stage for engine in manifest.engines] == list(STAGES)
    for engine in manifest.engines:
        assert engine.architectures == [f"sm_{number}" for number in TARGETS]
        assert engine.fingerprint == fingerprint(engine)
        assert {engine.file, engine.log} <= set(manifest.files)
        assert engine.seconds > 0
        assert engine.peak_bytes > 1 << 20
        assert engine.activation_bytes > 0
        check_engine(directory, manifest, engine, library="tensorrt_rtx", version=engine.version, architecture=89)
        assert read_engine(directory, manifest, engine)[:4] != b"\0\0\0\0"
    assert {path.name for path in (directory / "engines").iterdir()} == {
        Path(name).name for engine in manifest.engines for name in (engine.file, engine.log)
    }
    assert leftovers(directory.parent) == []
    assert not [path for path in directory.iterdir() if path.name.startswith(".")]


def test_weights_are_where_they_were_asked_to_be(bundle: tuple[Path, Manifest]) -> None:
    directory, manifest = bundle
    transformer = next(engine for engine in manifest.engines if engine.stage == "denoiser")
    stored = (directory / "denoiser.safetensors").stat().st_size
    if transformer.weights == "constant":
        assert transformer.weight_inputs == []
        assert transformer.weight_bytes > 0.5 * stored
    else:
        graph = onnx.load(directory / manifest.buckets[0].denoiser.file, load_external_data=False)
        matrices = {node.input[1] for node in graph.graph.node if node.op_type == "Gemm"}
        assert set(transformer.weight_inputs) == matrices & {tensor.name for tensor in graph.graph.initializer}
        assert "single_blocks.0.linear2.weight" in transformer.weight_inputs
        assert transformer.weight_bytes < 0.5 * stored


def test_attention_is_fused_and_nothing_is_float32_but_the_tail(bundle: tuple[Path, Manifest]) -> None:
    directory, manifest = bundle
    assert manifest.networks is not None
    blocks = sum(manifest.networks.denoiser[name] for name in ("depth", "depth_single_blocks"))
    for engine in manifest.engines:
        log = parse_log(read_log(directory / engine.log))
        actual = warnings(log, manifest.precision, float_tail=engine.stage == "decoder")
        assert not [line for line in actual if "float32" in line], actual
        roles = [layer.role for layer in log.layers]
        if engine.stage == "denoiser":
            assert roles.count("attention") == blocks
            assert not [line for line in actual if "not fused" in line], actual
            assert roles.count("matmul") >= 10
        else:
            assert roles.count("convolution") > 10


def test_layers_are_shown_for_people(bundle: tuple[Path, Manifest], capsys: pytest.CaptureFixture[str]) -> None:
    directory, manifest = bundle
    print_layers(directory, manifest, every=True)
    shown = capsys.readouterr().out
    assert f"denoiser 96x64 for sm_80 86 89 120, {manifest.precision}: " in shown
    assert shown.count("attention is not fused") == 2  # the autoencoder's, one head over all channels: known
    assert "gemm_mha" in shown
    print_manifest(directory, manifest)
    assert "engines, by tensorrt_rtx" in capsys.readouterr().out


def test_an_engine_with_the_same_fingerprint_is_not_built_again(
    bundle: tuple[Path, Manifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, manifest = bundle
    copy = tmp_path / "copy"
    shutil.copytree(directory, copy, ignore=shutil.ignore_patterns("engines"))
    monkeypatch.setattr(engine_builder, "build_engine", lambda *_: pytest.fail("built again"))
    settings = EngineOptions(library="tensorrt_rtx", weights=manifest.engines[0].weights)
    needed = planned_engines(manifest.buckets, manifest.precision, TARGETS, settings, manifest.files)
    actual = list(build_engines(copy, needed, settings, old=(directory, manifest), progress=str))
    assert actual == manifest.engines
    for engine in actual:
        assert (copy / engine.file).read_bytes() == (directory / engine.file).read_bytes()


def test_a_damaged_engine_is_not_reused(bundle: tuple[Path, Manifest], tmp_path: Path) -> None:
    directory, manifest = damaged_copy(bundle, tmp_path)
    record = manifest.engines[0]
    assert engine_builder.reusable(directory, manifest, record.fingerprint) is None
    assert engine_builder.reusable(directory, manifest, manifest.engines[1].fingerprint) == manifest.engines[1]


def damaged_copy(bundle: tuple[Path, Manifest], tmp_path: Path) -> tuple[Path, Manifest]:
    """The bundle with one byte of its first engine flipped."""
    directory, manifest = bundle
    copy = tmp_path / "copy"
    shutil.copytree(directory, copy)
    path = copy / manifest.engines[0].file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    return copy, manifest


def test_a_flipped_byte_is_refused(bundle: tuple[Path, Manifest], tmp_path: Path) -> None:
    directory, manifest = damaged_copy(bundle, tmp_path)
    with pytest.raises(EngineError, match=r"corrupted or was replaced.*densegeo engines"):
        read_engine(directory, manifest, manifest.engines[0])
    with pytest.raises(DigestError, match=r"encoder.*engine is corrupted"):
        check_files(directory, manifest)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": "0.9"}, "version is 0.9"),
        ({"library": "tensorrt"}, "library is tensorrt, here it is tensorrt_rtx"),
        ({"graph_sha256": "0" * 64}, "graph is 0000"),
        ({"weights_sha256": "0" * 64}, "weights is 0000"),
        ({"precision": "fp8"}, "precision is fp8"),
        ({"bucket": "640x480"}, "size is 640x480"),
        ({"options": {"optimization_level": 5}}, "fingerprint is"),
    ],
)
def test_a_stale_or_foreign_engine_is_refused(
    bundle: tuple[Path, Manifest], change: dict[str, object], message: str
) -> None:
    directory, manifest = bundle
    engine = msgspec.structs.replace(manifest.engines[0], **change)
    command = f"densegeo engines {directory} --gpu-arch 89 --builder tensorrt_rtx"
    with pytest.raises(EngineError, match=f"{message}.*Rebuild it: {command}"):
        check_engine(
            directory, manifest, engine, library="tensorrt_rtx", version=manifest.engines[0].version, architecture=89
        )


def test_another_architecture_is_refused_by_name(bundle: tuple[Path, Manifest]) -> None:
    directory, manifest = bundle
    version = manifest.engines[0].version
    with pytest.raises(EngineError, match=r"sm_80, sm_86, sm_89, sm_120, here it is sm_90"):
        select_engine(
            directory,
            manifest,
            "encoder",
            manifest.buckets[0],
            library="tensorrt_rtx",
            version=version,
            architecture=90,
        )
    anywhere = msgspec.structs.replace(manifest.engines[0], architectures=[])
    assert runs_on(anywhere, 120)
    assert not runs_on(anywhere, 90)  # TensorRT-RTX names no such target
    assert not runs_on(anywhere, 75)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="needs file owners")
def test_files_that_others_could_have_written_are_refused(bundle: tuple[Path, Manifest], tmp_path: Path) -> None:
    directory, manifest = bundle
    copy = tmp_path / "copy"
    shutil.copytree(directory, copy)
    engine = manifest.engines[0]
    (copy / engine.file).chmod(0o666)
    with pytest.raises(EngineError, match=r"can be written by everybody.*DENSEGEO_TRUST_ENGINES"):
        read_engine(copy, manifest, engine)
    assert read_engine(copy, manifest, engine, trust=True)
    (copy / engine.file).chmod(0o644)
    assert read_engine(copy, manifest, engine)
    if os.geteuid() == 0:
        os.chown(copy / engine.file, 12345, -1)
        with pytest.raises(EngineError, match="uid 12345"):
            read_engine(copy, manifest, engine)


@pytest.mark.parametrize("name", ["../evil.engine", "/etc/passwd", "engines/../../x", "c:\\x", "a\\..\\b"])
def test_a_manifest_cannot_name_files_outside_the_bundle(
    bundle: tuple[Path, Manifest], tmp_path: Path, name: str
) -> None:
    from densegeo.errors import BundleError

    _, manifest = bundle
    engine = msgspec.structs.replace(manifest.engines[0], file=name)
    write_manifest(tmp_path, msgspec.structs.replace(manifest, engines=[engine]))
    with pytest.raises(BundleError, match="outside the bundle"):
        read_manifest(tmp_path)
    write_manifest(tmp_path, msgspec.structs.replace(manifest, files={name: next(iter(manifest.files.values()))}))
    with pytest.raises(BundleError, match="outside the bundle"):
        read_manifest(tmp_path)


def test_impossible_targets_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    rtx = EngineOptions(library="tensorrt_rtx")

    def build(**changes: object) -> None:
        build_bundle(options(tmp_path / "nothing", tmp_path / "bundle", backend="tensorrt", engines=rtx, **changes))

    with pytest.raises(ConfigError, match="no bf16 before sm_80"):
        build(precision="bf16", architectures=(75, 89))
    with pytest.raises(ConfigError, match=r"no target for sm_90.*--builder tensorrt"):
        build(precision="bf16", architectures=(90,))
    with pytest.raises(ConfigError, match="no fp8 before sm_89"):
        target_groups("tensorrt_rtx", "fp8", (86, 89))
    assert target_groups("tensorrt_rtx", "fp8", (89, 120)) == [(89,), (120,)]
    assert target_groups("tensorrt_rtx", "bf16", (120, 89)) == [(89, 120)]
    assert target_groups("tensorrt_rtx", "bf16", ()) == [()]


@pytest.mark.parametrize(
    "settings",
    [{"weights": "both"}, {"optimization_level": 6}, {"workspace_mib": 0}, {"library": "tensorfast"}],
    ids=str,
)
def test_impossible_settings_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        EngineOptions(**settings).validated()  # type: ignore[arg-type]


def test_a_builder_that_is_not_installed_is_named() -> None:
    with pytest.raises(EngineError, match="tensorrt is not installed: pip install tensorrt"):
        EngineOptions(library="tensorrt").validated()


def test_weights_become_inputs_where_constants_do_not_fit() -> None:
    small = EngineOptions(memory_gib=4)
    assert choose_weights(small, 1 << 30) == "constant"
    assert choose_weights(small, 4 << 30) == "input"
    with pytest.raises(ResourceError, match="--weights input"):
        choose_weights(EngineOptions(memory_gib=4, weights="constant"), 4 << 30)


def graph_of(path: Path, nodes: list[onnx.NodeProto], opset: int = 23) -> Path:
    shape = [1, 2, 64, 32]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT16, shape) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "test", values[:1], values[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10), path)
    return path


def wanted(stem: str) -> Engine:
    return Engine(
        stage="denoiser",
        bucket="1x1",
        graph_sha256="",
        weights_sha256="",
        precision="fp16",
        library="tensorrt_rtx",
        version=engine_builder.library_version("tensorrt_rtx"),
        architectures=["sm_89"],
        weights="constant",
        options={},
        fingerprint="",
        file=f"{stem}.engine",
        log=f"{stem}.log.gz",
        weight_inputs=[],
        seconds=0.0,
        peak_bytes=0,
        activation_bytes=0,
        weight_bytes=0,
    )


def test_a_crash_becomes_an_error_that_names_graph_and_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One tensor as query and key crashes this builder: a real segmentation fault."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    graph = graph_of(tmp_path / "bad.onnx", [helper.make_node("Attention", ["x", "x", "x"], ["y"], name="same")])
    with pytest.raises(EngineError, match=r"engine of bad\.onnx crashed \(SIGSEGV\), at same") as caught:
        build_engine(tmp_path, graph, wanted("bad"), EngineOptions(library="tensorrt_rtx"), (89,), str)
    log = Path(str(caught.value).rpartition("log: ")[2])
    assert "Attention" in log.read_text()
    assert log.parent.parent.stat().st_mode & 0o777 == 0o700
    assert not (tmp_path / "bad.engine").exists()


def test_what_the_parser_says_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    graph = graph_of(tmp_path / "odd.onnx", [helper.make_node("NoSuchOperator", ["x"], ["y"], name="odd")])
    with pytest.raises(EngineError, match=r"odd\.onnx failed: .*NoSuchOperator"):
        build_engine(tmp_path, graph, wanted("odd"), EngineOptions(library="tensorrt_rtx"), (89,), str)


def test_a_build_that_takes_too_long_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    graph = graph_of(tmp_path / "slow.onnx", [helper.make_node("Softmax", ["x"], ["y"], name="soft")])
    settings = EngineOptions(library="tensorrt_rtx", timeout_s=0)
    with pytest.raises(EngineError, match=r"slow\.onnx took longer than 0 s"):
        build_engine(tmp_path, graph, wanted("slow"), settings, (89,), str)


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_the_builders_memory_is_limited() -> None:
    code = "from densegeo.export.engine_worker import limit_memory; limit_memory(1 << 29); bytearray(1 << 30)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert "MemoryError" in done.stderr
