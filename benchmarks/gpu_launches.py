"""What the tensorrt backend does around its engines, on a real driver: cubins launched through cuda-core, copies
through pinned memory, and a CUDA graph recorded by cuda-core; every result against the kernels' references.

Engines are stood in for by copies of known tensors: only their place in the stream and their addresses are checked.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from densegeo.export.cubins import write_cubins
from densegeo.kernels.normals import normals
from densegeo.kernels.preprocess import preprocess
from densegeo.kernels.resize_depth import resize_depth
from densegeo.kernels.split import split
from densegeo.models.reference import relative
from densegeo.runtime.backends.cuda_kernels import Kernels
from densegeo.runtime.backends.cuda_memory import Memory, architecture_of, open_device
from densegeo.runtime.backends.tensorrt_network import Network
from densegeo.runtime.bundle import Bucket, Decode, Graph, TensorSpec
from densegeo.runtime.resample import place

BOUND = 1e-5  # float32 (DESIGN section 10)
SIZE = (864, 576)
SOURCES = ((1003, 751), (333, 517))  # odd, larger than the bucket; odd, portrait
DECODE = Decode(
    depth_kind="log_affine", latent_scale=0.3611, latent_shift=0.1159, depth_sign=-1, normal_sign=1
)  # fe2e's


class Copies:
    """A `Stepper` that copies a fixed device tensor to its output."""

    workspace = 1

    def __init__(self, output: str, tensor: torch.Tensor) -> None:
        self._output, self._tensor = output, tensor.contiguous()

    def use(self, workspace: Any) -> None:
        """It needs none."""

    def launch(self, stream: Any, addresses: dict[str, int]) -> None:
        """Enqueue the copy on a stream or in the recording that it belongs to."""
        from cuda.bindings import driver

        size, handle = self._tensor.nbytes, int(stream.__cuda_stream__()[1])
        (status,) = driver.cuMemcpyDtoDAsync(addresses[self._output], self._tensor.data_ptr(), size, handle)
        if int(status):
            raise RuntimeError(f"CUDA reports {status}")


def launches(device: str) -> dict[str, Any]:
    """Relative errors of every kernel that the tensorrt backend launches, eager and from a recorded graph."""
    gpu = open_device(device)
    gpu.set_current()
    with tempfile.TemporaryDirectory() as folder:
        contracts = write_cubins(Path(folder), (architecture_of(gpu),))
        kernels = Kernels(Path(folder), contracts, architecture_of(gpu))
        return {"triton": contracts[0].triton, "binaries": len(contracts), **_through(gpu, kernels)}


def _through(gpu: Any, kernels: Kernels) -> dict[str, Any]:
    width, height = SIZE
    generator = torch.Generator("cuda").manual_seed(0)
    velocity, decoded = (
        torch.randn(shape, generator=generator, device="cuda")
        for shape in ((1, width * height // 128, 64), (2, 3, height, width))
    )
    torch.cuda.synchronize()
    bucket = _bucket()
    engines: dict[Any, Any] = {
        "encoder": Copies("latent", torch.zeros(1, 16, height // 8, width // 8, device="cuda")),
        "denoiser": Copies("velocity", velocity),
        "decoder": Copies("decoded", decoded),
    }
    memory = Memory(gpu)
    workspace, decode = memory.device_buffer(1), SimpleNamespace(decode=DECODE)
    network = Network(memory, kernels, decode, bucket, engines, workspace)  # type: ignore[arg-type]
    latents = split(
        velocity.cpu(),
        height,
        width,
        scale=DECODE.latent_scale,
        shift=DECODE.latent_shift,
        depth_sign=DECODE.depth_sign,
        normal_sign=DECODE.normal_sign,
    )
    rows = {}
    for source in SOURCES:
        image: NDArray[np.uint8] = np.random.default_rng(1).integers(0, 256, (source[1], source[0], 3), dtype=np.uint8)
        placement = place(bucket, source, "stretch")
        network.prepare(0, network.upload(image), (3 * source[0], 3), placement, "rgb")
        network.launch()
        prediction, vectors = network.outputs(0, placement)
        rgb = preprocess(torch.from_numpy(image), SIZE, box=placement.box)
        depth = resize_depth(decoded[:1].cpu(), placement.box, source)
        assert vectors is not None
        pairs = {
            "preprocess": (_buffer(network, "rgb"), rgb),
            "split": (_buffer(network, "latents"), latents),
            "resize_depth": (torch.from_numpy(network.download(prediction)), depth[0]),
            "normals": (
                torch.from_numpy(network.download(vectors)),
                normals(decoded[1:].cpu(), placement.box, source)[0],
            ),
        }
        rows[f"{source[0]}x{source[1]}"] = {name: relative(*pair) for name, pair in pairs.items()}
    found: dict[str, Any] = {"captured": network._graph is not None, "bound": BOUND, "errors": rows}
    wrong = [f"{name} at {size}" for size, row in rows.items() for name, error in row.items() if not error <= BOUND]
    if not found["captured"]:
        wrong.append("the recording failed")
    return found | ({"failed": ", ".join(wrong)} if wrong else {})


def _bucket() -> Bucket:
    width, height = SIZE
    latent, tokens = [1, 16, height // 8, width // 8], [1, width * height // 128, 64]
    rgb, decoded = [1, 3, height, width], [2, 3, height, width]
    return Bucket(
        width,
        height,
        _graph(("rgb", rgb), ("latent", latent)),
        _graph(("latent", latent), ("velocity", tokens)),
        _graph(("latents", [2, *latent[1:]]), ("decoded", decoded)),
    )


def _graph(given: tuple[str, list[int]], made: tuple[str, list[int]]) -> Graph:
    specs = [[TensorSpec(name=name, dtype="float32", shape=shape)] for name, shape in (given, made)]
    return Graph(file="", inputs=specs[0], outputs=specs[1], nodes=0, parameters=0, flops=0)


def _buffer(network: Network, name: str) -> torch.Tensor:
    address, shape = network._address(name), tuple(network._shapes[name])
    return torch.from_numpy(network._memory.staging.download(address, shape))
