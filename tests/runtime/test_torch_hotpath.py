"""What the torch backend's networks cost, counted: layout conversions, launches, concatenations, widened weights; and
what is decided by a timing. Numbers are held against the plain modules in `test_torch_fused.py`.
"""

from __future__ import annotations

import logging
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import Tensor, nn  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from densegeo.kernels.attention.strategies import STRATEGIES  # noqa: E402
from densegeo.models.quantized import FORMATS, QuantizedLinear  # noqa: E402
from densegeo.models.vae import AttnBlock, PhaseUpsample  # noqa: E402
from densegeo.runtime.backends import torch_capture, torch_fused, torch_pictures  # noqa: E402
from densegeo.runtime.backends.torch_choice import decide  # noqa: E402
from densegeo.runtime.backends.torch_fused import FusedTransformer, choose_accumulation  # noqa: E402
from densegeo.runtime.backends.torch_linear import FusedLinear  # noqa: E402
from densegeo.runtime.backends.torch_pictures import WIDE, FusedUpsample, fuse_pictures, products  # noqa: E402
from tests.support.fused_networks import HEIGHT, WIDTH, latent, pipeline, quantized  # noqa: E402

pytestmark = pytest.mark.integration
KERNELS = ("reference.py", "strategies.py")  # stand in for kernels here: what they do inside does not count
FREE = ("empty", "view", "t.", "transpose", "permute", "slice", "expand", "unsqueeze", "select", "detach", "alias")
LATENT_CHANNELS = 16


class Operations(TorchDispatchMode):
    """Every operation outside the kernels that does anything, with its results."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, tuple[Any, ...], Any]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = str(function).removeprefix("aten.")
        if not _in_a_kernel() and not name.startswith(FREE):
            self.seen.append((name, args, result))
        return result

    @property
    def counts(self) -> Counter[str]:
        return Counter(name for name, *_ in self.seen)


def _in_a_kernel() -> bool:
    frame = sys._getframe()
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.name in KERNELS and "kernels" in path.parts:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def by_rows(tensor: Any) -> bool:
    """Whether a picture has a pixel's channels adjacent."""
    return tensor.is_contiguous(memory_format=torch.channels_last)


def conversions(seen: list[tuple[str, tuple[Any, ...], Any]]) -> list[str]:
    """Pictures that are made in another order of memory, copies that change it, and convolutions that would have to."""
    actual = []
    for name, given, made in seen:
        if not isinstance(made, Tensor) or made.ndim != 4:
            continue
        pictures = [one for one in given if isinstance(one, Tensor) and one.ndim == 4]
        if not by_rows(made):
            actual.append(f"{name} makes {tuple(made.shape)} with strides {made.stride()}")
        elif name.startswith("convolution") and not all(map(by_rows, pictures)):
            actual.append(f"{name} takes another order")
        elif name.startswith(("clone", "copy_", "_to_copy")) and made.shape[1] > LATENT_CHANNELS:
            source = pictures[-1]
            if source.stride() != made.stride() or source.dtype == made.dtype:
                actual.append(f"{name} of {tuple(source.shape)}, strides {source.stride()} to {made.stride()}")
    return actual


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", ["encoder", "decoder"])
def test_no_picture_changes_its_layout(checkpoint: Any, stage: str, precision: str) -> None:
    vae = fuse_pictures(pipeline(checkpoint, (), precision).vae)
    picture = torch.rand(1, 3, HEIGHT, WIDTH).contiguous(memory_format=torch.channels_last)
    given = picture if stage == "encoder" else latent()
    with torch.no_grad(), Operations() as operations:
        getattr(vae, stage)(given)
    assert operations.counts["convolution.default"] > 20
    assert operations.counts["native_group_norm.default"] == 0
    assert conversions(operations.seen) == []


def test_what_counts_conversions_sees_them(checkpoint: Any) -> None:
    """With the plain upsampling in place, whose phases are put together in the other order."""
    vae = fuse_pictures(pipeline(checkpoint, ()).vae)
    for module in list(vae.decoder.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, FusedUpsample):
                plain = PhaseUpsample.__new__(PhaseUpsample)
                nn.Module.__init__(plain)
                plain.conv = child.conv
                setattr(module, name, plain)
    with torch.no_grad(), Operations() as operations:
        vae.decoder(latent())
    assert len(conversions(operations.seen)) >= 3


@pytest.mark.parametrize(
    ("kind", "base", "expected"),
    [
        ("fp8", torch.bfloat16, {"_scaled_mm.out": 1}),
        ("fp8", torch.float32, {"_scaled_mm.default": 1, "addcmul.out": 1}),
        ("int8", torch.bfloat16, {"_int_mm.default": 1, "addcmul.out": 1}),
    ],
)
def test_a_quantized_linear_is_one_product_and_at_most_one_pass(kind: str, base: Any, expected: dict[str, int]) -> None:
    """No scale is expanded and no weight is widened at a call."""
    torch.manual_seed(0)
    x, plain = torch.randn(1, 24, 64), nn.Linear(64, 48)
    linear = QuantizedLinear.prepare(plain, float(x.abs().max()), FORMATS[kind], base)
    fused, given = FusedLinear(linear), (x / linear.input_scale.float())
    eight = (given.round() if kind == "int8" else given).clamp(-448, 448).to(linear.weight.dtype)
    with torch.no_grad():
        fused(eight)  # the scale of so many rows is made
        with Operations() as operations:
            made = fused(eight)
        out = torch.empty(1, 24, 48, dtype=base)
        fused.into(eight, out)
    assert operations.counts == expected
    exact = torch.nn.functional.linear(x.double(), plain.weight.double(), plain.bias.double())
    emulated = (linear(eight).double() - exact).norm()
    assert (made.double() - exact).norm() <= 1.01 * emulated
    assert torch.equal(out, made)


def test_streams_are_joined_without_concatenation(checkpoint: Any) -> None:
    """Both streams' queries, keys and values are written into the joint sequence; single blocks join nothing."""
    fused = FusedTransformer(pipeline(checkpoint, ("constants",), "bf16").denoiser)
    with torch.no_grad(), Operations() as operations:
        fused(latent())
    assert operations.counts["cat.default"] == 3  # the canvas; tokens and their norms, once, before the single blocks
    assert operations.counts["addmm.out"] == 2 * len(fused.model.double_blocks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("pixels", "part"), [(40, 16), (33, 64)])
def test_wide_attention_by_products(dtype: Any, pixels: int, part: int) -> None:
    """512 features, in parts that do and do not divide the pixels: no further off than torch's attention."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 1, pixels, 512).to(dtype) for _ in range(3))
    exact = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double())
    off, plain = ((way.double() - exact).norm() for way in (products(q, k, v, part), WIDE["library"](q, k, v)))
    assert products(q, k, v, part).dtype == dtype
    assert off <= max(2 * plain, 1e-5 * exact.norm())


def test_every_way_of_wide_attention_gives_the_decoder(checkpoint: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    vae = fuse_pictures(pipeline(checkpoint, ()).vae)
    exact = pipeline(checkpoint, ()).vae.decoder(latent())
    blocks = [module for module in vae.decoder.modules() if isinstance(module, torch_pictures.FusedAttnBlock)]
    assert len(blocks) == sum(isinstance(m, AttnBlock) for m in pipeline(checkpoint, ()).vae.decoder.modules()) == 1
    for name in WIDE:
        monkeypatch.setattr(torch_pictures, "choose_wide", lambda q, k, v: pytest.fail("it was chosen already"))
        with torch.inference_mode():
            vae.decoder(latent())
            blocks[0].chosen = dict.fromkeys(blocks[0].chosen, name)
            assert (vae.decoder(latent()) - exact).norm() <= 1e-5 * exact.norm()


def ways_of(**seconds: float) -> dict[str, Callable[[], Tensor]]:
    """Ways that take so long, and are all right."""

    def way(duration: float) -> Callable[[], Tensor]:
        return lambda: (time.sleep(duration), torch.ones(4) * 1.001)[1]

    return {name: way(duration) for name, duration in seconds.items()}


EXACT = torch.ones(4, dtype=torch.float64)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_the_fastest_way_is_taken_and_remembered(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "densegeo")
    assert decide("work", ways_of(plain=0.05, quick=0.0), lambda: EXACT, CPU) == "quick"
    assert caplog.messages[-1] == "work: quick, of plain, quick"
    fail = {"plain": lambda: pytest.fail("it was timed again"), "quick": lambda: pytest.fail("it was timed again")}
    assert decide("work", fail, lambda: EXACT, CPU) == "quick"
    assert "as timed before" in caplog.messages[-1]
    assert decide("other work", ways_of(plain=0.0, quick=0.05), lambda: EXACT, CPU) == "plain"


def test_a_way_that_is_off_or_does_not_run_is_not_taken(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "densegeo")

    def absent() -> Tensor:
        raise RuntimeError("no kernel for this here\nand a long trace")

    ways = {
        **ways_of(plain=0.05),
        "off": lambda: torch.ones(4) * 1.003,
        "absent": absent,
        "nan": lambda: torch.ones(4) / 0 * 0,
    }
    assert decide("work", ways, lambda: EXACT, CPU) == "plain"
    assert [line for line in caplog.messages if "off is off by 3.0e-03, and the bound is 2.0e-03" in line]
    assert "work: absent does not run here: no kernel for this here" in caplog.messages
    with pytest.raises(RuntimeError, match="no kernel"):
        decide("nothing", {"absent": absent}, lambda: EXACT, CPU)


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert decide("work", ways_of(plain=0.05, quick=0.0), lambda: EXACT, CPU) == "quick"


@pytest.mark.parametrize("counts", [[1, 600, 1], [3, 2]])
def test_a_strategy_of_attention_is_chosen_among_good_ones(counts: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """All are timed, against the attention to repeated keys; and without the counts none would be."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, 70, 32) for _ in range(3))
    errors: dict[str, float] = {}

    def decided(work: str, ways: Any, exact: Any, device: Any) -> str:
        expected = exact()
        errors.update({name: float((way().double() - expected).norm() / expected.norm()) for name, way in ways.items()})
        return "merge"

    monkeypatch.setattr(torch_fused, "decide", decided)
    assert torch_fused.choose_strategy("attention", q, k, v, counts) == "merge"
    assert next(iter(errors)) == "bias"
    assert set(errors) == set(STRATEGIES)
    assert max(errors.values()) <= 1e-5


@pytest.mark.parametrize("winner", ["exact sums", "fast sums"])
def test_fast_sums_are_decided_for_all_products(checkpoint: Any, winner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways are the product that runs, within the plain one's bound; what is chosen holds for every linear."""
    fused = FusedTransformer(quantized(checkpoint, "fp8", (), "bf16").denoiser)
    flags: list[bool] = []

    def decided(work: str, ways: Any, exact: Any, device: Any, part: slice) -> str:
        expected = exact()
        errors = []
        for way in ways.values():
            errors.append(float((way()[part].double() - expected).norm() / expected.norm()))
        assert 1e-3 < errors[0] < 0.1
        assert errors[1] <= 2 * errors[0]
        return winner

    product = torch._scaled_mm

    def noted(*given: Any, **options: Any) -> Tensor:
        flags.append(options["use_fast_accum"])
        return product(*given, **options)

    monkeypatch.setattr(torch, "_scaled_mm", noted)
    monkeypatch.setattr(torch_fused, "decide", decided)
    choose_accumulation(fused.linears, 32)
    assert set(flags) == {False, True}
    flags.clear()
    with torch.inference_mode():
        fused(latent())
    assert set(flags) == {winner == "fast sums"}
    assert len(flags) > 10


def test_convolutions_are_measured_and_products_are_whole() -> None:
    before = torch.backends.cudnn.benchmark, torch.backends.cuda.matmul.allow_tf32
    with torch_capture.settings():
        assert torch.backends.cudnn.benchmark
        assert not torch.backends.cudnn.allow_tf32
        assert not torch.backends.cuda.matmul.allow_tf32
    assert (torch.backends.cudnn.benchmark, torch.backends.cuda.matmul.allow_tf32) == before


def test_the_schemas_that_only_a_gpu_runs() -> None:
    """cuDNN's attention returns the log-sum-exp second; products of 16 bits can be given back in float32."""
    schema = torch.ops.aten._scaled_dot_product_cudnn_attention.default._schema
    assert [argument.name for argument in schema.arguments][:5] == [
        "query",
        "key",
        "value",
        "attn_bias",
        "compute_log_sumexp",
    ]
    assert [value.name for value in schema.returns][:2] == ["output", "logsumexp"]
    names = [argument.name for argument in torch.ops.aten.baddbmm.dtype._schema.arguments]
    assert names == ["self", "batch1", "batch2", "out_dtype", "beta", "alpha"]
