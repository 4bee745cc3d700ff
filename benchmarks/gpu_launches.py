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

from densegeo.benchmarks.setups import FULL
from densegeo.export.cubins import write_cubins
from densegeo.kernels.preprocess import preprocess
from densegeo.models import chain
from densegeo.models.chain import relative_error
from densegeo.models.families import FE2E
from densegeo.runtime.backends.cuda_kernels import Kernels
from densegeo.runtime.backends.cuda_memory import Memory, architecture_of, open_device
from densegeo.runtime.backends.cuda_ring import Ring
from densegeo.runtime.backends.tensorrt_network import Network
from densegeo.runtime.bundle import Bucket, Graph, TensorSpec
from densegeo.runtime.resample import place
from densegeo.size import Size

BOUND = 1e-5  # float32 (DESIGN section 10)
SIZE = Size(864, 576)
SOURCES = (Size(1003, 751), Size(333, 517))  # odd, larger than the bucket; odd, portrait
DECODE = FE2E.decode(FULL.vae)


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
    ring = Ring(Memory(gpu))
    workspace, decode = ring.memory.device_buffer(1), SimpleNamespace(decode=DECODE)
    network = Network(ring, kernels, decode, bucket, engines, workspace)  # type: ignore[arg-type]
    latents = chain.split(DECODE, velocity.cpu(), SIZE)
    rows = {}
    for source in SOURCES:
        image: NDArray[np.uint8] = np.random.default_rng(1).integers(
            0, 256, (source.height, source.width, 3), dtype=np.uint8
        )
        placement = place(SIZE, source, "stretch")
        with ring.slot() as slot:
            (frame,) = slot.upload([image])
            with slot.computing():
                network.prepare(0, frame, placement, "rgb")
                network.launch()
                network.maps(0, placement, iter(slot.room(network.shapes(placement))))
            maps = dict(zip(DECODE.names, slot.download(), strict=True))
        rgb = preprocess(torch.from_numpy(image), SIZE, box=placement.box)
        expected_maps = chain.assemble(DECODE, decoded.cpu(), source, placement.box).named()
        pairs = {
            "preprocess": (_buffer(ring, network, "rgb"), rgb),
            "split": (_buffer(ring, network, "latents"), latents),
            **{name: (torch.from_numpy(maps[name]), expected_maps[name]) for name in expected_maps},
        }
        rows[str(source)] = {name: relative_error(*pair) for name, pair in pairs.items()}
    report: dict[str, Any] = {"captured": network._graph is not None, "bound": BOUND, "errors": rows}
    wrong = [f"{name} at {size}" for size, row in rows.items() for name, error in row.items() if not error <= BOUND]
    if not report["captured"]:
        wrong.append("the recording failed")
    return report | ({"failed": ", ".join(wrong)} if wrong else {})


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


def _graph(input_spec: tuple[str, list[int]], output_spec: tuple[str, list[int]]) -> Graph:
    specs = [[TensorSpec(name=name, dtype="float32", shape=shape)] for name, shape in (input_spec, output_spec)]
    return Graph(file="", inputs=specs[0], outputs=specs[1], nodes=0, parameters=0, flops=0)


def _buffer(ring: Ring, network: Network, name: str) -> torch.Tensor:
    with ring.slot() as slot:
        slot.fetch(network._address(name), tuple(network._shapes[name]))
        return torch.from_numpy(slot.results()[0])
