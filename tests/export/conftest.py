"""Bundles built once a session from the golden checkpoint, by the same function as the command."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from densegeo.export.build import build_bundle
from densegeo.export.options import BuildOptions
from densegeo.export.sources import Given

Builder = Callable[..., Path]


def golden_given(golden: Path, *, lora: bool = True) -> Given:
    folder = golden / "fe2e_small"
    return Given(
        checkpoint=str(folder),
        dit=str(folder / "dit.safetensors"),
        lora=str(folder / "lora.safetensors") if lora else None,
        config=str(folder / "config.json"),
        no_lora=not lora,
    )


@pytest.fixture(scope="session")
def golden_bundle(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Builder:
    """(lora, without, precision) -> bundle directory at the golden image's size, each built once."""

    @cache
    def build(*, lora: bool = True, without: tuple[str, ...] = (), precision: str = "fp32") -> Path:
        output = tmp_path_factory.mktemp("golden") / "bundle"
        options = BuildOptions(
            model="fe2e",
            output=output,
            given=golden_given(golden, lora=lora),
            sizes=((96, 64),),
            without=without,
            precision=precision,
        )
        return build_bundle(options)

    return build


@pytest.fixture(scope="session")
def expected(golden: Path) -> dict[str, object]:
    return load_file(golden / "fe2e_small" / "expected.safetensors")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A directory with the authors' file names, smaller than any real model."""
    from tests.export.test_build import write_checkpoint

    return write_checkpoint(tmp_path)
