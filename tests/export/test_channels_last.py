"""Graphs for convolutions that have a pixel's channels adjacent: the same numbers, fewer layouts turned around."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import numpy as np
import onnx
import onnxruntime
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from densegeo.backends import BACKENDS, Form, Norms  # noqa: E402
from densegeo.benchmarks.synthetic import fill  # noqa: E402
from densegeo.export.build_options import BuildOptions  # noqa: E402
from densegeo.export.graph_stats import describe  # noqa: E402
from densegeo.export.keys import stage_keys  # noqa: E402
from densegeo.export.onnx_graph import export_graph, write_weights  # noqa: E402
from densegeo.models.config import VAEConfig  # noqa: E402
from densegeo.models.layer_plans import LayerPlan, quantize_block  # noqa: E402
from densegeo.models.quantized import FORMATS  # noqa: E402
from densegeo.models.vae import VAE, Decoder, Norm, PhaseUpsample, Upsample, transpose_upsampling  # noqa: E402
from densegeo.runtime import Estimator  # noqa: E402
from densegeo.runtime.bundle import read_manifest  # noqa: E402

pytestmark = pytest.mark.usefixtures("graphs_once")  # torch's table of translations is read once
SMALL = VAEConfig(ch=32, ch_mult=(1, 2), num_res_blocks=1, z_channels=4)
openvino = pytest.importorskip("openvino")


def written(module: nn.Module, example: torch.Tensor, folder: Path, *, norms: Norms, exact: bool = True) -> Path:
    weights, path = folder / f"{norms}.safetensors", folder / f"{norms}.onnx"
    write_weights(module, weights)
    export_graph(module, example, ("x", "y"), weights, path, exact=exact, norms=norms)
    return path


def on_onnxruntime(path: Path, x: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def on_openvino(path: Path, x: np.ndarray) -> np.ndarray:
    model = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return model({0: x})[0]


def decoder(*, phases: bool) -> Decoder:
    with torch.device("meta"):
        vae = VAE(SMALL)
    fill(vae, seed=1)
    if phases:
        for level in vae.decoder.up:
            if level.resample == "up":
                level.upsample = PhaseUpsample(level.upsample)
    return vae.decoder


@pytest.mark.parametrize("shape", [(1, 3, 5, 7), (2, 8, 1, 2), (1, 4, 6, 1)])
def test_a_transposed_convolution_is_nearest_and_3x3(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    plain = Upsample(shape[1]).double()
    phases = PhaseUpsample(plain)
    holder = Decoder(SMALL)
    holder.up[1].upsample = phases
    (transposed,) = transpose_upsampling(holder)
    assert holder.up[1].upsample is transposed
    assert transposed.state_dict().keys() == phases.state_dict().keys()
    x = torch.randn(shape, dtype=torch.float64)
    with torch.no_grad():
        expected = plain(x)
        assert (transposed(x) - expected).abs().max() < 1e-12
        transposed.make_ready()
        assert (transposed(x) - expected).abs().max() < 1e-12
    assert transpose_upsampling(holder) == []  # it is one already


UPSAMPLING = "decoder.up.1.upsample.conv"


def int8_decoder(plan: LayerPlan, kind: str = "int8") -> Decoder:
    network = decoder(phases=True)
    quantize_block(network, "decoder", {UPSAMPLING: plan}, FORMATS[kind], torch.float32)
    return network


@pytest.mark.integration
@pytest.mark.parametrize("twice", [False, True])
def test_int8_phases_transposed_are_the_same_and_one_int8_kernel_on_openvino(tmp_path: Path, *, twice: bool) -> None:
    latent = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(2))
    network = int8_decoder(LayerPlan(4.0, None if twice else torch.linspace(0.5, 2, 64), twice))
    with torch.no_grad():
        phases = network(latent)
        transpose_upsampling(network)
        assert torch.equal(network(latent), phases)
    path = written(network, torch.zeros_like(latent), tmp_path, norms="channels")
    model = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    actual = model({0: latent.numpy()})[0]
    # A number that lies between two may be rounded to the other, as sums are in another order: half of 1 % of the
    # picture moves then by a 254th, and what the network makes of it.
    assert np.linalg.norm(actual - phases.numpy()) <= 5e-3 * phases.norm()
    layers = [layer.get_rt_info() for layer in model.get_runtime_model().get_ops()]
    kernels = [row["primitiveType"].astype(str) for row in layers if row["layerType"].astype(str) == "Deconvolution"]
    assert len(kernels) == 1 + twice
    assert all(kernel.upper().endswith("I8") for kernel in kernels)


def test_phases_that_cannot_be_transposed_stay() -> None:
    """Those in fp8, and those of bundles from before, which have a scale a row."""
    fp8, old = int8_decoder(LayerPlan(4.0), "fp8"), int8_decoder(LayerPlan(4.0))
    old.up[1].upsample.conv.weight_scale[0] *= 2
    for network in (fp8, old):
        assert transpose_upsampling(network) == []
        assert type(network.up[1].upsample) is PhaseUpsample


@pytest.mark.integration
@pytest.mark.parametrize("run", [on_onnxruntime, on_openvino])
@pytest.mark.parametrize("shape", [(2, 12, 5, 3), (1, 8, 160, 96)])
def test_norms_by_channel_lose_nothing(
    run: Callable[[Path, np.ndarray], np.ndarray], shape: tuple[int, ...], tmp_path: Path
) -> None:
    norm = Norm(shape[1], 4).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in norm.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    x = torch.randn(shape, generator=generator) + torch.arange(shape[1])[None, :, None, None]
    expected = copy.deepcopy(norm).double()(x.double())
    actual = run(written(norm, torch.zeros(shape), tmp_path, norms="channels"), x.numpy())
    assert np.linalg.norm(actual - expected.numpy()) <= 1e-6 * expected.norm()


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_openvino_turns_no_layout_around_for_them(tmp_path: Path, dtype: torch.dtype) -> None:
    """Why they exist. A layout is turned where the picture enters and leaves, and for attention."""
    latent, reference = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(2)), decoder(phases=True)
    plain, exact = copy.deepcopy(reference).to(dtype), dtype == torch.float32
    turned, pictures, graphs = {}, {}, {}
    for norms in get_args(Norms):
        network = copy.deepcopy(plain)
        if norms == "channels":
            transpose_upsampling(network)
        path = written(network, torch.zeros_like(latent), tmp_path, norms=norms, exact=exact)
        model = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        layers = model.get_runtime_model().get_ops()
        reorders = [layer for layer in layers if layer.get_rt_info()["layerType"].astype(str) == "Reorder"]
        turned[norms] = sum(math.prod(layer.output(0).shape) for layer in reorders)
        pictures[norms] = model({0: latent.numpy()})[0]
        graphs[norms] = path
    with torch.no_grad():
        expected, eager = reference(latent).numpy(), plain(latent).numpy()
    bound = 1e-5 * np.linalg.norm(expected) if exact else 2 * np.linalg.norm(eager - expected)
    for picture in pictures.values():
        assert np.linalg.norm(picture - expected) <= bound
    assert turned["channels"] < turned["rows"] / 4
    operators = Counter(node.op_type for node in onnx.load(graphs["channels"], load_external_data=False).graph.node)
    assert (operators["ConvTranspose"], operators["Concat"]) == (1, 0)
    phases, transposed = (describe(graphs[norms]).flops for norms in get_args(Norms))
    # phases have a row and a column more, of 4 * 64 outputs of 2x2 windows over 64 features
    assert phases - transposed == 2 * (17 * 17 - 16 * 16) * 4 * 64 * 64 * 4


def test_builds_take_the_form_of_their_backend() -> None:
    def built(backend: str, **others: str) -> BuildOptions:
        return BuildOptions(model="fe2e-tiny", output=Path("out"), backend=backend, **others).validated()

    assert [row.name for row in BACKENDS if built(row.name).graph_form != Form()] == ["openvino"]
    assert built("openvino", precision="bf16").graph_form == Form("transposed", "channels")
    other, openvinos = (stage_keys(built(name), [], "") for name in ("onnxruntime", "openvino"))
    assert other.weights == openvinos.weights
    assert other.graphs != openvinos.graphs


@pytest.mark.thorough
def test_a_bundle_for_openvino_runs_on_every_backend(small_bundle) -> None:
    bundle, other = small_bundle(backend="openvino"), small_bundle()
    graph = read_manifest(bundle).buckets[0].decoder.file
    operators = Counter(node.op_type for node in onnx.load(bundle / graph, load_external_data=False).graph.node)
    assert operators["ConvTranspose"] > 0
    image = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    expected = Estimator(other, backend="onnxruntime", device="cpu")(image).require_prediction("depth")
    for backend in ("onnxruntime", "openvino", "torch"):
        with Estimator(bundle, backend=backend, device="cpu") as estimator:
            actual = estimator(image).require_prediction("depth")
            assert np.linalg.norm(actual - expected) <= 1e-5 * np.linalg.norm(expected)
