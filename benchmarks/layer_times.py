"""How long each layer of a network takes in ONNX Runtime, OpenVINO and torch, by the libraries' own counters."""

from __future__ import annotations

import json
import re
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from densegeo.backends import Norms
from densegeo.errors import BackendError
from densegeo.export.onnx_graph import export_graph, write_weights
from densegeo.models.vae import TransposedUpsample
from densegeo.onnx_runtime import import_onnxruntime, session_options
from densegeo.runtime.backends.openvino_cpu import import_openvino

CONVOLUTION, UPSAMPLING, ATTENTION, LAYOUT, OTHER = KINDS = (
    "convolutions",
    "upsampling",
    "attention",
    "layouts",
    "norms, SiLU, sums",
)
# What belongs to which kind: the first pattern that is found in an operator's type.
_KINDS: tuple[tuple[str, str], ...] = (
    ("(?i)conv", CONVOLUTION),
    ("MatMul|Softmax|Transpose|scaled_dot_product", ATTENTION),
    ("Reorder|contiguous|clone|::to$|Pad$|::pad$", LAYOUT),
    ("Upsample|Resize|Interpolate|Slice|Split|Concat|Gather|upsample|stack|chunk|slice", UPSAMPLING),
)


@dataclass(frozen=True)
class Convolution:
    """One of a network's. inputs: (N, C, H, W) as it enters; flops: multiply-add = 2."""

    name: str
    module: nn.Module
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    kernel: tuple[int, ...]
    flops: int

    @property
    def shape(self) -> tuple[object, ...]:
        """Two of the same shape take equally long alone."""
        return self.inputs, self.outputs, self.kernel, type(self.module)


def convolutions(network: nn.Module, example: Tensor) -> list[Convolution]:
    """Every convolution that `network(example)` runs. example: on the meta device, as nothing is computed."""
    all_convolutions: list[Convolution] = []

    def note(name: str, module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        weight = module.kernel() if isinstance(module, TransposedUpsample) else module.weight
        pixels = inputs[0] if isinstance(module, TransposedUpsample) else output
        flops = 2 * pixels.numel() * weight[0].numel()
        all_convolutions.append(
            Convolution(name, module, tuple(inputs[0].shape), tuple(output.shape), tuple(weight.shape[2:]), flops)
        )

    handles = [
        module.register_forward_hook(lambda module, inputs, output, name=name: note(name, module, inputs, output))
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv2d | TransposedUpsample)
    ]
    try:
        on_meta = {name: torch.empty_like(tensor, device="meta") for name, tensor in network.state_dict().items()}
        with torch.no_grad():
            torch.func.functional_call(network, on_meta, (example,))
    finally:
        for handle in handles:
            handle.remove()
    return all_convolutions


@dataclass(frozen=True)
class Timed:
    """A layer's kind, the index of its convolution in the order in which they run or None, and seconds of each run."""

    kind: str
    index: int | None
    seconds: list[float]


class Timer(Protocol):
    """A network whose layers are timed; the first run is no measurement."""

    def run(self) -> float:
        """Run it once; seconds."""

    def layers(self) -> list[Timed]:
        """Of all runs so far; it cannot run any more."""


def graph_of(network: nn.Module, example: Tensor, folder: Path, norms: Norms = "rows") -> Path:
    """Its graph in a folder, written unless it is there."""
    path, weights = folder / "graph.onnx", folder / "weights.safetensors"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_weights(network, weights)
        export_graph(network, example, ("x", "y"), weights, path, norms=norms)
    return path


def _conv_nodes(path: Path) -> dict[str, int]:
    """Names by which libraries know a graph's convolutions -> their index."""
    nodes = [node for node in onnx.load(path, load_external_data=False).graph.node if "Conv" in node.op_type]
    return {name: index for index, node in enumerate(nodes) for name in (node.name, node.output[0])}


def kind_of(operator: str) -> str:
    """The kind of an operator, by its type."""
    return next((kind for pattern, kind in _KINDS if re.search(pattern, operator)), OTHER)


def _timed(rows: dict[Any, tuple[str, str, list[float]]], nodes: dict[str, int]) -> list[Timed]:
    """rows: (type, name, seconds of each run, the first one included). Raises BackendError for a convolution that is
    none of the graph's.
    """
    timed = []
    for operator, name, seconds in rows.values():
        kind = kind_of(operator)
        index = nodes.get(re.sub("_nchwc$|/.*$", "", name)) if kind == CONVOLUTION else None
        if kind == CONVOLUTION and index is None:
            raise BackendError(f"no convolution of the graph is called {name}: this library names them otherwise")
        timed.append(Timed(kind, index, seconds[1:]))
    return timed


class OrtTimer:
    """ONNX Runtime's profiler."""

    def __init__(self, path: Path, example: Tensor) -> None:
        runtime = import_onnxruntime()
        options = session_options(runtime)
        options.enable_profiling = True
        self._folder = tempfile.TemporaryDirectory()
        options.profile_file_prefix = str(Path(self._folder.name) / "profile")
        self._session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._feed, self._nodes = {"x": example.numpy()}, _conv_nodes(path)

    def run(self) -> float:
        start = time.perf_counter()
        self.output: np.ndarray[Any, Any] = self._session.run(None, self._feed)[0]
        return time.perf_counter() - start

    def layers(self) -> list[Timed]:
        events = json.loads(Path(self._session.end_profiling()).read_text())
        self._folder.cleanup()
        rows: dict[Any, tuple[str, str, list[float]]] = {}
        for event in events:
            name, suffix = event["name"], "_kernel_time"
            if event.get("cat") == "Node" and name.endswith(suffix):
                args = event["args"]
                row = rows.setdefault(args["node_index"], (args["op_name"], name.removesuffix(suffix), []))
                row[2].append(event["dur"] / 1e6)
        return _timed(rows, self._nodes)


class OpenVinoTimer:
    """OpenVINO's performance counters. options: of the compiled model, besides those of our backend.

    A counter is the mean of all runs so far in whole microseconds, rounded down (PerfCount::avg of OpenVINO's CPU
    plugin), so a run's own time is the difference of two totals: run n's is known to n microseconds.
    """

    def __init__(self, path: Path, example: Tensor, **options: Any) -> None:
        options = {"INFERENCE_PRECISION_HINT": "f32", "NUM_STREAMS": 1, "PERF_COUNT": True, **options}
        model = import_openvino().Core().compile_model(str(path), "CPU", options)
        self._request = model.create_infer_request()
        self._array, self._nodes = example.numpy(), _conv_nodes(path)
        self._made_of = {  # what each layer took in, by the names of the graph
            layer.get_friendly_name(): layer.get_rt_info()["originalLayersNames"].astype(str).split(",")
            for layer in model.get_runtime_model().get_ops()
        }
        self._rows: dict[Any, tuple[str, str, list[float]]] = {}
        self._totals: dict[str, float] = defaultdict(float)  # seconds
        self._runs = 0

    def run(self) -> float:
        start = time.perf_counter()
        results = self._request.infer({0: self._array})
        seconds = time.perf_counter() - start
        self.output: np.ndarray[Any, Any] = results[0].copy()
        self._runs += 1
        for layer in self._request.profiling_info:
            # a fused layer's name tells more than its type
            operator = layer.node_name if layer.node_type == "Subgraph" else layer.node_type
            known = [name for name in self._made_of.get(layer.node_name, []) if name in self._nodes]
            row = self._rows.setdefault(layer.node_name, (operator, (known or [layer.node_name])[0], []))
            total = self._runs * layer.real_time.total_seconds()
            row[2].append(max(0.0, total - self._totals[layer.node_name]))
            self._totals[layer.node_name] = total
        return seconds

    def layers(self) -> list[Timed]:
        return _timed(self._rows, self._nodes)


class TorchTimer:
    """torch's profiler over a module whose pixels' channels are adjacent."""

    def __init__(self, network: nn.Module, example: Tensor) -> None:
        self._network, self._example = network, example
        self._rows: dict[Any, list[float]] = defaultdict(list)

    def run(self) -> float:
        with torch.no_grad(), profile(activities=[ProfilerActivity.CPU]) as profiler:
            start = time.perf_counter()
            self.output: np.ndarray[Any, Any] = self._network(self._example).numpy()
            seconds = time.perf_counter() - start
        events = [event for event in profiler.events() if event.cpu_parent is None and event.name.startswith("aten::")]
        for place, event in enumerate(sorted(events, key=lambda event: event.time_range.start)):
            self._rows[place, event.name].append(event.cpu_time_total / 1e6)
        return seconds

    def layers(self) -> list[Timed]:
        return list(self._layers())

    def _layers(self) -> Iterator[Timed]:
        count = 0
        for (_, name), seconds in sorted(self._rows.items()):
            kind = kind_of(name)
            yield Timed(kind, count if kind == CONVOLUTION else None, seconds[1:])
            count += kind == CONVOLUTION


Make = Callable[[nn.Module, Tensor, Path], Timer]


def _on_torch(network: nn.Module, example: Tensor, folder: Path) -> Timer:
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for module in network.modules():
        if isinstance(module, TransposedUpsample):
            module.make_ready()
    return TorchTimer(network, example.contiguous(memory_format=torch.channels_last))


# Backend -> what times a network on it as its bundles run. folder: for its graph.
TIMERS: dict[str, Make] = {
    "onnxruntime": lambda network, example, folder: OrtTimer(graph_of(network, example, folder), example),
    "openvino": lambda network, example, folder: OpenVinoTimer(
        graph_of(network, example, folder, norms="channels"), example
    ),
    "torch": _on_torch,
}
