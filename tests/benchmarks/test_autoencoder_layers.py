"""The autoencoder's layers: all convolutions are timed, operations are those that run, wrong numbers end it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

torch = pytest.importorskip("torch")

from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from densegeo.benchmarks import autoencoder_layers  # noqa: E402
from densegeo.benchmarks.autoencoder_count import FORMS, counted, work_of  # noqa: E402
from densegeo.benchmarks.autoencoder_layers import latents, raced, with_upsampling  # noqa: E402
from densegeo.benchmarks.layer_times import (  # noqa: E402
    CONVOLUTION,
    KINDS,
    TIMERS,
    OpenVinoTimer,
    _timed,
    convolutions,
    kind_of,
)
from densegeo.benchmarks.setups import FULL  # noqa: E402
from densegeo.benchmarks.synthetic import fill  # noqa: E402
from densegeo.errors import BackendError, ConfigError, DensegeoError  # noqa: E402
from densegeo.models.config import VAEConfig  # noqa: E402
from densegeo.models.vae import VAE, Decoder  # noqa: E402

SMALL = VAEConfig(ch=32, ch_mult=(1, 2), num_res_blocks=1, z_channels=4)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    with torch.device("meta"):
        vae = VAE(SMALL)
    fill(vae, seed=1)
    return vae.decoder


def operations(network: torch.nn.Module, example: torch.Tensor) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(example)
    return counter.get_total_flops()


@pytest.mark.parametrize("form", FORMS)
def test_counted_operations_are_those_that_run(decoder: Decoder, form: str) -> None:
    example = torch.empty(2, 4, 6, 8, device="meta")
    with torch.device("meta"):
        network = with_upsampling(VAE(SMALL).decoder, form)
        plain = VAE(SMALL).decoder
    whole = operations(network, example)
    assert sum(work.flops for work in work_of(plain, example, form)) == whole
    actual = convolutions(with_upsampling(decoder, form), example)
    attention = 4 * 2 * (6 * 8) ** 2 * 64
    assert sum(convolution.flops for convolution in actual) == whole - attention
    names = [convolution.name for convolution in actual]
    assert (names[0], names[-1], len(names)) == ("conv_in", "conv_out", len(set(names)))


def test_a_form_of_fewer_operations_may_move_more_bytes() -> None:
    """What `count` is for: phases save operations and not bytes, a transposed convolution both."""
    rows = {(row["part"], row["form"]): row for row in counted(FULL.vae, 1024, 768)["rows"]}
    plain, phases, transposed = (rows["decoder.up.1.upsample", form] for form in FORMS)
    assert phases["tflop"] < 0.45 * plain["tflop"]
    assert phases["gb"] > 0.99 * plain["gb"]
    assert transposed["gb"] < 0.4 * phases["gb"]
    # DESIGN section 6: 19.1 TFLOP for the encoder and two decodes, without a rewrite
    whole = rows["encoder", ""]["tflop"] + rows["decoder, two latents", "plain, one batch"]["tflop"]
    assert whole == pytest.approx(19.1, abs=0.05)


THOROUGH = [name for name in TIMERS if name != "torch"]


@pytest.mark.parametrize("backend", ["torch", *(pytest.param(name, marks=pytest.mark.thorough) for name in THOROUGH)])
def test_every_convolution_is_timed(decoder: Decoder, backend: str, tmp_path: Path) -> None:
    if backend == "openvino":
        pytest.importorskip("openvino")
    network = with_upsampling(decoder, autoencoder_layers.UPSAMPLING[backend])
    example = latents(64, 4)
    timer = TIMERS[backend](network, example, tmp_path)
    walls = [timer.run() for _ in range(3)]
    rows = timer.layers()
    indices = [row.index for row in rows if row.kind == CONVOLUTION]
    assert sorted(indices) == list(range(len(convolutions(network, example.to("meta")))))
    assert {row.kind for row in rows} <= set(KINDS)
    assert {len(row.seconds) for row in rows} == {2}  # the first run is no measurement
    for turn in (1, 2):  # counters are whole microseconds, OpenVINO's of all runs so far together
        assert 0 < sum(row.seconds[turn - 1] for row in rows) <= walls[turn] + (1 + turn) * 1e-6 * len(rows)
    with torch.no_grad():
        expected = decoder(example).numpy()
    assert np.linalg.norm(timer.output - expected) <= 1e-5 * np.linalg.norm(expected)


def test_a_layers_time_is_that_of_its_own_run(tmp_path: Path) -> None:
    """OpenVINO's counters are means of all runs: the slow ones before it are not a layer's time."""
    pytest.importorskip("openvino")
    shape = [1, 64, None, None]
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name in "xy"]
    weight = onnx.numpy_helper.from_array(np.ones((64, 64, 3, 3), np.float32), "w")
    node = onnx.helper.make_node("Conv", ["x", "w"], ["y"], "conv", pads=[1, 1, 1, 1])
    graph = onnx.helper.make_graph([node], "one", ends[:1], ends[1:], [weight])
    path, sides = tmp_path / "graph.onnx", (8, 512, 8, 8, 512)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8), path)
    timer, walls = OpenVinoTimer(path, torch.ones(1, 64, 8, 8)), []
    for side in sides:
        timer._array = np.ones((1, 64, side, side), np.float32)
        walls.append(timer.run())
    (seconds,) = (row.seconds for row in timer.layers() if row.kind == CONVOLUTION)
    for run, (convolution, wall) in enumerate(zip(seconds, walls[1:], strict=True), 2):
        assert convolution <= wall + run * 1e-6
    assert min(seconds[0], seconds[3]) > 50 * max(seconds[1], seconds[2])


def test_a_convolution_of_another_name_is_no_layer() -> None:
    with pytest.raises(BackendError, match="no convolution of the graph is called merged_7"):
        _timed({0: ("Conv", "merged_7", [0.1, 0.1])}, {"conv2d_7": 0})


@pytest.mark.parametrize(
    ("operator", "kind"),
    [
        ("Conv", "convolutions"),
        ("Deconvolution", "convolutions"),
        ("ConvolutionBackpropData", "convolutions"),
        ("aten::conv_transpose2d", "convolutions"),
        ("ReorderInput", "layouts"),
        ("aten::contiguous", "layouts"),
        ("Resize", "upsampling"),
        ("Concat", "upsampling"),
        ("FusedMatMul", "attention"),
        ("node_scaled_dot_product_attention", "attention"),
        ("node_silu_22", "norms, SiLU, sums"),
        ("ReduceMean", "norms, SiLU, sums"),
    ],
)
def test_operators_have_a_kind(operator: str, kind: str) -> None:
    assert kind_of(operator) == kind


class Fixed:
    """A timer whose result is given."""

    def __init__(self, value: float) -> None:
        self.output = np.full(3, value, np.float32)

    def run(self) -> float:
        return 0.5

    def layers(self) -> list[object]:
        return []


def test_wrong_numbers_get_no_time() -> None:
    rows = raced({"one": Fixed(1), "same": Fixed(1)}, lambda: np.ones(3, np.float32), runs=2)
    assert rows["same"]["speedup"]["median"] == 1
    with pytest.raises(DensegeoError, match=r"other differs by 1\.0e-04; the bound is 1e-05"):
        raced({"one": Fixed(1), "other": Fixed(1.0001)}, lambda: np.ones(3, np.float32), runs=2)


def test_a_record_holds_one_run_of_each_kind(tmp_path: Path) -> None:
    file = tmp_path / "runs.json"
    for what, backend, value in (("forms", "torch", 1), ("forms", "openvino", 2), ("forms", "torch", 3)):
        autoencoder_layers._finish({"what": what, "backend": backend, "value": value}, file)
    runs = json.loads(file.read_text())["runs"]
    assert [(run["backend"], run["value"]) for run in runs] == [("openvino", 2), ("torch", 3)]
    assert all("commit" in run and "command" in run for run in runs)


@pytest.mark.parametrize(
    ("backend", "size", "message"),
    [
        ("tensorrt", 64, "no backend 'tensorrt' here; there are onnxruntime, openvino, torch"),
        ("torch", 60, "multiple of 8"),
    ],
)
def test_what_cannot_be_timed_is_refused(backend: str, size: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        autoencoder_layers._checked(backend, size)
