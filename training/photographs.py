"""The demo's photographs: views of panoramas of real places, which the viser package carries (CC0, Poly Haven).

`python -m densegeo.training.photographs` writes them to densegeo/photographs, from where the demo reads them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from densegeo.demo import ATTRIBUTION_FILE, PHOTOGRAPHS
from densegeo.errors import ImageError
from densegeo.files import atomic_write
from densegeo.size import Size

SIZE = Size(512, 384)
QUALITY = 95  # of the JPEG files, colours at full resolution
ATTRIBUTION = """\
hall.jpg, warehouse.jpg and square.jpg are views of the panoramas "St Fagans Interior", "Empty Warehouse 01" and
"Potsdamer Platz" from Poly Haven (https://polyhaven.com), which are in the public domain (CC0). The panoramas were
taken from the viser package; the views were made by training/photographs.py.
"""


@dataclass(frozen=True)
class View:
    """A pinhole camera in a panorama; angles in degrees, pitch upwards positive."""

    stem: str
    panorama: str
    yaw: float
    pitch: float = -8.0
    field_of_view: float = 80.0


VIEWS = (
    View("hall", "st_fagans_interior_1k.jpg", 285),
    View("warehouse", "empty_warehouse_01_1k.jpg", 300),
    View("square", "potsdamer_platz_1k.jpg", 0),
)


def panoramas() -> Path:
    """The folder of panoramas inside the installed viser, found without importing it. Raises ImageError without it."""
    spec = find_spec("viser")
    for folder in spec.submodule_search_locations or [] if spec is not None else []:
        path = Path(folder) / "_assets" / "hdri"
        if all((path / view.panorama).is_file() for view in VIEWS):
            return path
    raise ImageError("The panoramas come with viser, which lacks them or is missing: pip install viser")


def look(panorama: NDArray[np.uint8], view: View, size: Size = SIZE) -> NDArray[np.uint8]:
    """What the view's camera sees (h, w, 3) of an equirectangular panorama (H, W, 3), bilinear."""
    width, height = size
    focal = 0.5 * width / math.tan(math.radians(view.field_of_view) / 2)
    x, y = np.meshgrid((np.arange(width) - (width - 1) / 2) / focal, (np.arange(height) - (height - 1) / 2) / focal)
    cos, sin = math.cos(math.radians(view.pitch)), math.sin(math.radians(view.pitch))
    down, ahead = y * cos - sin, cos + y * sin
    rows, columns = panorama.shape[:2]
    u = ((np.arctan2(x, ahead) + math.radians(view.yaw)) / (2 * math.pi) + 0.5) * columns - 0.5
    v = np.clip((np.arctan2(down, np.hypot(x, ahead)) / math.pi + 0.5) * rows - 0.5, 0, rows - 1.001)
    left, top = np.floor(u).astype(int), np.floor(v).astype(int)
    across, along = (u - left)[..., None], (v - top)[..., None]
    pixels = panorama.astype(np.float32)
    upper, lower = (
        pixels[row, left % columns] * (1 - across) + pixels[row, (left + 1) % columns] * across
        for row in (top, top + 1)
    )
    picture: NDArray[np.uint8] = np.rint(upper * (1 - along) + lower * along).astype(np.uint8)
    return picture


def photograph(view: View) -> Image.Image:
    """The view at SIZE. Raises ImageError when its panorama is not installed."""
    with Image.open(panoramas() / view.panorama) as panorama:
        return Image.fromarray(look(np.asarray(panorama.convert("RGB")), view))


def main() -> None:
    """Write the photographs and their attribution."""
    PHOTOGRAPHS.mkdir(exist_ok=True)
    for view in VIEWS:
        with atomic_write(PHOTOGRAPHS / f"{view.stem}.jpg") as partial:
            photograph(view).save(partial, "JPEG", quality=QUALITY, subsampling=0, optimize=True)
    with atomic_write(PHOTOGRAPHS / ATTRIBUTION_FILE) as partial:
        partial.write_text(ATTRIBUTION)


if __name__ == "__main__":
    main()
