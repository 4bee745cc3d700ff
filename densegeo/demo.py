"""`densegeo demo`: a bundle on three photographs that come with densegeo, depth and normals shown beside them."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from densegeo.errors import BundleError, ResourceError
from densegeo.files import atomic_write
from densegeo.runtime import Estimator, Geometry

PHOTOGRAPHS = Path(__file__).parent / "photographs"  # made by training/photographs.py
ATTRIBUTION_FILE = "ATTRIBUTION.txt"


def photographs() -> list[Path]:
    """The files, in the order of their names. Raises BundleError where the installation lacks them."""
    if files := sorted(PHOTOGRAPHS.glob("*.jpg")):
        return files
    raise BundleError(f"{PHOTOGRAPHS} holds no photographs: this installation is incomplete, install densegeo again.")


def run(bundle: Path, results: Path, backend: str = "auto", device: str = "auto") -> list[Path]:
    """Run, save and say so; returns the files written. Raises what `Estimator` raises, and ResourceError."""
    console = Console()
    started = time.perf_counter()
    with Estimator(bundle, backend, device) as estimator:
        opened = time.perf_counter()
        geometries = {path: estimator(path) for path in photographs()}
        manifest, used = estimator.manifest, f"{estimator.backend} on {estimator.device}"
    try:
        files = _save(results, geometries)
    except OSError as error:
        raise ResourceError(f"Cannot write to {results}: {error.strerror or error}.") from error
    first, *_, last = geometries.values()
    table = Table(title=f"{manifest.model}, {manifest.precision}, {used}", title_justify="left", show_edge=False)
    table.add_column("stage")
    for heading in ("first ms", "last ms"):
        table.add_column(heading, justify="right")
    table.add_row("open the bundle", f"{1e3 * (opened - started):.0f}", "")
    for stage, milliseconds in first.timings.items():
        table.add_row(stage, f"{milliseconds:.1f}", f"{last.timings[stage]:.1f}")
    console.print(table)
    for file in files:
        console.print(f"wrote {escape(str(file))}", soft_wrap=True)
    kinds = ", ".join(output.kind for output in manifest.decode.outputs)
    console.print(f"[bold]Look at {escape(str(files[-1]))}[/]: photograph, {kinds}.", soft_wrap=True)
    if manifest.weights_note:
        console.print(f"[bold yellow]Note:[/] {escape(manifest.weights_note)}", soft_wrap=True)
    return files


def _save(results: Path, geometries: dict[Path, Geometry]) -> list[Path]:
    """Arrays, pictures and the photographs themselves; last of all a picture of everything, side by side."""
    files: list[Path] = []
    for path, geometry in geometries.items():
        files += geometry.save(results, ("npy", "png"), stem=path.stem)
    for source in (*geometries, PHOTOGRAPHS / ATTRIBUTION_FILE):
        with atomic_write(results / source.name) as partial:
            shutil.copyfile(source, partial)
        files.append(results / source.name)
    picture = results / "side_by_side.png"
    sheet = stack([geometry.visualize(path) for path, geometry in geometries.items()])
    with atomic_write(picture) as partial:
        sheet.save(partial, "PNG")
    return [*files, picture]


def stack(pictures: list[Image.Image]) -> Image.Image:
    """Pictures of one width, below one another."""
    sheet = Image.new("RGB", (pictures[0].width, sum(picture.height for picture in pictures)))
    top = 0
    for picture in pictures:
        sheet.paste(picture, (0, top))
        top += picture.height
    return sheet
