"""Full-size builds on a small machine: `python benchmarks/fullsize.py --folder DIR`. An hour each, 70 GB of disk.

Writes a seeded random checkpoint with the released files' names, keys and shapes (11.9 B block parameters, bf16, a LoRA
on all 304 modules), builds a bundle and its engines from it, and measures: anonymous memory, time, disk, and that every
block's stored weights are its own source's. `--precision fp8` (or int8) then calibrates the bf16 bundle, block by
block, and builds the 8-bit one, with `--attention` its attentions too; a calibration that is there is kept.
"""

from __future__ import annotations

import copy
import hashlib
import shutil
import subprocess
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import torch
import typer
from PIL import Image
from rich.console import Console
from rich.progress import track
from safetensors import safe_open
from torch import nn

from densegeo.benchmarks.environment import environment, write_json
from densegeo.benchmarks.setups import FULL
from densegeo.benchmarks.synthetic import patches
from densegeo.calibration.plan import plan_file
from densegeo.cli import guarded
from densegeo.errors import ConfigError, ResourceError
from densegeo.export.sources import SourceOptions, resolve
from densegeo.files import atomic_write
from densegeo.models import fe2e
from densegeo.models.casting import cast_module
from densegeo.models.chain import relative_error
from densegeo.models.config import TransformerConfig, VAEConfig
from densegeo.models.families import FE2E
from densegeo.models.loading import open_skeleton, open_streamed, rewritten_template
from densegeo.models.presets import AUTHORS_FILES
from densegeo.models.quantized import FORMATS
from densegeo.models.streaming import BlockFile, SafetensorsWriter, rewritten_parts
from densegeo.models.transformer import Transformer
from densegeo.models.vae import VAE
from densegeo.runtime.bundle import Manifest, read_manifest
from densegeo.runtime.engine_log import parse_log, read_log
from densegeo.size import Size

DISK = 70 * 10**9
RANK = 16
INTERRUPTED = 130  # exit code
IMAGES = 8  # of a calibration
Shapes = dict[str, tuple[int, ...]]
GPUS = {"bf16": (), "int8": (86,), "fp8": (89, 120)}  # architectures of the engines; none: any from Ampere on


class Measured(msgspec.Struct):
    """What one command took."""

    seconds: float
    anonymous_gib: float  # largest RssAnon of the process and its children, sampled
    exit_code: int = 0


def checkpoint_shapes(transformer: TransformerConfig, vae: VAEConfig) -> dict[str, Shapes]:
    """role -> the names and shapes of its file."""
    with torch.device("meta"):
        modules: dict[str, nn.Module] = {"dit": Transformer(transformer), "vae": VAE(vae)}
    shapes: dict[str, Shapes] = {
        role: {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
        for role, module in modules.items()
    }
    shapes["lora"] = {}
    for name, layer in modules["dit"].named_modules():
        if isinstance(layer, nn.Linear) and Transformer.is_block(name):
            key = "lora_unet_" + name.replace(".", "_")
            shapes["lora"][f"{key}.lora_down.weight"] = (RANK, layer.in_features)
            shapes["lora"][f"{key}.lora_up.weight"] = (layer.out_features, RANK)
    return shapes


def write_checkpoint(folder: Path, transformer: TransformerConfig, vae: VAEConfig, tokens: int, valid: int) -> None:
    """Seeded random files, tensor by tensor; a file that is there is kept."""
    folder.mkdir(parents=True, exist_ok=True)
    for role, shapes in checkpoint_shapes(transformer, vae).items():
        write_random(folder / AUTHORS_FILES[role][0], shapes)
    write_random_prompt(folder / AUTHORS_FILES["prompt"][0], transformer.prompt_dim, tokens, valid)


def write_random_prompt(path: Path, features: int, tokens: int, valid: int) -> None:
    """A prompt's embedding whose first `valid` tokens count."""
    mask = np.arange(tokens)[None] < valid
    embeds = np.random.default_rng(4).standard_normal((1, tokens, features)).astype(np.float32) * mask[..., None]
    np.savez(path, embeds=embeds, masks=mask.astype(np.int64))


def write_random(path: Path, shapes: Shapes) -> None:
    """A file of `random_tensor`s. A file that is there is kept."""
    if path.exists():
        return
    kinds = {name: (shape, torch.bfloat16) for name, shape in shapes.items()}
    with atomic_write(path) as partial, SafetensorsWriter(partial, kinds) as writer:
        for name, shape in track(shapes.items(), description=path.name):
            writer.write(name, random_tensor(name, shape))


def random_tensor(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """bf16, seeded by its name; activations keep their size: matrices scaled by width, norms near 1, biases small."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    noise = torch.empty(shape, dtype=torch.bfloat16).normal_(generator=generator)
    if len(shape) > 1:
        return noise * float(np.prod(shape[1:])) ** -0.5
    if "norm" in name and name.endswith(("weight", "scale")):
        return 1 + 0.1 * noise
    return noise * 0.1


def measure(
    command: list[str], log: Path, watch: Callable[[subprocess.Popen[bytes]], object] | None = None
) -> Measured:
    """Run a command to its end, sampling the anonymous memory of it and its children. Raises ResourceError.

    watch: called at every sample; it may look and, say, interrupt the process.
    """
    started, peak = time.monotonic(), 0
    with open(log, "w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        while process.poll() is None:
            peak = max(peak, sum(_anonymous(pid) for pid in _family(process.pid)))
            if watch is not None:
                watch(process)
            time.sleep(0.2)
    if process.returncode not in (0, INTERRUPTED):
        raise ResourceError(f"{' '.join(command)} failed: {log.read_text()[-2000:]}")
    return Measured(time.monotonic() - started, peak / 2**20, process.returncode)


def _family(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *(descendant for child in children for descendant in _family(int(child)))]


def _anonymous(pid: int) -> int:
    """RssAnon in KiB."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("RssAnon:")), 0)


def calibrate(
    bundle: Path,
    folder: Path,
    precision: str,
    side: int,
    output: Path,
    *,
    attention: bool = False,
    convolutions: bool = False,
) -> Measured:
    """`densegeo calibrate` on `IMAGES` seeded pictures, block by block, into `output`."""
    images = folder / "images"
    images.mkdir(exist_ok=True)
    for seed in range(IMAGES):
        Image.fromarray(patches(side, seed)).save(images / f"{seed}.png")
    command = [sys.executable, "-m", "densegeo", "calibrate", str(bundle), "--images", str(images)]
    command += ["--format", precision, "--backend", "torch", "--device", "cpu", "--stream"]
    command += ["--output", str(output), *(["--attention"] if attention else [])]
    command += ["--convolutions"] if convolutions else []
    return measure(command, folder / f"calibrate-{precision}.log")


def products(bundle: Path, manifest: Manifest) -> dict[str, dict[str, int]]:
    """What the builder's logs say of the denoiser's engines: "attention FP8" -> how many layers."""
    counts = {}
    for engine in manifest.engines:
        if engine.stage == "denoiser":
            layers = parse_log(read_log(bundle / engine.log)).layers
            kinds = Counter(f"{layer.role} {layer.dtype}" for layer in layers if layer.role in ("matmul", "attention"))
            counts[" ".join(engine.architectures) or "any"] = dict(kinds)
    return counts


def distinct_blocks(path: Path) -> int:
    """How many of a transformer file's matrices in blocks differ from all others, of how many; all must."""
    name_of: dict[str, str] = {}
    with safe_open(path, framework="pt") as file:
        names = [
            name
            for name in file.keys()  # noqa: SIM118
            if Transformer.is_block(name) and len(file.get_slice(name).get_shape()) == 2
        ]
        for name in track(names, description="digests"):
            digest = hashlib.sha256(file.get_tensor(name).view(torch.uint8).numpy()).hexdigest()
            if digest in name_of:
                raise ResourceError(f"{name} and {name_of[digest]} hold the same numbers")
            name_of[digest] = name
    return len(name_of)


def check_blocks(checkpoint: Path, bundle: Path, size: Size) -> dict[str, float]:
    """The worst error of a stored block against the float32 block made from the source, on random tokens.

    Stored bf16 weights run in float32; the bound is twice the error of the same block in eager bf16.
    Raises ResourceError for a block beyond its bound.
    """
    applied = fe2e.REWRITES
    files, _ = resolve(SourceOptions(checkpoint=str(checkpoint)), FE2E)
    pipeline, source = open_streamed(open_skeleton(files), size)
    template = rewritten_template(
        FE2E, (pipeline.denoiser.config, pipeline.vae.config), pipeline.prompt, applied, size
    ).denoiser
    assert isinstance(template, Transformer)
    stored = BlockFile(bundle / "denoiser.safetensors")
    generator = torch.Generator().manual_seed(5)
    text, image = (
        torch.randn(1, tokens, template.config.hidden_size, generator=generator)
        for tokens in (template.text_tokens, template.image_tokens)
    )
    worst = {"stored": 0.0, "eager bf16": 0.0, "share of the bound": 0.0}
    for name, exact in track(rewritten_parts(pipeline, source, applied), description="blocks", total=58):
        if not name:
            break
        again, low = copy.deepcopy(exact), copy.deepcopy(exact)
        stored.fill(again, name)
        cast_module(low, "bf16")
        rope = template.rope_cos, template.rope_sin
        inputs = (image, text) if name.startswith("double") else (torch.cat([text, image], dim=1),)
        reference = _outputs(exact, inputs, None, rope, template.key_bias)
        ours = relative_error(_outputs(again, inputs, None, rope, template.key_bias), reference)
        plain = relative_error(
            _outputs(low, tuple(x.bfloat16() for x in inputs), None, rope, template.key_bias), reference
        )
        if not ours <= 2 * plain:
            raise ResourceError(f"{name} is {ours:.2e} from its source, twice eager bf16's error is {2 * plain:.2e}")
        errors = {"stored": ours, "eager bf16": plain, "share of the bound": ours / (2 * plain)}
        worst = {key: max(value, errors[key]) for key, value in worst.items()}
    return worst


@torch.no_grad()
def _outputs(block: nn.Module, inputs: tuple[torch.Tensor, ...], *others: object) -> torch.Tensor:
    """What a block gives, its streams side by side, float32."""
    outputs = block(*inputs, *others)
    return torch.cat([part.float().flatten() for part in (outputs if isinstance(outputs, tuple) else (outputs,))])


def run(folder: Path, size: str, precision: str, attention: bool, backend: str, json_file: Path | None) -> None:
    if attention and precision != "fp8":
        raise ConfigError("--attention is for --precision fp8")
    if precision not in GPUS:
        raise ConfigError(f"there is no build in {precision!r} here; there are {', '.join(GPUS)}")
    console = Console()
    machine = environment(("torch", "onnx", "onnxruntime", "tensorrt-rtx-cu13"))
    free = shutil.disk_usage(folder if folder.exists() else folder.parent).free
    which = "-attention" if attention else ""
    checkpoint, base, output = folder / "checkpoint", folder / "bf16", folder / f"{precision}{which}"
    calibration = folder / f"calibration{which}"
    console.print(f"needs about {DISK / 1e9:.0f} GB of disk in {folder}, {free / 1e9:.0f} GB are free")
    if free < DISK and not checkpoint.exists():
        raise ResourceError(f"{folder} has too little space: choose another --folder")
    started = time.monotonic()
    write_checkpoint(checkpoint, FULL.transformer, FULL.vae, FULL.tokens, FULL.valid)
    console.print(f"checkpoint: {time.monotonic() - started:.0f} s")
    command = [sys.executable, "export/build_engine.py", "--model", "fe2e", "--checkpoint", str(checkpoint)]
    command += ["--size", size, "--precision", precision, "--backend", backend, "--output", str(output)]
    if backend == "tensorrt":
        command += ["--builder", "tensorrt_rtx", *(f"--gpu-arch={number}" for number in GPUS[precision])]
    report: dict[str, Any] = {**machine, "precision": precision}
    if precision in FORMATS and not plan_file(calibration, precision).exists():
        took = calibrate(base, folder, precision, max(Size.parse(size)), calibration, attention=attention)
        report["calibration"] = {"images": IMAGES, **msgspec.to_builtins(took)}
        console.print(f"calibration: {took.seconds:.0f} s, {took.anonymous_gib:.1f} GiB of anonymous memory")
    if precision in FORMATS:
        command += ["--calibration", str(calibration)]
    dry = subprocess.run([*command, "--dry-run"], capture_output=True, text=True, check=False)
    console.print(dry.stdout or dry.stderr, markup=False)
    built = measure(command, folder / f"{precision}.log")
    manifest = read_manifest(output)
    report |= {
        "seconds": built.seconds,
        "peak_anonymous_gib": built.anonymous_gib,
        "bundle_bytes": sum(file.bytes for file in manifest.files.values()),
        "denoiser_bytes": manifest.files["denoiser.safetensors"].bytes,
        "distinct_block_matrices": distinct_blocks(output / "denoiser.safetensors"),
        "quantized_share": None if manifest.quantization is None else manifest.quantization.share,
        "quantized_attentions": 0 if manifest.quantization is None else len(manifest.quantization.attentions),
        "checks": msgspec.to_builtins(manifest.verification.checks),
        "engines": msgspec.to_builtins(manifest.engines),
        "products": products(output, manifest),
        "dry_run": dry.stdout.splitlines()[-4:],
    }
    if precision not in FORMATS:
        report["block_errors"] = check_blocks(checkpoint, output, Size.parse(size))
    if json_file is not None:
        write_json(json_file, report)
    console.print_json(data=report)


def main(
    folder: Annotated[Path, typer.Option(help="Where checkpoint and bundle go: 70 GB.")] = Path("out/fullsize"),
    size: Annotated[str, typer.Option(help="WIDTHxHEIGHT of the bundle's bucket.")] = "256x192",
    precision: Annotated[str, typer.Option(help="bf16; then, from what that left: fp8 or int8.")] = "bf16",
    attention: Annotated[bool, typer.Option("--attention", help="With fp8: the products of attention too.")] = False,
    backend: Annotated[str, typer.Option(help="onnxruntime (graphs alone) or tensorrt (engines too).")] = "tensorrt",
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the result to this file.")] = None,
) -> None:
    """Build full-size FE2E from a seeded random checkpoint, and measure it."""
    guarded(lambda: run(folder, size, precision, attention, backend, json_file))


if __name__ == "__main__":
    typer.run(main)
