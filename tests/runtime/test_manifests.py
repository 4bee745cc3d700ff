"""Manifests that were damaged, edited, or written by another version: one typed error, and what to do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from densegeo.errors import BundleError, SchemaVersionError
from densegeo.runtime.bundle import MANIFEST, SCHEMA_VERSION, read_manifest
from densegeo.runtime.ready import FOLDER

NewBundle = Callable[..., Path]
Change = Callable[[dict[str, Any]], object]


def edited(bundle: Path, change: Change) -> Path:
    path = bundle / MANIFEST
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    return bundle


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m.update(precision="fp4"), "no precision 'fp4'"),
        (lambda m: m.update(base="int8"), "no precision 'fp32' over 'int8'"),
        (lambda m: m.update(precision="fp8", base="bf16"), "has no plan"),
        (lambda m: m["buckets"][0].update(width=0), ">= 1"),
        (lambda m: m["decode"].update(latent_scale=0), "latent_scale"),
        (lambda m: m["decode"].update(outputs=[]), "depth, or normals"),
        (lambda m: m["decode"].update(outputs=m["decode"]["outputs"][:1] * 2), "one of each"),
        (lambda m: m["decode"].update(outputs=m["decode"]["outputs"][:1]), "two outputs"),
        (lambda m: m["decode"].update(packing="latent"), "one output"),
        (lambda m: m["decode"]["outputs"][0].update(space="metric"), "space"),
        (lambda m: m["decode"]["outputs"][0].update(frame="dsine"), "neither has the other"),
        (lambda m: m["decode"]["outputs"][1].update(clamp="after_mean"), "no mean over channels"),
    ],
)
def test_what_cannot_be_is_refused(
    new_bundle: NewBundle, change: Callable[[dict[str, Any]], object], said: str
) -> None:
    with pytest.raises(BundleError, match=f"not a valid manifest .*{said}"):
        read_manifest(edited(new_bundle(), change))


def test_damaged_text_is_a_damaged_manifest(new_bundle: NewBundle) -> None:
    bundle = new_bundle()
    path = bundle / MANIFEST
    path.write_bytes(path.read_bytes().replace(b'"toy"', b'"t\xffy"', 1))
    with pytest.raises(BundleError, match="not a valid manifest"):
        read_manifest(bundle)


@pytest.mark.parametrize(
    ("options", "command"),
    [
        ({"--model": ["fe2e"], "--size": ["64x48", "48x64"], "--authors-sizes": []}, None),
        (None, "densegeo build --model toy --output"),  # of a version that kept no options
        ("damaged", "densegeo build --model MODEL --output"),
    ],
)
def test_another_versions_bundle_says_what_rebuilds_it(
    new_bundle: NewBundle, options: Any, command: str | None
) -> None:
    def older(manifest: dict[str, Any]) -> None:
        manifest["schema_version"] = SCHEMA_VERSION - 1
        del manifest["decode"], manifest["options"]
        if options == "damaged":
            manifest["options"] = 3
        elif options is not None:
            manifest["options"] = options

    bundle = edited(new_bundle(), older)
    expected = command or "densegeo build --model fe2e --size 64x48 --size 48x64 --authors-sizes --output"
    with pytest.raises(
        SchemaVersionError, match=f"reads version {SCHEMA_VERSION}.*Rebuild it: {expected} .*{bundle.name}"
    ):
        read_manifest(bundle)
    with pytest.raises(SchemaVersionError, match="Install the densegeo that built it"):
        read_manifest(edited(bundle, lambda manifest: manifest.update(schema_version=SCHEMA_VERSION + 1)))


def test_no_hint_writes_into_the_package() -> None:
    from densegeo.runtime.engines import renew_command

    ready = FOLDER / "fe2e-tiny"
    assert renew_command(read_manifest(ready), ready).endswith(" --backend tensorrt --output fe2e-tiny")
