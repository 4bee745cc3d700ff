"""int8 layers on a CPU through oneDNN: the numbers of their emulation, and only where sums are not cut off."""

from __future__ import annotations

import copy

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from densegeo.models.layer_plans import LayerPlan, quantize_block  # noqa: E402
from densegeo.models.quantized import (  # noqa: E402
    FORMATS,
    QuantizedConvolution,
    QuantizedLinear,
    with_weight_bits,
)
from densegeo.models.vae import Downsample, PhaseUpsample, Upsample  # noqa: E402
from densegeo.runtime.backends import torch_int8  # noqa: E402
from densegeo.runtime.backends.torch_int8 import (  # noqa: E402
    PART,
    Int8Convolution,
    Int8Linear,
    can_multiply,
    rounded,
    use_int8_products,
)

INT8 = FORMATS["int8"]
BOUND = {torch.float32: 1e-5, torch.bfloat16: 2**-7}  # relative L2: another order of sums; two roundings to bf16
exact = pytest.mark.skipif(
    not can_multiply(QuantizedLinear.prepare(nn.Linear(16, 16), 1.0, INT8, torch.float32)),
    reason="this processor has no int8 products whose sums are not cut off",
)


def off(ours: torch.Tensor, wanted: torch.Tensor) -> float:
    assert (ours.shape, ours.dtype) == (wanted.shape, wanted.dtype)
    return float((ours.double() - wanted.double()).norm() / wanted.double().norm())


@exact
def test_upsampling_in_phases_keeps_channels_adjacent() -> None:
    torch.manual_seed(0)
    level = nn.ModuleDict({"upsample": PhaseUpsample(Upsample(32).requires_grad_(False))})
    quantize_block(level, "", {"upsample.conv": LayerPlan(3.0)}, INT8, torch.float32)
    x = torch.randn(2, 32, 5, 7)
    emulated = level["upsample"](x)
    assert use_int8_products(level) == 1
    ours = level["upsample"](x)
    assert off(ours, emulated) <= BOUND[torch.float32]
    assert ours.is_contiguous(memory_format=torch.channels_last)


@exact
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["plain", "even channels", "two products"])
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 1, 1), (3, 2, 0), (1, 1, 0), (2, 1, 1)])
def test_convolutions_are_what_they_were_emulated(
    dtype: torch.dtype, form: str, kernel: int, stride: int, padding: int
) -> None:
    torch.manual_seed(0)
    layer, x = nn.Conv2d(24, 33, kernel, stride, padding), torch.randn(2, 24, 9, 7).to(dtype)
    smooth = torch.linspace(0.5, 2.0, 24) if form == "even channels" else None
    plain = QuantizedConvolution.prepare(layer, 3.0, INT8, dtype, smooth, twice=form == "two products")
    ours = Int8Convolution(plain)
    for given in (x, x.contiguous(memory_format=torch.channels_last), x[:, :, 1:]):
        assert off(ours(given), plain(given)) <= BOUND[dtype]
    assert ours(x).is_contiguous(memory_format=torch.channels_last)


@exact
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linears_are_what_they_were_emulated(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    plain = QuantizedLinear.prepare(nn.Linear(40, 24), 3.0, INT8, dtype)
    for shape in ((2, 5, 40), (1, 40), (3, 2, 4, 40)):
        x = torch.randn(shape).to(dtype)
        assert off(Int8Linear(plain)(x), plain(x)) <= BOUND[dtype]


def test_rounding_is_half_to_even_and_ends_where_numbers_end() -> None:
    rows = torch.tensor([[0.5, 1.5, -0.5, -1.5], [126.5, 1000.0, -127.4, -1000.0]])
    assert (rounded(rows, torch.ones(4)).int() - 128).tolist() == [[0, 2, 0, -2], [126, 127, -127, -127]]
    many = torch.randn(PART // 8 + 3, 16)  # in more than one part
    factor = torch.linspace(5.0, 20.0, 16)
    assert torch.equal(rounded(many, factor).int() - 128, (many * factor).round().clamp(-127, 127).int())


@exact
def test_networks_share_what_was_laid_out_anew() -> None:
    torch.manual_seed(0)
    network = nn.Module()
    network.downsample, network.linear, network.plain = Downsample(16), nn.Linear(16, 16), nn.Linear(16, 16)
    quantize_block(network, "", dict.fromkeys(("downsample.conv", "linear"), LayerPlan(4.0)), INT8, torch.float32)
    network.part = nn.Sequential(network.linear)
    x = torch.randn(1, 16, 6, 10)
    expected = network.downsample(x)
    assert use_int8_products(network) == 2
    assert network.part[0] is network.linear
    assert type(network.plain) is nn.Linear
    assert off(network.downsample(x), expected) <= BOUND[torch.float32]  # zeros beyond two of its edges are its own
    assert not any(tensor.dtype == torch.int8 for tensor in network.state_dict().values())
    assert copy.deepcopy(network).linear is network.linear


def test_products_whose_sums_would_be_cut_off_stay_emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    def layer(bits: int, kind: str = "int8") -> QuantizedLinear:
        return QuantizedLinear.prepare(nn.Linear(16, 16), 1.0, with_weight_bits(FORMATS[kind], bits), torch.float32)

    monkeypatch.setattr(torch_int8, "saturates_int8", lambda: True)
    monkeypatch.setattr(torch_int8, "is_x86", lambda: True)
    assert [can_multiply(layer(bits)) for bits in (8, 7)] == [False, torch.backends.mkldnn.is_available()]
    network = nn.Sequential(layer(8))
    assert use_int8_products(network) == 0
    assert type(network[0]) is QuantizedLinear
    monkeypatch.setattr(torch_int8, "saturates_int8", lambda: False)
    assert not can_multiply(layer(8, "fp8"))
    monkeypatch.setattr(torch_int8, "is_x86", lambda: False)
    assert not can_multiply(layer(8))
