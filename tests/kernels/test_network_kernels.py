"""The kernels inside the network against their references, with the bounds of `support/kernels.py`."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from densegeo.errors import TensorSizeError  # noqa: E402
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


@pytest.mark.parametrize(("batch", "tokens", "hidden"), [(1, 5, 160), (2, 3, 77), (1, 1, 1)])
def test_layer_norm(device: str, batch: int, tokens: int, hidden: int) -> None:
    kernel, reference = operation("layer_norm")
    x = noise(batch, tokens + 2, hidden + 5, device=device)[:, 2:, 3 : 3 + hidden]
    assert tokens * hidden == 1 or not x.is_contiguous()
    gain, offset = affine(hidden, device)
    close(
        kernel.layer_norm(x, gain, offset, EPS, x.dtype),
        reference.layer_norm(x.double(), gain, offset, EPS, torch.float64),
    )


@pytest.mark.parametrize("dtype", LOW)
def test_layer_norm_types(device: str, dtype: Any) -> None:
    kernel, reference = operation("layer_norm")
    x = 20 + noise(1, 4, 96, device=device, dtype=dtype)  # a large mean
    gain, offset = affine(96, device)
    plain = stored(torch.nn.functional.layer_norm(x.float(), (96,), gain, offset, EPS), dtype, device)
    actual = kernel.layer_norm(x, gain, offset, EPS, dtype)
    assert actual.dtype == dtype
    assert_as_good(actual, plain, reference.layer_norm(x.double(), gain, offset, EPS, torch.float64))


@pytest.mark.parametrize(
    ("batch", "tokens", "heads", "size", "more"), [(1, 19, 2, 32, 0), (2, 16, 1, 128, 40), (1, 3, 3, 12, 8)]
)
def test_qk_norm_rope(device: str, batch: int, tokens: int, heads: int, size: int, more: int) -> None:
    kernel, reference = operation("qk_norm_rope")
    qkv = noise(batch, tokens, 3 * heads * size + more, device=device)
    scales = affine(size, device)
    tables = rope(tokens, size, device)
    exact = reference.qk_norm_rope(qkv.double(), *scales, *tables, heads, EPS)
    for actual, expected in zip(kernel.qk_norm_rope(qkv, *scales, *tables, heads, EPS), exact, strict=True):
        assert actual.shape == (batch, heads, tokens, size)
        close(actual, expected)


@pytest.mark.parametrize("dtype", LOW)
def test_qk_norm_rope_types(device: str, dtype: Any) -> None:
    from densegeo.models.layers import RMSNorm, rotate, split_qkv

    kernel, reference = operation("qk_norm_rope")
    qkv = noise(1, 9, 3 * 2 * 32, device=device, dtype=dtype)
    scales, tables = affine(32, device), rope(9, 32, device)
    exact = reference.qk_norm_rope(qkv.double(), *scales, *tables, 2, EPS)
    actual = kernel.qk_norm_rope(qkv, *scales, *tables, 2, EPS)
    for part, scale, got, expected in zip(split_qkv(qkv, 2)[:2], scales, actual, exact, strict=True):
        norm = RMSNorm(32).to(device)
        norm.scale.data = scale
        plain = rotate(norm(part), *tables).detach()  # the network's own way
        assert got.dtype == dtype
        assert_as_good(got, plain, expected)


def channels_last(x: Any) -> Any:
    return x.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize(("batch", "channels", "groups", "height", "width"), [(1, 64, 32, 7, 9), (2, 24, 8, 13, 5)])
def test_group_norm_silu(
    device: str, batch: int, channels: int, groups: int, height: int, width: int, silu: bool
) -> None:
    kernel, reference = operation("group_norm_silu")
    x = channels_last(noise(batch, channels, height, width, device=device) * 2 + 1)
    arguments = (*affine(channels, device), groups, EPS, silu)
    actual = kernel.group_norm_silu(x, *arguments)
    assert actual.is_contiguous(memory_format=torch.channels_last)
    close(actual, reference.group_norm_silu(x.double(), *arguments))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(1, 8, 2, 2), (2, 12, 4, 6), (1, 520, 3, 3)])
def test_interleave(device: str, shape: tuple[int, ...], dtype: Any) -> None:
    """Bit by bit, of any type, also where channels are no power of two."""
    kernel, reference = operation("interleave")
    phases = channels_last(noise(*shape, device=device, dtype=dtype))
    actual = kernel.interleave(phases)
    assert actual.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(actual, reference.interleave(phases))
    with pytest.raises(AssertionError):
        kernel.interleave(phases.contiguous())


@pytest.mark.parametrize("dtype", LOW)
def test_group_norm_silu_in_float32(device: str, dtype: Any) -> None:
    """What is read in 16 bits is written in 32, with no rounding between."""
    kernel, reference = operation("group_norm_silu")
    x = channels_last(noise(2, 32, 5, 7, device=device, dtype=dtype))
    gain, offset = affine(32, device)
    actual = kernel.group_norm_silu(x, gain, offset, 8, EPS, True, torch.float32)
    assert actual.dtype == torch.float32
    assert actual.is_contiguous(memory_format=torch.channels_last)
    close(actual, reference.group_norm_silu(x.double(), gain, offset, 8, EPS, True))


@pytest.mark.parametrize("size", [(864, 576), (1024, 768), (512, 512)])
def test_statistics_are_made_by_more_programs_than_a_gpu_has_processors(size: tuple[int, int]) -> None:
    """At every level of the full-size autoencoder: an H100 has 132, a Blackwell card up to 170."""
    kernel, _ = operation("group_norm_silu")
    width, height = size
    for level, channels in enumerate((128, 256, 512, 512)):
        pixels = (width >> level) * (height >> level)
        runs, run = kernel.runs_of(pixels, channels)
        assert (runs - 1) * run < pixels <= runs * run
        assert runs > 170 or run == kernel.blocks(channels)["BLOCK_P"]  # or there are no more blocks


def test_queries_and_keys_go_into_a_joint_sequence(device: str) -> None:
    kernel, reference = operation("qk_norm_rope")
    qkv, scales, tables = noise(2, 5, 3 * 2 * 16, device=device), affine(16, device), rope(5, 16, device)
    joint = [torch.full((2, 2, 9, 16), 7.0, device=device) for _ in range(2)]
    made = kernel.qk_norm_rope(qkv, *scales, *tables, 2, EPS, out=tuple(part[:, :, 3:8] for part in joint))
    exact = reference.qk_norm_rope(qkv.double(), *scales, *tables, 2, EPS)
    for part, tensor, expected in zip(joint, made, exact, strict=True):
        close(part[:, :, 3:8], expected)
        assert tensor.data_ptr() == part[:, :, 3:8].data_ptr()
        assert bool((part[:, :, :3] == 7.0).all())
        assert bool((part[:, :, 8:] == 7.0).all())


def test_group_norm_survives_a_large_mean(device: str) -> None:
    kernel, reference = operation("group_norm_silu")
    x = channels_last(noise(1, 32, 40, 30, device=device) + 300)
    gain, offset = affine(32, device)
    plain = torch.nn.functional.group_norm(x, 8, gain, offset, EPS)
    assert_as_good(
        kernel.group_norm_silu(x, gain, offset, 8, EPS, False),
        plain,
        reference.group_norm_silu(x.double(), gain, offset, 8, EPS, False),
    )


@pytest.mark.parametrize("dtype", LOW)
def test_group_norm_silu_types(device: str, dtype: Any) -> None:
    kernel, reference = operation("group_norm_silu")
    x = channels_last(noise(1, 64, 9, 11, device=device, dtype=dtype))
    gain, offset = affine(64, device)
    normed = torch.nn.functional.group_norm(x, 32, gain.to(dtype), offset.to(dtype), EPS)
    actual = kernel.group_norm_silu(x, gain, offset, 32, EPS, True)
    assert actual.dtype == dtype
    assert_as_good(
        actual,
        torch.nn.functional.silu(normed),
        reference.group_norm_silu(x.double(), gain, offset, 32, EPS, True),
    )


@pytest.mark.parametrize("dtype", FLOATS)
def test_references_equal_the_network(dtype: Any) -> None:
    from densegeo.models.layers import QKNorm, rotate, split_qkv

    x = channels_last(torch.randn(2, 64, 5, 6, dtype=torch.float64))
    gain, offset = affine(64, "cpu")
    expected = torch.nn.functional.silu(torch.nn.functional.group_norm(x, 32, gain.double(), offset.double(), EPS))
    torch.testing.assert_close(
        operation("group_norm_silu")[1].group_norm_silu(x, gain, offset, 32, EPS, True), expected
    )
    tokens = torch.randn(2, 7, 64)
    expected = torch.nn.functional.layer_norm(tokens.double(), (64,), gain.double(), offset.double(), EPS)
    actual = operation("layer_norm")[1].layer_norm(tokens.to(dtype), gain, offset, EPS, dtype)
    assert actual.dtype == dtype
    bound = 2.0 * torch.finfo(dtype).eps
    assert error(actual, expected) <= max(bound, 1e-6)
    norm = QKNorm(16)
    norm.query_norm.scale.data, norm.key_norm.scale.data = affine(16, "cpu")
    qkv, tables = torch.randn(1, 7, 96), rope(7, 16, "cpu")
    query, key = norm(*split_qkv(qkv, 2)[:2])
    result = operation("qk_norm_rope")[1].qk_norm_rope(qkv, norm.query_norm.scale, norm.key_norm.scale, *tables, 2, EPS)
    for got, want in zip(result, (rotate(query, *tables), rotate(key, *tables)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_wrappers_refuse_wrong_layouts(device: str) -> None:
    layer_norm, qk_norm_rope, group_norm_silu = (
        getattr(operation(name)[0], name) for name in ("layer_norm", "qk_norm_rope", "group_norm_silu")
    )
    gain, offset = affine(8, device)
    tables = rope(3, 8, device)
    wrong = [
        lambda: layer_norm(noise(1, 3, 16, device=device)[..., ::2], gain, offset, EPS, torch.float32),
        lambda: layer_norm(noise(1, 3, 8, device=device), gain.double(), offset, EPS, torch.float32),
        lambda: qk_norm_rope(noise(1, 3, 15, device=device), gain, offset, *tables, 1, EPS),
        lambda: qk_norm_rope(noise(1, 4, 24, device=device), gain, offset, *tables, 1, EPS),
        lambda: group_norm_silu(noise(1, 8, 4, 3, device=device), gain, offset, 4, EPS, True),
        lambda: group_norm_silu(channels_last(noise(1, 8, 4, 3, device=device)), gain, offset, 3, EPS, True),
    ]
    for call in wrong:
        with pytest.raises(AssertionError):
            call()


def test_what_32_bits_do_not_reach_is_an_error_with_a_name() -> None:
    """Eight images of 1024x768: their sixteen pictures in the decoder's last level have 256 channels."""
    normed = operation("group_norm_silu")[0].group_norm_silu
    gain, offset = (torch.empty(256, device="meta") for _ in range(2))
    pictures = channels_last(torch.empty(16, 256, 768, 1024, dtype=torch.bfloat16, device="meta"))
    with pytest.raises(TensorSizeError, match=r"\(16, 256, 768, 1024\) is beyond"):
        normed(pictures, gain, offset, 32, EPS, True)
