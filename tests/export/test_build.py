"""The build from the outside: what it refuses, what it leaves behind, and when it has nothing to do."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import time

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from densegeo.errors import CheckpointError, ConfigError, ExportError, ResourceError
from densegeo.export import checks
from densegeo.export.build import build_bundle
from densegeo.export.sources import SourceOptions
from densegeo.models.presets import AUTHORS_FILES
from densegeo.runtime.bundle import read_manifest
from tests.support.checkpoints import leftovers, options, run_build
from tests.support.shared import BUILT_SIZES


@pytest.mark.thorough
def test_rebuilding_is_a_no_op_until_an_input_changes(checkpoint, tmp_path, capsys):
    output = tmp_path / "bundle"
    build_bundle(options(checkpoint, output))
    first = (output / "manifest.json").stat().st_mtime_ns
    build_bundle(options(checkpoint, output))
    assert (output / "manifest.json").stat().st_mtime_ns == first
    path = checkpoint / AUTHORS_FILES["vae"][0]
    tensors = load_file(path)
    tensors["decoder.conv_out.bias"] += 0.25
    save_file(tensors, path)
    before = read_manifest(output)
    build_bundle(options(checkpoint, output))
    after = read_manifest(output)
    assert after.build_key != before.build_key
    assert after.files["decoder.safetensors"].sha256 != before.files["decoder.safetensors"].sha256
    assert leftovers(tmp_path) == []


@pytest.mark.thorough
def test_buckets_share_their_weights(checkpoint, tmp_path):
    one = build_bundle(options(checkpoint, tmp_path / "one"))
    two = build_bundle(options(checkpoint, tmp_path / "two", sizes=BUILT_SIZES))
    manifest = read_manifest(two)
    assert [(bucket.width, bucket.height) for bucket in manifest.buckets] == [*BUILT_SIZES]
    for name in ("encoder.safetensors", "denoiser.safetensors", "decoder.safetensors"):
        assert manifest.files[name].sha256 == read_manifest(one).files[name].sha256
    assert all(check.error <= check.bound for check in manifest.verification.checks)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"sizes": ((50, 32),)}, "48x32"),
        ({"sizes": ((16, 32),)}, "at least 32"),
        ({"model": "fe3e"}, "fe2e-tiny"),
        ({"precision": "int4"}, "bf16"),
        ({"backend": "abacus"}, "onnxruntime"),
        ({"without": ("everything",)}, "padding"),
    ],
)
def test_invalid_options_say_what_is_valid(checkpoint, tmp_path, changes, named):
    with pytest.raises(ConfigError, match=named):
        build_bundle(options(checkpoint, tmp_path / "bundle", **changes))


def test_missing_files_are_named_with_their_origin(checkpoint, tmp_path):
    (checkpoint / AUTHORS_FILES["vae"][0]).unlink()
    given = SourceOptions(checkpoint=str(checkpoint), config=str(checkpoint / "config.json"))
    with pytest.raises(CheckpointError, match=r"vae.safetensors[^$]*LDRN.safetensors[^$]*--no-lora"):
        build_bundle(options(checkpoint, tmp_path / "bundle", source=given))


def test_a_pickle_checkpoint_is_refused_with_the_way_out(checkpoint, tmp_path):
    pickle = tmp_path / "model.ckpt"
    pickle.write_bytes(b"\x80\x04")
    given = SourceOptions(checkpoint=str(checkpoint), dit=str(pickle), no_lora=True)
    with pytest.raises(CheckpointError, match=r"pickle[^$]*weights_only=True"):
        build_bundle(options(checkpoint, tmp_path / "bundle", source=given))


def test_a_missing_key_fails_the_build_and_leaves_nothing(checkpoint, tmp_path):
    path = checkpoint / AUTHORS_FILES["dit"][0]
    tensors = load_file(path)
    del tensors["single_blocks.0.linear2.bias"]
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"1 missing: single_blocks\.0\.linear2\.bias"):
        build_bundle(options(checkpoint, tmp_path / "bundle"))
    assert not (tmp_path / "bundle").exists()
    assert leftovers(tmp_path) == []


def test_unexpected_keys_need_the_explicit_flag(checkpoint, tmp_path):
    path = checkpoint / AUTHORS_FILES["dit"][0]
    tensors = load_file(path)
    tensors["something.else"] = tensors["img_in.bias"].clone()
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"something\.else[^$]*--allow-unexpected"):
        build_bundle(options(checkpoint, tmp_path / "bundle"))
    build_bundle(options(checkpoint, tmp_path / "bundle", allow_unexpected=True))
    assert read_manifest(tmp_path / "bundle").model == "fe2e"


def test_a_directory_that_is_no_bundle_is_left_alone(checkpoint, tmp_path):
    output = tmp_path / "photos"
    output.mkdir()
    (output / "holiday.txt").write_text("mine")
    with pytest.raises(ResourceError, match="left alone"):
        build_bundle(options(checkpoint, output))
    assert [path.name for path in output.iterdir()] == ["holiday.txt"]


def test_an_unwritable_output_is_a_typed_error(checkpoint, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="cannot"):
        build_bundle(options(checkpoint, tmp_path / "file" / "bundle"))


def test_too_little_memory_or_disk_stops_the_build_early(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("densegeo.export.build_plan.available_memory", lambda: 1 << 20)
    with pytest.raises(ResourceError, match=r"GiB of memory"):
        build_bundle(options(checkpoint, tmp_path / "bundle"))
    monkeypatch.undo()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1 << 10))
    with pytest.raises(ResourceError, match=r"GiB on disk"):
        build_bundle(options(checkpoint, tmp_path / "bundle"))
    assert not (tmp_path / "bundle").exists()


def test_a_graph_that_misses_its_bound_fails_the_build(checkpoint, tmp_path, monkeypatch):
    """A fault in the exported graph (here: the wrong GELU's worth of error) must not become a bundle."""
    original = checks.graph_outputs

    def faulty(*args: object, **kwargs: object) -> checks.Outputs:
        outputs = original(*args, **kwargs)  # type: ignore[arg-type]
        return outputs | {"denoiser": outputs["denoiser"] * np.float32(1 + 1e-4)}

    monkeypatch.setattr(checks, "graph_outputs", faulty)
    with pytest.raises(ExportError, match=r"denoiser: 1\.00e-04 > 1\.00e-05"):
        build_bundle(options(checkpoint, tmp_path / "bundle"))
    assert not (tmp_path / "bundle").exists()
    assert leftovers(tmp_path) == []


def test_fp16_is_refused_where_it_would_overflow(checkpoint, tmp_path):
    path = checkpoint / AUTHORS_FILES["vae"][0]
    tensors = load_file(path)
    tensors["decoder.mid.block_1.conv1.weight"] *= 1e6
    save_file(tensors, path)
    with pytest.raises(ExportError, match=r"fp16 would overflow[^$]*decoder\.mid\.block_1\.conv1"):
        build_bundle(options(checkpoint, tmp_path / "bundle", precision="fp16"))


def test_a_precision_that_overflows_without_rewrites_gives_no_bound(checkpoint, tmp_path):
    """The connector alone overflows, and it is folded away; but then nothing says how large errors may be."""
    path = checkpoint / AUTHORS_FILES["dit"][0]
    tensors = load_file(path)
    for name in ("connector.S.input_embedder.weight", "connector.S.input_embedder.bias"):
        tensors[name] *= 1e6
    tensors["txt_in.weight"] *= 1e-6
    save_file(tensors, path)
    with pytest.raises(ExportError, match=r"without rewrites this precision overflows.*denoiser"):
        build_bundle(options(checkpoint, tmp_path / "bundle", precision="fp16"))
    assert leftovers(tmp_path) == []


@pytest.mark.thorough
def test_interrupting_a_build_before_its_first_stage_is_done_leaves_nothing(checkpoint, tmp_path):
    """What is left of finished stages: see test_resume.py."""
    process = run_build(checkpoint, tmp_path / "bundle")
    deadline = time.monotonic() + 120
    while not leftovers(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert leftovers(tmp_path), process.communicate()[0]
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint"]


@pytest.mark.thorough
def test_a_full_disk_leaves_nothing(checkpoint, tmp_path):
    """A limit on file size stands for a full disk: every write beyond it fails, as it does there."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))

    process = run_build(checkpoint, tmp_path / "bundle", preexec_fn=limit, env=os.environ | {"PYTHONUNBUFFERED": "1"})
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 1, output
    assert "error: cannot write the bundle" in output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint"]
