"""The `densegeo` command. Each command imports what it needs itself, so that `densegeo --help` is quick."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, NoReturn, Optional

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperGroup

from densegeo.arguments import Backend, Bundle, Device, find_bundle, known_backends, writable_file
from densegeo.backends import BACKENDS, NAMES
from densegeo.errors import ConfigError, DensegeoError, ImageError
from densegeo.extras import install_hint
from densegeo.infer_command import infer
from densegeo.precision import CALIBRATED
from densegeo.signals import Terminated, terminable

_EXPORT_LIBRARIES = frozenset(
    {"torch", "onnx", "onnxscript", "onnx_ir", "safetensors", "huggingface_hub", "ml_dtypes", "typing_extensions"}
)
_SERVE_LIBRARIES = frozenset({"starlette", "uvicorn", "python_multipart", "prometheus_client", "anyio"})
_BAG_LIBRARIES = frozenset({"mcap", "rosbags"})
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
_HEAVY = {
    "build": "densegeo.export.command",
    "engines": "densegeo.export.engines_command",
    "fetch": "densegeo.export.fetch_command",
    "calibrate": "densegeo.calibration.command",
    "serve": "densegeo.serving.command",
    "export-triton": "densegeo.fleet.triton_command",
    "bag": "densegeo.ros.command",
}


class _Group(TyperGroup):
    """Replaces a listed stand-in by the real command, which needs an extra, when it is called."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] in _HEAVY:
            holder = typer.Typer(add_completion=False)
            holder.command(args[0])(getattr(import_module(_HEAVY[args[0]]), args[0].replace("-", "_")))
            self.commands[args[0]] = typer.main.get_command(holder)
        return super().resolve_command(ctx, args)


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Depth and surface normals from single-step diffusion models.",
)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit: 0 done, 1 failed, 2 wrong usage, 130 interrupted, 143 terminated, 129 hung up."""
    guarded(lambda: app(args=None if arguments is None else list(arguments)))
    sys.exit(0)


def guarded(call: Callable[[], object]) -> None:
    """Call, and turn densegeo's own errors into one line on standard error.

    Exit codes: 2 for options that cannot be, 1 for what failed, 128 + its number for a signal.

    SIGTERM ends a command as Ctrl-C does: what is half-written is removed, what is finished stays.
    """
    try:
        with terminable():
            call()
    except ConfigError as error:
        _fail(str(error), 2)
    except DensegeoError as error:
        _fail(str(error))
    except ModuleNotFoundError as error:
        library = (error.name or "").partition(".")[0]
        if library in _EXPORT_LIBRARIES:
            _fail(f"Building needs {library}, which is not installed: {install_hint('export')}")
        if library in _SERVE_LIBRARIES:
            _fail(f"Serving needs {library}, which is not installed: {install_hint('serve')}")
        if library in _BAG_LIBRARIES:
            _fail(f"Bags need {library}, which is not installed: {install_hint('bags')}")
        if (row := next((row for row in BACKENDS if row.modules == (library,)), None)) is not None:
            _fail(f"Running needs {library}, which is not installed: {row.install}")
        raise
    except (SystemExit, KeyboardInterrupt) as error:  # typer makes an exit of its own of every interruption
        if (end := _interruption(error)) is None:
            raise
        said, status = ("terminated", end.status) if isinstance(end, Terminated) else ("interrupted", 130)
        Console(stderr=True).print(said)
        sys.exit(status)
    except OSError as error:
        if error.filename is not None or error.errno not in _FULL:  # of a file that has a name
            raise
        _fail(f"Standard output, or the disk of a file, takes nothing more: {error.strerror}.")


def _interruption(error: BaseException | None) -> KeyboardInterrupt | None:
    """The signal that an error came from, if one did."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error


def _fail(message: str, code: int = 1) -> NoReturn:
    Console(stderr=True).print(f"[bold red]error:[/] [red]{escape(message)}[/]", soft_wrap=True, highlight=False)
    sys.exit(code)


def _show_version(show: bool) -> None:
    if show:
        from densegeo import __version__

        typer.echo(f"densegeo {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    pass


@app.command("build")
def _build_stand_in() -> None:
    """Build a bundle from checkpoints (needs the export extra)."""
    raise AssertionError("replaced by _Group before it can be called")


@app.command("engines")
def _engines_stand_in() -> None:
    """Add or renew a bundle's TensorRT engines, without torch and the checkpoint (needs TensorRT)."""
    raise AssertionError("replaced by _Group before it can be called")


@app.command("fetch")
def _fetch_stand_in() -> None:
    """Download a model's published files (needs the export extra)."""
    raise AssertionError("replaced by _Group before it can be called")


@app.command(
    "calibrate", help=f"Measure what {' or '.join(CALIBRATED)} would change, and plan it (needs the export extra)."
)
def _calibrate_stand_in() -> None:
    raise AssertionError("replaced by _Group before it can be called")


@app.command("serve")
def _serve_stand_in() -> None:
    """Answer over HTTP: the KServe v2 protocol, a plain route, a page (needs the serve extra)."""
    raise AssertionError("replaced by _Group before it can be called")


@app.command("export-triton")
def _export_triton_stand_in() -> None:
    """A bundle as a model of Triton Inference Server."""
    raise AssertionError("replaced by _Group before it can be called")


@app.command("bag")
def _bag_stand_in() -> None:
    """The images of a ROS 2 bag, as another bag (needs the bags extra; no ROS)."""
    raise AssertionError("replaced by _Group before it can be called")


app.command()(infer)


@app.command()
def demo(
    bundle: Annotated[
        Path, typer.Argument(parser=find_bundle, metavar="[BUNDLE]", help="As in the other commands.")
    ] = Path("fe2e-tiny"),
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the results.")] = Path("out/demo"),
    backend: Backend = "auto",
    device: Device = "auto",
) -> None:
    """Run a bundle on three photographs that come with densegeo, and show depth and normals beside them."""
    from densegeo.demo import run

    run(bundle, output, backend, device)


@app.command()
def inspect(
    bundle: Bundle,
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest itself.")] = False,
    layers: Annotated[
        bool, typer.Option("--layers", help="What TensorRT made of the graphs: layers by role, types, warnings.")
    ] = False,
    every: Annotated[bool, typer.Option("--all", help="With --layers: list each layer.")] = False,
) -> None:
    """What a bundle holds: model, graphs and their cost, rewrites, files, sources, measured errors."""
    from densegeo.inspection import print_layers, print_manifest
    from densegeo.runtime.bundle import read_manifest

    manifest = read_manifest(bundle)
    if as_json:
        import msgspec

        typer.echo(msgspec.json.format(msgspec.json.encode(manifest), indent=2).decode())
    elif layers:
        print_layers(bundle, manifest, every=every)
    else:
        print_manifest(bundle, manifest)


@app.command()
def verify(
    bundle: Bundle,
    backend: Backend = "auto",
    device: Device = "auto",
    broken: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--break", hidden=True, help="Break this stage first: the command must notice."),
    ] = None,
    frames_on_cpu: Annotated[
        bool, typer.Option("--frames-on-cpu", hidden=True, help="Take torch's way on a GPU, on the CPU.")
    ] = False,
) -> None:
    """Check every file's digest, then run the stored pictures as images are run, and compare."""
    from densegeo.inspection import check_with_progress, print_checks
    from densegeo.runtime.bundle import read_manifest
    from densegeo.runtime.faults import NoSuchStageError
    from densegeo.runtime.verify import verify

    manifest = read_manifest(bundle)
    check_with_progress(bundle, manifest)
    console = Console()
    console.print(f"{len(manifest.files)} files: sizes and SHA-256 as in the manifest")
    try:
        verdict = verify(bundle, backend, device, frames_on_cpu=frames_on_cpu, broken=broken)
    except NoSuchStageError as error:
        raise typer.BadParameter(str(error), param_hint="--break") from error
    print_checks(verdict.served, f"images through {verdict.backend} on {verdict.device}")
    if verdict.stages:
        print_checks(verdict.stages, "the stages one by one, to find the one that is off")
    if not verdict.good:
        _fail(
            "This machine does not reproduce the bundle's reference outputs: do not trust its results here."
            + (f" (The stage {broken} was broken on purpose.)" if broken else "")
        )
    console.print(f"[green]verified[/]: with {verdict.backend} the numbers come out right on {verdict.device}")


@app.command()
def bench(
    bundles: Annotated[
        list[Path],
        typer.Argument(
            parser=find_bundle,
            metavar="BUNDLES...",
            help="Directories of bundles, or fe2e-tiny; several are compared.",
            show_default=False,
        ),
    ],
    image: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Image to time; without one, a generated image of the first bucket's size."),
    ] = None,
    runs: Annotated[int, typer.Option(min=2, help="Timed runs, after the warm-up.")] = 20,
    json_file: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            "--json", callback=writable_file, help="Also write the results to this file, one line of JSON a run."
        ),
    ] = None,
    backend: Annotated[
        list[str],
        typer.Option(
            callback=known_backends,
            help=f"What runs the bundles: {', '.join(NAMES)}; repeat it to compare. Default: the best one.",
        ),
    ] = ["auto"],  # noqa: B006  (typer reads it, nobody writes it)
    device: Device = "auto",
) -> None:
    """Latency per stage and end to end; refuses to print a speed when the numbers are wrong."""
    from densegeo.benchmarks import latency_report
    from densegeo.runtime.images import load_image

    if image is not None:
        try:
            load_image(image)
        except ImageError as error:
            raise typer.BadParameter(str(error), param_hint="--image") from error
    latency_report.bench(bundles, image=image, runs=runs, backends=backend, device=device, json_file=json_file)


@app.command()
def compare(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILES...", help="JSON files that `densegeo bench --json` wrote.")
    ],
    plot: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(callback=writable_file, help="Also draw the stages into this picture (needs matplotlib)."),
    ] = None,
) -> None:
    """Benchmarks of several machines, backends or precisions, one row each, against the first."""
    from densegeo.benchmarks.compare import draw, print_comparison, read

    results = read(files)
    print_comparison(results)
    if plot is not None:
        draw(results, plot)
        typer.echo(f"wrote {plot}")


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """What this machine has (CPU, memory, GPUs, backends) and what is missing; fails when densegeo itself is broken."""
    from densegeo.doctor import examine, print_report

    report = examine()
    if as_json:
        import msgspec

        typer.echo(msgspec.json.format(msgspec.json.encode(report), indent=2).decode())
    else:
        print_report(report)
    if report.broken:
        raise typer.Exit(1)
