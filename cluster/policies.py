"""What Ray Train's controller decides for our runs: how many workers, when to start anew, and what a failure means.

Ray Train restarts all workers whenever it restarts any. Its own elastic policy asks the autoscaling coordinator which
nodes there are; that view keeps a dead node for some twenty seconds, and every start that counts on it waits out the
start time-out. `LiveNodesPolicy` looks at the nodes themselves. It also asks running workers to save before they are
restarted, at a drain notice or to grow, which Ray Train does not: what is lost is no step at all.

Both policies run in the controller's process, on the driver's node.
"""

from __future__ import annotations

import logging
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar, NamedTuple

import ray
from ray.exceptions import RayActorError, RayError
from ray.train import FailureConfig, ScalingConfig
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.callback import WorkerGroupCallback
from ray.train.v2._internal.execution.failure_handling import FailureDecision, FailurePolicy
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ScalingDecision
from ray.train.v2._internal.execution.scaling_policy.elastic import ElasticScalingPolicy
from ray.train.v2._internal.execution.worker_group import WorkerGroup, WorkerGroupPollStatus, WorkerGroupState
from ray.train.v2.api.exceptions import ControllerError, PreemptionError, TrainingFailedError, WorkerGroupError

from cluster.errors import Restart
from cluster.exchange import UNSTARTED, Exchange, MessageHandler
from cluster.failures import cause_of

LOOK_SECONDS = 1.0  # between looks at the nodes
ANSWER_SECONDS = 2.0  # within which a node's raylet accepts a connection
WAIT_WARNING_SECONDS = 30.0
RELEASE_SECONDS = 0.3
CHECKPOINT_WAITS = 10  # times the seconds that the room for more workers must have stood
START_TIMES = 6  # starts in a row that timed out, a minute by default, are counted as a lost worker

logger = logging.getLogger(__name__)


class Group(WorkerGroupCallback):
    """The workers that are up, for the policies: Ray Train tells them of a group only while it trains.

    The policies are sent to the controller one by one, so what they share is kept by this class, of which the process
    of a controller has one.

    Args:
        exchange: of this launch.
    """

    state: ClassVar[WorkerGroupState | None] = None

    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange

    def after_worker_group_start(self, worker_group: WorkerGroup) -> None:
        """Keep the group, and note for driver and workers where every rank runs."""
        Group.state = worker_group.get_worker_group_state()
        places = {worker.distributed_context.world_rank: _place(worker.metadata) for worker in Group.state.workers}
        self.exchange.write_group(places)

    def after_worker_group_shutdown(self, worker_group_context: Any) -> None:
        """Forget the group."""
        Group.state = None

    @staticmethod
    def release() -> None:
        """End a group whose start failed halfway: Ray Train forgets it, and its nodes would stay taken."""
        if Group.state is not None:
            Group.state.shutdown()
            Group.state = None


class Size(NamedTuple):
    """How many workers there are, or could be, and since when (seconds of a monotonic clock)."""

    workers: int
    since: float


class Growth:
    """When a group is restarted to grow: nodes often come one after the other, and each restart costs seconds.

    The room for more workers must have stood for a while, or suffice for all; then the restart follows a checkpoint, or
    comes without one where that takes too long.

    Args:
        most: workers that the run takes.
        seconds: that the room must have stood.
    """

    def __init__(self, most: int, seconds: float) -> None:
        self.most, self.seconds = most, seconds
        self._group: Size | None = None
        self._room: Size | None = None
        self._settled: tuple[float, int] | None = None  # when, and the step of the newest checkpoint then

    def is_due(self, group: Size, wanted: int, now: float, step: int) -> bool:
        """Whether the group should be restarted now; asked again and again while it trains.

        Args:
            wanted: as many workers as there is room for.
            step: of the newest checkpoint.
        """
        if group != self._group:
            self._group, self._room, self._settled = group, None, None
        if wanted <= group.workers:
            self._room = self._settled = None
            return False
        if self._room is None or wanted != self._room.workers:
            self._room, self._settled = Size(wanted, now), None
        if self._settled is None:
            if wanted < self.most and now - self._room.since < self.seconds:
                return False
            self._settled = now, step
        since, before = self._settled
        return step > before or now - since >= CHECKPOINT_WAITS * self.seconds


class LiveNodesPolicy(ElasticScalingPolicy):
    """As many workers as the nodes that are up, and not about to go, have room for.

    Args:
        scaling: with `num_workers=(least, most)`.
        exchange: of this launch.
        autoscaled: whether a cluster's autoscaler should be told how many workers are wanted.
    """

    def __init__(self, scaling: ScalingConfig, exchange: Exchange, autoscaled: bool) -> None:
        super().__init__(scaling)
        self.exchange, self.autoscaled = exchange, autoscaled
        self._gone: list[str] = []
        self._told: set[str] = set()  # nodes whose loss was reported
        self._next_look = self._next_warning = 0.0
        self._growth = Growth(scaling.max_workers, scaling.elastic_resize_monitor_interval_s)

    def after_controller_start(self, train_run_context: Any) -> None:
        """Report to the driver from now on; ask the autoscaler for nodes."""
        logging.getLogger().addHandler(MessageHandler(self.exchange, "controller"))
        if self.autoscaled:
            super().after_controller_start(train_run_context)

    def _maybe_send_resource_request(self) -> None:
        if self.autoscaled:
            super()._maybe_send_resource_request()

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        """Start with what there is room for; wait where that is too little; nothing starts that was told to stop."""
        if self.exchange.stop_asked:
            raise Restart("stopped while there were no workers")
        self._maybe_send_resource_request()
        nodes = self._get_reserved_resources()
        self._tell_of_lost_nodes(nodes)
        num_workers = self._count_possible_workers(nodes)
        if num_workers < self.scaling_config.min_workers:
            self._warn_of_waiting(num_workers)
            time.sleep(LOOK_SECONDS)  # the controller asks again at once
            return NoopDecision()
        self.exchange.clear_restart()
        self.exchange.add_event("start", world=num_workers)
        return self._get_resize_decision(num_workers)

    def make_decision_for_running_worker_group(
        self, worker_group_state: WorkerGroupState, worker_group_status: WorkerGroupPollStatus
    ) -> ScalingDecision:
        """Never resize at once: ask the workers to save and end, where another group is wanted."""
        self._maybe_send_resource_request()
        now = time.monotonic()
        if now < self._next_look or self.exchange.restart_asked or self.exchange.stop_asked:
            return NoopDecision()
        self._next_look = now + LOOK_SECONDS
        draining = _draining_nodes()
        if leaving := [worker.metadata for worker in worker_group_state.workers if worker.metadata.node_id in draining]:
            self.exchange.add_event("drained", reason=f"node {leaving[0].node_ip} is about to go")
            self.exchange.ask_to_restart()
            return NoopDecision()
        if now - worker_group_state.start_time > self.scaling_config.elastic_resize_monitor_interval_s:
            wanted = self._count_possible_workers(self._get_reserved_resources())
            group = Size(worker_group_state.num_workers, worker_group_state.start_time)
            if self._growth.is_due(group, wanted, now, self.exchange.read_step()):
                self.exchange.add_event("resized", reason=f"room for {wanted} workers")
                self.exchange.ask_to_restart()
        return NoopDecision()

    def _get_reserved_resources(self) -> dict[str, dict[str, float]]:
        """What each node has for us: all that is free there, and what the last group still holds.

        Ray takes a node for alive until its health checks have failed for long enough, half a minute by default. A
        raylet that was killed refuses connections at once, and one whose machine has gone does not answer.
        """
        each = self.scaling_config._resources_per_worker_not_none
        free = ray._private.state.state.available_resources_per_node()
        draining = _draining_nodes()
        held: dict[str, int] = {}
        for worker in Group.state.workers if Group.state is not None else []:
            held[worker.metadata.node_id] = held.get(worker.metadata.node_id, 0) + 1
        alive = [node for node in ray.nodes() if node["Alive"]]
        with ThreadPoolExecutor(min(32, len(alive))) as pool:
            answers = list(pool.map(_answers, alive))
        self._gone = [node["NodeID"] for node, answer in zip(alive, answers, strict=True) if not answer]
        nodes = {}
        for node in alive:
            key = node["NodeID"]
            if key not in draining and key not in self._gone:
                nodes[key] = {
                    name: min(
                        node["Resources"].get(name, 0.0),
                        free.get(key, {}).get(name, 0.0) + held.get(key, 0) * amount,
                    )
                    for name, amount in each.items()
                }
        return nodes

    def on_controller_start_worker_group(self, *, scaling_config: ScalingConfig, num_workers: int) -> Any:
        """Keep workers off nodes that are gone, or about to go, before Ray knows."""
        # The places of the last group are free in a moment; a reservation that comes before is tried again a second
        # later.
        time.sleep(RELEASE_SECONDS)
        if not (out := [*self._gone, *_draining_nodes()]):
            return None
        return {ray._raylet.RAY_NODE_ID_KEY: f"!in({','.join(out)})"}

    def _tell_of_lost_nodes(self, nodes: dict[str, dict[str, float]]) -> None:
        places = {
            worker.metadata.node_id: worker.metadata.node_ip
            for worker in (Group.state.workers if Group.state is not None else [])
        }
        for node, address in places.items():
            if node not in nodes and node not in self._told and node not in _draining_nodes():
                self._told.add(node)
                logger.warning("node %s (%s) does not answer; its workers are lost", address, node[:8])

    def _warn_of_waiting(self, num_workers: int) -> None:
        if (now := time.monotonic()) >= self._next_warning:
            self._next_warning = now + WAIT_WARNING_SECONDS
            logger.warning(
                "the cluster has room for %d of at least %d workers (%s each); waiting for nodes",
                num_workers,
                self.scaling_config.min_workers,
                ", ".join(
                    f"{amount:g} {name}" for name, amount in self.scaling_config._resources_per_worker_not_none.items()
                ),
            )


class RecoveryPolicy(FailurePolicy):
    """Go on after a lost worker, end at once at anything that would come again.

    Args:
        exchange: of this launch.
        max_failures: lost workers in a row, with no new checkpoint in between, after which the run ends.
    """

    def __init__(self, exchange: Exchange, max_failures: int) -> None:
        super().__init__(FailureConfig(max_failures=max_failures))
        self.exchange, self.max_failures = exchange, max_failures

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        """Called by the controller, once a failure."""
        if isinstance(training_failed_error, PreemptionError):
            return FailureDecision.RETRY
        if isinstance(training_failed_error, WorkerGroupError):
            cause = cause_of(training_failed_error.worker_failures)
            if cause.kind == "restart":
                return FailureDecision.RETRY
            if cause.kind != "lost":
                return FailureDecision.RAISE
            if cause.rank is None:
                return self._count(f"a worker was lost ({cause.reason})")
            return self._count(f"{self.exchange.place_of(cause.rank)} {cause.what}")
        if isinstance(training_failed_error, ControllerError):
            failure = training_failed_error.controller_failure
            if isinstance(failure, Restart):
                return FailureDecision.RAISE  # told to stop while it waited
            if isinstance(failure, RayError) and not isinstance(failure, RayActorError):
                return FailureDecision.RAISE  # the training function cannot even be loaded
            Group.release()
            self.exchange.add_event(UNSTARTED)
            if isinstance(failure, WorkerGroupStartupTimeoutError):
                if (times := self.exchange.unstarted()) % START_TIMES == 0:
                    return self._count(f"workers could not be started {times} times in a row, though there was room")
                logger.warning("the places that were free are taken; trying again")
                return FailureDecision.RETRY
            return self._count(f"workers could not be started ({type(failure).__name__})")
        return FailureDecision.RAISE

    def _count(self, what: str) -> FailureDecision:
        self.exchange.add_event("lost", reason=what, step=self.exchange.read_step())
        if self.exchange.failures() > self.max_failures:
            return FailureDecision.RAISE
        logger.warning("%s; going on from the newest checkpoint", what)
        return FailureDecision.RETRY


def _draining_nodes() -> dict[str, int]:
    draining: dict[str, int] = ray._private.state.state.get_draining_nodes()
    return draining


def _answers(node: dict[str, Any]) -> bool:
    """Whether the raylet of a node accepts connections."""
    try:
        socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), timeout=ANSWER_SECONDS).close()
    except OSError:
        return False
    return True


def _place(metadata: Any) -> str:
    return f"node {metadata.node_ip} ({metadata.node_id[:8]}, process {metadata.pid})"
