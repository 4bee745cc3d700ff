"""FiffDepth at full size on a machine without a GPU: what its builds take, and its speed beside diffusers' pipeline.

`python benchmarks/fiffdepth.py build` writes a seeded random checkpoint with Stable Diffusion 2's keys and shapes
(865 M and 84 M parameters), and builds fp32, bf16, fp16, int8 and fp8 bundles with TensorRT engines: about half an
hour, 15 GB of disk. `python benchmarks/fiffdepth.py speed` then times the fp32 and bf16 bundles against the pipeline
of diffusers' modules (DESIGN section 5). Numbers are checked before anything is timed.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import torch
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from densegeo.benchmarks.environment import environment, write_json
from densegeo.benchmarks.fullsize import IMAGES, Measured, calibrate, measure, products, write_random
from densegeo.benchmarks.setups import SD2_UNET, SD2_VAE
from densegeo.benchmarks.synthetic import patches
from densegeo.benchmarks.timing import interleaved, speedup, summary
from densegeo.cli import guarded
from densegeo.errors import DensegeoError
from densegeo.models.diffusers_format import vae_names
from densegeo.models.quantized import FORMATS
from densegeo.models.unet import UNet
from densegeo.models.vae import VAE
from densegeo.runtime import Estimator
from densegeo.runtime.bundle import read_manifest
from densegeo.runtime.verify import relative_error

app = typer.Typer(help="FiffDepth at full size on a CPU.", add_completion=False)
Folder = Annotated[Path, typer.Option(help="Where checkpoint and bundles lie.")]
Json = Annotated[Path | None, typer.Option("--json", help="Also write the result to this file.")]
LIBRARIES = ("torch", "diffusers", "onnx", "onnxruntime", "openvino", "tensorrt-rtx-cu13")
WEIGHTS = "diffusion_pytorch_model.safetensors"
# precision -> the architectures of its engines; fp32 is for this CPU alone
BUILDS: dict[str, tuple[int, ...]] = {
    "fp32": (),
    "bf16": (86, 89, 120),
    "fp16": (86, 89, 120),
    "int8": (86,),
    "fp8": (89, 120),
    "fp8-attention": (89, 120),  # fp8 with the products of attention
}
KEPT = ("fp32", "bf16")  # which `speed` takes; the others are deleted once they are measured
EXACT, TWICE = 1e-5, 2.0  # bounds: of float32 (relative L2); of low precision, in units of eager low precision's error


class WrongError(DensegeoError):
    """A contender whose numbers are off is not timed."""


def write_checkpoint(folder: Path, narrower: int = 1) -> None:
    """A diffusers directory with the prompt's embedding; files that are there are kept.

    narrower: what the numbers of features are divided by, so that a small machine can run it: 1 or 2 (the U-Net's 1 or
    5, which leaves multiples of the norms' 32 groups).
    """
    slim = 1 if narrower == 1 else 5
    unet_config = msgspec.structs.replace(
        SD2_UNET,
        block_out_channels=tuple(width // slim for width in SD2_UNET.block_out_channels),
        heads=tuple(heads // slim for heads in SD2_UNET.heads),
    )
    vae_config = msgspec.structs.replace(SD2_VAE, ch=SD2_VAE.ch // narrower)
    with torch.device("meta"):
        unet, vae = UNet(unet_config), VAE(vae_config)
    names = vae_names(vae_config, {})
    shapes = {
        "unet": {key: tuple(tensor.shape) for key, tensor in unet.state_dict().items()},
        "vae": dict(names(key, tuple(tensor.shape)) for key, tensor in vae.state_dict().items()),
    }
    levels = len(unet_config.block_out_channels)
    cross = ["CrossAttn" if attention else "" for attention in unet_config.down_attention]
    configs: dict[str, dict[str, Any]] = {
        "unet": {
            "_class_name": "UNet2DConditionModel",
            "attention_head_dim": unet_config.heads,
            "block_out_channels": unet_config.block_out_channels,
            "cross_attention_dim": unet_config.cross_attention_dim,
            "down_block_types": [f"{name}DownBlock2D" for name in cross],
            "up_block_types": [f"{name}UpBlock2D" for name in reversed(cross)],
            "use_linear_projection": True,
        },
        "vae": {
            "_class_name": "AutoencoderKL",
            "block_out_channels": [vae_config.ch * factor for factor in vae_config.ch_mult],
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
            "latent_channels": vae_config.z_channels,
            "layers_per_block": vae_config.num_res_blocks,
        },
    }
    for part in ("unet", "vae"):
        (folder / part).mkdir(parents=True, exist_ok=True)
        (folder / part / "config.json").write_bytes(msgspec.json.encode(configs[part]))
        write_random(folder / part / WEIGHTS, shapes[part])
    generator = torch.Generator().manual_seed(2)
    embedding = torch.randn(1, 2, unet_config.cross_attention_dim, generator=generator)
    save_file({"empty_prompt": embedding}, folder / "empty_prompt.safetensors")


def row(name: str, bundle: Path, took: Measured) -> dict[str, Any]:
    """What a build gave and took."""
    manifest = read_manifest(bundle)
    return {
        "precision": name,
        "seconds": took.seconds,
        "anonymous_gib": took.anonymous_gib,
        "bundle_bytes": sum(file.bytes for file in manifest.files.values()),
        "weight_bytes": sum(file.bytes for name, file in manifest.files.items() if name.endswith("er.safetensors")),
        "parameters": {
            stage: getattr(manifest.buckets[0], stage).parameters for stage in ("encoder", "denoiser", "decoder")
        },
        "gflop": {
            stage: getattr(manifest.buckets[0], stage).flops / 1e9 for stage in ("encoder", "denoiser", "decoder")
        },
        "quantized_share": None if manifest.quantization is None else manifest.quantization.share,
        "quantized_attentions": 0 if manifest.quantization is None else len(manifest.quantization.attentions),
        "checks": [
            {"output": check.output, "error": check.error, "bound": check.bound}
            for check in manifest.verification.checks
        ],
        "products": products(bundle, manifest),
        "engines": [
            {
                "stage": engine.stage,
                "architectures": engine.architectures,
                "seconds": engine.seconds,
                "bytes": manifest.files[engine.file].bytes,
                "builder_bytes": engine.peak_bytes,
                "workspace_bytes": engine.activation_bytes,
            }
            for engine in manifest.engines
        ],
    }


@app.command()
def build(
    folder: Folder = Path("out/fiffdepth"),
    size: Annotated[int, typer.Option(help="Side of the bucket in pixels.")] = 512,
    precision: Annotated[list[str] | None, typer.Option(help=f"Which (repeatable): {', '.join(BUILDS)}.")] = None,
    json_file: Json = None,
) -> None:
    """Build every precision from a random checkpoint, and measure it."""
    guarded(lambda: _build(folder, size, precision or list(BUILDS), json_file))


def _build(folder: Path, size: int, precisions: list[str], json_file: Path | None) -> None:
    console, report = Console(), {**environment(LIBRARIES), "builds": list[Any]()}
    write_checkpoint(folder / "checkpoint")
    python = [sys.executable, "-m", "densegeo"]
    for name in precisions:
        precision, _, attention = name.partition("-")
        output = folder / name
        command = [*python, "build", "--model", "fiffdepth", "--checkpoint", str(folder / "checkpoint")]
        command += ["--size", f"{size}x{size}", "--precision", precision, "--output", str(output)]
        if BUILDS[name]:
            command += ["--backend", "tensorrt", "--builder", "tensorrt_rtx"]
            command += [f"--gpu-arch={number}" for number in BUILDS[name]]
        if precision in FORMATS:
            plans = folder / f"calibration{attention and '-attention'}"
            took = calibrate(folder / "fp32", folder, precision, size, plans, attention=bool(attention))
            report["builds"].append({"calibration": name, "images": IMAGES, **msgspec.to_builtins(took)})
            command += ["--calibration", str(plans)]
        console.print(f"{time.strftime('%H:%M:%S')} building {name}")
        report["builds"].append(row(name, output, measure(command, folder / f"{name}.log")))
        if name not in KEPT:
            shutil.rmtree(output)
        if json_file is not None:
            write_json(json_file, report)
    console.print_json(data=report)


def diffusers_pipeline(
    checkpoint: Path, dtype: torch.dtype, *, channels_last: bool = False, compiled: bool = False
) -> Callable[[NDArray[np.uint8]], NDArray[np.float32]]:
    """uint8 (h, w, 3), multiples of 8 -> depth (h, w) in [0, 1], every module in `dtype`.

    compiled: by torch.compile, at the first call; a pixel's channels are adjacent with `channels_last`.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from safetensors.torch import load_file

    loading = {"low_cpu_mem_usage": False}  # otherwise it asks for another library
    unet = UNet2DConditionModel.from_pretrained(checkpoint / "unet", torch_dtype=dtype, **loading).eval()
    vae = AutoencoderKL.from_pretrained(checkpoint / "vae", torch_dtype=dtype, **loading).eval()
    prompt = load_file(checkpoint / "empty_prompt.safetensors")["empty_prompt"].to(dtype)

    layout = torch.channels_last if channels_last else torch.contiguous_format
    if channels_last:
        for module in (unet, vae):
            module.to(memory_format=layout)
    if compiled:
        unet.compile()
        vae.encoder.compile()
        vae.decoder.compile()

    @torch.no_grad()
    def run(image: NDArray[np.uint8]) -> NDArray[np.float32]:
        rgb = (torch.from_numpy(image.copy()).permute(2, 0, 1)[None] / 255 * 2 - 1).to(dtype, memory_format=layout)
        latent = vae.encode(rgb).latent_dist.mean * vae.config.scaling_factor
        output = unet(latent, 0, encoder_hidden_states=prompt).sample
        decoded = vae.decode(output / vae.config.scaling_factor).sample
        depth: NDArray[np.float32] = ((decoded.float().mean(1).clip(-1, 1) + 1) / 2)[0].numpy()
        return depth

    return run


@app.command()
def speed(
    folder: Folder = Path("out/fiffdepth"),
    runs: Annotated[int, typer.Option(min=1, help="Rounds.")] = 5,
    json_file: Json = None,
) -> None:
    """Time the fp32 and bf16 bundles on this CPU against diffusers' pipeline in float32 and bf16, side by side."""
    guarded(lambda: _speed(folder, runs, json_file))


def _speed(folder: Path, runs: int, json_file: Path | None) -> None:
    console, machine = Console(), environment(LIBRARIES)
    first = read_manifest(folder / "fp32").buckets[0]
    image = patches(first.width, seed=100)
    slow = {
        f"diffusers {name}": diffusers_pipeline(folder / "checkpoint", dtype)
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
    }
    reference = slow["diffusers fp32"](image)
    if reference.std() <= 0.05:
        raise WrongError(f"the picture is saturated: its standard deviation is {reference.std():.3f}")
    allowed = TWICE * relative_error(slow["diffusers bf16"](image), reference)
    estimators = {
        f"{backend} {precision}": Estimator(folder / precision, backend=backend, check_digests=False)
        for precision, backend in (("fp32", "onnxruntime"), ("bf16", "openvino"))  # more do not fit 24 GiB
    }
    errors = {
        name: relative_error(estimator(image).require_prediction("depth"), reference)
        for name, estimator in estimators.items()
    }
    for name, error in errors.items():
        if not error <= (EXACT if name.endswith("fp32") else allowed):
            raise WrongError(f"{name} is {error:.1e} from diffusers in float32")
    stages: dict[str, list[Any]] = {name: [] for name in estimators}

    def timed(name: str) -> None:
        stages[name].append(dict(estimators[name](image).timings))

    calls: dict[str, Callable[[], object]] = {name: (lambda run=run: run(image)) for name, run in slow.items()}  # type: ignore[misc]
    calls |= {name: (lambda name=name: timed(name)) for name in estimators}  # type: ignore[misc]
    times = interleaved(calls, runs, warm_up=1)
    table = Table("", "seconds", "against diffusers fp32", "bf16", "encoder", "U-Net", "decoder")
    rows = {}
    for name, seconds in times.items():
        last = stages.get(name, [])[-runs:]
        middle = {key: float(np.median([laps[key] for laps in last])) for key in (last[0] if last else {})}
        faster = {other: speedup(times[other], seconds) for other in slow}
        rows[name] = {**summary(seconds), "stages_ms": middle, "error": errors.get(name), "speedup": faster}
        ratios = [f"{faster[other]['median']:.2f}" for other in slow]
        parts = [f"{middle[key] / 1e3:.2f}" if middle else "" for key in ("encoder", "denoiser", "decoder")]
        table.add_row(name, f"{np.median(seconds):.2f}", *ratios, *parts)
    console.print(table)
    report = {**machine, "size": [first.width, first.height], "runs": runs, "bf16_bound": allowed, "rows": rows}
    if json_file is not None:
        write_json(json_file, report)


if __name__ == "__main__":
    app()
