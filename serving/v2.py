"""The KServe v2 inference protocol, and Triton's extension for binary tensors: bytes to a request, results to bytes.

Written from the Open Inference Protocol's REST specification and Triton's `extension_binary_data`, `_parameters`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import UNSET, Meta, UnsetType
from numpy.typing import NDArray

from densegeo.errors import NotMetricError, RequestError
from densegeo.outputs import Decode
from densegeo.runtime import Geometry
from densegeo.serving.metric_options import METRES, Metres, read_metres

INPUT = "image"
EXTENSIONS = ("binary_tensor_data", "parameters", "model_repository")
# Hints that Triton's clients and proxies add, which change no number.
_IGNORED = ("priority", "headers", "content_type")
_REQUEST_PARAMETERS = ("binary_data_output", "timeout", *METRES)
Pixel = Annotated[int, Meta(ge=0, le=255)]
_NESTED: dict[int, Any] = {1: list[Pixel], 3: list[list[list[Pixel]]], 4: list[list[list[list[Pixel]]]]}


class TensorIn(msgspec.Struct, frozen=True):
    """data: row by row, flat or nested; absent when `parameters.binary_data_size` says how much of the body it is."""

    name: str
    shape: list[Annotated[int, Meta(ge=0, le=2**62)]]
    datatype: str
    parameters: dict[str, Any] = {}
    data: msgspec.Raw | UnsetType = UNSET


class TensorWanted(msgspec.Struct, frozen=True):
    """parameters.binary_data: whether it is to come as bytes behind the JSON."""

    name: str
    parameters: dict[str, Any] = {}


class Body(msgspec.Struct, frozen=True):
    """An inference request."""

    inputs: list[TensorIn]
    id: str = ""
    parameters: dict[str, Any] = {}
    outputs: list[TensorWanted] = []


class TensorOut(msgspec.Struct, frozen=True, omit_defaults=True):
    """data: flat, row by row, null for NaN; absent when the tensor follows as little-endian bytes."""

    name: str
    datatype: str
    shape: list[int]
    parameters: dict[str, int] = {}
    data: list[float | None] | UnsetType = UNSET


class Answer(msgspec.Struct, frozen=True, omit_defaults=True):
    """An inference response. parameters.warnings: what was warned of, a line each; absent where nothing was."""

    model_name: str
    model_version: str
    outputs: list[TensorOut]
    id: str = ""
    parameters: dict[str, str] = {}


@dataclass(frozen=True, eq=False)
class Inference:
    """What was asked. images: (h, w, 3) uint8, views of the body; batched: whether they came as one (B, h, w, 3).

    binary: by output, in order, whether as bytes. deadline_ms: as the client's `timeout`.
    """

    id: str
    images: list[NDArray[np.uint8]]
    batched: bool
    metres: Metres
    binary: Mapping[str, bool]
    deadline_ms: float | None


def read_inference(body: bytes, header_length: str | None, decode: Decode, max_images: int) -> Inference:
    """A request's body and its Inference-Header-Content-Length -> what was asked of a model of these outputs.

    max_images: images a batch may have. Raises RequestError, NotMetricError.
    """
    header, binary = _split(body, header_length)
    try:
        request = msgspec.json.decode(header, type=Body)
    except (msgspec.MsgspecError, RecursionError, UnicodeError) as error:
        raise RequestError(f"The inference request is not valid: {error}.") from None
    parameters = known_parameters(request.parameters)
    metres = read_metres({name: value for name, value in parameters.items() if name in METRES})
    outputs = _outputs(request, parameters, decode, metres)
    metres.rehearse(decode)
    pixels = _pixels(request.inputs, binary, max_images)
    batched = pixels.ndim == 4
    images = list(pixels) if batched else [pixels]
    return Inference(request.id, images, batched, metres, outputs, _deadline(parameters))


def known_parameters(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Without hints; raises RequestError for what this server would have to heed and cannot."""
    heeded = {}
    for name, value in parameters.items():
        if name in _IGNORED or name.startswith("triton_"):
            continue
        if name not in _REQUEST_PARAMETERS:
            raise RequestError(
                f"There is no request parameter {name[:60]!r}; there are {', '.join(_REQUEST_PARAMETERS)}."
            )
        heeded[name] = value
    return heeded


def output_names(decode: Decode, metres: Metres) -> list[str]:
    """What a request can have of a model; depth where it says what makes the result metric."""
    return [*decode.names, *(["depth"] if metres.is_metric and decode.has("depth") else [])]


def require_output(name: str, decode: Decode, metres: Metres) -> None:
    """Raises NotMetricError, RequestError for an output that a request cannot have."""
    available = output_names(decode, metres)
    if name == "depth" and "depth" not in available and decode.has("depth"):
        raise NotMetricError(
            "There is no output depth in this request: the prediction is known only up to a scale and a shift. Say in "
            "the request's parameters what fixes them: near and far, scale and shift, or a measurement: anchors, or "
            "with intrinsics camera_height or size."
        )
    if name not in available:
        raise RequestError(f"There is no output {name[:60]!r}; there are {', '.join(available)}.")


def write_inference(
    inference: Inference, model: str, version: str, geometries: Sequence[Geometry], warned: Sequence[str] = ()
) -> tuple[bytes, int]:
    """The response's body, and its JSON's length; 0 where there is nothing else. Raises CalibrationError.

    warned: texts of warnings, which grow meanwhile.
    """
    metric = [inference.metres.apply(geometry) for geometry in geometries]
    described, behind = [], []
    for name, as_bytes in inference.binary.items():
        maps = [getattr(geometry, name) for geometry in metric]
        array: NDArray[np.float32] = np.stack(maps) if inference.batched else maps[0]
        if as_bytes:
            behind.append(np.ascontiguousarray(array, dtype="<f4").data)
            content: dict[str, Any] = {"parameters": {"binary_data_size": array.nbytes}}
        else:
            content = {"data": _numbers(array)}
        described.append(TensorOut(name=name, datatype="FP32", shape=list(array.shape), **content))
    parameters = {"warnings": "\n".join(warned)} if warned else {}
    header = msgspec.json.encode(Answer(model, version, described, inference.id, parameters))
    return b"".join([header, *behind]), len(header) if behind else 0


def metadata(name: str, version: str, backend: str, decode: Decode, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The model metadata response. parameters: what else a client may want to know."""
    shapes = {"prediction": [-1, -1], "normals": [-1, -1, 3]}
    return {
        "name": name,
        "versions": [version],
        "platform": f"densegeo_{backend}",
        "inputs": [{"name": INPUT, "datatype": "UINT8", "shape": [-1, -1, 3]}],
        "outputs": [{"name": output, "datatype": "FP32", "shape": shapes[output]} for output in decode.names],
        "parameters": dict(parameters),
    }


def _split(body: bytes, header_length: str | None) -> tuple[bytes, memoryview]:
    if header_length is None:
        return body, memoryview(b"")
    if re.fullmatch("[0-9]{1,18}", header_length) is None or int(header_length) > len(body):
        raise RequestError(
            f"Inference-Header-Content-Length must be the length of the JSON, at most the body's {len(body)} bytes, "
            f"not {header_length[:40]!r}."
        )
    length = int(header_length)
    return body[:length], memoryview(body)[length:]


def _outputs(request: Body, parameters: dict[str, Any], decode: Decode, metres: Metres) -> dict[str, bool]:
    by_default = _flag(parameters, "binary_data_output", False)
    as_binary: dict[str, bool] = {}
    for output in request.outputs:
        require_output(output.name, decode, metres)
        if output.name in as_binary:
            raise RequestError(f"The output {output.name} is asked for twice.")
        for name in output.parameters:
            if name == "classification" or name.startswith("shared_memory"):
                raise RequestError(
                    f"The output parameter {name} is not supported: outputs are maps, sent in the answer."
                )
        as_binary[output.name] = _flag(output.parameters, "binary_data", by_default)
    return as_binary or dict.fromkeys(output_names(decode, metres), by_default)


def _flag(parameters: dict[str, Any], name: str, otherwise: bool) -> bool:
    value = parameters.get(name, otherwise)
    if not isinstance(value, bool):
        raise RequestError(f"The parameter {name} must be true or false, not {str(value)[:40]!r}.")
    return value


def _deadline(parameters: dict[str, Any]) -> float | None:
    """Triton's `timeout`: microseconds, 0 for none."""
    value = parameters.get("timeout", 0)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
        raise RequestError(f"The parameter timeout must be whole microseconds, 0 or more, not {str(value)[:40]!r}.")
    return value / 1e3 if value else None


def _pixels(inputs: list[TensorIn], binary: memoryview, max_images: int) -> NDArray[np.uint8]:
    if [tensor.name for tensor in inputs] != [INPUT]:
        names = ", ".join(repr(tensor.name[:60]) for tensor in inputs[:4]) or "none"
        raise RequestError(f"A request has one input, {INPUT!r}; this one has {names}.")
    (tensor,) = inputs
    shape = tuple(tensor.shape)
    if tensor.datatype != "UINT8":
        raise RequestError(f"The input {INPUT} is UINT8 (RGB, 0 to 255), not {tensor.datatype[:40]!r}.")
    if len(shape) not in (3, 4) or shape[-1] != 3 or 0 in shape:
        raise RequestError(
            f"The input {INPUT} has shape {list(shape[:8])}; it must be [height, width, 3], or "
            "[batch, height, width, 3]."
        )
    if len(shape) == 4 and shape[0] > max_images:
        raise RequestError(
            f"The batch has {shape[0]} images, and at most {max_images} may wait here. Send fewer at once."
        )
    size = tensor.parameters.get("binary_data_size")
    if any(name.startswith("shared_memory") for name in tensor.parameters):
        raise RequestError("Shared memory is not supported: send the pixels in the body.")
    count = math.prod(shape)
    if size is None:
        if len(binary):
            raise RequestError(f"{len(binary)} bytes follow the JSON, and no input has a binary_data_size.")
        array = _from_json(tensor, shape)
    else:
        if isinstance(size, bool) or not isinstance(size, int) or size != len(binary):
            raise RequestError(
                f"The input's binary_data_size is {str(size)[:40]}, and {len(binary)} bytes follow the JSON."
            )
        array = np.frombuffer(binary, np.uint8)
    if array.size != count:
        raise RequestError(f"The shape {list(shape)} needs {count} numbers; there are {array.size}.")
    return array.reshape(shape)


def _from_json(tensor: TensorIn, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    if tensor.data is UNSET:
        raise RequestError(f"The input {INPUT} has neither data nor a binary_data_size.")
    data = bytes(tensor.data)
    nested = data[:64].translate(None, b" \t\r\n").startswith(b"[[")
    try:
        array = np.array(msgspec.json.decode(data, type=_NESTED[len(shape) if nested else 1]), dtype=np.uint8)
    except (msgspec.MsgspecError, RecursionError, UnicodeError) as error:
        raise RequestError(f"The input's data are not pixels of shape {list(shape)}: {error}.") from None
    except ValueError:
        raise RequestError("The rows of the input's data are not of one length.") from None
    if nested and array.shape != shape:
        raise RequestError(f"The input's data are of shape {list(array.shape)}, and it says {list(shape)}.")
    return array


def _numbers(array: NDArray[np.float32]) -> list[float | None]:
    flat: list[float | None] = array.astype(np.float64).ravel().tolist()
    if np.isfinite(array).all():
        return flat
    return [value if value is not None and math.isfinite(value) else None for value in flat]
