"""A Ray cluster on this machine, whose nodes are Ray's own processes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.support.project import ROOT


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


@contextmanager
def running(cpus: int) -> Iterator[Cluster]:
    """One node of so many CPUs, whose processes see this checkout."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment().items():
            patch.setenv(name, value)
        cluster = Cluster(cpus)
        yield cluster
        cluster.close()


class Cluster:
    """Nodes of Ray, each a group of processes. address: of the first, the head."""

    def __init__(self, cpus: int, *others: int) -> None:
        from ray.cluster_utils import Cluster as Nodes

        head = {"num_cpus": cpus, "include_dashboard": False, "object_store_memory": 100 * 2**20}
        self.nodes = Nodes(initialize_head=True, head_node_args=head)
        self.workers = [self.add(more) for more in others]
        self.nodes.wait_for_nodes()
        self.address: str = self.nodes.address

    def add(self, cpus: int) -> Any:
        return self.nodes.add_node(num_cpus=cpus, object_store_memory=100 * 2**20)

    def close(self) -> None:
        self.nodes.shutdown()
