"""The `Runtime` of a Ray Train worker."""

from __future__ import annotations

import time
from collections.abc import Mapping

import ray.train
import ray.train.torch
from ray.util.metrics import Gauge

from cluster.exchange import Exchange
from cluster.gauges import GAUGES
from cluster.runtime import Interruption, Notice, Runtime

POLL_SECONDS = 0.5
INTERRUPTIONS = {"lost": "recovered", "resized": "resized", "drained": "drained"}


class RayRuntime(Runtime):
    """Rank, world and device as Ray Train assigned them; its process group is up when a worker starts."""

    def __init__(self, exchange: Exchange) -> None:
        context = ray.train.get_context()
        device = ray.train.torch.get_device()
        super().__init__(context.get_world_rank(), context.get_world_size(), context.get_local_rank(), device)
        self.place = f"rank {self.rank} on node {ray.util.get_node_ip_address()}"
        self.exchange = exchange
        cause = exchange.interruption()
        if cause is not None:
            self.interruption = Interruption(INTERRUPTIONS[cause["event"]], cause["reason"], cause["time"])
        self._told, self._next_look = Notice.NONE, 0.0
        self._gauges: dict[str, Gauge] = {}

    def report_checkpoint(self, step: int) -> None:
        """Note the step, which tells the controller that the run gets on."""
        if self.rank == 0:
            self.exchange.write_step(step)

    def publish(self, values: Mapping[str, float]) -> None:
        """Set Ray's gauges, which Prometheus reads from every node; rank 0 has the numbers."""
        for key in values.keys() & GAUGES.keys():
            if key not in self._gauges:
                self._gauges[key] = Gauge(*GAUGES[key], tag_keys=("run",))
            self._gauges[key].set(values[key], {"run": self.exchange.run.name})

    def _passed(self, notice: Notice) -> Notice:
        return notice

    def _look_for_notice(self) -> Notice:
        # Rank 0 alone looks: what one rank knows, all know after the collective, and the folder may be on a network.
        if self.rank == 0 and self._told != Notice.STOP and time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + POLL_SECONDS
            if self.exchange.stop_asked:
                self._told = Notice.STOP
            elif self.exchange.restart_asked:
                self._told = Notice.RESTART
        return self._told
