"""A pretraining run on Ray that writes down what every worker does, on nodes that can be killed.

Every process appends to RUN/trace/<pid>_<rank>.jsonl, a line a step: {"step", "time", "rank", "world", "index" of each
sample, "loss"}. A step that was done again, after a restart, counts as it was done last.
"""

from __future__ import annotations

import itertools
import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from conftest import NARROW

from cluster.runtime import Runtime, run
from data_pipeline.manifest import Manifest
from data_pipeline.order import SampleOrder
from pretrain.config import PretrainConfig
from pretrain.run import check_data, check_earlier_run, resolve
from pretrain.trainer import Trainer

# A busy machine must not pass for a dead node: what tests kill, the policies notice by themselves.
OBJECT_STORE = 100 * 2**20
PATIENT = {"health_check_failure_threshold": 60}


class RecordedTrainer(Trainer):
    """A trainer that leaves a trace of its steps."""

    def _train_step(self, stage, batch) -> None:
        super()._train_step(stage, batch)
        folder = self.run / "trace"
        folder.mkdir(exist_ok=True)
        row = {
            "step": self.progress.step,
            "time": time.time(),
            "rank": self.runtime.rank,
            "world": self.runtime.world,
            "index": batch.index.tolist(),
        }
        with (folder / f"{os.getpid()}_{self.runtime.rank}.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")


def recorded_pretrain(runtime: Runtime, config: PretrainConfig) -> None:
    """What every worker runs."""
    trainer = RecordedTrainer(runtime, config)
    try:
        trainer.train()
    finally:
        trainer.close()


def options(data: Path, run_dir: Path, *overrides: str) -> PretrainConfig:
    """A small run of one stage, contrastive, with elastic workers."""
    return resolve(
        "small",
        [
            f"data={data}", f"run={run_dir}", *NARROW, "only=[ssl]", "stages.ssl.batch_size=24", "stages.ssl.epochs=20",
            "image_size=32", "canvas_size=32", "knn_samples=0", "log_every=1", "checkpoint_every=10", "workers=2",
            "cluster.resize_seconds=5", "picture_every=100000", *overrides,
        ],
    )  # fmt: skip


class Run:
    """A run in a thread of this process, as `dicm pretrain` drives it."""

    def __init__(self, config: PretrainConfig) -> None:
        self.config, self.folder = config, Path(config.run)
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._drive, daemon=True)
        self._thread.start()

    def _drive(self) -> None:
        try:
            config = self.config
            check_data(config)
            check_earlier_run(config, self.folder)
            self.folder.mkdir(parents=True, exist_ok=True)
            run(
                recorded_pretrain, config, workers=config.workers, launcher="ray", run_dir=config.run,
                cluster=config.cluster,
            )  # fmt: skip
        except BaseException as error:
            self.error = error

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def wait(self, seconds: float = 600.0) -> None:
        """Until the run has ended; its error is raised here."""
        self._thread.join(seconds)
        if self.alive:
            raise TimeoutError(f"the run is still up after {seconds:g} s")
        if self.error is not None:
            raise self.error

    def wait_for_step(self, step: int, world: int | None = None, after: float = 0.0, seconds: float = 240.0) -> dict:
        """The first recorded step of at least that number, by a group of that size, later than `after`."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for row in read_trace(self.folder):
                if row["step"] >= step and row["time"] > after and world in (None, row["world"]):
                    return row
            if not self.alive:
                raise RuntimeError(f"the run ended before step {step}: {self.error!r}")
            time.sleep(0.05)
        raise TimeoutError(f"no step {step} within {seconds:g} s")

    def processes(self) -> dict[int, int]:
        """Rank -> process id of the newest group."""
        newest: dict[int, tuple[float, int]] = {}
        for path in (self.folder / "trace").glob("*.jsonl"):
            pid, _, rank = path.stem.partition("_")
            newest[int(rank)] = max(newest.get(int(rank), (0.0, 0)), (path.stat().st_mtime, int(pid)))
        return {rank: pid for rank, (_, pid) in newest.items() if os.path.exists(f"/proc/{pid}")}


def read_trace(folder: Path) -> list[dict[str, Any]]:
    """All steps that any process recorded, in order of time."""
    rows = []
    for path in (folder / "trace").glob("*.jsonl"):
        for line in path.read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                rows.append({**json.loads(line), "process": path.stem})
    return sorted(rows, key=lambda row: row["time"])


def sample_log(folder: Path) -> dict[int, list[int]]:
    """Step -> indexes of its samples, ascending, as the step was done last."""
    last: dict[int, dict[int, dict]] = {}
    for row in read_trace(folder):
        ranks = last.setdefault(row["step"], {})
        if any(other["world"] != row["world"] for other in ranks.values()):
            ranks.clear()  # the step is done anew by a group of another size
        ranks[row["rank"]] = row
    for step, ranks in last.items():
        assert len(ranks) == next(iter(ranks.values()))["world"], f"step {step} lacks a rank"
    return {
        step: sorted(itertools.chain.from_iterable(row["index"] for row in ranks.values()))
        for step, ranks in sorted(last.items())
    }


def expected_log(config: PretrainConfig, world_of_step: dict[int, int]) -> dict[int, list[int]]:
    """Step -> indexes, as an uninterrupted run with those worlds reads them: from the order alone."""
    split = Manifest.load(config.data).split(config.split)
    order = SampleOrder(
        [shard.samples for shard in split.shards], seed=config.seed, shuffle_shards=config.shuffle_shards,
        num_lanes=config.num_lanes,
    )  # fmt: skip
    log, start = {}, 0
    for step, world in sorted(world_of_step.items()):
        stop = start + config.stages[0].batch_size // world * world
        log[step] = sorted(order.take(start, stop).tolist())
        start = stop
    return log


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the newest checkpoint's networks."""
    from cluster.checkpoint import CheckpointStore

    store = CheckpointStore(folder / "checkpoints")
    state = store.load(store.newest())
    return {**state["codec"], **state["method"]}


@contextmanager
def nodes(*num_cpus: int) -> Iterator[Any]:
    """A Ray cluster of raylets on this machine, which `launch` finds by RAY_ADDRESS: a head without CPUs, and a node for
    each number; yields the Cluster."""
    import ray
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "object_store_memory": OBJECT_STORE, "include_dashboard": False, "_system_config": PATIENT}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    before = os.environ.get("RAY_ADDRESS")
    os.environ["RAY_ADDRESS"] = cluster.address
    try:
        cluster.workers = [add_node(cluster, count) for count in num_cpus]
        yield cluster
    finally:
        ray.shutdown()  # a run that still drives holds a node, which then cannot be removed
        cluster.shutdown()
        if before is None:
            del os.environ["RAY_ADDRESS"]
        else:
            os.environ["RAY_ADDRESS"] = before


def add_node(cluster: Any, num_cpus: int = 1) -> Any:
    """One more node; on the main thread alone."""
    return cluster.add_node(num_cpus=num_cpus, object_store_memory=OBJECT_STORE)


def kill_node(cluster: Any, node: Any) -> float:
    """SIGKILL to a node's raylet and all that runs there; returns the time."""
    now = time.time()
    cluster.remove_node(node, allow_graceful=False)
    return now


def drain_node(cluster: Any, node: Any, seconds: float = 120.0) -> float:
    """The notice that a node goes in so many seconds, as a cloud gives it; returns the time."""
    from ray._raylet import GcsClient
    from ray.core.generated import autoscaler_pb2

    now = time.time()
    client = GcsClient(address=cluster.address)
    accepted, why = client.drain_node(
        node.node_id, autoscaler_pb2.DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION, "a test", int((now + seconds) * 1000)
    )
    assert accepted, why
    return now


def stop(run: Run) -> None:
    """What SIGTERM to the driver does."""
    for folder in (run.folder / "ray").glob("*-*"):
        (folder / "stop").touch()
