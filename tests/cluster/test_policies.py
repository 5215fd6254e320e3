from __future__ import annotations

from pathlib import Path

import pytest

import cluster.launch  # noqa: F401  # sets what Ray Train reads as it is imported
from cluster.errors import Restart
from cluster.exchange import Exchange
from cluster.policies import START_TIMES, LiveNodesPolicy, RecoveryPolicy


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
