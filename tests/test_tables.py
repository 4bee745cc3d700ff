"""The tables of precisions, architectures and backends: complete, consistent, and what code asks instead of names."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Sequence
from types import SimpleNamespace

import pytest

from densegeo import doctor
from densegeo.architectures import AMPERE, ARCHITECTURES, OLDEST, RTX_TARGETS, names
from densegeo.backends import BACKENDS, ENGINE_LIBRARIES, ENGINES, NAMES, NETWORKS, BackendRow, backend_row
from densegeo.errors import ConfigError
from densegeo.findings import Finding
from densegeo.precision import CALIBRATED, FLOATS, PRECISIONS, QUANTIZED, precision_row
from tests.support.project import ROOT

CODE = ("densegeo", "calibration", "export", "runtime", "models")
TABLE = "densegeo/backends.py"
WAYS = "runtime/faults.py"  # of an image, which are broken on purpose; two are named after backends


def test_every_precision_has_its_types() -> None:
    for row in PRECISIONS.values():
        assert row.bases == ((row.name,) if not row.quantized else ("bf16", "fp32"))
        assert row.quantized == (row.bits < 16)
        assert row.calibrated <= row.quantized
        assert all(base in FLOATS for base in row.bases)
        assert (row.qmax > 0) == row.quantized
        assert row.bytes_of(10) * 8 == 10 * row.bits
    assert (FLOATS, QUANTIZED, CALIBRATED) == (("fp32", "bf16", "fp16"), ("fp8", "int8"), ("fp8", "int8"))
    with pytest.raises(ConfigError, match="there is no precision 'fp4'; there are fp32, bf16"):
        precision_row("fp4")


def test_libraries_know_the_types_by_their_names() -> None:
    torch = pytest.importorskip("torch")
    onnx = pytest.importorskip("onnx")
    for row in PRECISIONS.values():
        dtype = getattr(torch, row.torch)
        assert dtype.itemsize * 8 == row.bits
        assert onnx.TensorProto.DataType.Value(row.onnx)
        if row.quantized and not row.integer:
            assert torch.finfo(dtype).max == row.qmax


def test_architectures() -> None:
    assert OLDEST == 75
    assert AMPERE in ARCHITECTURES
    assert {number: f"SM{number}" for number in (75, 80, 86, 89, 120, 121)} == RTX_TARGETS
    assert ARCHITECTURES[75].types == ("fp32", "fp16")
    assert ARCHITECTURES[87].types == ("fp32", "bf16", "fp16", "int8")
    assert ARCHITECTURES[90].types == tuple(PRECISIONS)
    assert names((80, 89)) == "sm_80, sm_89"


def test_kernels_and_precisions_agree_on_first_architectures() -> None:
    pytest.importorskip("triton")
    from densegeo.kernels.table import NEEDS

    rows = {f"*{row.triton}": row for row in PRECISIONS.values() if f"*{row.triton}" in NEEDS}
    assert set(rows) == set(NEEDS)
    for kind, row in rows.items():
        assert NEEDS[kind] == (row.first_architecture, f"no {row.name} before sm_{row.first_architecture}")


def test_backends_are_complete() -> None:
    assert len(set(NAMES)) == len(NAMES)
    for row in BACKENDS:
        module = row.opens.partition(":")[0].removeprefix("densegeo.").replace(".", "/")
        defined = {node.name for node in ast.parse((ROOT / f"{module}.py").read_text()).body if hasattr(node, "name")}
        assert row.opens.partition(":")[2] in defined
        assert set(row.precisions) <= set(PRECISIONS)
        assert set(row.providers) <= set(row.devices)
    assert (ENGINES.name, NETWORKS.name) == ("tensorrt", "torch")


def test_no_second_list_of_backends() -> None:
    """No literal has two of their names."""
    for folder in CODE:
        for path in (ROOT / folder).rglob("*.py"):
            where = path.relative_to(ROOT).as_posix()
            if (folder == "densegeo" and path.parent != ROOT / folder) or where in (TABLE, WAYS):
                continue
            for node in ast.walk(ast.parse(path.read_text())):
                parts = getattr(node, "elts", None) or getattr(node, "keys", None)
                if isinstance(parts, list):
                    texts = {part.value for part in parts if isinstance(part, ast.Constant)}
                    assert len(texts & set(NAMES)) < 2, f"{where}:{node.lineno} lists backends"


def test_rows_import_nothing_heavy() -> None:
    code = "import sys, densegeo.backends; print({'torch', 'numpy', 'onnxruntime', 'msgspec'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def said(
    monkeypatch: pytest.MonkeyPatch,
    versions: dict[str, str],
    providers: list[str],
    *,
    gpu: bool,
    verified: Sequence[Finding] = (),
) -> dict[str, doctor.Backend]:
    """What `doctor` says on a machine with these distributions and ONNX Runtime's providers. verified: found there."""
    monkeypatch.setattr(doctor, "installed_version", versions.get)
    monkeypatch.setattr(BackendRow, "available", lambda row: True)
    monkeypatch.setitem(sys.modules, "onnxruntime", SimpleNamespace(get_available_providers=lambda: providers))
    return {line.name: line for row in BACKENDS for line in doctor._examined(row, gpu, verified)}


CPU, CUDA, TENSORRT = (f"{name}ExecutionProvider" for name in ("CPU", "CUDA", "Tensorrt"))


def test_doctor_on_an_empty_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    actual = said(monkeypatch, {}, [], gpu=False)
    assert set(actual) == {"tensorrt", "onnxruntime-tensorrt", "onnxruntime", "openvino cpu", "torch"}
    for name, line in actual.items():
        assert line == doctor.Backend(name, None, "no", f"not installed: {backend_row(name.split()[0]).install}")


@pytest.mark.parametrize(
    ("providers", "gpu", "usable", "detail"),
    [
        ([CPU], False, "no", "this ONNX Runtime has no TensorRT provider"),
        ([TENSORRT, CUDA, CPU], False, "no", "TensorRT provider there, but no GPU was found"),
        ([TENSORRT, CUDA, CPU], True, "untried", "`densegeo verify BUNDLE --backend onnxruntime-tensorrt` tells"),
    ],
)
def test_doctor_on_the_tensorrt_provider(
    monkeypatch: pytest.MonkeyPatch, providers: list[str], gpu: bool, usable: str, detail: str
) -> None:
    versions = {"onnxruntime-gpu": "1.31", "tensorrt-cu12": "10.9", "torch": "2.13"}
    actual = said(monkeypatch, versions, providers, gpu=gpu)
    line = actual["onnxruntime-tensorrt"]
    assert (line.usable, line.version) == (
        usable,
        None if providers == [CPU] else "onnxruntime-gpu 1.31, tensorrt-cu12 10.9",
    )
    assert detail in line.detail
    assert actual["onnxruntime cpu"] == doctor.Backend("onnxruntime cpu", "1.31", "yes", "CPU provider")
    assert actual["torch"].detail == "not tried here: `densegeo verify BUNDLE --backend torch` tells"
    assert actual["tensorrt"].usable == ("untried" if gpu else "no")


def test_doctor_says_what_verify_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bundle that passed counts, of those on the same kind of device the last; failures alone are a no."""
    versions = {"onnxruntime-gpu": "1.31", "torch": "2.13", "openvino": "2026.4"}
    verified = [
        Finding("a", "torch", "cpu", good=True, said="", when="2026-01-01 10:00"),
        Finding("b", "torch", "cuda:1", good=True, said="", when="2026-01-02 10:00"),
        Finding("c", "torch", "cuda:0", good=False, said="off", when="2026-01-03 10:00"),
        Finding("a", "openvino", "cpu", good=False, said="off", when="2026-01-01 10:00"),
        Finding("a", "onnxruntime", "cpu", good=True, said="", when="2026-01-01 10:00"),
    ]
    actual = said(monkeypatch, versions, [CUDA, CPU], gpu=True, verified=verified)
    assert (actual["torch"].usable, actual["torch"].detail) == ("yes", "verified on cuda:1, 2026-01-02 10:00")
    assert actual["openvino cpu"].usable == "no"
    assert "no bundle that was verified with it passed" in actual["openvino cpu"].detail
    assert actual["onnxruntime cuda"].usable == "untried"


def test_doctor_says_which_cuda_a_gpu_needs() -> None:
    listed = [
        "NVIDIA H100, 81559 MiB, 550.1, 9.0",
        "NVIDIA B200, 180000 MiB, 570.1, 10.0",
        "GPU of tomorrow, 1, 2, 99.9",
    ]
    assert doctor._toolkits(listed) == (
        " sm_100 needs libraries of CUDA 12.8 or later. sm_90 needs libraries of CUDA 11.8 or later."
    )


def test_help_names_every_backend_and_precision() -> None:
    for command in ("infer", "verify", "bench"):
        done = subprocess.run(
            [sys.executable, "-m", "densegeo", command, "--help"],
            capture_output=True,
            text=True,
            check=True,
            env={"COLUMNS": "400", "PATH": "", "PYTHONPATH": ":".join(sys.path)},
        )
        assert ", ".join(NAMES) in done.stdout


def test_engine_libraries() -> None:
    assert [row.knows(90) for row in ENGINE_LIBRARIES.values()] == [True, False]


def test_rewrites_say_what_they_touch() -> None:
    pytest.importorskip("torch")
    from densegeo.models.families import FAMILIES
    from densegeo.models.rewrites import Scope, block

    for family in FAMILIES.values():
        for rewrite in family.rewrites:
            kind, _ = rewrite.scope.block
            assert (rewrite.scope.part == "block") == (kind in family.denoiser.BLOCKS)
    first, last, every, outside = block("a", 0), block("a", -1), Scope(), Scope("outside")
    assert [first.touches("a", index, 3) for index in range(3)] == [True, False, False]
    assert [last.touches("a", index, 3) for index in range(3)] == [False, False, True]
    assert not last.touches("b", 2, 3)
    assert every.touches("b", 1, 3)
    assert not outside.touches("a", 0, 3)
    assert (every.before_blocks, outside.before_blocks, Scope("prompt").before_blocks) == (False, True, True)
    assert [scope.stage for scope in (first, outside, Scope("decoder"))] == ["denoiser", "denoiser", "decoder"]


def test_roles_say_what_can_be_left_out() -> None:
    pytest.importorskip("torch")
    from densegeo.export.sources import SourceOptions, unnamed
    from densegeo.models.families import FAMILIES
    from densegeo.models.published import PUBLICATIONS

    for family in FAMILIES.values():
        assert set(family.weights) <= {role.name for role in family.roles}
        assert {role.merged_into for role in family.roles} <= {"", *family.weights}
        for role in family.roles:
            assert not role.skip or role.skip in SourceOptions.__struct_fields__
            assert not role.flag or role.name in SourceOptions.__struct_fields__
    row = PUBLICATIONS["fe2e"]
    assert row.needed_roles() == ["dit", "vae", "lora", "prompt"]
    assert row.needed_roles("no_lora") == ["dit", "vae", "prompt"]
    assert unnamed(SourceOptions(), FAMILIES["fe2e"]) == row.needed_roles()
    assert unnamed(SourceOptions(no_lora=True, dit="x"), FAMILIES["fe2e"]) == ["vae", "prompt"]
