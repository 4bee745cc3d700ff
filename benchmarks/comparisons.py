"""Three comparisons with diffusers, each side by side in one run, its numbers checked first."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from densegeo.benchmarks.baseline import Baseline, make_baseline
from densegeo.benchmarks.timing import flops, interleaved, speedup, summary
from densegeo.models import casting, chain, fe2e, rewrites
from densegeo.models.config import VAEConfig
from densegeo.models.rewrites import Pipeline
from densegeo.outputs import Decode
from densegeo.size import Size

EXACT = 1e-5  # relative L2 bound in float32
LOW_FACTOR = 2.0  # our low-precision error is at most this many times that of plain eager low precision
MIN_STD, MAX_SATURATED = 0.05, 0.1  # outputs that say something: neither constant nor clamped

Compile = Callable[[Any], Any]


class Wrong(Exception):
    """Numbers that are off: no speed is reported."""


@dataclass(frozen=True)
class Comparison:
    name: str
    slow: str  # what the baseline is
    fast: str
    target: float
    speedup: dict[str, float]
    times: dict[str, dict[str, float]]
    flops: dict[str, int]
    errors: dict[str, float] = field(default_factory=dict)

    @property
    def reached(self) -> bool:
        return self.speedup["median"] >= self.target


def geometry_errors(decode: Decode, decoded: Tensor, reference: Tensor) -> dict[str, float]:
    """RMS error of the log-depth prediction and mean angle of the normals, of decoded (2, 3, H, W) tensors."""
    size = Size(decoded.shape[3], decoded.shape[2])
    ours, theirs = (chain.assemble(decode, pictures, size).named() for pictures in (decoded, reference))
    depth = (ours["prediction"] - theirs["prediction"]).square().mean().sqrt()
    first, second = ours["normals"].double(), theirs["normals"].double()
    # atan2 of |a x b| and a.b: acos alone has no digits left near zero
    angle = torch.atan2(torch.linalg.cross(first, second, dim=-1).norm(dim=-1), (first * second).sum(-1))
    return {"log_depth_rms": float(depth), "normals_degrees": float(angle.rad2deg().mean())}


@dataclass
class Contenders:
    """The pipelines that run against each other, and the float32 answers."""

    folded: Pipeline  # float32, all rewrites
    low: Pipeline  # low precision, with the decoder's rewrites that pay here
    exact: Baseline  # float32
    authors: Baseline  # low-precision transformer, float32 autoencoder
    plain_low: Baseline  # low precision everywhere, eager
    rgb: Tensor
    latent: Tensor
    velocity: Tensor
    decoded: Tensor


def contenders(plain: Pipeline, vae: VAEConfig, rgb: Tensor, low: str, without: Iterable[str]) -> Contenders:
    """Build all pipelines and run the float32 baseline once; `without` names rewrites that do not pay in `low`.

    Raises Wrong when the baseline's outputs would prove nothing.
    """
    dtype = casting.DTYPES[low]
    exact = make_baseline(plain, vae)
    latent = exact.encode(rgb)
    velocity = exact.transform(latent)
    decoded = exact.decode(velocity, *rgb.shape[-2:])
    saturated = float((decoded.abs() > 1).float().mean())
    if min(float(t.std()) for t in (latent, velocity, decoded)) < MIN_STD or saturated > MAX_SATURATED:
        raise Wrong("the random model's outputs are nearly constant or saturated: they cannot show an error")
    folded = rewrites.apply(copy.deepcopy(plain), fe2e.REWRITES)
    fast = casting.cast(rewrites.apply(copy.deepcopy(plain), rewrites.select(fe2e.REWRITES, without)), low)
    fast.vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    authors = make_baseline(plain, vae, dtype=dtype)
    plain_low = make_baseline(plain, vae, dtype=dtype, vae_dtype=dtype)
    plain_low.flux = authors.flux  # equal weights
    return Contenders(folded, fast, exact, authors, plain_low, rgb, latent, velocity, decoded)


def _check_low(ours: dict[str, float], plain: dict[str, float], network: str) -> None:
    for name, error in ours.items():
        if not error <= LOW_FACTOR * plain[name]:
            raise Wrong(
                f"{network}: {name} is off by {error:.2e}, plain eager low precision by {plain[name]:.2e}; "
                f"at most {LOW_FACTOR:g} times that is allowed"
            )


def transformers(c: Contenders, low: str, runs: int) -> list[Comparison]:
    """Folded transformer against the authors' (batch of two, whole connector), both eager, at equal precision."""
    out = []
    for name, ours, theirs in (("fp32", c.folded, c.exact), (low, c.low, c.authors)):
        error = chain.relative_error(chain.denoise(ours, c.latent), c.velocity)
        errors = {"ours": error}
        if name == "fp32":
            if not error <= EXACT:
                raise Wrong(f"the folded transformer differs by {error:.1e} in float32, {EXACT:.0e} is allowed")
        else:
            errors["baseline"] = chain.relative_error(theirs.transform(c.latent), c.velocity)
            _check_low({"velocity": error}, {"velocity": errors["baseline"]}, "the folded transformer")
        calls: dict[str, Callable[[], object]] = {
            "baseline": lambda theirs=theirs: theirs.transform(c.latent),  # type: ignore[misc]
            "ours": lambda ours=ours: chain.denoise(ours, c.latent),  # type: ignore[misc]
        }
        out.append(_timed(f"transformer {name}", "authors' way, eager", "folded, eager", 2.7, calls, errors, runs))
    return out


def whole(c: Contenders, low: str, compile_: Compile, runs: int) -> Comparison:
    """Image in, decoded depth and normals out: ours in `low` against the authors' choice of precisions."""
    # The autoencoder is not compiled: that took minutes, and whether it gains was never settled on a quiet machine.
    denoiser, channels_last = compile_(c.low.denoiser), torch.channels_last
    size = Size(c.rgb.shape[3], c.rgb.shape[2])

    @torch.no_grad()
    def ours() -> Tensor:
        latent = chain.encode(c.low, c.rgb.contiguous(memory_format=channels_last))
        latents = chain.split(c.low.decode, denoiser(latent), size)
        return chain.decode(c.low, latents.contiguous(memory_format=channels_last))

    eager = c.plain_low
    plain = geometry_errors(c.low.decode, eager(c.rgb), c.decoded)
    errors = geometry_errors(c.low.decode, ours(), c.decoded)
    _check_low(errors, plain, "the whole pipeline")
    chosen = geometry_errors(c.low.decode, c.authors(c.rgb), c.decoded)
    recorded = {
        f"{who} {name}": value
        for who, group in (("ours", errors), ("plain", plain), ("authors", chosen))
        for name, value in group.items()
    }
    calls: dict[str, Callable[[], object]] = {"baseline": lambda: c.authors(c.rgb), "ours": ours}
    counted = {
        "baseline": lambda: c.authors(c.rgb),
        "ours": lambda: chain.run(c.low, c.rgb, size),
    }
    slow = f"authors' way, {low} transformer, float32 autoencoder, eager"
    fast = f"folded, {low}, compiled transformer, channels-last autoencoder"
    return _timed("whole pipeline", slow, fast, 2.5, calls, recorded, runs, counted)


def hard(c: Contenders, low: str, compile_: Compile, runs: int) -> Comparison:
    """Compiled against compiled, batch 1 against batch 1, and the connector's work is spared to the baseline too."""
    theirs = c.authors.connected()
    theirs.batch = 1
    eager_flux = theirs.flux
    theirs.flux = compile_(eager_flux)
    denoiser = compile_(c.low.denoiser)
    error = chain.relative_error(denoiser_output(denoiser, c.latent), c.velocity)
    errors = {"ours": error, "baseline": chain.relative_error(theirs.transform(c.latent), c.velocity)}
    _check_low({"velocity": error}, {"velocity": errors["baseline"]}, "the compiled transformer")
    calls: dict[str, Callable[[], object]] = {
        "baseline": lambda: theirs.transform(c.latent),
        "ours": lambda: denoiser_output(denoiser, c.latent),
    }
    uncompiled = copy.copy(theirs)
    uncompiled.flux = eager_flux
    counted = {
        "baseline": lambda: uncompiled.transform(c.latent),
        "ours": lambda: chain.denoise(c.low, c.latent),
    }
    names = f"diffusers, batch 1, {low}, compiled, connector precomputed", f"folded, {low}, compiled"
    return _timed("compiled transformer", *names, 1.25, calls, errors, runs, counted)


@torch.no_grad()
def denoiser_output(denoiser: Any, latent: Tensor) -> Tensor:
    velocity: Tensor = denoiser(latent)
    return velocity


def _timed(
    name: str,
    slow: str,
    fast: str,
    target: float,
    calls: Mapping[str, Callable[[], object]],
    errors: dict[str, float],
    runs: int,
    counted: Mapping[str, Callable[[], object]] | None = None,  # what to count operations of, when calls are compiled
) -> Comparison:
    times = interleaved(calls, runs)
    return Comparison(
        name,
        slow,
        fast,
        target,
        speedup(times["baseline"], times["ours"]),
        {key: summary(seconds) for key, seconds in times.items()},
        {key: flops(call) for key, call in (counted or calls).items()},
        errors,
    )
