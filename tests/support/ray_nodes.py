"""A Ray cluster on this machine, whose nodes are Ray's own processes."""

from __future__ import annotations

import os
from typing import Any

from tests.support.project import ROOT


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


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
