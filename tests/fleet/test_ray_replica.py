"""A replica of `densegeo serve --ray` in this process, without Ray; and what is said before Ray is started."""

from __future__ import annotations

import asyncio
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from typer.testing import CliRunner

from densegeo.cli import app
from densegeo.errors import BackendError, ConfigError, DigestError
from densegeo.fleet import ray_replica
from densegeo.fleet.ray_cluster import for_process, require_here, share
from densegeo.fleet.ray_replica import Deployed, Replica, labelled, require_verified
from densegeo.runtime import Estimator
from densegeo.serving.command import ServeJob
from densegeo.serving.options import Options
from densegeo.serving.replicas import Replicas
from densegeo.signals import EXIT_HUNG
from tests.support.grey_requests import level_in, pixels, request
from tests.support.toy_bundle import make_toy_bundle

ESTIMATOR: dict[str, Any] = {"device": "cpu", "threads": None, "timeout_s": 60.0, "max_queue": 64}


def replica(bundle: Path, **estimator: Any) -> Replica:
    job = ServeJob([bundle], ESTIMATOR | estimator, Options(drain_s=0.0), None, Replicas("local"))
    return Replica(Deployed("me", job, {"num_cpus": 1}))


@pytest.mark.parametrize(
    ("nodes", "device", "cpus", "needs", "fit"),
    [
        ([{"CPU": 16.0, "GPU": 4.0}], "auto", 1, {"num_cpus": 1, "num_gpus": 1}, 4),
        ([{"CPU": 16.0, "GPU": 4.0}], "cuda", 6, {"num_cpus": 6, "num_gpus": 1}, 2),  # CPUs for two
        ([{"CPU": 16.0, "GPU": 4.0}], "cpu", 3, {"num_cpus": 3}, 5),
        ([{"CPU": 3.0}, {"CPU": 3.0}], "auto", 2, {"num_cpus": 2}, 2),  # and not three: they are of one node
        ([{"CPU": 64.0}, {"CPU": 4.0, "GPU": 1.0}], "auto", 4, {"num_cpus": 4, "num_gpus": 1}, 1),
    ],
)
def test_what_a_process_takes_of_its_node(
    nodes: list[Mapping[str, float]], device: str, cpus: int, needs: dict[str, Any], fit: int
) -> None:
    assert share(nodes, device, cpus, "actor") == (needs, fit)


@pytest.mark.parametrize(
    ("nodes", "device", "cpus", "said"),
    [
        ([{"CPU": 8.0}], "cuda", 1, "has a GPU: leave --device out"),
        ([{"CPU": 2.0}, {"CPU": 2.0}], "auto", 4, "No replica with 4 CPUs fits on a node: the largest node has 2"),
        ([{"CPU": 64.0}, {"CPU": 2.0, "GPU": 1.0}], "auto", 4, "the largest node with a GPU has 2.*--replica-cpus"),
    ],
)
def test_nodes_on_which_nothing_fits(nodes: list[Mapping[str, float]], device: str, cpus: int, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        share(nodes, device, cpus, "replica")


def test_a_process_sees_its_own_gpu_alone_and_uses_its_share_of_cpus() -> None:
    options = {"device": "cuda:3", "threads": None}
    assert for_process(options, {"num_cpus": 1, "num_gpus": 1}) == {"device": "cuda", "threads": None}
    assert for_process(options | {"device": "auto"}, {"num_cpus": 3}) == {"device": "auto", "threads": 3}
    assert for_process({"device": "cpu", "threads": 2}, {"num_cpus": 3}) == {"device": "cpu", "threads": 2}


def test_this_machine_is_known_before_ray_is_started() -> None:
    require_here("auto", "cuda", 10_000, "actor")  # a cluster is asked when it is there
    require_here("local", "cpu", os.cpu_count() or 1, "actor")
    with pytest.raises(ConfigError, match="No actor with 10000 CPUs fits"):
        require_here("local", "auto", 10_000, "actor")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--min-replicas", "2"), "goes with --ray"),
        (("--replica-cpus", "1"), "goes with --ray"),
        (("--ray", "127.0.0.1:1"), "There is no Ray cluster at 127.0.0.1:1"),
        (("--ray", " "), "say local, auto, or the address of a cluster"),
        (("--ray", "local", "--min-replicas", "3", "--max-replicas", "2"), "must be 3 or more"),
        (("--ray", "local", "--target-requests", "0"), "must be above 0"),
        (("--ray", "local", "--replica-cpus", "10000"), "No replica with 10000 CPUs fits"),
        (("--ray", "local", "--port", "0"), "must be named with --ray"),
    ],
)
def test_wrong_options(toy_bundle: Path, options: tuple[str, ...], said: str) -> None:
    done = CliRunner().invoke(app, ["serve", str(toy_bundle), *options], env={"COLUMNS": "300"})
    assert done.exit_code == 2, done.output
    assert said in " ".join(done.output.split())


def test_it_answers_as_the_server_does_and_its_models_stay(toy_bundle: Path) -> None:
    made = replica(toy_bundle)
    name = toy_bundle.name

    async def ask() -> None:
        transport = httpx.ASGITransport(made.__serve_build_asgi_app__())  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            body, headers = request(pixels(0.5))
            answer = await client.post(f"/v2/models/{name}/infer", content=body, headers=headers)
            assert abs(level_in(answer) - 0.5) < 0.01
            for what in ("load", "unload"):
                refused = await client.post(f"/v2/repository/models/{name}/{what}")
                assert (refused.status_code, refused.json()["type"]) == (400, "RequestError")
                assert "densegeo serve NEW_BUNDLE --ray" in refused.json()["error"]
            assert (await client.get("/v2/health/ready")).status_code == 200
            made.drain()
            assert (await client.get("/v2/health/ready")).status_code == 503

    asyncio.run(ask())
    made.__del__()


def test_health_is_asked_of_the_estimator(toy_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = replica(toy_bundle)
    (model,) = made._service.models.values()
    estimator: Any = model.current

    def completed() -> int:
        return int(estimator.metrics.snapshot().counters["completed"])

    start = completed()
    asyncio.run(made.check_health())
    assert completed() == start + 1
    asyncio.run(made.check_health())
    assert completed() == start + 2
    estimator(pixels(0.5))
    asyncio.run(made.check_health())  # which was evidence enough
    assert completed() == start + 3

    def failing(*given: object) -> None:
        raise BackendError("the GPU fell off the bus")

    monkeypatch.setattr(estimator._backend, "run", failing)
    with pytest.raises(BackendError, match="fell off the bus"):
        asyncio.run(made.check_health())
    made.__del__()


def test_a_hang_ends_the_process(toy_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    codes: list[int] = []
    monkeypatch.setattr(ray_replica.os, "_exit", codes.append)
    monkeypatch.setattr(ray_replica, "HUNG_GRACE_S", 0.0)
    made = replica(toy_bundle)
    made._service.on_hang()
    for _ in range(500):
        if codes:
            break
        asyncio.run(asyncio.sleep(0.01))
    assert codes == [EXIT_HUNG]
    made.__del__()


def test_damaged_and_wrong_bundles_take_no_requests(toy_bundle: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(toy_bundle, damaged)
    graph = next(damaged.glob("denoiser*.onnx"))
    graph.write_bytes(graph.read_bytes()[:-1] + b"\0")
    with pytest.raises(DigestError, match="denoiser"):
        replica(damaged)
    right = make_toy_bundle(tmp_path / "right", references=1.0)
    with Estimator(right, device="cpu") as estimator:
        require_verified(right, estimator)
    wrong = make_toy_bundle(tmp_path / "wrong", references=1.5)
    with pytest.raises(BackendError, match="does not give its reference outputs"):
        replica(wrong)


def test_metrics_of_several_replicas_are_one_exposition() -> None:
    text = b'# HELP a_total Answers.\n# TYPE a_total counter\na_total{route="/"} %d\n# TYPE up gauge\nup 1\n'
    whole = labelled([("x", text % 3), ("y", text % 4)]).decode()
    assert whole.count("# TYPE a_total counter") == 1
    samples = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(whole)
        for sample in family.samples
    }
    assert samples[("a_total", ("replica", "x"), ("route", "/"))] == 3
    assert samples[("a_total", ("replica", "y"), ("route", "/"))] == 4
    assert math.fsum(samples[("up", ("replica", name))] for name in "xy") == 2
