"""`make demo`: builds `fe2e-tiny`, runs it on a photograph, and shows where depth and normals are."""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from densegeo.errors import ImageError, ResourceError

BUNDLE = Path("out/fe2e-tiny")
RESULTS = Path("out/demo")
ATTRIBUTION = "Photo: danielbuechele, CC BY 2.0 (carried by scikit-learn as china.jpg)"


def photograph() -> Path:
    """The photo inside the installed scikit-learn, found without importing it. Raises ImageError when it is absent."""
    spec = find_spec("sklearn")
    folders = list(spec.submodule_search_locations or []) if spec is not None else []
    for folder in folders:
        path = Path(folder) / "datasets" / "images" / "china.jpg"
        if path.is_file():
            return path
    raise ImageError("The demo's photo comes with scikit-learn, which lacks it or is missing: pip install scikit-learn")


def run(build: Callable[[Path, Console], Path], bundle: Path = BUNDLE, results: Path = RESULTS) -> list[Path]:
    """Build, run, save and say so; returns the files written. `build` makes the bundle at a path."""
    from densegeo.runtime import Estimator

    console = Console()
    photo = photograph()
    start = time.perf_counter()
    directory = build(bundle, console)
    built = time.perf_counter()
    with Estimator(directory) as estimator:
        opened = time.perf_counter()
        geometry = estimator(photo)
        manifest = estimator.manifest
    picture = results / "side_by_side.png"
    try:
        files = geometry.save(results, ("npy", "png"), stem="china")
        geometry.visualize(photo).save(picture)
        (results / "ATTRIBUTION.txt").write_text(ATTRIBUTION + "\n")
    except OSError as error:
        raise ResourceError(f"Cannot write to {results}: {error.strerror or error}.") from error
    files = [*files, picture]
    width, height = geometry.source_size
    table = Table(
        title=f"{manifest.model}, {manifest.precision}, photo {width}x{height}, first run",
        title_justify="left",
        show_edge=False,
    )
    table.add_column("stage")
    table.add_column("ms", justify="right")
    table.add_row("build the bundle", f"{1e3 * (built - start):.0f}")
    table.add_row("open it", f"{1e3 * (opened - built):.0f}")
    for stage, milliseconds in geometry.timings.items():
        table.add_row(stage, f"{milliseconds:.1f}")
    console.print(table)
    for file in files:
        console.print(f"wrote {escape(str(file))}", soft_wrap=True)
    console.print(ATTRIBUTION, soft_wrap=True)
    if manifest.weights_note:
        console.print(f"[bold yellow]Note:[/] {escape(manifest.weights_note)}", soft_wrap=True)
    return files


def _build(bundle: Path, console: Console) -> Path:
    from densegeo.export.build import BuildOptions, build_bundle

    return build_bundle(BuildOptions(model="fe2e-tiny", output=bundle), console)


if __name__ == "__main__":
    from densegeo.cli import guarded

    guarded(lambda: run(_build))
