"""The tensorrt backend as it serves images, over the stand-in driver: real cuda-core, cuda-bindings and our cubins."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

from tests.cuda.conftest import LOWEST, ROOT, Child
from tests.support.shared import Build

RUN = ROOT / "tests/cuda/run.py"
SCHEDULES = "lazy,eager,random:1,random:2"
pytestmark = pytest.mark.integration


def last_line(done: Any) -> dict[str, Any]:
    assert done.stdout.strip(), done.stderr[-3000:]
    said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return said


@pytest.mark.thorough
@pytest.mark.parametrize("version", ["lowest", "installed"])
def test_images_over_every_schedule(
    version: str, child: Child, with_engines: Build, request: pytest.FixtureRequest
) -> None:
    packages = request.getfixturevalue("lowest") if version == "lowest" else None
    done = child(RUN, SCHEDULES, with_engines("fe2e"), packages=packages)
    said = last_line(done)
    assert (done.returncode, said["failures"], said["problems"], said["misaligned"]) == (0, [], [], 0), done.stderr
    assert said["worst_error"] <= 1e-5
    assert said["launches"] > 500


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("model", "without"), [pytest.param("fe2e", ("decoder",), marks=pytest.mark.slow), ("fiffdepth", ())]
)
def test_other_models_and_rewrites(model: str, without: tuple[str, ...], child: Child, with_engines: Build) -> None:
    done = child(RUN, "lazy", with_engines(model, without=without))
    said = last_line(done)
    assert (done.returncode, said["failures"], said["problems"]) == (0, [], []), done.stderr
    assert said["worst_error"] <= 1e-5


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_mutation_is_noticed(child: Child, with_engines: Build) -> None:
    done = child(RUN, "lazy", with_engines("fe2e"), "--mutate", "all")
    rows = re.findall(r"^\| ([a-z-]+) \| (\d+) \| (\d+) \|", done.stdout, re.MULTILINE)
    from tests.cuda.mutations import MUTATIONS

    assert [name for name, *_ in rows] == list(MUTATIONS), done.stderr
    assert all(int(failures) + int(problems) for _, failures, problems in rows), rows
    assert done.returncode == 0


@pytest.mark.thorough
def test_a_mutation_ends_with_status_1(child: Child, with_engines: Build) -> None:
    done = child(RUN, "lazy", with_engines("fe2e"), "--mutate", "synchronise-while-recording")
    said = last_line(done)
    assert done.returncode == 1
    assert said["mutation"] == "synchronise-while-recording"
    assert said["problems"]


@pytest.mark.thorough
def test_verification_notices_every_broken_stage(child: Child, with_engines: Build) -> None:
    bundle = with_engines("fe2e")
    done = child(RUN.parent / "command.py", bundle)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (
        0,
        "verified: with tensorrt the numbers come out right on cuda:1",
    ), done.stderr
    stages = ("preprocess", "split", "resize", "normals", "graph")
    done = child(RUN.parent / "command.py", bundle, "--break", ",".join((*stages, "fused")))
    *broken, lacking = done.stdout.splitlines()
    assert done.returncode == 2  # of the one that this way has not
    assert [line.split()[:2] for line in broken] == [[stage, "1"] for stage in stages], done.stderr
    assert all(f"The stage {line.split()[0]} was broken on purpose" in line for line in broken)
    assert lacking.startswith("fused 2 ")
    for wrong, says in (
        ((), "BUNDLE"),
        (("nowhere",), "nowhere is not a densegeo bundle"),
        ((bundle, "--break"), "--break"),
    ):
        done = child(RUN.parent / "command.py", *wrong)
        assert done.returncode == 2
        assert says in done.stderr


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("slowly", "{bundle}"), "there is no schedule 'slowly'"),
        (("lazy", "{toy}"), "no TensorRT engines: build it with --backend tensorrt --gpu-arch 89"),
        (("lazy", "nowhere"), "nowhere is not a densegeo bundle"),
        (("lazy", "{bundle}", "--mutate", "nothing"), "there is no mutation 'nothing'"),
    ],
)
def test_a_wrong_call_says_so(
    arguments: tuple[str, ...], says: str, child: Child, with_engines: Build, toy_bundle: Path
) -> None:
    places = {"bundle": with_engines("fe2e"), "toy": toy_bundle}
    done = child(RUN, *(argument.format(**places) for argument in arguments))
    assert done.returncode == 2
    assert says in done.stderr


def test_the_lowest_versions_are_pyprojects() -> None:
    extra = next(line for line in (ROOT / "pyproject.toml").read_text().splitlines() if line.startswith("tensorrt = "))
    expected = dict(re.findall(r"(cuda-\w+)>=([\d.]+)", extra))
    written = dict(re.findall(r"^(cuda-\w+)==([\d.]+)$", LOWEST.read_text(), re.MULTILINE))
    assert set(written) == set(expected)
    for name, version in expected.items():  # 0.6 is 0.6.0
        assert written[name] in (version, f"{version}.0")


def test_the_stand_ins_have_nothing_that_tensorrt_lacks() -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    from tests.cuda import engine_double

    pairs = {
        engine_double.StandInEngine: trt.ICudaEngine,
        engine_double.StandInContext: trt.IExecutionContext,
        engine_double.StandInConfig: trt.IRuntimeConfig,
        engine_double.StandInCache: trt.IRuntimeCache,
    }
    for ours, real in pairs.items():
        public = {name for name, value in vars(ours).items() if name[0] != "_" and not isinstance(value, bytes)}
        assert public - set(dir(real)) == set(), real
    assert hasattr(trt.ICudaEngine, "device_memory_size_v2")  # an instance's attribute of ours
    assert hasattr(trt.ExecutionContextAllocationStrategy, "USER_MANAGED")
    assert hasattr(trt.Runtime, "deserialize_cuda_engine")
