"""What `densegeo inspect` and `densegeo verify` print."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from densegeo.architectures import AMPERE
from densegeo.outputs import Output
from densegeo.runtime.bundle import STAGES, Check, Engine, Graph, Manifest, amount_quantized, check_files
from densegeo.runtime.engine_log import BuildLog, parse_log, read_log, warnings


def check_with_progress(bundle: Path, manifest: Manifest) -> None:
    """Check all sizes and digests behind a progress bar. Raises BundleError and DigestError."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("digests", total=sum(file.bytes for file in manifest.files.values()))
        check_files(bundle, manifest, progress=lambda count: progress.advance(task, count))


def print_checks(checks: Sequence[Check], title: str) -> None:
    """Measured errors against their bounds."""
    table = _table(title, "bucket", "output", "compared with", "error", "bound", "")
    for check in checks:
        ok = check.error <= check.bound
        mark = "[green]ok[/]" if ok else "[bold red]exceeds[/]"
        cells = (check.bucket, check.output, escape(check.reference), f"{check.error:.2e}", f"{check.bound:.1e}", mark)
        table.add_row(*cells)
    Console().print(table)


def print_manifest(bundle: Path, manifest: Manifest) -> None:
    """The whole manifest as tables."""
    console = Console()
    console.print(_summary(bundle, manifest), "", _graphs(manifest), "", sep="\n")
    print_checks(manifest.verification.checks, "verified when built")
    files = _table("files", "file", "bytes", "sha256")
    for name, file in sorted(manifest.files.items()):
        files.add_row(escape(name), amount(file.bytes, "B"), file.sha256[:16])
    if manifest.kernels:
        console.print("", _kernels(manifest), sep="\n")
    if manifest.engines:
        console.print("", _engines(manifest), sep="\n")
    sources = _table("built from", "role", "path", "bytes", "sha256")
    for source in manifest.sources:
        sources.add_row(source.role, escape(source.path), amount(source.bytes, "B"), source.sha256[:16])
    console.print("", files, "", sources, sep="\n")


def _summary(bundle: Path, manifest: Manifest) -> Table:
    decode = manifest.decode
    table = _table(None, "", "")
    table.show_header = False
    rows = {
        "bundle": f"{bundle} (schema {manifest.schema_version}, build key {manifest.build_key[:16]})",
        "model": manifest.model,
        "precision": _precision(manifest),
        "weights": manifest.weights_note or "from the files below",
        "outputs": "; ".join(map(_output, decode.outputs)),
        "latents": f"{decode.packing}, scale {decode.latent_scale:g}, shift {decode.latent_shift:g}",
        "rewrites": ", ".join(manifest.rewrites) or "none",
        "compiled for": ", ".join(manifest.target_architectures) or "nothing in particular (plain graphs)",
        "versions": ", ".join(f"{name} {version}" for name, version in sorted(manifest.versions.items())),
    }
    for key, value in rows.items():
        table.add_row(key, escape(value))
    return table


def _precision(manifest: Manifest) -> str:
    plan = manifest.quantization
    if plan is None:
        return manifest.precision
    amount = amount_quantized(plan.share, len(plan.attentions), plan.convolution_share, plan.twice_share)
    text = f"{plan.format}: {amount}, ranges by {plan.method}; the rest is {manifest.base}"
    depth, normals = plan.depth_error, plan.normal_error
    errors = [] if depth is None else [f"depth {depth:.5f}"]
    errors += [] if normals is None else [f"normals {normals:.3f}°"]
    return text + (f"; when calibrated: {', '.join(errors)}" if errors else "")


def _output(row: Output) -> str:
    """ "depth: log_affine, clamped before_mean"."""
    return f"{row.kind}: {row.space or row.frame}, clamped {row.clamp}" + (
        f", times {row.factor:g}" if row.factor != 1 else ""
    )


def _graphs(manifest: Manifest) -> Table:
    table = _table("graphs", "bucket", "stage", "nodes", "parameters", "FLOP/run", "output tensor")
    for bucket in manifest.buckets:
        for stage in STAGES:
            graph: Graph = getattr(bucket, stage)
            outputs = ", ".join(f"{spec.dtype} {'x'.join(map(str, spec.shape))}" for spec in graph.outputs)
            costs = (str(graph.nodes), amount(graph.parameters), amount(graph.flops))
            table.add_row(bucket.name, stage, *costs, outputs)
    return table


def _kernels(manifest: Manifest) -> Table:
    table = _table("GPU kernels", "kernel", "architectures", "launch", "arguments")
    for name in dict.fromkeys(contract.name for contract in manifest.kernels):
        rows = [contract for contract in manifest.kernels if contract.name == name]
        architectures = ", ".join(f"sm_{row.architecture}" for row in rows)
        launch = f"{32 * rows[0].warps} threads, {max(row.shared for row in rows)} B shared"
        table.add_row(name, architectures, launch, str(len(rows[0].arguments)))
    return table


def _engines(manifest: Manifest) -> Table:
    builders = ", ".join(sorted({f"{engine.library} {engine.version}" for engine in manifest.engines}))
    table = _table(f"engines, by {builders}", "engine", "for", "weights", "bytes", "workspace", "built in")
    for engine in manifest.engines:
        table.add_row(
            f"{engine.stage} {engine.bucket}",
            _targets(engine),
            engine.weights,
            amount(manifest.files[engine.file].bytes if engine.file in manifest.files else 0, "B"),
            amount(engine.activation_bytes, "B"),
            f"{engine.seconds:.1f} s",
        )
    return table


def _targets(engine: Engine) -> str:
    numbers = " ".join(name.removeprefix("sm_") for name in engine.architectures)
    return f"sm_{numbers}" if numbers else f"sm_{AMPERE} and later"


def print_layers(bundle: Path, manifest: Manifest, *, every: bool = False) -> None:
    """What the builder made of each graph, from the logs in the bundle: layers by role, types, and what looks wrong.

    every: list each layer. Raises BundleError when a log is missing or damaged.
    """
    console = Console()
    if not manifest.engines:
        console.print(f"This bundle has no TensorRT engines: `densegeo engines {bundle}` makes them.")
    for engine in manifest.engines:
        log = parse_log(read_log(bundle / engine.log))
        console.print(
            f"[bold]{engine.stage} {engine.bucket}[/] for {_targets(engine)}, {manifest.precision}: "
            f"{len(log.layers)} layers, workspace {amount(log.activation_bytes, 'B')}, "
            f"weights {amount(log.weight_bytes, 'B')}",
            _roles(log),
            sep="\n",
            soft_wrap=True,
        )
        if every:
            console.print(_layers(log))
        findings = warnings(log, manifest.precision, float_tail=engine.stage == "decoder")
        for line in findings:
            console.print(f"[yellow]warning[/] {escape(line)}", soft_wrap=True)
        if not findings:
            console.print("[green]nothing looks wrong[/]")
        console.print()


def _roles(log: BuildLog) -> Table:
    """Layers counted by role and by the type they multiply or write."""
    counts: dict[tuple[str, str], int] = {}
    for layer in log.layers:
        key = (layer.role, layer.dtype)
        counts[key] = counts.get(key, 0) + 1
    table = _table(None, "role", "type", "layers")
    for (role, dtype), count in sorted(counts.items()):
        table.add_row(role, dtype, str(count))
    return table


def _layers(log: BuildLog) -> Table:
    table = _table(None, "layer", "role", "type", "output", "from")
    for layer in log.layers:
        shape = "x".join(map(str, layer.outputs[0].shape)) if layer.outputs else ""
        table.add_row(escape(layer.name), layer.role, layer.dtype, shape, escape(", ".join(layer.onnx[:3])))
    return table


def amount(value: float, unit: str = "") -> str:
    """A number with a decimal prefix: 5.1 M, 12.3 GB."""
    for prefix, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.1f} {prefix}{unit}"
    return f"{value:g} {unit}".strip()


def _table(title: str | None, *columns: str) -> Table:
    numeric = {"nodes", "parameters", "FLOP/run", "bytes", "error", "bound", "layers", "workspace"}
    folding = {"", "file", "path", "compared with", "output", "architectures", "layer", "from", "for"}
    table = Table(title=title, title_justify="left", show_edge=False)
    for column in columns:
        justify: Literal["left", "right"] = "right" if column in numeric else "left"
        table.add_column(column, justify=justify, overflow="fold", no_wrap=column not in folding)
    return table
