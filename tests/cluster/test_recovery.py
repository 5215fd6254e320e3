"""A run on real raylets whose nodes are killed, added and drained: nothing is read twice, nothing committed is lost."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from recorded_run import (
    Run,
    add_node,
    drain_node,
    expected_log,
    kill_node,
    nodes,
    options,
    read_trace,
    sample_log,
    stop,
)

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from data_pipeline.scenes import write_scenes

    folder = tmp_path_factory.mktemp("data") / "scenes"
    write_scenes(folder, train=144, val=16, size=32, seed=0)
    return folder


def test_run__nodes_killed_added_and_drained_leave_the_order_of_samples(data: Path, tmp_path: Path):
    config = options(
        data, tmp_path / "run", "workers=3", "cluster.min_workers=1", "stages.ssl.epochs=1000", "checkpoint_every=15"
    )
    with nodes(1, 1) as cluster:
        run = Run(config)
        run.wait_for_step(20, world=2)
        killed = kill_node(cluster, cluster.workers[0])
        alone = run.wait_for_step(1, world=1, after=killed)
        # The checkpoint of step 15 was complete: nothing before it is done again.
        assert alone["step"] > 15
        added = [add_node(cluster), add_node(cluster)]
        three = run.wait_for_step(1, world=3, after=alone["time"])
        # To grow costs no step. The nodes may join one by one, with steps of two workers between.
        between = [row["step"] for row in read_trace(run.folder) if alone["time"] <= row["time"] < three["time"]]
        assert three["step"] == between[-1] + 1
        run.wait_for_step(three["step"] + 3, world=3)
        drained = drain_node(cluster, added[0])
        two = run.wait_for_step(1, world=2, after=drained)
        assert two["step"] >= last_step(run, 3)  # a drain notice costs one at most
        run.wait_for_step(two["step"] + 5)
        stop(run)
        run.wait(60)
    log = sample_log(run.folder)
    worlds = {row["step"]: row["world"] for row in read_trace(run.folder)}
    assert set(worlds.values()) == {1, 2, 3}
    assert log == expected_log(config, worlds)
    seen = [index for step in log.values() for index in step]
    for epoch in range(len(seen) // 144):
        assert sorted(seen[epoch * 144 : (epoch + 1) * 144]) == list(range(144))
    rows = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    events = [row["event"] for row in rows if "event" in row]
    assert [event for event, _ in itertools.groupby(events)] == ["recovered", "resized", "drained"]
    assert all(0 < row["seconds"] < 120 for row in rows if "event" in row)


def last_step(run: Run, world: int) -> int:
    return max(row["step"] for row in read_trace(run.folder) if row["world"] == world)
