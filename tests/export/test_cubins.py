"""Kernels compiled into a bundle: the files, their contracts and digests, and what is refused."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from densegeo.errors import ConfigError, KernelError
from densegeo.export import stages
from densegeo.export.build import build_bundle
from densegeo.runtime.bundle import check_files, read_manifest
from tests.support.checkpoints import leftovers, options

pytest.importorskip("triton")


@pytest.mark.thorough
def test_a_bundle_holds_its_kernels(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that its images need, of the architectures that were asked for, and no others."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # must not reach the compiler
    bundle = build_bundle(options(checkpoint, tmp_path / "bundle", architectures=(75, 90)))
    manifest = read_manifest(bundle)
    check_files(bundle, manifest)
    assert manifest.target_architectures == ["sm_75", "sm_90"]
    resized = "resize_depth.before_mean3_fp32"
    depths = [resized, f"{resized}_log_affine"]
    names = ["preprocess.u8_fp32", "preprocess.ycbcr_fp32", "split.fp32_fp32", *depths, "normals.fp32"]
    made = sorted((contract.name, contract.architecture) for contract in manifest.kernels)
    assert made == sorted((name, architecture) for name in names for architecture in (75, 90))
    for contract in manifest.kernels:
        data = (bundle / "kernels" / contract.file).read_bytes()
        assert data[:4] == b"\x7fELF"
        assert hashlib.sha256(data).hexdigest() == contract.digest
        assert manifest.files[f"kernels/{contract.file}"].sha256 == contract.digest
        assert contract.symbol.encode() in data
    assert {path.name for path in (bundle / "kernels").iterdir()} == {c.file for c in manifest.kernels}


def test_an_unknown_architecture_is_refused_before_anything_is_done(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"sm_42; there are 75, 80"):
        build_bundle(options(checkpoint, tmp_path / "bundle", architectures=(90, 42)))
    assert not (tmp_path / "bundle").exists()


def test_a_compiler_that_fails_leaves_no_bundle_but_its_graphs(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "launched", lambda decode, channels: ["split.fp32_fp32", "layer_norm.fp32"])
    with pytest.raises(
        KernelError, match=r"Unknown kernels layer_norm\.fp32[^$]*Finished: references, weights, graphs\."
    ):
        build_bundle(options(checkpoint, tmp_path / "bundle", architectures=(90,)))
    assert not (tmp_path / "bundle").exists()
    assert leftovers(tmp_path) == [".bundle.building"]
    assert not (tmp_path / ".bundle.building" / "bundle" / "kernels").exists()
