from __future__ import annotations

from pathlib import Path

import pytest

import cluster.launch  # noqa: F401  # sets what Ray Train reads as it is imported
from cluster.errors import Restart
from cluster.exchange import Exchange
from cluster.policies import CHECKPOINT_WAITS, START_TIMES, Growth, LiveNodesPolicy, RecoveryPolicy, Size


@pytest.fixture
def exchange(tmp_path: Path) -> Exchange:
    folder = tmp_path / "ray" / "one"
    folder.mkdir(parents=True)
    return Exchange(folder)


def start_times_out(exchange: Exchange, policy: RecoveryPolicy) -> str:
    """What the policy makes of a start that counted on a node which is gone."""
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
    from ray.train.v2.api.exceptions import ControllerError

    exchange.add_event("start", world=2)
    return str(policy.make_decision(ControllerError(WorkerGroupStartupTimeoutError(2))).value)


def test_recovery__starts_that_time_out_again_and_again_end_the_run(exchange: Exchange):
    policy = RecoveryPolicy(exchange, max_failures=1)
    decisions = [start_times_out(exchange, policy) for _ in range(2 * START_TIMES)]
    assert set(decisions[:-1]) == {"RETRY"}
    assert decisions[-1] == "RAISE"
    assert (
        exchange.events()[-1]["reason"]
        == f"workers could not be started {2 * START_TIMES} times in a row, though there was room"
    )


def test_recovery__one_start_that_times_out_is_no_loss_and_hides_none(exchange: Exchange):
    policy = RecoveryPolicy(exchange, max_failures=0)
    exchange.add_event("start", world=2)
    exchange.add_event("drained", reason="node 10.0.0.7 is about to go")
    assert start_times_out(exchange, policy) == "RETRY"
    exchange.add_event("start", world=2)
    interruption = exchange.interruption()
    assert interruption is not None
    assert interruption["reason"] == "node 10.0.0.7 is about to go"


def test_live_nodes__told_to_stop_starts_nothing_any_more(exchange: Exchange):
    from ray.train import ScalingConfig

    policy = LiveNodesPolicy(ScalingConfig(num_workers=(1, 2)), exchange, autoscaled=False)
    exchange.ask_to_stop()
    with pytest.raises(Restart):
        policy.make_decision_for_non_running_worker_group()
    assert exchange.events() == []


def restarts(growth: Growth, looks: list[tuple[float, int, int]], workers: int = 2) -> list[float]:
    """When a group of so many workers, up since 0, is restarted; looks are (time, room for workers, checkpoint's step)."""
    group, times = Size(workers, 0.0), []
    for now, wanted, step in looks:
        if growth.is_due(group, wanted, now, step):
            times.append(now)
            group = Size(wanted, now)
    return times


def test_growth__nodes_that_join_one_by_one_are_one_restart_at_a_checkpoint():
    joining = [(100.0 + second, 3 + min(second // 20, 4), second // 50) for second in range(200)]
    (moment,) = restarts(Growth(most=16, seconds=60), joining)
    assert moment == 250.0  # the last node came at 180, its room had stood at 240, the next checkpoint is of 250


def test_growth__room_for_all_needs_no_wait_for_more():
    looks = [(100.0 + second, 4, int(second >= 5)) for second in range(20)]
    assert restarts(Growth(most=4, seconds=60), looks) == [105.0]


def test_growth__a_node_that_came_and_went_is_no_reason():
    looks = [(100.0 + second, 3 if second < 50 else 2, second) for second in range(300)]
    assert restarts(Growth(most=4, seconds=60), looks) == []


def test_growth__does_not_wait_for_a_checkpoint_for_ever():
    looks = [(100.0 + second, 4, -1) for second in range(700)]
    assert restarts(Growth(most=4, seconds=60), looks) == [100.0 + CHECKPOINT_WAITS * 60]
