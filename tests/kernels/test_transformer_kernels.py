"""The transformer's residual and MLP kernels against their references, with the bounds of `support/kernels.py`."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from tests.support.interpreter import operation  # noqa: E402
from tests.support.kernels import (  # noqa: E402
    EPS,
    FLOATS,
    LOW,
    affine,
    assert_as_good,
    close,
    error,
    noise,
    rope,
    stored,
)

pytestmark = [pytest.mark.usefixtures("poisoned"), pytest.mark.integration]
FP8 = torch.float8_e4m3fn
QUANTIZED = {FP8: 448, torch.int8: 127}


def inner(batch: int, tokens: int, features: int, **options: Any) -> Any:
    """A part of wider tokens, as of a joint projection."""
    return noise(batch, tokens + 2, features + 5, **options)[:, 1 : 1 + tokens, 3 : 3 + features]


@pytest.mark.parametrize(("batch", "tokens", "hidden"), [(2, 3, 77), (1, 1, 1)])
def test_residual_layer_norm(device: str, batch: int, tokens: int, hidden: int) -> None:
    kernel, reference = operation("residual_layer_norm")
    x, update = (inner(batch, tokens, hidden, device=device, seed=seed) for seed in (5, 6))
    gain, offset = affine(hidden, device)
    exact, exact_normed = reference.residual_layer_norm(x.double(), update, gain, offset, EPS, torch.float64)
    residual, normed = kernel.residual_layer_norm(x, update, gain, offset, EPS, x.dtype)
    assert residual.is_contiguous()
    close(residual, exact)
    close(normed, exact_normed)


@pytest.mark.parametrize("dtype", LOW)
def test_residual_layer_norm_types(device: str, dtype: Any) -> None:
    kernel, reference = operation("residual_layer_norm")
    x = 20 + noise(1, 4, 96, device=device, dtype=dtype)  # a large mean
    update = noise(1, 4, 96, device=device, dtype=dtype, seed=6)
    gain, offset = affine(96, device)
    plain = stored(x.float() + update.float(), dtype, device)
    plain_normed = stored(torch.nn.functional.layer_norm(plain.float(), (96,), gain, offset, EPS), dtype, device)
    exact = reference.residual_layer_norm(x.double(), update, gain, offset, EPS, torch.float64)
    actual = kernel.residual_layer_norm(x, update, gain, offset, EPS, x.dtype)
    for got, ordinary, expected in zip(actual, (plain, plain_normed), exact, strict=True):
        assert got.dtype == dtype
        assert_as_good(got, ordinary, expected)


@pytest.mark.filterwarnings("ignore:overflow")  # the interpreter's numpy
@pytest.mark.parametrize(("batch", "tokens", "features"), [(2, 3, 77), (1, 2, 2051)])
def test_gelu(device: str, batch: int, tokens: int, features: int) -> None:
    kernel, reference = operation("gelu_quantize")
    x = 3 * inner(batch, tokens, features, device=device)
    exact = reference.gelu_quantize(x.double(), torch.float64, 1.0, None)
    close(kernel.gelu_quantize(x, torch.float32, 1.0, None), exact)
    torch.testing.assert_close(exact, torch.nn.functional.gelu(x.double(), approximate="tanh"))


@pytest.mark.filterwarnings("ignore:overflow")  # the interpreter's numpy
def test_gelu_of_large_values(device: str) -> None:
    kernel, _ = operation("gelu_quantize")
    x = torch.tensor([[[-300.0, 300.0, 0.0, torch.inf, torch.nan]]], device=device)
    expected = torch.tensor([[[0.0, 300.0, 0.0, torch.inf, torch.nan]]], device=device)
    torch.testing.assert_close(kernel.gelu_quantize(x, torch.float32, 1.0, None), expected, equal_nan=True)


@pytest.mark.parametrize("dtype", LOW)
def test_gelu_types(device: str, dtype: Any) -> None:
    kernel, reference = operation("gelu_quantize")
    x = noise(1, 4, 300, device=device, dtype=dtype)
    actual = kernel.gelu_quantize(x, dtype, 1.0, None)
    assert actual.dtype == dtype
    plain = stored(torch.nn.functional.gelu(x.float(), approximate="tanh"), dtype, device)
    assert_as_good(actual, plain, reference.gelu_quantize(x.double(), torch.float64, 1.0, None))


def equal(actual: Any, exact: Any) -> Any:
    """Where two 8-bit tensors hold the same bits, or both NaN, whose sign is nobody's."""
    bits = actual.view(torch.uint8) == exact.view(torch.uint8)
    return bits | (actual.float().isnan() & exact.float().isnan())


def interpretable(device: str, target: Any) -> None:
    if device == "cpu" and target == FP8:
        pytest.skip("Triton's interpreter rounds fp8 wrongly (no carry into the exponent, NaN becomes 384)")


@pytest.mark.filterwarnings("ignore:overflow")  # the interpreter's numpy
@pytest.mark.parametrize("target", list(QUANTIZED))
@pytest.mark.parametrize("source", FLOATS)
def test_quantized_gelu(device: str, source: Any, target: Any) -> None:
    """fp8 is checked on a GPU only, and that it compiles in `test_compile.py`."""
    interpretable(device, target)
    kernel, reference = operation("gelu_quantize")
    x = 3 * noise(2, 3, 300, device=device, dtype=source)
    x[0, 0, :4] = torch.tensor([-300.0, 300.0, torch.nan, 1e-3])
    scale = 37.5
    actual, exact = kernel.gelu_quantize(x, target, scale, None), reference.gelu_quantize(x, target, scale, None)
    assert actual.dtype == exact.dtype == target
    assert float(actual[0, 0, 1]) == QUANTIZED[target]
    assert actual[0, 0, 2].isnan() if target == FP8 else actual[0, 0, 2] == 0
    same = equal(actual, exact)
    assert same.float().mean() > 0.998  # float32 may fall on the other side of a tie
    step = torch.where(same, 0, actual.double() - exact.double()).abs()
    one = torch.maximum(exact.double().abs() / 8, torch.tensor(1.0 if target == torch.int8 else 2**-9))
    assert (same | (step <= one)).all()


@pytest.mark.parametrize("target", list(QUANTIZED))
def test_quantized_gelu_is_gelu(target: Any) -> None:
    """The reference: half a step from the unquantized value, ties to even, saturation."""
    _, reference = operation("gelu_quantize")
    x = noise(1, 5, 200, device="cpu")
    scale = QUANTIZED[target] / 3
    quantized = reference.gelu_quantize(x, target, scale, None).double()
    expected = torch.nn.functional.gelu(x.double(), approximate="tanh") * scale
    expected = expected.clamp(-QUANTIZED[target], QUANTIZED[target])
    half_step = 0.5 if target == torch.int8 else torch.maximum(expected.abs() / 16, torch.tensor(2.0**-10))
    assert ((quantized - expected).abs() <= half_step * (1 + 1e-9)).all()
    large = torch.tensor([[[20.5, 21.5, 1e9, torch.nan]]])
    result = reference.gelu_quantize(large, target, 1.0, None).double()
    assert result[0, 0, :2].tolist() == [20.0, 22.0]  # both types' nearest, ties to even
    assert result[0, 0, 2] == QUANTIZED[target]


@pytest.mark.parametrize("target", list(QUANTIZED))
@pytest.mark.parametrize("source", FLOATS)
def test_quantized_queries_and_keys(device: str, source: Any, target: Any) -> None:
    interpretable(device, target)
    kernel, reference = operation("qk_norm_rope")
    qkv, scales, tables = noise(2, 9, 3 * 2 * 32, device=device, dtype=source), affine(32, device), rope(9, 32, device)
    inverse = 30.0, 110.0  # the second saturates
    actual = kernel.qk_norm_rope(qkv, *scales, *tables, 2, EPS, target, inverse)
    exact = reference.qk_norm_rope(qkv.double(), *scales, *tables, 2, EPS)
    rounded = reference.qk_norm_rope(qkv, *scales, *tables, 2, EPS, target, inverse)
    for got, same, expected, scale in zip(actual, rounded, exact, inverse, strict=True):
        assert got.dtype == same.dtype == target
        assert (got.view(torch.uint8) == same.view(torch.uint8)).float().mean() > 0.998
        limited = (expected * scale).clamp(-QUANTIZED[target], QUANTIZED[target])
        half_step = 0.5 if target == torch.int8 else torch.maximum(limited.abs() / 16, torch.tensor(2.0**-10))
        assert ((got.double() - limited).abs() <= half_step * (1 + 1e-4) + 1e-4).all()


@pytest.mark.parametrize("target", [torch.float32, *QUANTIZED])
def test_gelu_into_a_wider_buffer(device: str, target: Any) -> None:
    interpretable(device, target)
    kernel, _ = operation("gelu_quantize")
    x = inner(2, 3, 50, device=device)
    scale = 1.0 if target == torch.float32 else 30.0
    joint = torch.zeros((2, 3, 70), dtype=torch.float32, device=device).to(target)
    result = kernel.gelu_quantize(x, target, scale, joint[..., 20:])
    assert result.data_ptr() == joint[..., 20:].data_ptr()
    expected = kernel.gelu_quantize(x, target, scale, None)
    assert torch.equal(joint[..., 20:].float(), expected.float())
    assert not joint[..., :20].float().any()


@pytest.mark.parametrize("target", list(QUANTIZED))
@pytest.mark.parametrize("source", FLOATS)
def test_quantize(device: str, source: Any, target: Any) -> None:
    """Into a part of a wider buffer; NaN, infinity, saturation and ties included."""
    interpretable(device, target)
    kernel, reference = operation("quantize")
    x = inner(2, 3, 300, device=device, dtype=source)
    x[0, 0, :5] = torch.tensor([-300.0, torch.inf, torch.nan, 2.5, 3.5])
    joint = torch.zeros((2, 3, 320), dtype=torch.float32, device=device).to(target)
    actual, exact = kernel.quantize(x, target, 1.0, joint[..., 20:]), reference.quantize(x, target, 1.0, None)
    assert actual.data_ptr() == joint[..., 20:].data_ptr()
    assert equal(actual, exact).all()
    assert not joint[..., :20].float().any()
    limit = QUANTIZED[target]
    assert actual[0, 0, :2].float().tolist() == [-min(300, limit) if target == torch.int8 else -288.0, limit]
    assert actual[0, 0, 3:5].float().tolist() == ([2.0, 4.0] if target == torch.int8 else [2.5, 3.5])


@pytest.mark.parametrize("target", list(QUANTIZED))
@pytest.mark.parametrize("source", FLOATS)
def test_norms_in_8_bits(device: str, source: Any, target: Any) -> None:
    """The norm of the sum, rounded once: at most a step from the reference, and most of it equal."""
    interpretable(device, target)
    x, update = (noise(2, 3, 96, device=device, dtype=source, seed=seed) for seed in (1, 2))
    gain, offset = affine(96, device)
    scale = QUANTIZED[target] / 2  # a few values saturate
    pairs = []
    for name, given in (("layer_norm", (x,)), ("residual_layer_norm", (x, update))):
        kernel, reference = operation(name)
        arguments = (*given, gain, offset, EPS, target, scale)
        actual, exact = getattr(kernel, name)(*arguments), getattr(reference, name)(*arguments)
        pairs.append((actual, exact) if name == "layer_norm" else (actual[1], exact[1]))
    for actual, exact in pairs:
        assert actual.dtype == exact.dtype == target
        assert (actual.float().abs() == QUANTIZED[target]).any()
        same = actual.view(torch.uint8) == exact.view(torch.uint8)
        assert same.float().mean() > 0.998  # float32 may fall on the other side of a tie
        step = torch.where(same, 0, actual.double() - exact.double()).abs()
        assert (step <= torch.maximum(exact.double().abs() / 8, torch.tensor(1.0))).all()


def test_public_names_on_a_cpu() -> None:
    from densegeo.kernels.gelu_quantize import gelu_quantize
    from densegeo.kernels.layer_norm import layer_norm
    from densegeo.kernels.quantize import quantize
    from densegeo.kernels.residual_layer_norm import residual_layer_norm

    x, update = noise(1, 3, 16, device="cpu"), noise(1, 3, 16, device="cpu", seed=1)
    gain, offset = affine(16, "cpu")
    residual, normed = residual_layer_norm(x, update, gain, offset)
    torch.testing.assert_close(residual, x + update)
    torch.testing.assert_close(normed, torch.nn.functional.layer_norm(residual, (16,), gain, offset, EPS))
    joint = torch.zeros(1, 3, 20, dtype=torch.int8)
    assert gelu_quantize(x, inverse_scale=20.0, out=joint[..., 4:]).dtype == torch.int8
    assert joint.any()
    assert torch.equal(quantize(x, torch.int8, 20.0, out=joint[..., 4:]), (20 * x).round().to(torch.int8))
    assert layer_norm(x, gain, offset, dtype=torch.int8, inverse_scale=9.0).dtype == torch.int8
    assert residual_layer_norm(x, update, gain, offset, dtype=FP8, inverse_scale=9.0)[1].dtype == FP8
    assert error(gelu_quantize(x), torch.nn.functional.gelu(x, approximate="tanh")) < 1e-6


def test_wrappers_refuse_wrong_layouts(device: str) -> None:
    norm, gelu = operation("residual_layer_norm")[0].residual_layer_norm, operation("gelu_quantize")[0]
    x, gain = noise(1, 3, 8, device=device), affine(8, device)[0]
    wrong = [
        lambda: norm(noise(1, 3, 16, device=device)[..., ::2], x, gain, gain, EPS, torch.float32),
        lambda: norm(x, x[:, :2], gain, gain, EPS, torch.float32),
        lambda: norm(x, x.bfloat16(), gain, gain, EPS, torch.float32),
        lambda: norm(x, x, gain.double(), gain, EPS, torch.float32),
        lambda: norm(x, x, gain[:4], gain, EPS, torch.float32),
        lambda: gelu.gelu_quantize(x.mT, torch.float32, 1.0, None),
        lambda: gelu.gelu_quantize(x, torch.float32, 2.0, None),
        lambda: gelu.gelu_quantize(x, torch.float32, 1.0, x[:, :2]),
        lambda: gelu.gelu_quantize(x, torch.int8, 1.0, torch.empty_like(x)),
        lambda: operation("quantize")[0].quantize(x, torch.float32, 1.0, None),
        lambda: operation("quantize")[0].quantize(x.mT, torch.int8, 1.0, None),
    ]
    for call in wrong:
        with pytest.raises(AssertionError):
            call()
