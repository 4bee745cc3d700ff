"""Attention to keys that stand for several tokens: every strategy against float64, in torch and in Triton.

On a CPU, `merge` and `bias` of the table are torch's; their Triton kernels are called by themselves.
"""

from __future__ import annotations

import time
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.usefixtures("poisoned"), pytest.mark.integration]

from densegeo.kernels.attention import attention, attention_fp8, choose, fastest, strategies  # noqa: E402
from tests.support.interpreter import operation  # noqa: E402
from tests.support.kernels import BOUND, FLOATS, LOW, error, noise  # noqa: E402

FP8 = torch.float8_e4m3fn
NAMES = ["merge", "bias", "expand"]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
CASES = [  # batch, heads, queries, keys, size, counts
    (1, 2, 19, 40, 32, (1, 1, 1, 625)),
    (2, 3, 7, 7, 16, (3, 1, 2, 1, 90)),
    (1, 1, 1, 3, 128, (2, 5, 3)),
    (1, 2, 130, 70, 12, (1, 1)),
]


def tensors(
    batch: int, heads: int, queries: int, keys: int, size: int, device: str, dtype: Any = torch.float32
) -> tuple[Any, Any, Any]:
    """Queries; keys that are large enough to concentrate the weights; values as a joint projection holds them."""
    q = noise(batch, heads, queries, size, device=device, dtype=dtype, seed=1)
    k = 1.5 * noise(batch, heads, keys, size, device=device, dtype=dtype, seed=2)
    v = noise(batch, keys, heads * size + 16, device=device, dtype=dtype, seed=3)[..., 16:]
    return q, k, v.unflatten(-1, (heads, size)).transpose(1, 2)


def exactly(q: Any, k: Any, v: Any, counts: Any) -> Any:
    return operation("attention")[1].attention(q.double(), k.double(), v.double(), counts)


def plainly(q: Any, k: Any, v: Any, counts: Any) -> Any:
    """Everything in the tensors' dtype."""
    bias = torch.zeros(k.shape[2], device=q.device)
    bias[: len(counts)] = torch.tensor(counts, dtype=torch.float32).log()
    logits = q @ k.mT * q.shape[-1] ** -0.5 + bias.to(q.dtype)
    return logits.softmax(-1) @ v


def check(actual: Any, q: Any, k: Any, v: Any, counts: Any) -> None:
    exact = exactly(q, k, v, counts)
    assert actual.shape == q.shape
    assert actual.dtype == q.dtype
    assert torch.isfinite(actual).all()
    bound = BOUND if q.dtype == torch.float32 else 2 * error(plainly(q, k, v, counts), exact)
    assert error(actual, exact) <= bound


@pytest.mark.parametrize("counts", [(1, 1, 1, 625), (4, 1, 2)])
def test_reference_repeats_keys(counts: Any) -> None:
    q, k, v = (tensor.double() for tensor in tensors(2, 2, 5, 9, 8, "cpu"))
    repeats = torch.tensor([*counts, *[1] * (9 - len(counts))])
    repeated = (tensor.repeat_interleave(repeats, dim=2) for tensor in (k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(q, *repeated)
    torch.testing.assert_close(exactly(q, k, v, counts), expected)


@pytest.mark.parametrize("where", DEVICES)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("case", CASES[:3])
@pytest.mark.parametrize("name", [*NAMES, "auto"])
def test_strategies(name: str, case: Any, dtype: Any, where: str) -> None:
    if where == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    q, k, v = tensors(*case[:5], where, dtype)
    check(attention(q, k, v, case[5], name), q, k, v, case[5])


@pytest.mark.parametrize("counts", [None, (), (1, 1)])
def test_nothing_merged_is_plain_attention(counts: Any) -> None:
    q, k, v = tensors(1, 2, 5, 9, 16, "cpu")
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    for name in (*NAMES, "auto"):
        assert torch.equal(attention(q, k, v, counts, name), expected)


def test_wrong_arguments() -> None:
    q, k, v = tensors(1, 2, 5, 3, 16, "cpu")
    with pytest.raises(ValueError, match=r"'nope'; choose from auto, merge, merge-cudnn, bias, expand"):
        attention(q, k, v, (2,), "nope")
    with pytest.raises(ValueError, match="4 counts for 3 keys"):
        attention(q, k, v, (1, 1, 1, 1))
    with pytest.raises(ValueError, match="at least one token"):
        choose(q, k, v, (2, 0))


def test_the_fastest_by_the_median() -> None:
    calls: list[str] = []

    def wait(name: str, *seconds: float) -> Any:
        durations = iter(seconds)

        def call() -> None:
            calls.append(name)
            time.sleep(next(durations))

        return call

    ways = {"steady": wait("steady", 0.0, 0.1, 0.1, 0.1), "jumpy": wait("jumpy", 0.5, 0.01, 0.9, 0.02)}
    assert fastest(ways, torch.device("cpu"), runs=3) == "jumpy"
    assert calls == ["steady"] * 4 + ["jumpy"] * 4


def test_choose_measures() -> None:
    q, k, v = tensors(1, 2, 5, 9, 16, "cpu")
    for counts in ((2, 3), (1, 1), None):
        assert choose(q, k, v, counts, runs=1) in strategies.STRATEGIES
    calls = []

    def timed(name: str, seconds: float) -> strategies.Strategy:
        def wait(*arguments: Any) -> Any:
            calls.append((name, arguments[3]))
            time.sleep(seconds)
            return strategies.bias(*arguments[:4])

        return strategies.Strategy(wait, "never")

    slow = {"slow": timed("slow", 0.2), "fast": timed("fast", 0.0), "slower": timed("slower", 0.3)}
    assert choose(q, k, v, (2, 3, 1), runs=2, strategies=slow) == "fast"
    assert calls == [(name, (2, 3)) for name in slow for _ in range(3)]  # one run to warm up


@pytest.mark.parametrize("case", CASES)
def test_bias_kernel(device: str, case: Any) -> None:
    kernel, _ = operation("attention")
    q, k, v = tensors(*case[:5], device)
    bias = torch.tensor(case[5], dtype=torch.float32, device=device).log()
    actual = kernel.attention(q, k, v, bias)
    assert actual.transpose(1, 2).is_contiguous()
    check(actual, q, k, v, case[5])


@pytest.mark.parametrize("dtype", LOW)
def test_bias_kernel_types(device: str, dtype: Any) -> None:
    if device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies bf16 matrices as if they held integers")
    kernel, _ = operation("attention")
    q, k, v = tensors(1, 2, 40, 70, 32, device, dtype)
    counts = (1, 3, 625)
    check(kernel.attention(q, k, v, torch.tensor(counts, device=device).float().log()), q, k, v, counts)


@pytest.mark.parametrize("case", CASES)
def test_bias_kernel_scales(device: str, case: Any) -> None:
    """What 8-bit operands need: each with its scale, and a result of another type."""
    kernel, _ = operation("attention")
    q, k, v = tensors(*case[:5], device)
    bias = torch.tensor(case[5], dtype=torch.float32, device=device).log()
    actual = kernel.attention(q / 3, k / 0.25, v / 7, bias, (3.0, 0.25, 7.0), torch.float16)
    assert actual.dtype == torch.float16
    assert error(actual, exactly(q, k, v, case[5])) <= 2**-10


def in_fp8(*tensors: Any) -> tuple[list[Any], tuple[float, float, float]]:
    """Tensors over their scales, in fp8, and the scales."""
    q, k, v = (float(x.abs().max()) / 448 for x in tensors)
    return [(x / scale).to(FP8) for x, scale in zip(tensors, (q, k, v), strict=True)], (q, k, v)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_fp8_attention_is_as_good_as_its_emulation(case: Any, dtype: Any) -> None:
    """The reference, which a CPU runs, against the operator that calibration judges by."""
    from densegeo.models.quantized import quantized_attention

    q, k, v = tensors(*case[:5], "cpu")
    eight, scales = in_fp8(q, k, v)
    counts = case[5]
    bias = torch.zeros(1, 1, 1, k.shape[2])
    bias[..., : len(counts)] = torch.tensor(counts, dtype=torch.float32).log()
    exact = exactly(q, k, v, counts)
    emulated = error(quantized_attention(q, k, v, bias, *(torch.tensor(scale) for scale in scales)), exact)
    actual = attention_fp8(*eight, scales, dtype, counts)
    assert actual.dtype == dtype
    assert 1e-3 < error(actual, exact) <= 2 * emulated < 0.5


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", LOW)
def test_fp8_kernel(case: Any, dtype: Any) -> None:
    """Triton's interpreter rounds fp8 wrongly; that the kernel compiles to fp8 products is in `test_compile.py`."""
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no fp8 before sm_89")
    _, reference = operation("attention")
    eight, scales = in_fp8(*tensors(*case[:5], "cuda"))
    exact = exactly(*(x.double() * scale for x, scale in zip(eight, scales, strict=True)), case[5])
    expected = error(reference.attention_fp8(*eight, scales, dtype, case[5]), exact)
    assert error(attention_fp8(*eight, scales, dtype, case[5]), exact) <= 2 * expected


def added(kernel: Any, q: Any, k: Any, v: Any, counts: Any) -> Any:
    """What `merge` does on CUDA, with a plain attention in float32."""
    logits = q.float() @ k.float().mT * q.shape[-1] ** -0.5
    out = (logits.softmax(-1) @ v.float()).to(q.dtype)
    keys, logarithms = strategies._further(strategies._checked(counts, k.shape[2]), q.device)
    return kernel.add_keys(q, k, v, out, logits.logsumexp(-1), keys, logarithms)


@pytest.mark.parametrize("case", CASES)
def test_add_keys_kernel(device: str, case: Any) -> None:
    kernel, _ = operation("attention")
    q, k, v = tensors(*case[:5], device)
    actual = added(kernel, q, k, v, case[5])
    assert actual.transpose(1, 2).is_contiguous()
    check(actual, q, k, v, case[5])


@pytest.mark.parametrize("case", CASES)
def test_results_go_where_they_are_read(device: str, case: Any) -> None:
    """Into a part of a wider row, which nothing else of is touched: by both kernels, and by every strategy."""
    kernel, _ = operation("attention")
    q, k, v = tensors(*case[:5], device)
    batch, heads, queries, size = q.shape
    width = heads * size
    wide = torch.full((batch, queries, -(-(width + 16) // 16) * 16), 7.0, device=device)
    bias = torch.tensor(case[5], dtype=torch.float32, device=device).log()
    logits = q.float() @ k.float().mT * size**-0.5
    further = strategies._further(strategies._checked(case[5], k.shape[2]), q.device)
    plain = logits.softmax(-1) @ v, logits.logsumexp(-1), *further
    calls = [
        lambda out: kernel.attention(q, k, v, bias, out=out),
        lambda out: kernel.add_keys(q, k, v, *plain, result=out),
        *(lambda out, name=name: attention(q, k, v, case[5], name, out) for name in NAMES),
    ]
    for call in calls:
        out = wide.fill_(7.0)[..., :width]
        made = call(out)
        assert made.data_ptr() == out.data_ptr()
        check(out.unflatten(2, (heads, size)).transpose(1, 2), q, k, v, case[5])
        assert bool((wide[..., width:] == 7.0).all())


@pytest.mark.parametrize("dtype", LOW)
def test_add_keys_kernel_types(device: str, dtype: Any) -> None:
    kernel, _ = operation("attention")
    q, k, v = tensors(1, 2, 40, 70, 32, device, dtype)
    check(added(kernel, q, k, v, (1, 3, 625)), q, k, v, (1, 3, 625))


def test_large_logits(device: str) -> None:
    """No overflow, and a merged key with hardly any weight stays without."""
    kernel, _ = operation("attention")
    q, k, v = tensors(1, 1, 8, 40, 16, device)
    q, k = 20 * q, 20 * k
    bias = torch.tensor([600.0], device=device).log()
    check(kernel.attention(q, k, v, bias), q, k, v, (600,))
    check(added(kernel, q, k, v, (600,)), q, k, v, (600,))


def test_wrappers_refuse_wrong_layouts(device: str) -> None:
    kernel, _ = operation("attention")
    q, k, v = tensors(1, 2, 5, 9, 16, device)
    bias = noise(2, device=device)
    wrong = [
        lambda: kernel.attention(q.mT.contiguous().mT, k, v, bias),
        lambda: kernel.attention(q, k, v[:, :, :5], bias),
        lambda: kernel.attention(q, k.bfloat16(), v, bias),
        lambda: kernel.attention(q, k, v, bias.double()),
        lambda: kernel.attention(q, k, v, noise(10, device=device)),
        lambda: kernel.add_keys(q, k, v, q, bias, bias, bias),
        lambda: kernel.add_keys(q, k, v, q, q[..., 0], bias.int(), bias),
    ]
    for call in wrong:
        with pytest.raises(AssertionError):
            call()
