"""A Ray cluster: reaching it, or starting one of this process's own, and how many processes fit into its nodes."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from densegeo.errors import ConfigError
from densegeo.runtime.backends import has_cuda_driver

log = logging.getLogger("densegeo.fleet")

LOCAL = "local"  # the address of a Ray of this process's own
REACH_S = 10.0  # for a connection to a cluster


@contextlib.contextmanager
def connected(address: str, cpus: int) -> Iterator[Any]:
    """The module `ray`, connected until the block ends. cpus: that a Ray of this process's own has at least, also where
    the machine has fewer. Raises ConfigError where there is no cluster.
    """
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # before the import; of a cluster, each node has its own
    import ray

    own_ray: dict[str, Any] = {}
    if address == LOCAL:
        own_ray = {"include_dashboard": False, "num_cpus": max(os.cpu_count() or 1, cpus)}
    sigterm_handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **own_ray)
        signal.signal(signal.SIGTERM, sigterm_handler)  # Ray puts one in its place that ends the process with 15
        if address != LOCAL:
            log.info("joined the Ray cluster at %s", ray.get_runtime_context().gcs_address)
    except Exception as error:  # Ray raises this very type where its processes do not start in time
        raise _no_cluster(address, error) from error
    with contextlib.redirect_stdout(sys.stderr):  # Ray prints which tasks it tries again, until it is shut down
        try:
            yield ray
        finally:
            ray.shutdown()


def require_reachable(address: str) -> None:
    """Raises ConfigError for what is no address, and where nobody listens at HOST:PORT: Ray would try for minutes."""
    if address in (LOCAL, "auto") or address.startswith("ray://"):
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or "/" in address:
        raise ConfigError(f"{address!r} is no address of a Ray cluster: say local, auto, HOST:PORT or ray://HOST:PORT.")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_S).close()
    except (OSError, OverflowError) as error:
        raise _no_cluster(address, error) from error


def require_here(address: str, device: str, cpus: int, process: str) -> None:
    """What `share` would refuse of a Ray of this process's own, before it is started. Raises ConfigError."""
    if address == LOCAL:
        share([{"CPU": os.cpu_count() or 1, "GPU": math.inf if has_cuda_driver() else 0}], device, cpus, process)


def share(nodes: Sequence[Mapping[str, float]], device: str, cpus: int, process: str) -> tuple[dict[str, Any], int]:
    """What one process takes of its node, as Ray's options, and how many fit into nodes of these resources.

    A process has one GPU where there are any, unless device is "cpu", and so many CPUs of the same node. process: its
    name, of which the option --NAME-cpus is made. Raises ConfigError where none fits.
    """
    with_gpu = device != "cpu" and any(node.get("GPU", 0) >= 1 for node in nodes)
    if device.startswith("cuda") and not with_gpu:
        raise ConfigError("No node of this Ray cluster has a GPU: leave --device out, or add nodes that have one.")
    usable = [node for node in nodes if node.get("GPU", 0) >= 1] if with_gpu else nodes
    fit = sum(min(node.get("CPU", 0) // cpus, node["GPU"] if with_gpu else math.inf) for node in usable)
    if not fit:
        largest_cpus = int(max((node.get("CPU", 0) for node in usable), default=0))
        kind = "node with a GPU" if with_gpu else "node"
        raise ConfigError(
            f"No {process} with {cpus} CPUs fits on a node: the largest {kind} has {largest_cpus}. "
            f"Say a smaller --{process}-cpus, or add larger nodes."
        )
    needs: dict[str, Any] = {"num_cpus": cpus}
    return needs | ({"num_gpus": 1} if with_gpu else {}), int(fit) if fit < math.inf else sys.maxsize


def resources(ray: Any) -> list[Mapping[str, float]]:
    """Of every node that is alive."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def for_process(estimator: Mapping[str, Any], needs: Mapping[str, Any]) -> dict[str, Any]:
    """An estimator's options in a process of a cluster: Ray shows it its own GPU alone; on CPUs its share of them is
    what its networks may use.
    """
    arguments = dict(estimator)
    if "num_gpus" in needs:
        arguments["device"] = "cuda"
    elif arguments.get("threads") is None:
        arguments["threads"] = needs["num_cpus"]
    return arguments


def _no_cluster(address: str, cause: Exception) -> ConfigError:
    if address == LOCAL:
        return ConfigError(f"Ray did not start on this machine: {cause}")
    return ConfigError(
        f"There is no Ray cluster at {address} ({str(cause).rstrip('. ')}). Start one with `ray start --head`, or say "
        "--ray local for one on this machine alone."
    )
