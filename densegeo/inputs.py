"""Which images `densegeo infer` works on, and under which names their results are saved."""

from __future__ import annotations

import glob
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from densegeo.errors import ImageError

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"})


def find_images(arguments: Sequence[str]) -> list[Path]:
    """Files named, images in folders (recursively) and matches of globs; each once, in a stable order.

    A file named outright is taken whatever its suffix. Raises ImageError for an argument that gives nothing.
    """
    found: dict[Path, None] = {}
    for argument in arguments:
        images = list(_expand(argument))
        if not images:
            raise ImageError(f"{argument} matches no image: it is neither a file, a folder with images, nor a glob.")
        found.update(dict.fromkeys(images))
    return list(found)


def _expand(argument: str) -> Iterable[Path]:
    path = Path(argument)
    if path.is_dir():
        return sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if path.exists():
        return [path]  # also a name that looks like a glob
    matches = (Path(match) for match in sorted(glob.glob(argument, recursive=True)))
    return [p for p in matches if p.is_file()]


def unique_stems(images: Sequence[Path]) -> list[str]:
    """A file stem for each image; equal ones are told apart by their folders, and at last by a number.

    Compared without case, so that nothing is overwritten on file systems that ignore it.
    """
    stems = [image.stem for image in images]
    counts = Counter(stem.lower() for stem in stems)
    taken = {stem.lower() for stem in stems if counts[stem.lower()] == 1}
    result = []
    for image, stem in zip(images, stems, strict=True):
        if counts[stem.lower()] == 1:
            result.append(stem)
            continue
        candidates = _candidates(image)
        name = next(candidate for candidate in candidates if candidate.lower() not in taken)
        taken.add(name.lower())
        result.append(name)
    return result


def _candidates(image: Path) -> Iterable[str]:
    """folder_stem, then with the suffix (`a.jpg` beside `a.png`), with more folders, numbered."""
    folders = [part for part in image.resolve().parent.parts if part != image.anchor and part.strip("/\\")]
    if folders:
        yield f"{folders[-1]}_{image.stem}"
        yield f"{folders[-1]}_{image.stem}_{image.suffix[1:]}"
    yield from ("_".join([*folders[-n:], image.stem]) for n in range(2, len(folders) + 1))
    number = 1
    while True:
        number += 1
        yield f"{image.stem}_{number}"
