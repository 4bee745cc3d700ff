"""PyTorch module -> ONNX graph whose weights lie in a safetensors file beside it, shared between buckets.

Linears become Gemm(transB=1) on the checkpoint's [out, in] layout, so that no transposed copy of a weight is made and
engine builders can take weights as inputs (DESIGN section 7).
"""

from __future__ import annotations

import copy
import gc
import json
import logging
import math
import operator
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes import common
from onnxscript import opset20, optimizer
from onnxscript.rewriter import RewritePass
from onnxscript.rewriter.rules import common as rules
from safetensors.torch import save_file
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from densegeo.backends import Norms
from densegeo.export import group_norms, quantized_layers
from densegeo.export.quantized_layers import in_8_bits
from densegeo.models.quantized import ATTENTION  # registers its operators, too
from densegeo.precision import PRECISIONS

OPSET = 20
LARGEST_FUSED, CHUNK_LOGITS = 256, 1 << 25  # features of a head; logits a head: 128 MiB in float32
op: Any = opset20  # traced with symbolic values, which its type hints do not know


def _linear(x: Any, weight: Any, bias: Any = None) -> Any:
    """aten.linear as Gemm on rows: (..., in) -> (rows, in) -> (..., out); shapes are static."""
    shape = [int(size) for size in x.shape]
    flat = op.Reshape(x, op.Constant(value_ints=[-1, shape[-1]]))
    out = op.Gemm(flat, weight, *(() if bias is None else (bias,)), transB=1)
    return op.Reshape(out, op.Constant(value_ints=[*shape[:-1], int(weight.shape[0])]))


def _attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """aten.scaled_dot_product_attention."""
    assert not any((dropout_p, is_causal, enable_gqa, scale))
    return _softmax_attention(query, key, value, attn_mask, _sizes(query, key))


def _sizes(query: Any, key: Any) -> tuple[int, int, int]:
    """Queries, keys, features of a head."""
    return int(query.shape[2]), int(key.shape[2]), int(query.shape[3])


def _softmax_attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any,
    sizes: tuple[int, int, int],
    rounded: Callable[[Any], Any] = lambda weights: weights,
) -> Any:
    """Logits get their bias and softmax in float32, as in flash kernels. rounded: what happens to the probabilities."""
    factor = op.CastLike(op.Constant(value_float=sizes[2] ** -0.5), query)
    scaled, turned = op.Mul(query, factor), op.Transpose(key, perm=[0, 1, 3, 2])

    def attend(rows: Any) -> Any:
        logits = op.Cast(op.MatMul(rows, turned), to=ir.DataType.FLOAT)
        if attn_mask is not None:
            logits = op.Add(logits, op.Cast(attn_mask, to=ir.DataType.FLOAT))
        return op.MatMul(rounded(op.CastLike(op.Softmax(logits, axis=-1), value)), value)

    count = query_chunks(*sizes)
    if count == 1 or attn_mask is not None:
        return attend(scaled)
    step = -(-sizes[0] // count)
    edges = [
        (op.Constant(value_ints=[first]), op.Constant(value_ints=[first + step]))
        for first in range(0, step * count, step)
    ]
    axis = op.Constant(value_ints=[2])
    return op.Concat(*(attend(op.Slice(scaled, *edge, axis)) for edge in edges), axis=2)


def query_chunks(queries: int, keys: int, size: int) -> int:
    """How many parts an attention's queries run in: its logits are whole in memory where no kernel fuses it.

    That is so for heads of more than 256 features, as the autoencoder's. Each part has at most CHUNK_LOGITS logits.
    """
    return 1 if size <= LARGEST_FUSED else -(-queries * keys // CHUNK_LOGITS)


def _quantized_attention(
    query: Any, key: Any, value: Any, key_bias: Any, q_scale: Any, k_scale: Any, v_scale: Any
) -> Any:
    """Attention in the form that TensorRT makes one fp8 kernel of: both products must have 8-bit operands."""
    unit = op.CastLike(op.Constant(value_float=1 / ATTENTION.qmax), query)  # of the probabilities
    q, k, v = (in_8_bits(x, scale) for x, scale in ((query, q_scale), (key, k_scale), (value, v_scale)))
    return _softmax_attention(q, k, v, key_bias, _sizes(query, key), lambda weights: in_8_bits(weights, unit))


def _cast(x: Any, dtype: int, non_blocking: bool = False, copy: bool = False, memory_format: Any = None) -> Any:
    """aten.to.dtype; torch.onnx gives the type as ONNX numbers it."""
    return op.Cast(x, to=dtype)


def _square(x: Any) -> Any:
    """aten.square."""
    return op.Mul(x, x)


def _flatten(x: Any, start_dim: int = 0, end_dim: int = -1) -> Any:
    """aten.flatten; shapes are static."""
    shape = [int(size) for size in x.shape]
    first, after = start_dim % len(shape), end_dim % len(shape) + 1
    return op.Reshape(x, op.Constant(value_ints=[*shape[:first], math.prod(shape[first:after]), *shape[after:]]))


def _unflatten(x: Any, dim: int, sizes: Sequence[int]) -> Any:
    """aten.unflatten; shapes are static."""
    shape = [int(size) for size in x.shape]
    axis = dim % len(shape)
    return op.Reshape(x, op.Constant(value_ints=[*shape[:axis], *sizes, *shape[axis + 1 :]]))


GROUP_NORM: Callable[..., Any] = torch.ops.aten.group_norm.default
_TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.aten.flatten.using_ints: _flatten,
    torch.ops.aten.unflatten.int: _unflatten,
    torch.ops.aten.to.dtype: _cast,
    torch.ops.aten.square.default: _square,
    torch.ops.aten.linear.default: _linear,
    torch.ops.aten.scaled_dot_product_attention.default: _attention,
    **quantized_layers.TRANSLATIONS,
    torch.ops.densegeo.quantized_attention.default: _quantized_attention,
}
# Functions of aten that torch.onnx translates as they are. A graph of these and of ours needs no decomposition, which
# traces it twice more: a third of a whole export.
_TRANSLATED = frozenset(
    f"aten.{name}" if "." in name else f"aten.{name}.default"
    for name in (
        *("add.Tensor", "cat", "chunk", "conv2d", "div.Tensor", "einsum", "expand", "expand_as", "gelu", "group_norm"),
        *("index_select", "layer_norm", "lift_fresh_copy", "maximum", "mean.dim", "mul.Tensor", "pad", "permute"),
        *("reshape", "round", "rsqrt", "select.int", "silu", "slice.Tensor", "split_with_sizes", "stack", "sub.Tensor"),
        *("sum.dim_IntList", "transpose.int", "unbind.int", "unsqueeze", "upsample_nearest2d.vec", "zeros_like"),
        "_assert_tensor_metadata",  # left out
    )
)


def _traced(module: nn.Module, example: Tensor) -> torch.export.ExportedProgram:
    """The operators that `module(example)` runs; torch.onnx decomposes them unless it knows them all."""
    program = torch.export.export(module, (example,))
    if all(_is_translated(node.target) for node in program.graph.nodes if node.op == "call_function"):
        program.run_decompositions = lambda table=None: program
    return program


def _is_translated(target: Any) -> bool:
    """Whether torch.onnx writes calls of this as they are."""
    return target is operator.getitem or target in _TRANSLATIONS or str(target) in _TRANSLATED


def _should_fold(node: ir.Node) -> bool | None:
    """Keep Expand and Slice of constants: folded, each bucket would store a copy of what lies in the weight file.

    Products of constants are left too: folding them is the rewrites' choice, and must not depend on their size.
    """
    unfolded = ("Expand", "Slice", "Gemm", "MatMul", "Mul", "ReduceSum", "Einsum", "DequantizeLinear")
    return False if node.op_type in unfolded else None


# What the exporter leaves for these to tidy; no other rule of onnxscript's default set finds anything in our graphs.
_RULES = (
    rules.fuse_pad_into_conv_rule,
    rules.reshape_reshape_rule,
    rules.transpose_transpose_rule,
    rules.no_op_transpose_rule,
    rules.mul_by_1_rule,
    rules.add_0_rule,
    rules.sub_0_rule,
    rules.div_by_1_rule,
    rules.cast_cast_rule,
    rules.no_op_cast_rule,
)


def _simplify(model: ir.Model) -> None:
    """Fold constants and apply `_RULES`, in place; every constant becomes an initializer, and one of equal ones.

    onnxscript's `optimize_ir` does this with fifty rules, one of which compares every node with all others: half the
    time of a whole export.
    """
    common.InlinePass()(model)
    optimizer.fold_constants_ir(model, onnx_shape_inference=True, should_fold=_should_fold)
    RewritePass(_RULES)(model)
    for tidy in (
        common.IdentityEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
        common.RemoveUnusedFunctionsPass(),
        common.RemoveUnusedOpsetsPass(),
    ):
        tidy(model)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's chatter about libraries that are not installed."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logger.setLevel(level)


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """What a stage's weight file holds: parameters and constants by name; per-bucket tables stay in the graph."""
    return {name: tensor.detach().contiguous() for name, tensor in module.state_dict().items()}


def write_weights(module: nn.Module, path: Path) -> None:
    """Write a stage's weights, once for all buckets."""
    save_file(weights_of(module), path)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Without Python's garbage collector, whose passes over millions of living objects take a fifth of a trace."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@_no_collection()
def export_graph(
    module: nn.Module,
    example: Tensor,
    names: tuple[str, str],
    weights: Path,
    path: Path,
    *,
    exact: bool = True,
    norms: Norms = "rows",
) -> None:
    """Trace `module(example)` and write it to `path`; its weights are references into the file `weights`.

    names: of the input and the output. exact: write norms so that float32 loses nothing on a CPU, and not as the one
    operator that engine builders know; norms: by "channels" for convolutions that have a pixel's channels adjacent.
    `weights` (see write_weights) must lie in the same directory as `path`.
    """
    norm = group_norms.translation(exact=exact, norms=norms)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    without_values = _without_values(module, mode)
    with torch.no_grad(), _quiet(), mode:
        program = torch.onnx.export(
            _traced(without_values, example),
            dynamo=True,
            opset_version=OPSET,
            input_names=[names[0]],
            output_names=[names[1]],
            custom_translation_table=_TRANSLATIONS if norm is None else _TRANSLATIONS | {GROUP_NORM: norm},
            optimize=False,
            verbose=False,
        )
    assert program is not None
    model = program.model
    stored = _stored_tensors(weights)
    for name, value in model.graph.initializers.items():
        if name in stored:
            dtype, shape, offset, length = stored[name]
            value.const_value = ir.ExternalTensor(
                weights.name, offset, length, dtype, shape=ir.Shape(shape), name=name, base_dir=path.parent
            )
    _simplify(model)
    model.producer_name, model.producer_version = "densegeo", None
    for node in model.graph:
        node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)  # file paths of the building machine
        node.metadata_props.pop("pkg.torch.onnx.fx_node", None)
    ir.save(model, path)


def _without_values(module: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """A copy to trace whose stored tensors have shapes alone; tables that belong into the graph are shared."""
    stored = module.state_dict(keep_vars=True).values()
    memo: dict[int, Any] = {id(buffer): buffer for buffer in module.buffers()}
    with mode:
        for tensor in stored:
            fake = torch.empty(tensor.shape, dtype=tensor.dtype)
            memo[id(tensor)] = nn.Parameter(fake, requires_grad=False) if isinstance(tensor, nn.Parameter) else fake
    copied = copy.deepcopy(module, memo)
    for part in copied.modules():
        for name in [name for name, buffer in part._buffers.items() if buffer is None]:
            delattr(part, name)  # torch.export counts it as an input, and fails on the ones behind it
            setattr(part, name, None)
    return copied


_IR_DTYPES = {row.safetensors: ir.DataType[row.onnx] for row in PRECISIONS.values()}


def _stored_tensors(path: Path) -> dict[str, tuple[ir.DataType, list[int], int, int]]:
    """name -> (dtype, shape, offset in the file, bytes), from a safetensors header."""
    with open(path, "rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(header_bytes))
    return {
        name: (
            _IR_DTYPES[entry["dtype"]],
            entry["shape"],
            8 + header_bytes + entry["data_offsets"][0],
            entry["data_offsets"][1] - entry["data_offsets"][0],
        )
        for name, entry in header.items()
        if name != "__metadata__"
    }
