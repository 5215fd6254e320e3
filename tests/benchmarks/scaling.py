"""Two workers beside one, each on a core of its own: images a second of stage `ssl`, weak and strong scaling.

    python tests/benchmarks/scaling.py [--steps 24] [--repeat 3] [--batch 32] [--cores 0 1] [--json FILE] [KEY=VALUE ...]

Recipe `small` (ResNet-18, 64 px) on procedural scenes, plain torch, one thread a worker, decoding in the worker
itself. Weak: a worker keeps its batch; strong: two workers share the batch of one. The three runs take turns, and the
medians over the repeats count. The first rows of a run's metrics.jsonl are left out as warm-up. Two cores of one
processor share its caches and memory, and gloo copies through the host: more machines have other limits.

Figures in --json, for `one`, `weak` and `strong`: `images_per_second`, `data_wait` (share of time, of rank 0) and the values of each
repeat; `weak_efficiency` and `strong_efficiency`: speed over that of one worker, over two.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from contextlib import suppress
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from cluster.local_workers import run_workers
from cluster.metrics import METRICS, read_rows
from cluster.runtime import Runtime
from data_pipeline.scenes import write_scenes
from pretrain.config import PretrainConfig
from pretrain.run import resolve
from pretrain.trainer import pretrain

IMAGES = 512
WARM_ROWS = 2
ROW_STEPS = 4  # steps between rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="options of the recipe")
    parser.add_argument("--steps", type=int, default=24, help="of a run, warm-up included")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--batch", type=int, default=32, help="images of one worker")
    parser.add_argument("--cores", type=int, nargs=2, help="the first two that there are, if not given")
    parser.add_argument("--json", type=Path, help="file for the figures")
    arguments = parser.parse_args()
    cores = arguments.cores or sorted(os.sched_getaffinity(0))[:2]
    if len(set(cores)) < 2 or not set(cores) <= os.sched_getaffinity(0):
        parser.error(f"cores {cores}: two different ones of {sorted(os.sched_getaffinity(0))} are needed")
    if arguments.steps // ROW_STEPS <= WARM_ROWS:
        parser.error(f"--steps {arguments.steps}: at least {(WARM_ROWS + 1) * ROW_STEPS} are needed, some are warm-up")

    kinds = {"one": (1, arguments.batch), "weak": (2, 2 * arguments.batch), "strong": (2, arguments.batch)}
    rows: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "scenes"
        write_scenes(data, train=IMAGES, val=1, size=64)
        for repeat in range(arguments.repeat):
            for kind, (workers, batch) in kinds.items():
                run = Path(scratch) / f"{kind}{repeat}"
                rows[kind].append(steady(data, run, workers, batch, arguments.steps, cores, arguments.overrides))
    figures = {kind: summary(measured) for kind, measured in rows.items()}
    one = figures["one"]["images_per_second"]
    efficiencies = {kind: figures[kind]["images_per_second"] / one / 2 for kind in ("weak", "strong")}

    table = Table("run", "workers", "batch", "images/s", "least to most", "waiting for data", "efficiency",
                  title=f"{arguments.repeat} turns, cores {cores[0]} and {cores[1]}")  # fmt: skip
    for kind, (workers, batch) in kinds.items():
        values = figures[kind]["repeats"]
        efficiency = f"{efficiencies[kind]:.2f}" if kind in efficiencies else ""
        table.add_row(kind, str(workers), str(batch), f"{figures[kind]['images_per_second']:.1f}",
                      f"{min(values):.1f} to {max(values):.1f}", f"{100 * figures[kind]['data_wait']:.1f} %", efficiency)  # fmt: skip
    Console(width=110).print(table)
    if arguments.json:
        found = {**figures, **{f"{kind}_efficiency": value for kind, value in efficiencies.items()}}
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")


def steady(
    data: Path, run: Path, workers: int, batch: int, steps: int, cores: list[int], overrides: list[str]
) -> dict[str, float]:
    """Images a second and the share of waiting of one run, after its warm-up."""
    options = [f"data={data}", f"run={run}", "launcher=local", f"workers={workers}", "only=[ssl]", "knn_samples=0",
               f"stages.ssl.batch_size={batch}", f"stages.ssl.epochs={steps * batch / IMAGES}", "ssl.heatmap.warmup=0",
               f"log_every={ROW_STEPS}", "picture_every=1000000", "checkpoint_every=1000000"]  # fmt: skip
    config = resolve("small", [*options, *overrides])
    # In processes of their own even where it is one, so that all runs start alike and this one stays unpinned.
    run_workers(train_pinned, (config, cores), workers)
    found = [row for row in read_rows(run / METRICS) if "images_per_second" in row][WARM_ROWS:]
    return {key: statistics.median(row[key] for row in found) for key in ("images_per_second", "data_wait")}


def train_pinned(runtime: Runtime, options: tuple[PretrainConfig, list[int]]) -> None:
    """A worker: keeps all of its threads on one core."""
    config, cores = options
    for thread in os.listdir("/proc/self/task"):
        with suppress(ProcessLookupError):  # it has just ended
            os.sched_setaffinity(int(thread), {cores[runtime.rank]})
    torch.set_num_threads(1)
    pretrain(runtime, config)


def summary(measured: list[dict[str, float]]) -> dict:
    """Medians over the repeats, and the repeats."""
    speeds = [values["images_per_second"] for values in measured]
    waits = [values["data_wait"] for values in measured]
    return {"images_per_second": statistics.median(speeds), "data_wait": statistics.median(waits), "repeats": speeds}


if __name__ == "__main__":
    main()
