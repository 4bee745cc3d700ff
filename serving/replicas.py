"""The options of `densegeo serve --ray`, checked before Ray is started."""

from __future__ import annotations

import math
from dataclasses import dataclass

import typer

from densegeo.infer_options import require_ray

REPLICA = "replica"  # what Ray calls one of a server's processes


@dataclass(frozen=True)
class Replicas:
    """address: "local" for a Ray of this process's own, "auto", or the address of a cluster. min_replicas,
    max_replicas: processes, as many as keep `target` requests a process under way. cpus: of each.
    """

    address: str
    min_replicas: int = 1
    max_replicas: int = 1
    target: float = 4.0
    cpus: int = 1


def replicas_of(
    ray: str | None,
    min_replicas: int | None,
    max_replicas: int | None,
    target_requests: float | None,
    replica_cpus: int | None,
    *,
    port: int,
    device: str,
) -> Replicas | None:
    """How to run on Ray; None without it. Raises BadParameter."""
    if ray is None:
        options = {"--min-replicas": min_replicas, "--max-replicas": max_replicas}
        options |= {"--target-requests": target_requests, "--replica-cpus": replica_cpus}  # type: ignore[dict-item]
        for option, value in options.items():
            if value is not None:
                raise typer.BadParameter("goes with --ray.", param_hint=option)
        return None
    smallest = min_replicas or 1
    largest = max_replicas or smallest
    target = 4.0 if target_requests is None else target_requests
    if largest < smallest:
        raise typer.BadParameter(f"must be {smallest} or more, as many as --min-replicas.", param_hint="--max-replicas")
    if not 0 < target < math.inf:
        raise typer.BadParameter(f"must be above 0, not {target:g}.", param_hint="--target-requests")
    if port == 0:
        raise typer.BadParameter("must be named with --ray: every node listens on the same one.", param_hint="--port")
    require_ray(ray, device, replica_cpus or 1, REPLICA, "fastapi", "aiohttp")
    return Replicas(ray, smallest, largest, target, replica_cpus or 1)
