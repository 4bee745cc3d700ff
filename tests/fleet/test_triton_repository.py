"""What `densegeo export-triton` writes, and what it refuses; the server itself is asked in `test_triton.py`."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from densegeo.cli import app
from densegeo.errors import ConfigError, DigestError, NotMetricError, RequestError, ResourceError
from densegeo.fleet import triton_repository
from densegeo.fleet.triton_model import (
    BUNDLE,
    OPTIONS,
    InstanceOptions,
    device_of,
    images_of,
    metres_of,
    outputs_of,
    read_options,
)
from densegeo.fleet.triton_repository import CONFIG, Deployment, export, versions
from densegeo.runtime import Estimator
from densegeo.serving.metric_options import Metres
from tests.support.toy_bundle import DECODE


def command(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, ["export-triton", *map(str, arguments)])


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_a_version_holds_the_bundle(toy_bundle: Path, tmp_path: Path) -> None:
    done = command(toy_bundle, tmp_path / "models", "--name", "depth")
    assert done.exit_code == 0, done.output
    version = tmp_path / "models" / "depth" / "1"
    assert f"wrote {version}" in done.output
    assert names(tmp_path / "models") == sorted(
        ["depth/config.pbtxt", "depth/1/model.py", *(f"depth/1/{BUNDLE}/{name}" for name in names(toy_bundle))]
    )
    picture = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    with Estimator(version / BUNDLE, device="cpu") as ours, Estimator(toy_bundle, device="cpu") as theirs:
        assert np.array_equal(ours(picture).prediction, theirs(picture).prediction)


def test_the_same_again_is_nothing_and_another_is_the_next(toy_bundle: Path, new_bundle: Callable[..., Path]) -> None:
    other = new_bundle(sizes=((64, 48), (48, 64)))
    repository = other.with_name("models")
    first = export(toy_bundle, repository, "m", Deployment())
    assert (first.version, first.fresh) == (1, True)
    written = (repository / "m" / CONFIG).stat().st_mtime_ns
    assert not export(toy_bundle, repository, "m", Deployment()).fresh
    assert (repository / "m" / CONFIG).stat().st_mtime_ns == written
    with pytest.raises(ConfigError, match=r"config.pbtxt says something else .* --replace-config"):
        export(other, repository, "m", Deployment())  # it warms two sizes up
    assert versions(repository / "m") == [1]
    second = export(other, repository, "m", Deployment(), replace_config=True)
    assert (second.version, second.fresh) == (2, True)
    with pytest.raises(ConfigError, match="is there already, with another bundle"):
        export(toy_bundle, repository, "m", Deployment(), version=2, replace_config=True)
    assert export(toy_bundle, repository, "m", Deployment(), version=10, replace_config=True).version == 10
    assert versions(repository / "m") == [1, 2, 10]
    with pytest.raises(ConfigError, match="Version 5 is older than 10"):
        export(other, repository, "m", Deployment(), version=5, replace_config=True)


def test_a_changed_configuration_is_kept(toy_bundle: Path, tmp_path: Path) -> None:
    export(toy_bundle, tmp_path, "m", Deployment())
    config = tmp_path / "m" / CONFIG
    config.write_text(config.read_text() + "# mine\n")
    done = command(toy_bundle, tmp_path, "--name", "m")
    assert done.exit_code == 1
    assert config.read_text().endswith("# mine\n")
    done = command(toy_bundle, tmp_path, "--name", "m", "--replace-config")
    assert done.exit_code == 0
    assert "its configuration was written anew" in done.output
    assert "mine" not in config.read_text()


def test_what_fails_leaves_nothing(
    toy_bundle: Path, new_bundle: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged = new_bundle()
    graph = next(damaged.glob("*.onnx"))
    graph.write_bytes(graph.read_bytes()[:-1] + b"\0")
    with pytest.raises(DigestError):
        export(damaged, tmp_path / "models", "m", Deployment())
    assert not (tmp_path / "models").exists()
    export(toy_bundle, tmp_path / "models", "m", Deployment())
    before = names(tmp_path / "models")

    def full(*given: object, **more: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "link", full)
    monkeypatch.setattr(shutil, "copyfile", full)
    for name in ("m", "another"):
        with pytest.raises(ResourceError, match="No space left"):
            export(new_bundle(), tmp_path / "models", name, Deployment(), version=7)
    assert names(tmp_path / "models") == before
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["m"]


def test_bundles_are_copied_where_there_are_no_links(
    toy_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    linked = export(toy_bundle, tmp_path, "linked", Deployment()).path / BUNDLE
    assert (linked / "manifest.json").stat().st_nlink > 1

    def without(*given: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", without)
    copied = export(toy_bundle, tmp_path, "copied", Deployment()).path / BUNDLE
    assert [(copied / name).read_bytes() for name in names(toy_bundle)] == [
        (toy_bundle / name).read_bytes() for name in names(toy_bundle)
    ]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--device", "cpu", "--device", "cuda:0"), "Name one device"),
        (("--device", "cuda:0", "--device", "cuda:0"), "named twice"),
        (("--device", "tpu"), "tpu"),
        (("--name", "a/b"), "is no name of a model"),
        (("--name", ".hidden"), "'.hidden' is no name of a model"),
        (("--timeout", "0"), "must be above 0"),
        (("--version", "0"), "greater than or equal to"),
    ],
)
def test_wrong_options(toy_bundle: Path, tmp_path: Path, options: tuple[str, ...], said: str) -> None:
    done = command(toy_bundle, tmp_path / "models", *options)
    assert done.exit_code == 2, done.output
    assert said in " ".join(done.output.split())
    assert not (tmp_path / "models").exists()


def test_gpus_are_listed(toy_bundle: Path, tmp_path: Path) -> None:
    version = export(toy_bundle, tmp_path, "m", Deployment(devices=("cuda:0", "cuda:2"), instances=2)).path
    text = (version.parent / CONFIG).read_text()
    assert "instance_group [ { count: 2 kind: KIND_GPU gpus: [ 0, 2 ] } ]" in text
    assert device_of("GPU", "2") == device_of("KIND_GPU", "2") == "cuda:2"
    assert device_of("CPU", "0") == device_of("KIND_CPU", "0") == "cpu"


def test_options_go_through_the_configuration() -> None:
    options = InstanceOptions("openvino", 3, 7.5, 1000)
    text = {"string_value": json.dumps({"backend": "openvino", "threads": 3, "timeout_s": 7.5, "max_pixels": 1000})}
    assert read_options({"parameters": {OPTIONS: text}}) == options
    assert read_options({}) == InstanceOptions()
    with pytest.raises(ConfigError, match=r"config.pbtxt .* --replace-config"):
        read_options({"parameters": {OPTIONS: {"string_value": '{"backends": "torch"}'}}})


def test_requests() -> None:
    assert [image.shape for image in images_of(np.zeros((2, 4, 5, 3), np.uint8))] == [(4, 5, 3)] * 2
    for shape in ((4, 5, 3), (1, 4, 5, 4), (1, 0, 5, 3)):
        with pytest.raises(RequestError, match="must be UINT8"):
            images_of(np.zeros(shape, np.uint8))
    near = metres_of('{"near": "0.5", "far": 10, "triton_x": true}')
    assert near == Metres(near=0.5, far=10.0)
    with pytest.raises(RequestError, match="no request parameter"):
        metres_of('{"colour": 1}')
    assert outputs_of(["normals"], DECODE, Metres()) == ["normals"]
    assert outputs_of(["depth", "normals", "prediction"], DECODE, Metres()) == ["prediction", "normals"]
    assert outputs_of(["prediction", "normals", "depth"], DECODE, near) == ["prediction", "normals", "depth"]
    with pytest.raises(NotMetricError):
        outputs_of(["depth"], DECODE, Metres())


def test_the_file_that_triton_imports_has_its_class(toy_bundle: Path, tmp_path: Path) -> None:
    scope: dict[str, Any] = {}
    exec((export(toy_bundle, tmp_path, "m", Deployment()).path / "model.py").read_text(), scope)
    assert {"initialize", "execute", "finalize"} <= set(vars(scope["TritonPythonModel"]))
    assert triton_repository.INPUT == "image"
