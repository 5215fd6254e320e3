"""From a killed node, or a killed worker, to the next training step.

    python tests/benchmarks/recovery.py [--repeat 5] [--random 0] [--elastic] [--data DIR] [--json FILE]

Pretraining of a narrow codec on two of three raylets of this machine, elastic, checkpoint every 10 steps. Nodes and workers
are killed in turn with SIGKILL; a killed node is replaced. Figures in --json:

- `node_seconds`, `worker_seconds`: from the signal to the next optimizer step of any worker, each time and the median.
- `drain_lost`: steps done again after a drain notice. `grow_seconds`: from a new node to a step of the larger group, of which
  `resize_seconds` (2 here) are waited on purpose.
- `random`: with --random N, N kills of a worker at moments drawn at random, during saves too: steps done, restarts, whether the
  log of samples is that of an uninterrupted run, and checkpoints that were complete and then missing.
- `elastic`: with --elastic, the loss over the last epoch of a run on 2, then 1, then 3 workers, over that of one on 2 throughout.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import smoke
from conftest import REPOSITORY
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

from cluster.checkpoint import CheckpointStore
from cluster.metrics import read_rows
from data_pipeline.scenes import write_scenes


def kill_worker(run: Run) -> float:
    """SIGKILL to a worker; returns the time."""
    processes = run.processes()
    rank = random.choice(sorted(processes))
    now = time.time()
    os.kill(processes[rank], signal.SIGKILL)
    return now


def step_after(run: Run, moment: float, world: int | None = None) -> dict[str, Any]:
    """The first step of a new group after `moment`: the last steps of the old one may still be written down."""
    old = {row["process"] for row in read_trace(run.folder)}
    end = time.monotonic() + 300
    while time.monotonic() < end:
        for row in read_trace(run.folder):
            if row["time"] > moment and row["process"] not in old and world in (None, row["world"]):
                return row
        if not run.alive:
            run.wait(0)
        time.sleep(0.05)
    raise TimeoutError("no step in five minutes")


def measure_kills(data: Path, folder: Path, repeat: int) -> dict[str, Any]:
    """Nodes, then workers, `repeat` times each; a drain and a new node between."""
    figures: dict[str, Any] = {"node_seconds": [], "worker_seconds": [], "grow_seconds": []}
    with nodes(1, 1) as cluster:
        config = options(data, folder, "workers=2", "cluster.min_workers=1", "stages.ssl.epochs=100000",
                         "cluster.resize_seconds=2", "cluster.max_failures=5")  # fmt: skip
        run = Run(config)
        run.wait_for_step(12, world=2)
        for _ in range(repeat):
            moment = kill_node(cluster, cluster.workers.pop(0))
            row = step_after(run, moment)
            figures["node_seconds"].append(row["time"] - moment)
            settle(run, row)
            moment = time.time()
            cluster.workers.append(add_node(cluster))
            row = step_after(run, moment, world=2)
            figures["grow_seconds"].append(row["time"] - moment)
            settle(run, row)
            moment = kill_worker(run)
            row = step_after(run, moment)
            figures["worker_seconds"].append(row["time"] - moment)
            settle(run, row)
            print({name: [round(value, 1) for value in values] for name, values in figures.items()}, flush=True)
        done = max(row["step"] for row in read_trace(folder))
        moment = drain_node(cluster, cluster.workers[0])
        row = step_after(run, moment)
        before = [old["step"] for old in read_trace(folder) if old["time"] < row["time"]]
        figures["drain_lost"] = max(max(before), done) - row["step"] + 1
        stop(run)
        run.wait(120)
    check_log(config, folder)
    for name in ("node_seconds", "worker_seconds", "grow_seconds"):
        figures[name] = [*(round(value, 2) for value in figures[name])]
        figures[f"{name}_median"] = statistics.median(figures[name])
    return figures


def settle(run: Run, row: dict[str, Any]) -> None:
    """Let the new group train past its next checkpoint."""
    run.wait_for_step(row["step"] // 10 * 10 + 11, after=row["time"])


def measure_random(data: Path, folder: Path, kills: int, workers: int) -> dict[str, Any]:
    """Kills of workers at random moments; every step of training also saves, so that saves are hit, too."""
    random.seed(0)
    with nodes(*[1] * workers):
        config = options(data, folder, f"workers={workers}", "stages.ssl.epochs=100000", "checkpoint_every=3",
                         "cluster.max_failures=50")  # fmt: skip
        run = Run(config)
        run.wait_for_step(2)
        store = CheckpointStore(folder / "checkpoints", keep=2)
        committed, missing = 0, 0
        for number in range(kills):
            time.sleep(random.uniform(0.0, 4.0))
            moment = kill_worker(run)
            complete = store.steps()
            row = step_after(run, moment)
            missing += bool(complete) and row["step"] <= max(complete)
            committed = max([committed, *complete])
            print(f"kill {number + 1}: complete up to {max(complete, default=0)}, on with {row['step']}", flush=True)
        run.wait_for_step(committed + 10)
        stop(run)
        run.wait(120)
    restarts = len({row["process"] for row in read_trace(folder)}) // workers - 1
    return {"kills": kills, "restarts": restarts, "steps": check_log(config, folder), "committed_lost": missing}


def measure_elastic(data: Path, folder: Path) -> dict[str, Any]:
    """The same run twice: undisturbed, and with a node killed a third of the way and two added at two thirds."""
    epochs = 30
    common = ["stages.ssl.epochs=" + str(epochs), "cluster.resize_seconds=2"]
    calm = options(data, folder / "calm", "workers=2", *common)
    with nodes(1, 1):
        run = Run(calm)
        run.wait(1800)
    steps = max(row["step"] for row in read_trace(run.folder))
    restless = options(data, folder / "restless", "workers=3", "cluster.min_workers=1", *common)
    with nodes(1, 1) as cluster:
        run = Run(restless)
        run.wait_for_step(steps // 3, world=2, seconds=900)
        row = step_after(run, kill_node(cluster, cluster.workers.pop()), world=1)
        run.wait_for_step(2 * steps // 3, after=row["time"], seconds=900)
        moment = time.time()
        cluster.workers += [add_node(cluster), add_node(cluster)]
        step_after(run, moment, world=3)
        run.wait(1800)
    check_log(restless, run.folder)
    worlds = {row["step"]: row["world"] for row in read_trace(run.folder)}
    last = [last_loss(Path(config.run), steps // epochs) for config in (calm, restless)]
    return {
        "steps": steps,
        "steps_of_world": {world: list(worlds.values()).count(world) for world in sorted(set(worlds.values()))},
        "loss_calm": round(last[0], 4),
        "loss_restless": round(last[1], 4),
        "ratio": round(last[1] / last[0], 4),
        "same_samples": sample_log(Path(calm.run)) == sample_log(run.folder),
    }


def last_loss(run: Path, steps: int) -> float:
    """Mean loss of the last so many steps."""
    return statistics.fmean([row["loss"] for row in read_rows(run / "metrics.jsonl") if "loss" in row][-steps:])


def check_log(config: Any, folder: Path) -> int:
    """See that every step read what an uninterrupted run reads; returns their number."""
    log = sample_log(folder)
    worlds = {row["step"]: row["world"] for row in read_trace(folder)}
    if log != expected_log(config, worlds):
        raise SystemExit("the log of samples is not that of an uninterrupted run")
    return len(log)


def small(folder: Path) -> list[str]:
    """Options of a tiny run."""
    return ["--repeat", "0", "--random", "1", "--workers", "1"]


def create_parser() -> argparse.ArgumentParser:
    """Its options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--random", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="of the run of --random")
    parser.add_argument("--elastic", action="store_true")
    parser.add_argument("--data", type=Path, help="data set; scenes if not given")
    parser.add_argument("--json", type=Path)
    smoke.add_option(parser)
    return parser


def main() -> int:
    """Measure, print and write."""
    arguments = smoke.parse(create_parser(), small)
    os.chdir(REPOSITORY)
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        data = arguments.data or Path(scratch, "scenes")
        if arguments.data is None:
            with smoke.light_processes():
                write_scenes(data, train=480, val=16, size=32, seed=0)
        if arguments.repeat:
            figures |= measure_kills(data, Path(scratch, "kills"), arguments.repeat)
        if arguments.random:
            figures["random"] = measure_random(data, Path(scratch, "random"), arguments.random, arguments.workers)
        if arguments.elastic:
            figures["elastic"] = measure_elastic(data, Path(scratch, "elastic"))
    for name, value in figures.items():
        print(f"{name:22s} {value}")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
