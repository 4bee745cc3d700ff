"""The TensorRT backend as far as a machine without a GPU shows it: what is refused, and how kernels are launched."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import pytest

from densegeo.backends import BACKENDS
from densegeo.errors import BackendError
from densegeo.kernels.contract import Argument, Axis, LaunchContract
from densegeo.runtime.backends import open_backend
from densegeo.runtime.backends.cuda_kernels import Kernels, pack
from densegeo.runtime.bundle import read_manifest
from densegeo.runtime.verified import forget, is_verified, mark_verified

CONTRACT = LaunchContract(
    name="split.test",
    symbol="split_kernel",
    architecture=89,
    arguments=[Argument("source", "*fp32", 16), Argument("rows", "i32"), Argument("scale", "fp32")],
    constants={},
    warps=4,
    shared=0,
    grid=[Axis("rows", 32)],
    hidden=["global_scratch", "profile_scratch"],
    fp_fusion=False,
    triton="3.9.0",
    digest="",
)


def has_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def test_arguments_are_packed_in_launch_order() -> None:
    packed = pack(CONTRACT, {"scale": 0.25, "source": 4096, "rows": 7})
    # cuda.core.launch takes addresses as int; it refuses c_void_p (seen with 0.6 to 1.2)
    assert [type(value) for value in packed] == [int, ctypes.c_int32, ctypes.c_float, int, int]
    assert [getattr(value, "value", value) for value in packed] == [4096, 7, 0.25, 0, 0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"source": 4096, "rows": 7}, "wrong: scale"),
        ({"source": 4096, "rows": 7, "scale": 1.0, "rose": 1}, "wrong: rose"),
        ({"source": 4100, "rows": 7, "scale": 1.0}, "source must be a multiple of 16"),
        ({"source": 4096, "rows": 1 << 31, "scale": 1.0}, "rows is 2147483648, and has 32 bits"),
    ],
)
def test_a_launch_that_breaks_the_contract_is_refused(values: dict[str, float], message: str) -> None:
    with pytest.raises(BackendError, match=message):
        pack(CONTRACT, values)


def test_a_bundle_without_kernels_for_this_gpu_says_how_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"no kernels for sm_90: build it with --gpu-arch 90"):
        Kernels(tmp_path, [CONTRACT], 90)


def test_the_backends_arguments_are_those_of_the_kernels() -> None:
    """The names that the backend passes, read from its source, against the table that is compiled."""
    pytest.importorskip("triton")
    import ast
    from fnmatch import fnmatch

    from densegeo.kernels.table import VARIANTS
    from densegeo.runtime.backends import tensorrt_network

    def pattern(name: ast.expr) -> str:
        parts = name.values if isinstance(name, ast.JoinedStr) else [name]
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "*" for part in parts)

    launched = {}
    tree = ast.parse(Path(tensorrt_network.__file__).read_text())
    for call in ast.walk(tree):
        match call:
            case ast.Call(func=ast.Attribute(attr="launch"), args=[name, _, ast.Dict(keys)]) if pattern(name) != "*":
                launched[pattern(name)] = {key.value for key in keys if isinstance(key, ast.Constant)}
    assert set(launched) == {
        "preprocess.u8_fp32",
        "split.fp32_fp32",
        "log_dequantize.**_fp32",
        "normals.fp32",
    }
    spread = {
        "batch_stride", "channel_stride", "row_stride", "column_stride", "left", "top", "box_width", "box_height",
        "width", "height", *(f"m{row}{column}" for row in range(3) for column in range(3)),
    }  # fmt: skip
    for name, keys in launched.items():
        variants = [variant for variant in VARIANTS if fnmatch(variant.name, name)]
        assert len(variants) == (3 if "*" in name else 1)
        for variant in variants:
            assert keys <= set(variant.types)
            assert set(variant.types) - keys <= spread


def test_a_bundle_without_engines_says_how_to_build_them(bundle: Path) -> None:
    with pytest.raises(BackendError, match=r"no TensorRT engines\. Build some: densegeo build"):
        open_backend("tensorrt", bundle, read_manifest(bundle), "auto")


@pytest.mark.skipif(has_driver(), reason="there is a driver")
def test_a_machine_without_a_driver_is_told_so() -> None:
    from densegeo.runtime.backends.cuda_memory import open_device

    with pytest.raises(BackendError, match="no NVIDIA driver"):
        open_device("auto")
    with pytest.raises(BackendError, match="NVIDIA GPUs only"):
        open_device("cpu")


def test_auto_takes_no_backend_that_was_not_verified_here(
    new_bundle: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    bundle = new_bundle()
    manifest = read_manifest(bundle)
    row = next(row for row in BACKENDS if row.name == "tensorrt")
    monkeypatch.setattr("densegeo.runtime.backends.BACKENDS", (row,))
    monkeypatch.setattr(type(row), "available", lambda self: True)
    with pytest.raises(BackendError, match=r"not verified on this machine; `densegeo verify .* --backend tensorrt`"):
        open_backend("auto", bundle, manifest, "auto")
    mark_verified(bundle, "tensorrt")
    assert is_verified(bundle, "tensorrt")
    assert not is_verified(bundle, "onnxruntime")
    with pytest.raises(BackendError, match="no TensorRT engines"):  # now it is tried
        open_backend("auto", bundle, manifest, "auto")
    (bundle / "manifest.json").write_bytes((bundle / "manifest.json").read_bytes() + b"\n")
    assert not is_verified(bundle, "tensorrt")  # another bundle by now
    mark_verified(bundle, "tensorrt")
    forget(bundle, "tensorrt")
    assert not is_verified(bundle, "tensorrt")
