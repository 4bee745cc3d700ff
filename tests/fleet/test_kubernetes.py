"""The manifests: valid by Kubernetes' own schemas, and in step with the commands that they start.

KubeRay's kinds are not among those schemas: of them the templates of pods are validated.
"""

from __future__ import annotations

import importlib
import re
import shlex
import warnings
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import typer
import yaml

from densegeo.cli import app
from densegeo.fleet.ray_replica import APPLICATION
from densegeo.serving.routes import ROWS
from tests.support.project import ROOT

FILES = sorted((ROOT / "deploy" / "kubernetes").glob("*.yaml"))
VERSIONS = ("1.30", "1.37")


def documents(file: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(file.read_text()))


def templates(part: Any) -> list[dict[str, Any]]:
    """Templates of pods, wherever they stand."""
    if isinstance(part, list):
        return [actual for one in part for actual in templates(one)]
    if not isinstance(part, dict):
        return []
    own = [part["template"]] if "containers" in part.get("template", {}).get("spec", {}) else []
    return own + [actual for one in part.values() for actual in templates(one)]


def checked(document: dict[str, Any]) -> list[dict[str, Any]]:
    """What Kubernetes' schemas know of a document."""
    if not document["apiVersion"].startswith("ray.io/"):
        return [document]
    actual = templates(document)
    assert actual
    return [{"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": one} for one in actual]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_the_schemas_take_it(file: Path, version: str) -> None:
    for document in documents(file):
        for part in checked(document):
            kubernetes_validate.validate(part, version, strict=True)


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_the_schemas_notice_a_misspelling(file: Path) -> None:
    text = file.read_text().replace("resources:", "ressources:", 1)
    parts = [part for document in yaml.safe_load_all(text) for part in checked(document)]
    with pytest.raises(kubernetes_validate.ValidationError):
        all(kubernetes_validate.validate(part, VERSIONS[-1], strict=True) for part in parts)


def serve() -> dict[str, Any]:
    return next(one for one in documents(ROOT / "deploy/kubernetes/serve.yaml") if one["kind"] == "Deployment")


def parsed(command: list[str]) -> dict[str, Any]:
    """A command's options, as the command line reads them, nothing run."""
    group: Any = typer.main.get_command(app)
    context = group.make_context("densegeo", command, resilient_parsing=True)
    name, real, rest = group.resolve_command(context, command)
    assert name == command[0]
    options: dict[str, Any] = real.make_context(name, rest, resilient_parsing=True).params
    return options


def test_options_are_those_of_the_commands() -> None:
    (container,) = serve()["spec"]["template"]["spec"]["containers"]
    served = parsed(container["args"])
    assert served["host"] == "0.0.0.0"
    assert int(served["port"]) == container["ports"][0]["containerPort"]
    (job,) = documents(ROOT / "deploy/kubernetes/infer.yaml")
    program, *rest = shlex.split(job["spec"]["entrypoint"])
    assert program == "densegeo"
    assert parsed(rest)["ray"] == "auto"


def test_pods_end_when_they_have_finished() -> None:
    """Readiness fails before requests are refused, and nothing is killed that may still run."""
    spec = serve()["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    options, ready = parsed(container["args"]), container["readinessProbe"]
    drain, timeout = float(options["drain"]), float(options["timeout"])
    assert drain > ready["periodSeconds"] * ready["failureThreshold"] + ready["timeoutSeconds"]
    assert spec["terminationGracePeriodSeconds"] > drain + timeout


def test_probes_ask_what_is_there_without_a_token() -> None:
    (container,) = serve()["spec"]["template"]["spec"]["containers"]
    free = {row.path for row in ROWS if row.open}
    paths = [probe["httpGet"]["path"] for name, probe in container.items() if name.endswith("Probe")]
    assert len(paths) == 3
    assert set(paths) <= free


def test_what_a_service_of_kuberay_hands_to_ray() -> None:
    """Ray Serve's own schema takes it, the application can be imported, and its options are those of `serve`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of pydantic, about Ray
        from ray.serve.schema import ServeDeploySchema
    (service,) = documents(ROOT / "deploy/kubernetes/serve-ray.yaml")
    config = ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"]))
    (application,) = config.applications
    module, _, name = application.import_path.partition(":")
    assert callable(getattr(importlib.import_module(module), name))
    assert application.name == APPLICATION  # by which replicas find each other
    served = parsed(["serve", *shlex.split(application.args["serve"])])
    assert served["host"] == config.http_options.host  # who may ask depends on it
    group = service["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]
    assert group["maxReplicas"] > int(served["max_replicas"])  # room for the first of a replacement
    (container,) = group["template"]["spec"]["containers"]
    assert container["resources"]["requests"]["cpu"] == str(served["replica_cpus"])
    assert {"name": "serve", "containerPort": config.http_options.port} in container["ports"]


def test_selectors_meet() -> None:
    deployment, service, budget = documents(ROOT / "deploy/kubernetes/serve.yaml")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    for selector in (deployment["spec"]["selector"]["matchLabels"], service["spec"]["selector"]):
        assert selector.items() <= labels.items()
    assert budget["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert 1 <= budget["spec"]["minAvailable"] < deployment["spec"]["replicas"]


def test_ray_is_the_pinned_one() -> None:
    (job,) = documents(ROOT / "deploy/kubernetes/infer.yaml")
    (service,) = documents(ROOT / "deploy/kubernetes/serve-ray.yaml")
    (pinned,) = re.findall(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert job["spec"]["rayClusterSpec"]["rayVersion"] == pinned
    assert service["spec"]["rayClusterConfig"]["rayVersion"] == pinned
