"""The smallest real network, images, and both formats' plans; made once a run, so none may be changed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from tests.support.shared import Once


@pytest.fixture(scope="session")
def bundle(small_bundle: Callable[..., Path]) -> Path:
    return small_bundle()


@pytest.fixture(scope="session")
def images(once: Once) -> Path:
    from tests.support.calibration import write_images

    return once("images", write_images)


@pytest.fixture(scope="session")
def calibrated(once: Once, bundle: Path, images: Path) -> Path:
    """Statistics and both formats' plans."""
    from tests.support.calibration import write_plans

    return once("calibrated", lambda folder: write_plans(bundle, images, folder))


@pytest.fixture(scope="session")
def attentive(once: Once, bundle: Path, images: Path) -> Path:
    """Statistics of linears and attentions, and an fp8 plan of both."""
    from tests.support.calibration import run

    return once("attentive", lambda folder: run(bundle, images, folder, attention=True))


@pytest.fixture(scope="session")
def convolved(once: Once, bundle: Path, images: Path) -> Path:
    """Statistics of linears and convolutions, channels evened out, and an int8 plan; errors measured on one image."""
    return once("convolved", lambda folder: _plan_convolutions(bundle, images, folder, "int8"))


@pytest.fixture(scope="session")
def convolved_fp8(once: Once, bundle: Path, images: Path) -> Path:
    """The same to an fp8 plan, whose channels are left as they are."""
    return once("convolved-fp8", lambda folder: _plan_convolutions(bundle, images, folder, "fp8"))


def _plan_convolutions(bundle: Path, images: Path, folder: Path, kind: str) -> None:
    from densegeo.calibration import planning
    from tests.support.calibration import run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "JUDGED", 1)
        patch.setattr(planning, "JUDGED_TOGETHER", 1)
        run(bundle, images / "0[0-7].png", folder, kind=kind, convolutions=True, backend="torch", smooth=None)


@pytest.fixture(scope="session")
def doubled(once: Once, convolved: Path) -> Path:
    """The same plan with two of the convolutions in two products."""
    from densegeo.calibration.plan import load_plan, plan_file
    from tests.support.calibration import TWICE

    def make(folder: Path) -> None:
        plan = load_plan(convolved, "int8")
        others = {*plan.ranges, *plan.convolutions} - {*TWICE}
        shutil.copytree(convolved, folder, dirs_exist_ok=True)
        plan_file(folder, "int8").write_bytes(msgspec.json.encode(plan.keep(others, TWICE)))

    return once("doubled", make)
