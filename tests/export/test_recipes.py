"""What a bundle says of its making: the command that makes it again, and what equal keys promise."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path
from typing import Any

import msgspec
import onnx
import pytest
from typer.testing import CliRunner

from densegeo.cli import app
from densegeo.export import command, keys
from densegeo.export.build_options import BuildOptions
from densegeo.export.command_line import flags
from densegeo.export.engine_builder import EngineOptions
from densegeo.export.graphs import bucket_examples
from densegeo.export.keys import RECIPES, stage_keys, versions
from densegeo.export.onnx_graph import export_graph
from densegeo.export.sources import SourceOptions
from densegeo.runtime import ready
from densegeo.runtime.backends.torch_modules import load_networks
from densegeo.runtime.bundle import read_manifest, rebuild_command


def structure(path: Path) -> list[tuple[str, list[str], list[str]]]:
    """A graph's operators with what they take and give."""
    nodes = onnx.load(path, load_external_data=False).graph.node
    return [(node.op_type, list(node.input), list(node.output)) for node in nodes]


@pytest.mark.parametrize("stage", ["encoder", "denoiser"])
def test_the_ready_bundles_graphs_are_those_of_todays_recipe(stage: str, tmp_path: Path) -> None:
    """Fails when the code makes other graphs: raise RECIPES, `make ready-bundle`, and commit both."""
    directory = ready.find_bundle("fe2e-tiny")
    manifest = read_manifest(directory)
    if manifest.versions["torch"] != versions()["torch"]:
        pytest.skip("another torch names nodes in another way")
    (bucket,) = manifest.buckets
    pipeline = load_networks(directory, manifest, bucket.size, "cpu")
    weights = tmp_path / f"{stage}.safetensors"
    shutil.copyfile(directory / weights.name, weights)
    taken, given, example = bucket_examples(pipeline, bucket.size, 1)[stage]
    export_graph(pipeline.stages()[stage], example, (taken, given), weights, tmp_path / "graph.onnx")
    assert structure(tmp_path / "graph.onnx") == structure(directory / getattr(bucket, stage).file)


def test_a_recipe_changes_the_keys_that_follow_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    options = BuildOptions(model="fe2e-tiny", output=Path("out"), architectures=(89,)).validated()
    before = stage_keys(options, [], "")
    for changed, kept in (("graphs", ("weights",)), ("kernels", ("weights", "graphs")), ("weights", ())):
        with monkeypatch.context() as patch:
            patch.setattr(keys, "RECIPES", RECIPES | {changed: RECIPES[changed] + 1})
            after = stage_keys(options, [], "")
        assert {name for name in ("weights", "graphs", "kernels") if getattr(before, name) == getattr(after, name)} == {
            *kept
        }


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "fe2e-tiny", "sizes": ((256, 192), (512, 384)), "batches": (2, 4), "without": ("padding",)},
        {
            "model": "fe2e",
            "source": SourceOptions(
                dit="a b.safetensors", vae="acme/x@1:vae.safetensors", no_lora=True, any_digest=True
            ),
            "architectures": (86, 89),
            "precision": "fp16",
            "backend": "tensorrt",
            "engines": EngineOptions(library="tensorrt_rtx", weights="input", workspace_mib=64, weight_streaming=True),
        },
        {"model": "fiffdepth", "source": SourceOptions(checkpoint="files"), "sizes": ((70, 45),), "any_size": True},
    ],
)
def test_the_stored_options_make_the_same_bundle(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "engines" in changes:
        pytest.importorskip("tensorrt_rtx")
    options = BuildOptions(output=tmp_path / "my bundle", **changes).validated()
    built: list[BuildOptions] = []
    monkeypatch.setattr(command, "build_bundle", lambda options, console: built.append(options))
    monkeypatch.setattr(command, "on_this_gpu", lambda choice, machine: False)
    manifest = msgspec.structs.replace(read_manifest(ready.find_bundle("fe2e-tiny")), options=flags(options))
    typed = rebuild_command(manifest.options, options.output)
    words = shlex.split(typed)
    assert words[:2] == ["densegeo", "build"]
    result = CliRunner().invoke(app, words[1:], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    (again,) = built
    assert msgspec.structs.replace(again, choice=None) == options
