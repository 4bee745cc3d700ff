"""What an exported model must do in a real tritonserver, asked by tritonclient; in the environment that has both.

python -m tests.fleet.triton_cases TOY FOLDER [NAME...] prints, as JSON, what went wrong in which.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import InferenceServerException

from densegeo.fleet.triton_model import InstanceOptions
from densegeo.fleet.triton_repository import Deployment, export
from densegeo.runtime import Estimator, Geometry
from densegeo.runtime.ready import find_bundle
from tests.fleet.tritonserver import Server, server

Case = Callable[["Site"], None]
CASES: dict[str, Case] = {}
CLIENTS = (tritonclient.http, tritonclient.grpc)
TOLERANCE = 1e-5  # relative, of float32; the same library makes both
TIMEOUT_S = 2.0  # of a run, in the model that hangs
RANGE = {"near": 0.8, "far": 25.0}


def case(function: Case) -> Case:
    CASES[function.__name__] = function
    return function


class Site:
    """A repository and its server. tiny: fe2e-tiny as exported; toy: a toy bundle with faults; pair: two instances."""

    def __init__(self, toy: Path, folder: Path) -> None:
        self.toy, self.bundle = toy, find_bundle("fe2e-tiny")
        self.repository, self.fault = folder / "repository", folder / "fault"
        self.fault.write_text("")
        export(self.bundle, self.repository, "tiny", Deployment())
        options = InstanceOptions(timeout_s=TIMEOUT_S)
        made = export(toy, self.repository, "toy", Deployment(max_wait_ms=100, max_queue=32, options=options))
        self.break_version(made.path)
        export(toy, self.repository, "pair", Deployment(instances=2, devices=("cpu",)))
        self.server: Server

    def break_version(self, version: Path) -> None:
        """Its backend does from now on what `fault` says."""
        shutil.copyfile(Path(__file__).with_name("faulty_model.py"), version / "model.py")

    def load(self, model: str) -> None:
        """Have it served, as it is in the repository now."""
        self.server.http.load_model(model)

    def unload(self, model: str) -> None:
        self.server.http.unload_model(model)
        _until(lambda: not self.server.stubs(model))

    def executed(self) -> list[list[int]]:
        """Of the faulty model: images of each request, an `execute` each."""
        path = self.fault.with_suffix(".executed")
        return [list(map(int, line.split())) for line in path.read_text().splitlines()] if path.exists() else []


def ask(
    site: Site,
    model: str,
    images: np.ndarray,
    library: Any = tritonclient.grpc,
    outputs: tuple[str, ...] = (),
    **more: Any,
) -> dict[str, np.ndarray]:
    """Images (b, h, w, 3) to outputs by name, with one of the two clients."""
    tensor = library.InferInput("image", list(images.shape), "UINT8")
    tensor.set_data_from_numpy(images)
    client = site.server.http if library is tritonclient.http else site.server.grpc
    expected = [library.InferRequestedOutput(name) for name in outputs]
    result = client.infer(model, [tensor], outputs=expected or None, **more)
    actual = {name: result.as_numpy(name) for name in ("prediction", "normals", "depth")}
    return {name: array for name, array in actual.items() if array is not None}


def refused(site: Site, model: str, images: np.ndarray, library: Any = tritonclient.grpc, **more: Any) -> str:
    """Status and message of the error that the request is answered with."""
    try:
        ask(site, model, images, library, **more)
    except InferenceServerException as error:
        return f"{error.status()} {error.message()}"
    raise AssertionError("the request was answered")


def pictures(count: int, width: int = 64, height: int = 48, seed: int = 0) -> np.ndarray:
    """(count, height, width, 3) uint8 of large shapes, so that results differ from place to place."""
    y, x = np.mgrid[0:height, 0:width]
    actual = []
    for middle in np.random.default_rng(seed).uniform(0.2, 0.8, (count, 2)):
        disc = np.hypot(x - middle[0] * width, y - middle[1] * height) < height / 4
        actual.append(np.stack([x / width, y / height, disc], axis=-1))
    return np.round(255 * np.stack(actual)).astype(np.uint8)


def require_equal(result: dict[str, np.ndarray], expected: list[Geometry], *names: str) -> None:
    assert set(result) == set(names), result.keys()
    for name in names:
        ours = np.stack([getattr(geometry, name) for geometry in expected])
        assert result[name].dtype == np.float32
        assert result[name].shape == ours.shape
        assert ours.std() > 0.05, f"{name} says nothing"
        error = np.linalg.norm(np.nan_to_num(result[name] - ours)) / np.linalg.norm(np.nan_to_num(ours))
        assert error <= TOLERANCE, f"{name} is off by {error:.1e}"
        assert np.array_equal(np.isnan(result[name]), np.isnan(ours))


def _until(met: Callable[[], object], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.05)


@case
def numbers_of_the_estimator(site: Site) -> None:
    site.load("tiny")
    images = pictures(2, 300, 200)
    with Estimator(site.bundle, device="cpu") as estimator:
        expected = [estimator(image) for image in images]
    metric = [geometry.to_metric(**RANGE) for geometry in expected]
    require_equal(ask(site, "tiny", images, tritonclient.http), expected, "prediction", "normals")
    require_equal(ask(site, "tiny", images[:1], tritonclient.grpc, ("normals",)), expected[:1], "normals")
    text = {name: str(value) for name, value in RANGE.items()}
    for library in CLIENTS:
        actual = ask(site, "tiny", images[1:], library, parameters=text)
        require_equal(actual, metric[1:], "prediction", "normals", "depth")
    assert "NotMetricError" in refused(site, "tiny", images[:1], outputs=("depth",))
    config = site.server.http.get_model_config("tiny")
    assert config["parameters"]["depth_kind"]["string_value"] == "log_affine"
    site.unload("tiny")


@case
def a_warm_up_before_the_first_request(site: Site) -> None:
    site.load("toy")
    assert len(site.executed()) == 2, "one for each of the bundle's two sizes"


@case
def concurrent_clients_are_batched(site: Site) -> None:
    """Twenty-four requests of two sizes from as many threads, in far fewer runs, each with its own result."""
    before, counted = len(site.executed()), statistics(site)
    asked = [pictures(1, *((64, 48) if index % 2 else (48, 64)), seed=index) for index in range(24)]
    with ThreadPoolExecutor(24) as pool:
        actual = list(pool.map(lambda images: ask(site, "toy", images), asked))
    with Estimator(site.toy, device="cpu") as estimator:
        for images, result in zip(asked, actual, strict=True):
            require_equal(result, [estimator(images[0])], "prediction", "normals")
    inferences, executions, sizes = statistics(site)
    assert inferences - counted[0] == 24
    assert executions - counted[1] <= 8, executions
    sizes.subtract(counted[2])
    assert max(+sizes) > 1
    assert sum(size * count for size, count in sizes.items()) == 24
    assert sum(map(sum, site.executed()[before:])) == 24
    assert max(map(sum, site.executed()[before:])) <= 8, "more than max_batch"


def statistics(site: Site) -> tuple[int, int, Counter[int]]:
    """Of the model `toy` so far, as Triton counts them: images, executions, and executions by their batch's size."""
    (stats,) = site.server.http.get_inference_statistics("toy")["model_stats"]
    sizes = {int(row["batch_size"]): int(row["compute_infer"]["count"]) for row in stats["batch_stats"]}
    return int(stats["inference_count"]), int(stats["execution_count"]), Counter(sizes)


@case
def what_is_wrong_is_an_error_and_the_rest_is_answered(site: Site) -> None:
    good, bad = pictures(1), pictures(1, 7, 1)
    with ThreadPoolExecutor(6) as pool:  # of one batch
        answers = [pool.submit(ask, site, "toy", good) for _ in range(4)]
        errors = [pool.submit(refused, site, "toy", bad, parameters={"near": "far away"}) for _ in range(2)]
    assert all(set(answer.result()) == {"prediction", "normals"} for answer in answers)
    assert all("RequestError" in error.result() and "near" in error.result() for error in errors)
    for library in CLIENTS:
        said = refused(site, "toy", good[..., :2].copy(), library)  # Triton's own
        assert "unexpected shape for input 'image'" in said, said
        said = refused(site, "toy", pictures(9), library)
        assert "8" in said, said  # of max_batch_size
        said = refused(site, "toy", good, library, parameters={"colour": "bgr"})
        assert "There is no request parameter 'colour'" in said, said
        said = refused(site, "toy", good, library, parameters={"near": "5", "far": "1"})
        assert "CalibrationError" in said, said
        assert ("INVALID_ARGUMENT" if library is tritonclient.grpc else "400") in said, said
    assert site.server.live()
    assert set(ask(site, "toy", good)) == {"prediction", "normals"}


@case
def a_deadline_that_passes_in_the_queue(site: Site) -> None:
    """While a batch runs, a request with 50 ms to wait is refused, and those without a limit are answered."""
    site.fault.write_text("slow 0.2")
    with ThreadPoolExecutor(9) as pool:
        busy = [pool.submit(ask, site, "toy", pictures(4)) for _ in range(2)]
        time.sleep(0.3)  # they are being run, for 1.6 s
        behind = pool.submit(ask, site, "toy", pictures(1))
        late = pool.submit(refused, site, "toy", pictures(1), timeout=50_000)
    site.fault.write_text("")
    assert "UNAVAILABLE" in late.result(), late.result()
    assert "timeout" in late.result().lower() or "deadline" in late.result().lower(), late.result()
    assert all("prediction" in future.result() for future in (*busy, behind))


@case
def a_full_queue_refuses(site: Site) -> None:
    site.fault.write_text("slow 0.05")
    with ThreadPoolExecutor(60) as pool:
        futures = [pool.submit(lambda: "answered" if ask(site, "toy", pictures(1)) else "") for _ in range(60)]
    site.fault.write_text("")
    refusals = [str(future.exception()) for future in futures if future.exception() is not None]
    assert refusals
    assert all("Exceeds maximum queue size" in said for said in refusals), refusals[0]
    assert all(future.exception() is not None or future.result() == "answered" for future in futures)


@case
def a_failing_backend_is_an_error_each_time(site: Site) -> None:
    site.fault.write_text("fail")
    for library in CLIENTS:
        said = refused(site, "toy", pictures(1), library)
        assert "BackendError: the GPU fell off the bus" in said, said
    site.fault.write_text("")
    assert "prediction" in ask(site, "toy", pictures(1))


@case
def the_configuration_as_triton_reads_it(site: Site) -> None:
    site.load("pair")
    config = site.server.grpc.get_model_config("pair", as_json=True)["config"]
    (image,) = config["input"]
    assert (image["data_type"], image["dims"], image["allow_ragged_batch"]) == ("TYPE_UINT8", ["-1", "-1", "3"], True)
    assert [output["name"] for output in config["output"]] == ["prediction", "normals", "depth"]
    policy = config["dynamic_batching"]["default_queue_policy"]
    assert policy["allow_timeout_override"]
    assert policy["max_queue_size"] == 64
    assert [(group["kind"], group["count"]) for group in config["instance_group"]] == [("KIND_CPU", 2)]
    assert config["version_policy"]["latest"]["num_versions"] == 1
    dims = [row["inputs"]["image"]["dims"] for row in config["model_warmup"]]
    assert dims == [["48", "64", "3"], ["64", "48", "3"]]


@case
def an_instance_is_a_process(site: Site) -> None:
    """Of the model that the case before loaded."""
    assert len(site.server.stubs("pair")) == 2
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(lambda seed: "normals" in ask(site, "pair", pictures(2, seed=seed)), range(8)))


@case
def a_hanging_backend_is_given_up(site: Site) -> None:
    """What waits is answered, the process ends, others go on, and loading the model again gives a new one."""
    (before,) = site.server.stubs("toy")
    site.fault.write_text("hang")
    with ThreadPoolExecutor(3) as pool:
        said = list(pool.map(lambda _: refused(site, "toy", pictures(1)), range(3)))
    site.fault.write_text("")
    assert all("UNAVAILABLE" in text and "BackendTimeoutError" in text for text in said), said
    _until(lambda: before.pid not in [stub.pid for stub in site.server.stubs("toy")])
    require_dead_then_loaded(site)


@case
def a_killed_process_is_an_error(site: Site) -> None:
    (before,) = site.server.stubs("toy")
    before.kill()
    require_dead_then_loaded(site)


def require_dead_then_loaded(site: Site) -> None:
    """The model's process is gone: its requests fail, each at once, the server and other models go on."""
    for library in CLIENTS:
        said = refused(site, "toy", pictures(1), library)
        assert "is not healthy" in said, said
        assert site.server.live()
        assert "prediction" in ask(site, "pair", pictures(1), library)
    site.unload("toy")
    site.load("toy")
    assert "prediction" in ask(site, "toy", pictures(1))


@case
def versions_follow_each_other(site: Site) -> None:
    """A newer bundle takes over; a damaged one does not, and the one before goes on."""
    deployment = Deployment(max_wait_ms=100, max_queue=32, options=InstanceOptions(timeout_s=TIMEOUT_S))
    again = export(site.toy, site.repository, "toy", deployment)
    assert (again.version, again.fresh) == (1, False)
    other = export(site.toy, site.repository, "toy", deployment, version=2)
    assert other.fresh
    site.load("toy")
    _until(lambda: len(site.server.stubs("toy")) == 1)
    assert site.server.grpc.is_model_ready("toy", "2")
    assert not site.server.grpc.is_model_ready("toy", "1")
    with Estimator(site.toy, device="cpu") as estimator:
        require_equal(ask(site, "toy", pictures(1)), [estimator(pictures(1)[0])], "prediction", "normals")
    damaged = export(site.toy, site.repository, "toy", deployment, version=3).path / "bundle"
    graph = next(damaged.glob("*.onnx"))
    content = graph.read_bytes()
    graph.unlink()  # it may be a hard link
    graph.write_bytes(content[:-1] + b"\0")
    said = ""
    try:
        site.load("toy")
    except InferenceServerException as error:
        said = str(error)
    assert "DigestError" in said or "SHA-256" in said, said or "a damaged bundle was loaded"
    assert "prediction" in ask(site, "toy", pictures(1))
    assert site.server.grpc.is_model_ready("toy", "2")
    shutil.rmtree(damaged.parent)


def main() -> None:
    toy, folder, *names = sys.argv[1:]
    site = Site(Path(toy), Path(folder))
    said: dict[str, dict[str, Any]] = {}
    with server(site.repository, Path(folder) / "log", DENSEGEO_FAULT=str(site.fault)) as site.server:
        for name in names or CASES:
            start, problem = time.monotonic(), ""
            try:
                CASES[name](site)
            except Exception:
                problem = traceback.format_exc() + site.server.text()[-3000:]
            site.fault.write_text("")
            said[name] = {"problem": problem, "seconds": round(time.monotonic() - start, 1)}
            print(f"{name}: {'failed' if problem else 'passed'} in {said[name]['seconds']} s", file=sys.stderr)
    print(json.dumps(said))


if __name__ == "__main__":
    main()
