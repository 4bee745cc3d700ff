"""The networks over our kernels against the plain modules: on a CPU through the kernels' references."""

from __future__ import annotations

from collections.abc import Callable

import pytest

torch = pytest.importorskip("torch")

from torch import Tensor, nn  # noqa: E402

from densegeo.models.chain import relative_error  # noqa: E402
from densegeo.models.loading import Files  # noqa: E402
from densegeo.models.quantized import FORMATS  # noqa: E402
from densegeo.runtime.backends import torch_capture, torch_fused  # noqa: E402
from densegeo.runtime.backends.torch_attention import FusedAttention  # noqa: E402
from densegeo.runtime.backends.torch_fused import FusedTransformer, can_fuse, fuse  # noqa: E402
from densegeo.runtime.backends.torch_linear import FusedLinear  # noqa: E402
from densegeo.runtime.backends.torch_pictures import fuse_pictures  # noqa: E402
from tests.support.fused_networks import HEIGHT, WIDTH, latent, pipeline, quantized  # noqa: E402

pytestmark = pytest.mark.integration

DEVICES = ["cpu", pytest.param("cuda:0", marks=pytest.mark.gpu)]


@torch.no_grad()
def run(module: nn.Module, given: Tensor, device: str) -> Tensor:
    with torch_capture.settings():  # as the backend runs networks on a GPU: float32 in full
        result: Tensor = module.to(device)(given.to(device)).float().cpu()
    return result


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "without", [(), ("padding",), ("constants",), ("trim",), ("connector",), ("constants", "trim")]
)
def test_the_fused_transformer_is_the_same_function(checkpoint: Files, without: tuple[str, ...], device: str) -> None:
    exact = run(pipeline(checkpoint, without).denoiser, latent(), "cpu")
    model = pipeline(checkpoint, without).denoiser
    assert can_fuse(model)
    fused = FusedTransformer(model.to(device))
    assert (fused.counts is None) == ("padding" in without)
    assert relative_error(run(fused, latent(), device), exact) <= 1e-5


@pytest.mark.parametrize("device", DEVICES)
def test_low_precision_is_no_worse_than_the_plain_modules(checkpoint: Files, device: str) -> None:
    exact = run(pipeline(checkpoint, ()).denoiser, latent(), "cpu")
    plain = run(pipeline(checkpoint, (), "bf16").denoiser, latent(), device)
    fused = run(FusedTransformer(pipeline(checkpoint, (), "bf16").denoiser.to(device)), latent(), device)
    assert relative_error(fused, exact) <= 2 * relative_error(plain, exact)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("without", [(), ("constants", "trim")])
@pytest.mark.parametrize("kind", list(FORMATS))
@pytest.mark.parametrize("base", ["fp32", "bf16"])
def test_kernels_write_what_quantized_linears_take(
    checkpoint: Files, kind: str, without: tuple[str, ...], base: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """8-bit inputs come from the kernel before; only linears that share theirs quantize for themselves."""
    if device != "cpu" and (kind, base) == ("fp8", "fp32"):
        pytest.skip("the hardware's fp8 products give bf16")
    exact = run(pipeline(checkpoint, ()).denoiser, latent(), "cpu")
    plain = run(quantized(checkpoint, kind, without, base).denoiser, latent(), device)
    model = FusedTransformer(quantized(checkpoint, kind, without, base).denoiser.to(device))
    linears = {name: module for name, module in model.model.named_modules() if isinstance(module, FusedLinear)}
    names = {id(module): name for name, module in linears.items()}
    wide: set[str] = set()
    taken = FusedLinear._operand

    def watched(self: FusedLinear, rows: Tensor) -> Tensor:
        if rows.dtype != self.weight.dtype:
            wide.add(names[id(self)])
        return taken(self, rows)

    monkeypatch.setattr(FusedLinear, "_operand", watched)
    fused = run(model, latent(), device)
    first = {"double_blocks.0.img_attn.qkv"} if "double_blocks.0.img_attn.qkv" in linears else set()
    last = {"single_blocks.2.key_value", "single_blocks.2.query_mlp"}
    assert len(linears) > 15
    assert wide == (set() if without else (first | last) & set(linears))
    assert relative_error(fused, exact) <= 2 * relative_error(plain, exact)
    assert relative_error(fused, plain) <= relative_error(plain, exact)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("without", [(), ("padding",), ("constants", "trim")])
@pytest.mark.parametrize("base", ["fp32", "bf16"])
def test_kernels_write_what_fp8_attention_takes(
    checkpoint: Files, without: tuple[str, ...], base: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only blocks that rotate their queries for themselves, the first and the last, have them rounded afterwards."""
    exact = run(pipeline(checkpoint, ()).denoiser, latent(), "cpu")
    plain = run(quantized(checkpoint, "fp8", without, base, attention=True).denoiser, latent(), device)
    fused = FusedTransformer(quantized(checkpoint, "fp8", without, base, attention=True).denoiser.to(device))
    wide, rounded = [], FusedAttention.rounded

    def watched(self: FusedAttention, x: Tensor, part: int) -> Tensor:
        if part == 0 and x.dtype != self.DTYPE:
            wide.append(x.shape)
        return rounded(self, x, part)

    monkeypatch.setattr(FusedAttention, "rounded", watched)
    result = run(fused, latent(), device)
    assert len(wide) == (0 if "trim" in without else 2)
    assert relative_error(plain, exact) > 1e-4  # it is 8-bit
    assert relative_error(result, exact) <= 2 * relative_error(plain, exact)
    assert relative_error(result, plain) <= relative_error(plain, exact)


@pytest.mark.parametrize("without", [(), ("padding",)])
def test_fp8_attention_runs_only_where_it_is_faster(
    checkpoint: Files, without: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the network attends as if none had been planned."""
    model = quantized(checkpoint, "fp8", without, "bf16", attention=True).denoiser
    floating = FusedTransformer(pipeline(checkpoint, without, "bf16").denoiser, "bias")
    measured: list[dict[str, Tensor]] = []

    def decide(what: str, ways: dict[str, Callable[[], Tensor]], exact: object, device: torch.device) -> str:
        measured.append({name: way() for name, way in ways.items()})
        return winner

    monkeypatch.setattr(torch_fused, "choose_strategy", lambda *given: "bias")
    monkeypatch.setattr(torch_fused, "decide", decide)
    results = {}
    for winner in ("fp8", "plain"):
        fused = fuse(model)
        assert isinstance(fused, FusedTransformer)
        assert fused.plainly == (winner == "plain")
        results[winner] = run(fused, latent(), "cpu")
    assert torch.equal(results["plain"], run(floating, latent(), "cpu"))
    assert relative_error(results["fp8"], results["plain"]) > 1e-4
    timed = measured[-1]["fp8"], measured[-1]["plain"]
    assert 1e-3 < relative_error(*timed) < 0.2  # the same work


@pytest.mark.parametrize("without", [("modulation",), ("guidance",)])
def test_what_cannot_be_fused_is_known(checkpoint: Files, without: tuple[str, ...]) -> None:
    assert not can_fuse(pipeline(checkpoint, without).denoiser)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", ["encoder", "decoder"])
def test_the_fused_autoencoder_is_the_same_function(checkpoint: Files, device: str, precision: str, stage: str) -> None:
    given = latent() if stage == "decoder" else torch.rand(1, 3, HEIGHT, WIDTH) * 2 - 1
    exact = run(getattr(pipeline(checkpoint, ()).vae, stage), given, "cpu")
    vae = pipeline(checkpoint, (), precision).vae
    plain = relative_error(run(getattr(vae, stage), given, "cpu"), exact)
    fused = fuse_pictures(vae)
    shared = dict(vae.named_parameters())
    convolutions = [name for name, value in fused.named_parameters() if value.ndim == 4]
    assert len(convolutions) > 20
    assert all(fused.get_parameter(name) is shared[name] for name in convolutions)
    assert relative_error(run(getattr(fused, stage), given, device), exact) <= max(2 * plain, 1e-5)
