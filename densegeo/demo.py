"""`make demo`: builds `fe2e-tiny`, runs it on photographs of real places, and shows where depth and normals are."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from densegeo.errors import ImageError, ResourceError
from densegeo.files import atomic_write

BUNDLE = Path("out/fe2e-tiny")
RESULTS = Path("out/demo")
SIZE = (512, 384)  # pixels of a photo
ATTRIBUTION = "Photos: views of panoramas from Poly Haven (polyhaven.com), CC0, carried by viser"


@dataclass(frozen=True)
class Photo:
    """A perspective view of a panorama; angles in degrees, pitch upwards positive."""

    stem: str
    panorama: str
    yaw: float
    pitch: float = -8.0
    field_of_view: float = 80.0


PHOTOS = (
    Photo("hall", "st_fagans_interior_1k.jpg", 285),
    Photo("warehouse", "empty_warehouse_01_1k.jpg", 300),
    Photo("square", "potsdamer_platz_1k.jpg", 0),
)


def panoramas() -> Path:
    """The folder of panoramas inside the installed viser, found without importing it. Raises ImageError without it."""
    spec = find_spec("viser")
    for folder in spec.submodule_search_locations or [] if spec is not None else []:
        path = Path(folder) / "_assets" / "hdri"
        if all((path / photo.panorama).is_file() for photo in PHOTOS):
            return path
    raise ImageError("The demo's photos come with viser, which lacks them or is missing: pip install viser")


def look(panorama: NDArray[np.uint8], photo: Photo, size: tuple[int, int] = SIZE) -> NDArray[np.uint8]:
    """A pinhole camera's view (h, w, 3) of an equirectangular panorama (H, W, 3), bilinear."""
    width, height = size
    focal = 0.5 * width / math.tan(math.radians(photo.field_of_view) / 2)
    x, y = np.meshgrid((np.arange(width) - (width - 1) / 2) / focal, (np.arange(height) - (height - 1) / 2) / focal)
    cos, sin = math.cos(math.radians(photo.pitch)), math.sin(math.radians(photo.pitch))
    down, ahead = y * cos - sin, cos + y * sin
    rows, columns = panorama.shape[:2]
    u = ((np.arctan2(x, ahead) + math.radians(photo.yaw)) / (2 * math.pi) + 0.5) * columns - 0.5
    v = np.clip((np.arctan2(down, np.hypot(x, ahead)) / math.pi + 0.5) * rows - 0.5, 0, rows - 1.001)
    left, top = np.floor(u).astype(int), np.floor(v).astype(int)
    across, along = (u - left)[..., None], (v - top)[..., None]
    pixels = panorama.astype(np.float32)
    upper, lower = (
        pixels[row, left % columns] * (1 - across) + pixels[row, (left + 1) % columns] * across
        for row in (top, top + 1)
    )
    seen: NDArray[np.uint8] = np.rint(upper * (1 - along) + lower * along).astype(np.uint8)
    return seen


def photograph(photo: Photo) -> Image.Image:
    """The photo at SIZE. Raises ImageError when its panorama is not installed."""
    with Image.open(panoramas() / photo.panorama) as panorama:
        return Image.fromarray(look(np.asarray(panorama.convert("RGB")), photo))


def stack(pictures: list[Image.Image]) -> Image.Image:
    """Pictures of one width, below one another."""
    sheet = Image.new("RGB", (pictures[0].width, sum(picture.height for picture in pictures)))
    top = 0
    for picture in pictures:
        sheet.paste(picture, (0, top))
        top += picture.height
    return sheet


def run(build: Callable[[Path, Console], Path], bundle: Path = BUNDLE, results: Path = RESULTS) -> list[Path]:
    """Build, run, save and say so; returns the files written. `build` makes the bundle at a path."""
    from densegeo.runtime import Estimator

    console = Console()
    photos = [(photo, photograph(photo)) for photo in PHOTOS]
    start = time.perf_counter()
    directory = build(bundle, console)
    built = time.perf_counter()
    with Estimator(directory) as estimator:
        opened = time.perf_counter()
        geometries = [estimator(picture) for _, picture in photos]
        manifest = estimator.manifest
    picture = results / "side_by_side.png"
    files: list[Path] = []
    try:
        for (photo, image), geometry in zip(photos, geometries, strict=True):
            files += geometry.save(results, ("npy", "png"), stem=photo.stem)
            files.append(results / f"{photo.stem}.jpg")
            image.save(files[-1], quality=92)
        sheet = stack([g.visualize(image) for (_, image), g in zip(photos, geometries, strict=True)])
        with atomic_write(picture) as partial:
            sheet.save(partial)
        (results / "ATTRIBUTION.txt").write_text(ATTRIBUTION + "\n")
    except OSError as error:
        raise ResourceError(f"Cannot write to {results}: {error.strerror or error}.") from error
    files.append(picture)
    width, height = SIZE
    table = Table(
        title=f"{manifest.model}, {manifest.precision}, photos of {width}x{height}",
        title_justify="left",
        show_edge=False,
    )
    table.add_column("stage")
    for heading in ("first ms", "last ms"):
        table.add_column(heading, justify="right")
    table.add_row("build the bundle", f"{1e3 * (built - start):.0f}", "")
    table.add_row("open it", f"{1e3 * (opened - built):.0f}", "")
    for stage, milliseconds in geometries[0].timings.items():
        table.add_row(stage, f"{milliseconds:.1f}", f"{geometries[-1].timings[stage]:.1f}")
    console.print(table)
    for file in files:
        console.print(f"wrote {escape(str(file))}", soft_wrap=True)
    console.print(f"[bold]Look at {escape(str(picture))}[/]: photo, depth, normals.", soft_wrap=True)
    console.print(ATTRIBUTION, soft_wrap=True)
    if manifest.weights_note:
        console.print(f"[bold yellow]Note:[/] {escape(manifest.weights_note)}", soft_wrap=True)
    return files


def _build(bundle: Path, console: Console) -> Path:
    from densegeo.export.build import build_bundle
    from densegeo.export.options import BuildOptions

    return build_bundle(BuildOptions(model="fe2e-tiny", output=bundle), console)


if __name__ == "__main__":
    from densegeo.cli import guarded

    guarded(lambda: run(_build))
