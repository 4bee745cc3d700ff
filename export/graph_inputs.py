"""A graph's weights as inputs of its engine, without the onnx library: a board that makes engines does not have it.

An ONNX file is a protocol buffer; what changes are a few fields of its graph. Their numbers are those of onnx.proto
(github.com/onnx/onnx, onnx/onnx.proto); everything else is copied as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from densegeo.errors import BundleError

MODEL_GRAPH = 7
GRAPH_NODE, GRAPH_INITIALIZER, GRAPH_INPUT = 1, 5, 11
NODE_INPUT, NODE_OUTPUT, NODE_OPERATOR = 1, 2, 4
TENSOR_DIMS, TENSOR_TYPE, TENSOR_NAME = 1, 2, 8
VALUE_NAME, VALUE_TYPE, TYPE_TENSOR = 1, 2, 1
ELEMENT_TYPE, SHAPE, SHAPE_DIM, DIM_VALUE = 1, 2, 1, 1
VARINT, BYTES = 0, 2  # wire types
FIXED = {1: 8, 5: 4}  # bytes of the others


class Field(NamedTuple):
    """One field of a message. value: its number, or its bytes; raw: all of it, as it stands in the file."""

    number: int
    value: int | bytes
    raw: bytes


def with_weight_inputs(path: Path, target: Path) -> list[str]:
    """Write a copy of a graph that takes the matrices of its linears as inputs; returns their names.

    `target` must lie in the same directory, beside the weight file that both refer to. Raises BundleError for a file
    that is no ONNX graph.
    """
    try:
        model = list(_fields(path.read_bytes()))
        (graph,) = (list(_fields(field.value)) for field in model if field.number == MODEL_GRAPH)
        names = _matrices(graph)
        stored = {_text(_fields(field.value), TENSOR_NAME): field for field in _of(graph, GRAPH_INITIALIZER)}
        new_inputs = [name for name in names if name in stored]
        removed = {id(stored[name]) for name in new_inputs}
        remaining = b"".join(field.raw for field in graph if id(field) not in removed)
        inputs = b"".join(_message(GRAPH_INPUT, _value_info(name, stored[name])) for name in new_inputs)
    except (ValueError, LookupError) as error:
        raise BundleError(f"{path} is no ONNX graph ({error}). Copy the bundle again or rebuild it.") from error
    changed = _message(MODEL_GRAPH, remaining + inputs)
    target.write_bytes(b"".join(changed if field.number == MODEL_GRAPH else field.raw for field in model))
    return new_inputs


def _matrices(graph: list[Field]) -> list[str]:
    """Second operands of the matrix products, before they are widened; each once, in the nodes' order."""
    products, widened = [], dict[str, str]()
    for node in _of(graph, GRAPH_NODE):
        fields = list(_fields(node.value))
        inputs = [_decoded(field) for field in fields if field.number == NODE_INPUT]
        operator = _text(fields, NODE_OPERATOR)
        if operator == "Gemm":
            products.append(inputs[1])
        elif operator == "DequantizeLinear":
            widened[_text(fields, NODE_OUTPUT)] = inputs[0]
    return list(dict.fromkeys(widened.get(name, name) for name in products))


def _value_info(name: str, tensor: Field) -> bytes:
    """The ValueInfoProto of an input like this initializer."""
    fields = list(_fields(tensor.value))
    (kind,) = (field.value for field in fields if field.number == TENSOR_TYPE)
    assert isinstance(kind, int)
    dims = [dim for field in fields if field.number == TENSOR_DIMS for dim in _numbers(field)]
    shape = b"".join(_message(SHAPE_DIM, _number(DIM_VALUE, dim)) for dim in dims)
    described = _message(TYPE_TENSOR, _number(ELEMENT_TYPE, kind) + _message(SHAPE, shape))
    return _message(VALUE_NAME, name.encode()) + _message(VALUE_TYPE, described)


def _fields(data: int | bytes) -> Iterator[Field]:
    """The fields of a message. Raises ValueError and LookupError for what is none."""
    if isinstance(data, int):
        raise ValueError("a number stands where a message was expected")
    at = 0
    while at < len(data):
        start = at
        key, at = _varint(data, at)
        value: int | bytes
        if key & 7 == VARINT:
            value, at = _varint(data, at)
        else:
            size, at = _varint(data, at) if key & 7 == BYTES else (FIXED[key & 7], at)
            if at + size > len(data):
                raise ValueError(f"field {key >> 3} at byte {start} is cut off")
            value, at = data[at : at + size], at + size
        yield Field(key >> 3, value, data[start:at])


def _of(message: list[Field], number: int) -> Iterator[Field]:
    return (field for field in message if field.number == number)


def _text(fields: Iterator[Field] | list[Field], number: int) -> str:
    """The first field of this number, decoded; empty where there is none."""
    return next((_decoded(field) for field in fields if field.number == number), "")


def _decoded(field: Field) -> str:
    if isinstance(field.value, int):
        raise ValueError(f"field {field.number} is a number, and text was expected")
    return field.value.decode()


def _numbers(field: Field) -> list[int]:
    """A repeated number: one, or several packed."""
    if isinstance(field.value, int):
        return [field.value]
    numbers, at = [], 0
    while at < len(field.value):
        number, at = _varint(field.value, at)
        numbers.append(number)
    return numbers


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """The number that begins here, and where it ends."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if not byte & 0x80:
            return value, at


def _encoded(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _number(number: int, value: int) -> bytes:
    return _encoded(number << 3 | VARINT) + _encoded(value)


def _message(number: int, content: bytes) -> bytes:
    return _encoded(number << 3 | BYTES) + _encoded(len(content)) + content
