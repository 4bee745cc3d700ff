"""8-bit linears and convolutions: rounding, scales, smoothing, and the blocks they are put into."""

from __future__ import annotations

import copy

import ml_dtypes
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from densegeo.models import fe2e, quantized, rewrites
from densegeo.models.config import TransformerConfig
from densegeo.models.families import FE2E
from densegeo.models.layer_plans import LayerPlan, _smooth, quantize_block, smoothable
from densegeo.models.loading import bound
from densegeo.models.prompt import Prompt
from densegeo.models.quantized import (
    FORMATS,
    QuantizedConvolution,
    QuantizedLinear,
    convolution_fits,
    quantize,
    quantized_convolution,
    quantized_linear,
)
from densegeo.models.transformer import Transformer
from densegeo.models.vae import VAE, Downsample
from densegeo.size import Size
from tests.support.checkpoints import SMALL, SMALL_VAE


def test_rounding_is_that_of_an_independent_library() -> None:
    x = torch.cat([torch.randn(5000) * 10.0**power for power in range(-4, 4)])
    scale = torch.tensor(0.37)
    ours = quantize(x, scale, torch.float8_e4m3fn).float().numpy()
    steps = np.clip(x.numpy() / scale.numpy(), -448, 448)
    assert np.array_equal(ours, steps.astype(ml_dtypes.float8_e4m3fn).astype(np.float32))
    eight = quantize(x, scale, torch.int8).numpy()
    assert np.array_equal(eight, np.clip(np.rint(x.numpy() / scale.numpy()), -127, 127).astype(np.int8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_fp8_products_ask_for_what_torch_has_on_gpus(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """As _scaled_mm refuses it on CUDA devices (ATen/native/cuda/ScaledBlas.cpp); a CPU takes everything."""
    product = torch._scaled_mm

    def on_gpu(
        a: torch.Tensor,
        b: torch.Tensor,
        *scales: torch.Tensor,
        bias: torch.Tensor | None = None,
        out_dtype: torch.dtype,
    ) -> torch.Tensor:
        if bias is not None and out_dtype == torch.float32:
            raise ValueError("Bias is not supported when out_dtype is set to Float32")
        if scales[0].numel() > 1 and out_dtype not in (torch.bfloat16, torch.float16):
            raise ValueError("Only bf16 and fp16 high precision output types are supported for row-wise scaling.")
        return product(a, b, *scales, bias=bias, out_dtype=out_dtype)

    torch.manual_seed(0)
    x = torch.randn(2, 7, 48).to(dtype)
    linear = QuantizedLinear.prepare(nn.Linear(48, 32), float(x.abs().max()), FORMATS["fp8"], dtype)
    plain = linear(x)
    monkeypatch.setattr(torch, "_scaled_mm", on_gpu)
    monkeypatch.setattr(quantized, "_has_product", lambda taken, weight: True)
    for given in (x, quantize(x, linear.input_scale, torch.float8_e4m3fn)):
        ours = linear(given)
        assert ours.dtype == dtype
        bound = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}[dtype]
        assert (ours.double() - plain.double()).norm() <= bound * plain.double().norm()


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_quantized_linear_is_the_product_of_its_8_bit_numbers(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(48, 33)
    x = torch.randn(2, 7, 48).to(dtype)
    ours = QuantizedLinear.prepare(linear, float(x.abs().max()), FORMATS[kind], dtype)
    assert ours.weight.dtype == FORMATS[kind].dtype
    assert ours.weight_scale.shape == (33,)
    numbers = quantize(x, ours.input_scale, ours.weight.dtype).double() * ours.input_scale.double()
    weights = ours.weight.double() * ours.weight_scale.double()[:, None]
    expected = numbers @ weights.T + ours.bias.double()
    out = ours(x)
    assert out.dtype == dtype
    bound = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    assert (out.double() - expected).norm() <= bound * expected.norm()
    exact = x.double() @ linear.weight.double().T + linear.bias.double()
    relative = (expected - exact).norm() / exact.norm()
    assert relative < {"fp8": 0.06, "int8": 0.03}[kind]  # a rounding's share of its number, by the format
    assert relative > 1e-4


@pytest.mark.parametrize("kind", FORMATS)
def test_a_row_of_zeros_stays_one(kind: str) -> None:
    linear = nn.Linear(16, 4)
    linear.weight.data[2] = 0
    linear.weight.data[3] = 1e-30
    made = QuantizedLinear.prepare(linear, 3.0, FORMATS[kind], torch.bfloat16)
    out = made(torch.ones(1, 16, dtype=torch.bfloat16)).float()
    assert out.isfinite().all()
    assert (out[0, 2:] - linear.bias[2:]).abs().max() <= 0.01 * linear.bias[2:].abs().max()


def test_the_operator_keeps_to_torchs_rules() -> None:
    linear = QuantizedLinear.prepare(nn.Linear(16, 8), 3.0, FORMATS["int8"], torch.float32)  # its checks know no fp8
    given = (torch.randn(3, 16), linear.weight, linear.weight_scale, linear.input_scale, linear.bias)
    torch.library.opcheck(quantized_linear, given, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["fp8", "int8"])
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 1, 1), (3, 2, 0), (1, 1, 0), (2, 1, 1)])
def test_a_quantized_convolution_is_the_product_of_its_8_bit_numbers(
    dtype: torch.dtype, kind: str, kernel: int, stride: int, padding: int
) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(24, 33, kernel, stride, padding)
    x = torch.randn(2, 24, 9, 7).to(dtype)
    ours = QuantizedConvolution.prepare(layer, float(x.abs().max()), FORMATS[kind], dtype)
    assert ours.weight.dtype == FORMATS[kind].dtype
    assert ours.weight_scale.shape == (33,)
    assert (ours.weight.float().abs().amax(dim=(1, 2, 3)) == FORMATS[kind].qmax).all()  # each row uses all of its range
    numbers = quantize(x, ours.input_scale, FORMATS[kind].dtype).double() * ours.input_scale.double()
    weights = ours.weight.double() * ours.weight_scale.double()[:, None, None, None]
    expected = F.conv2d(numbers, weights, ours.bias.double(), stride, padding)
    out = ours(x)
    assert (out.shape, out.dtype) == (expected.shape, dtype)
    bound = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    assert (out.double() - expected).norm() <= bound * expected.norm()
    exact = F.conv2d(x.double(), layer.weight.double(), layer.bias.double(), stride, padding)
    steps = {"fp8": 0.06, "int8": 0.03}[kind]
    assert 1e-4 < (expected - exact).norm() / exact.norm() < steps
    if kind == "fp8":
        return  # torch's checks know none of it
    given = (x.float(), ours.weight, ours.weight_scale, ours.input_scale, None, ours.bias, ours.stride, ours.pads)
    torch.library.opcheck(quantized_convolution, given, test_utils=("test_schema", "test_faketensor"))


def test_even_channels_make_a_convolution_more_exact() -> None:
    """Channels whose sizes differ a hundredfold: one scale leaves the small ones few steps."""
    torch.manual_seed(0)
    layer, sizes = nn.Conv2d(24, 32, 3, padding=1), torch.logspace(0, 2, 24)
    layer.weight.data /= sizes[:, None, None]
    x = torch.randn(1, 24, 16, 16) * sizes[:, None, None]
    exact = layer(x)

    def off(smooth: torch.Tensor | None) -> float:
        limit = float((x if smooth is None else x / smooth[:, None, None]).abs().max())
        made = QuantizedConvolution.prepare(layer, limit, FORMATS["int8"], torch.float32, smooth)
        assert set(made.state_dict()) >= ({"input_factor"} if smooth is not None else set())
        return float((made(x) - exact).norm() / exact.norm())

    assert off(sizes) < 0.02
    assert off(None) > 5 * off(sizes)
    with torch.device("meta"):
        empty = QuantizedConvolution.prepare(nn.Conv2d(24, 32, 3), 1.0, FORMATS["int8"], torch.float32, sizes)
    assert empty.input_factor is not None
    assert empty.input_factor.shape == (24, 1, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_products_keep_what_one_rounding_loses(dtype: torch.dtype) -> None:
    """A few values a thousand times as large as the others: one scale leaves the others nothing."""
    torch.manual_seed(0)
    layer = nn.Conv2d(16, 32, 3, padding=1)
    x = 0.2 * torch.randn(1, 16, 32, 32)
    x[:, ::2, 0, 0] = 200.0
    x = x.to(dtype)

    def off(twice: bool) -> float:
        """Where there is no large value, relative to the product of the same rounded weights."""
        made = QuantizedConvolution.prepare(layer, 200.0, FORMATS["int8"], dtype, twice=twice)
        weight = made.weight.double() * made.weight_scale.double()[:, None, None, None]
        expected = F.conv2d(x.double(), weight, made.bias.double(), padding=1)
        return float((made(x).double() - expected)[..., 2:].norm() / expected[..., 2:].norm())

    assert off(twice=False) > 0.3
    rounding = 2.0 / 254 / 12**0.5  # of the rest: its step's standard deviation
    assert off(twice=True) < 2 * rounding / 0.2
    made = QuantizedConvolution.prepare(layer, 200.0, FORMATS["int8"], dtype, twice=True)
    assert float(made.input_scale) == 2.0  # 200 / 127, up to a power of two
    with torch.device("meta"):
        empty = QuantizedConvolution.prepare(nn.Conv2d(16, 32, 3), 1.0, FORMATS["int8"], dtype, twice=True)
    assert empty.state_dict().keys() == made.state_dict().keys()


def test_a_downsampling_convolution_takes_over_its_zeros() -> None:
    torch.manual_seed(0)
    holder = nn.Module()
    holder.downsample = Downsample(16)
    exact, x = copy.deepcopy(holder.downsample), torch.randn(1, 16, 6, 10)
    quantize_block(holder, "encoder", {"encoder.downsample.conv": LayerPlan(4.0)}, FORMATS["int8"], torch.float32)
    assert isinstance(holder.downsample.conv, QuantizedConvolution)
    assert set(holder.state_dict()) == {
        f"downsample.conv.{name}" for name in ("weight", "weight_scale", "input_scale", "bias")
    }
    ours, expected = holder.downsample(x), exact(x)
    assert ours.shape == expected.shape == (1, 16, 3, 5)
    assert 1e-4 < (ours - expected).norm() / expected.norm() < 0.03


def test_ends_shortcuts_and_thin_convolutions_stay() -> None:
    wide, thin = nn.Conv2d(16, 16, 3), nn.Conv2d(15, 16, 3)
    assert convolution_fits("decoder.up.3.block.0.conv1", wide)
    assert convolution_fits("decoder.mid.attn_1.q", nn.Conv2d(64, 64, 1))
    assert not convolution_fits("decoder.up.3.block.0.conv1", thin)
    for name in ("conv_in", "encoder.conv_out", "up_blocks.0.resnets.1.conv_shortcut", "decoder.up.2.nin_shortcut"):
        assert not convolution_fits(name, wide)


def rewritten(config: TransformerConfig = SMALL) -> Transformer:
    torch.manual_seed(1)
    transformer = Transformer(config)
    for parameter in transformer.parameters():
        nn.init.normal_(parameter, std=0.2)
    embeds = np.random.default_rng(0).standard_normal((5, config.prompt_dim)).astype(np.float32)
    prompt = Prompt(embeds, np.arange(5) < 2)
    pipeline = bound(FE2E, transformer, VAE(SMALL_VAE), prompt, Size(64, 48))
    with torch.no_grad():
        return rewrites.apply(pipeline, fe2e.REWRITES).denoiser


@torch.no_grad()
def test_smoothing_alone_changes_nothing() -> None:
    transformer = rewritten()
    latent = torch.randn(1, 16, 6, 8)
    expected = transformer(latent)
    smoothed = []
    for _, block in transformer.blocks():
        for norm, names in smoothable(block):
            before = norm.weight.clone()
            _smooth(norm, [block.get_submodule(name) for name in names], torch.rand(len(before)) + 0.5)
            assert not torch.equal(norm.weight, before)
            smoothed += names
    assert smoothed == ["img_attn.qkv", "img_mlp.0", "txt_mlp.0", "key_value", "query_mlp"]
    assert (transformer(latent) - expected).norm() <= 1e-5 * expected.norm()


@torch.no_grad()
def test_smoothing_helps_where_channels_differ() -> None:
    """One channel of a block's norm is a thousand times the others: without smoothing they round to nothing."""
    transformer = rewritten()
    block = transformer.single_blocks[0]
    ((norm, names),) = smoothable(block)
    norm.weight.data[3] *= 1000
    for name in names:
        block.get_submodule(name).weight.data[:, 3] /= 1000
    latent = torch.randn(1, 16, 6, 8)
    expected = transformer(latent)
    factors = norm.weight.data.abs() / norm.weight.data.abs().median()
    errors = {}
    for label, smooth, limit in (("plain", None, 4000.0), ("smooth", factors, 4.0)):
        twin = copy.deepcopy(transformer)
        plans = {f"single_blocks.0.{name}": LayerPlan(limit, smooth) for name in names}
        quantize_block(twin.single_blocks[0], "single_blocks.0", plans, FORMATS["int8"], torch.float32)
        errors[label] = float((twin(latent) - expected).norm() / expected.norm())
    assert errors["smooth"] < 0.2 * errors["plain"]


@torch.no_grad()
@pytest.mark.parametrize("kind", FORMATS)
def test_blocks_with_8_bit_linears_stay_close(kind: str) -> None:
    transformer = rewritten()
    latent = torch.randn(1, 16, 6, 8)
    expected = transformer(latent)
    plans = {
        f"{prefix}.{name}": LayerPlan(20.0)
        for prefix, block in transformer.blocks()
        for name, layer in block.named_modules()
        if isinstance(layer, nn.Linear)
    }
    for prefix, block in transformer.blocks():
        quantize_block(block, prefix, plans, FORMATS[kind], torch.float32)
    left = [name for name, layer in transformer.named_modules() if isinstance(layer, nn.Linear)]
    assert left == ["img_in", "final_layer.linear"]
    error = (transformer(latent) - expected).norm() / expected.norm()
    assert 1e-4 < error < 0.3
