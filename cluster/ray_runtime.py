"""The `Runtime` of a Ray Train worker."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import ray.train
import ray.train.torch
from ray.util.metrics import Counter, Gauge, Metric

from cluster.exchange import Exchange
from cluster.runtime import Interruption, Notice, Runtime

POLL_SECONDS = 0.5
# Key of a row of metrics.jsonl -> name and meaning of the metric that Ray exports to Prometheus, as ray_<name>.
GAUGES = {
    "step": ("dicm_step", "Optimizer steps of the run."),
    "loss": ("dicm_loss", "Training loss."),
    "bpp": ("dicm_bpp", "Estimated bits per pixel."),
    "images_per_second": ("dicm_images_per_second", "Training images a second, all workers."),
    "images_per_second_per_worker": ("dicm_images_per_second_per_worker", "Training images a second of a worker."),
    "step_seconds": ("dicm_step_seconds", "Seconds of a step."),
    "data_wait": ("dicm_data_wait", "Share of time spent waiting for data, 0 to 1."),
    "world": ("dicm_world", "Number of workers."),
    "lr": ("dicm_learning_rate", "Learning rate."),
    "gpu_memory": ("dicm_gpu_memory_bytes", "Most memory that rank 0 had allocated on its GPU."),
    "seconds": ("dicm_recovery_seconds", "Seconds from the notice of the last interruption to the next step."),
}
INTERRUPTIONS = {"lost": "recovered", "resized": "resized", "drained": "drained"}


class RayRuntime(Runtime):
    """Rank, world and device as Ray Train assigned them; its process group is up when a worker starts."""

    def __init__(self, exchange: Exchange) -> None:
        context = ray.train.get_context()
        device = ray.train.torch.get_device()
        super().__init__(context.get_world_rank(), context.get_world_size(), context.get_local_rank(), device)
        self.place = f"rank {self.rank} on node {ray.util.get_node_ip_address()}"
        self.exchange = exchange
        self.interruption = _last_interruption(exchange)
        self._told, self._next_look = Notice.NONE, 0.0
        self._metrics: dict[str, Metric] = {}

    def report_checkpoint(self, step: int) -> None:
        """Note the step, which tells the controller that the run gets on."""
        if self.rank == 0:
            self.exchange.write_step(step)

    def publish(self, values: Mapping[str, float]) -> None:
        """Set Ray's gauges, which Prometheus reads from every node; rank 0 has the numbers."""
        tags = {"run": self.exchange.run.name}
        for key in values.keys() & GAUGES.keys():
            gauge = self._metric(Gauge, *GAUGES[key])
            gauge.set(values[key], tags)
        if "seconds" in values:
            counter = self._metric(Counter, "dicm_recoveries", "How often another group of workers took over.")
            counter.inc(1, tags)

    def _metric(self, kind: type[Metric], name: str, meaning: str) -> Any:
        if name not in self._metrics:
            self._metrics[name] = kind(name, meaning, tag_keys=("run",))
        return self._metrics[name]

    def _look_for_notice(self) -> Notice:
        # Rank 0 alone looks: what one rank knows, all know after the collective, and the folder may be on a network.
        if self.rank == 0 and self._told != Notice.STOP and time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + POLL_SECONDS
            if self.exchange.stop_asked:
                self._told = Notice.STOP
            elif self.exchange.restart_asked:
                self._told = Notice.RESTART
        return self._told


def _last_interruption(exchange: Exchange) -> Interruption | None:
    """What happened before the present group started: the first event after the start before it."""
    last = None
    for event in reversed(exchange.events()[:-1]):  # the last one is the present start
        if event["event"] == "start":
            break
        last = event
    return last and Interruption(INTERRUPTIONS[last["event"]], last["reason"], last["time"])
