"""What a build makes on which machine: a table of machines and requests against backend, precision and what is said."""

from __future__ import annotations

from pathlib import Path

import pytest

from densegeo.calibration.plan import plan_file
from densegeo.errors import ConfigError
from densegeo.export.choice import BuildRequest, choose, on_this_gpu
from densegeo.export.machine import Gpu, Machine, this_machine
from densegeo.models.presets import preset

GIB = 1 << 30
CPU_LIBRARIES = frozenset({"torch", "onnxruntime", "openvino"})


def gpu(architecture: int, gib: int = 80) -> Gpu:
    return Gpu(f"GPU of sm_{architecture}", architecture, gib * GIB)


def machine(
    card: Gpu | None = None, *more: str, without: str = "", bf16: bool = False, torch_cuda: bool = False
) -> Machine:
    """A machine with the CPU's libraries and `more`, but for `without`."""
    return Machine(gpu=card, libraries=(CPU_LIBRARIES | {*more}) - {without}, torch_cuda=torch_cuda, cpu_bf16=bf16)


RTX, FULL = "tensorrt_rtx", "tensorrt"
TABLE = [
    # CPUs
    (machine(), BuildRequest(), "onnxruntime", "fp32", [], "the CPU has no bf16 units"),
    (machine(bf16=True), BuildRequest(), "openvino", "bf16", [], "the CPU has units for it"),
    (machine(bf16=True, without="openvino"), BuildRequest(), "onnxruntime", "fp32", [], "OpenVINO is not installed"),
    (machine(without="onnxruntime"), BuildRequest(), "openvino", "fp32", [], "ONNX Runtime is not installed"),
    (
        Machine(libraries=frozenset({"torch"}), cpu_bf16=True),
        BuildRequest(),
        "torch",
        "bf16",
        [],
        "neither OpenVINO nor ONNX",
    ),
    (Machine(libraries=frozenset({"torch"})), BuildRequest(), "torch", "fp32", [], "the CPU has no units for bf16"),
    (machine(), BuildRequest(precision="bf16"), "openvino", "bf16", [], "you asked for it"),
    (machine(without="openvino"), BuildRequest(precision="bf16"), "torch", "bf16", [], "bf16"),
    (machine(), BuildRequest(backend="torch"), "torch", "fp32", [], "you asked for it"),
    (machine(), BuildRequest(precision="fp32", convolutions=True), "openvino", "fp32", [], "8-bit convolutions slower"),
    (
        machine(gpu(89), without="openvino"),
        BuildRequest(convolutions=True),
        "torch",
        "fp32",
        [],
        "nothing else is installed",
    ),
    # engines for another machine's GPU
    (
        machine(None, RTX),
        BuildRequest(architectures=(89, 120)),
        "tensorrt",
        "bf16",
        [89, 120],
        "--gpu-arch means engines",
    ),
    (machine(None, RTX), BuildRequest(architectures=(75,)), "tensorrt", "fp16", [75], "there is no bf16 before sm_80"),
    (machine(None, RTX), BuildRequest(backend="tensorrt"), "tensorrt", "bf16", [], "you asked for it"),
    # GPUs of this machine
    *[
        (machine(gpu(number), library), BuildRequest(), "tensorrt", precision, [number], "and TensorRT are here")
        for library, numbers in ((RTX, (75, 80, 86, 89, 120, 121)), (FULL, (75, 80, 86, 87, 89, 90, 100, 110, 120)))
        for number in numbers
        for precision in ("fp16" if number < 80 else "bf16",)
    ],
    (
        machine(gpu(90), RTX, torch_cuda=True),
        BuildRequest(),
        "torch",
        "bf16",
        [],
        "TensorRT-RTX has no target for sm_90",
    ),
    (machine(gpu(89), torch_cuda=True), BuildRequest(), "torch", "bf16", [], "no TensorRT is installed"),
    (machine(gpu(75), torch_cuda=True), BuildRequest(), "torch", "fp16", [], "there is no bf16 before sm_80"),
    (machine(gpu(89)), BuildRequest(), "onnxruntime", "fp32", [], "torch here is no CUDA build"),
    (machine(gpu(89, 24), RTX), BuildRequest(precision="fp16"), "tensorrt", "fp16", [89], "you asked for it"),
    (machine(gpu(89, 24), RTX), BuildRequest(architectures=(120,)), "tensorrt", "bf16", [120], "engines for sm_120"),
]


@pytest.mark.parametrize(("machine", "asked", "backend", "precision", "architectures", "why"), TABLE)
def test_what_is_chosen(
    machine: Machine, asked: BuildRequest, backend: str, precision: str, architectures: list[int], why: str
) -> None:
    made = choose(asked, machine, preset("fe2e"))
    assert (made.backend, made.precision, made.architectures) == (backend, precision, architectures)
    assert why in made.why
    assert precision in made.what
    assert all(f"sm_{number}" in made.what for number in architectures)
    assert "--backend" in made.instead
    assert f" {precision}" not in made.instead.partition("--precision")[2].partition("(")[0]


@pytest.mark.parametrize(
    ("machine", "asked", "message"),
    [
        (machine(gpu(86), RTX), BuildRequest(precision="fp8"), "there is no fp8 before sm_89, so none for sm_86"),
        (machine(gpu(75), FULL), BuildRequest(precision="bf16"), "there is no bf16 before sm_80, so none for sm_75"),
        (machine(None, RTX), BuildRequest(architectures=(75, 89), precision="bf16"), "none for sm_75"),
        (machine(None, RTX), BuildRequest(architectures=(80,), precision="int8", base="bf16"), None),
        (machine(None, RTX), BuildRequest(architectures=(75,), precision="int8"), "there is no int8 before sm_80"),
        (
            machine(gpu(89, 24), RTX),
            BuildRequest(precision="fp32"),
            r"needs 32\.9 GiB .* has 24\.0: say --precision bf16",
        ),
        (
            machine(gpu(90, 24), torch_cuda=True),
            BuildRequest(precision="fp32", backend="torch"),
            "say --precision bf16",
        ),
        (machine(gpu(89, 12), RTX), BuildRequest(), r"needs 16\.7 GiB .* say --precision fp8 or int8"),
        (machine(gpu(89, 6), RTX), BuildRequest(), "no precision does"),
        (machine(gpu(89, 12), RTX), BuildRequest(weight_streaming=True), None),
        (machine(), BuildRequest(architectures=(89,)), "need TensorRT"),
        (machine(), BuildRequest(backend="onnxruntime", precision="bf16"), "has no bf16 kernels.*--precision fp32"),
        (machine(), BuildRequest(backend="onnxruntime", precision="fp8"), "has no bf16 kernels.*--base fp32"),
        (machine(), BuildRequest(backend="onnxruntime", precision="fp8", base="fp32"), None),
        (machine(None, RTX), BuildRequest(architectures=(42,)), "nothing can be built for sm_42: sm_75 is the oldest"),
        (machine(), BuildRequest(backend="tensorflow"), "there is no backend 'tensorflow'"),
        (machine(), BuildRequest(precision="fp4"), "there is no precision 'fp4'"),
    ],
)
def test_what_cannot_work_is_refused(machine: Machine, asked: BuildRequest, message: str | None) -> None:
    if message is None:
        choose(asked, machine, preset("fe2e"))
        return
    with pytest.raises(ConfigError, match=message):
        choose(asked, machine, preset("fe2e"))


def test_a_plan_decides_the_precision(tmp_path: Path) -> None:
    def chosen(card: int) -> str:
        return choose(BuildRequest(calibration=tmp_path), machine(gpu(card), FULL), preset("fe2e")).precision

    with pytest.raises(ConfigError, match="holds no plan"):
        chosen(89)
    plan_file(tmp_path, "int8").touch()
    assert chosen(89) == "int8"
    with pytest.raises(ConfigError, match="a plan for int8, which sm_75 lacks"):
        chosen(75)
    plan_file(tmp_path, "fp8").touch()
    assert (chosen(89), chosen(86)) == ("fp8", "int8")


def test_a_small_model_fits_anywhere() -> None:
    made = choose(BuildRequest(precision="fp32"), machine(gpu(89, 4), RTX), preset("fe2e-tiny"))
    assert made.precision == "fp32"
    assert on_this_gpu(made, machine(gpu(89, 4), RTX))
    assert not on_this_gpu(made, machine(gpu(86, 4), RTX))
    assert not on_this_gpu(made, machine())


def test_the_facts_of_this_machine() -> None:
    actual = this_machine()
    assert "torch" in actual.libraries
    if actual.gpu is None:
        assert choose(BuildRequest(), actual, preset("fe2e-tiny")).backend != "tensorrt"
    else:
        assert actual.gpu.architecture >= 50
        assert actual.gpu.memory > GIB
