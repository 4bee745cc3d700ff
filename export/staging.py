"""A bundle's directory is built under a hidden name beside it and put in place by renaming: whole, or not there."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from densegeo.errors import ResourceError
from densegeo.files import existing_parent
from densegeo.runtime.bundle import MANIFEST


@contextmanager
def staged(output: Path) -> Iterator[Path]:
    """A hidden directory beside `output` to build in; removed whatever happens. Raises ResourceError."""
    if output.exists() and not (output.is_dir() and ((output / MANIFEST).is_file() or not any(output.iterdir()))):
        raise ResourceError(f"{output} exists and is no bundle: it is left alone. Choose another --output.")
    try:
        output.absolute().parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{output.name}.building-", dir=output.absolute().parent))
    except OSError as error:
        raise ResourceError(f"cannot write to {existing_parent(output)}: {error}") from error
    try:
        yield staging
    except (OSError, SafetensorError) as error:  # safetensors reports a failed write as its own error
        raise ResourceError(f"cannot write the bundle: {error}. Nothing is left behind.") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def publish(staging: Path, output: Path) -> None:
    """Put the finished directory in place by renaming; an older bundle there is replaced."""
    staging.chmod(0o755)
    for path in staging.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    if output.exists():
        old = staging.with_name(staging.name + "-old")
        output.rename(old)
        staging.rename(output)
        shutil.rmtree(old)
    else:
        staging.rename(output)
