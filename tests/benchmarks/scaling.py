"""Two workers beside one, each on a core of its own: images a second of stage `ssl`.

    python tests/benchmarks/scaling.py [--steps 16] [--repeat 3] [--batch 128] [--cores 0 1] [--json FILE] [KEY=VALUE ...]

Recipe `small` (ResNet-18, 64 px) on procedural scenes, plain torch, one thread a worker, decoding in the worker itself, the
recipe's batch for each worker. `two` train together; `apart` are two runs of one worker each at the same time, which know
nothing of each other: what the machine has for two, memory and caches shared. The runs take turns, and medians over the
repeats count. The first rows of a run's metrics.jsonl are left out as warm-up.

Figures in --json, for `one`, `two` and `apart`: `images_per_second`, `data_wait` (share of time, of rank 0) and the values of each
repeat; `two_ratio`, `apart_ratio`: speed over that of one worker; `efficiency`: of two over apart.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from contextlib import suppress
from pathlib import Path

import smoke
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
KINDS = {"one": 1, "two": 2, "apart": 2}  # workers


def small(folder: Path) -> list[str]:
    """Options of a tiny run."""
    tiny = ["image_size=32", "canvas_size=32", "checkpoint_every=1000000"]
    return [*smoke.NARROW, *tiny, "--batch", "8", "--steps", "12", "--repeat", "1", "--only", "two"]


def create_parser() -> argparse.ArgumentParser:
    """Its options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="options of the recipe")
    parser.add_argument("--steps", type=int, default=16, help="of a run, warm-up included")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--batch", type=int, default=128, help="images of one worker")
    parser.add_argument("--cores", type=int, nargs=2, help="the first two that there are, if not given")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS), help="runs; all by default")
    parser.add_argument("--json", type=Path, help="file for the figures")
    smoke.add_option(parser)
    return parser


def main() -> None:
    parser = create_parser()
    arguments = smoke.parse(parser, small)
    cores = arguments.cores or sorted(os.sched_getaffinity(0))[:2]
    if len(set(cores)) < 2 or not set(cores) <= os.sched_getaffinity(0):
        parser.error(f"cores {cores}: two different ones of {sorted(os.sched_getaffinity(0))} are needed")
    if arguments.steps // ROW_STEPS <= WARM_ROWS:
        parser.error(f"--steps {arguments.steps}: at least {(WARM_ROWS + 1) * ROW_STEPS} are needed, some are warm-up")

    kinds = {kind: workers for kind, workers in KINDS.items() if kind in arguments.only}
    rows: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "scenes"
        with smoke.light_processes():
            write_scenes(data, train=IMAGES, val=1, size=64)
        for repeat in range(arguments.repeat):
            for kind, workers in kinds.items():
                run = Path(scratch) / f"{kind}{repeat}"
                together = 1 if kind == "apart" else workers
                config = options(data, run, together, arguments.batch, arguments.steps, arguments.overrides)
                # In processes of their own even where it is one, so that all runs start alike.
                run_workers(train_pinned, (config, cores, kind == "apart"), workers)
                rows[kind].append(steady([run, Path(f"{run}_1")] if kind == "apart" else [run]))
    figures = {kind: summary(measured) for kind, measured in rows.items()}
    speeds = {kind: figures[kind]["images_per_second"] for kind in kinds}
    ratios = {
        name: speeds[kind] / speeds[base]
        for name, kind, base in (
            ("two_ratio", "two", "one"),
            ("apart_ratio", "apart", "one"),
            ("efficiency", "two", "apart"),
        )
        if kind in speeds and base in speeds
    }

    table = Table("run", "workers", "images/s", "least to most", "waiting for data", "over one",
                  title=f"{arguments.repeat} turns, cores {cores[0]} and {cores[1]}")  # fmt: skip
    for kind, workers in kinds.items():
        values = figures[kind]["repeats"]
        ratio = f"{ratios[f'{kind}_ratio']:.2f}" if f"{kind}_ratio" in ratios else ""
        table.add_row(kind, str(workers), f"{figures[kind]['images_per_second']:.1f}",
                      f"{min(values):.1f} to {max(values):.1f}", f"{100 * figures[kind]['data_wait']:.1f} %", ratio)  # fmt: skip
    Console(width=110).print(table)
    if "efficiency" in ratios:
        print(f"two together reach {ratios['efficiency']:.2f} of two apart")
    if arguments.json:
        arguments.json.write_text(json.dumps({**figures, **ratios}, indent=2) + "\n")


def options(data: Path, run: Path, workers: int, batch: int, steps: int, overrides: list[str]) -> PretrainConfig:
    """A run of so many steps, with `batch` images for each worker."""
    batch *= workers
    wanted = [f"data={data}", f"run={run}", "launcher=local", f"workers={workers}", "only=[ssl]", "knn_samples=0",
              f"stages.ssl.batch_size={batch}", f"stages.ssl.epochs={steps * batch / IMAGES}", "ssl.heatmap.warmup=0",
              f"log_every={ROW_STEPS}", "picture_every=1000000", "checkpoint_every=1000000"]  # fmt: skip
    return resolve("small", [*wanted, *overrides])


def steady(runs: list[Path]) -> dict[str, float]:
    """Images a second, of all runs together, and the share of waiting, after their warm-up."""
    found = [[row for row in read_rows(run / METRICS) if "images_per_second" in row][WARM_ROWS:] for run in runs]
    speeds = [statistics.median(row["images_per_second"] for row in rows) for rows in found]
    return {"images_per_second": sum(speeds), "data_wait": statistics.median(row["data_wait"] for row in found[0])}


def train_pinned(runtime: Runtime, options: tuple[PretrainConfig, list[int], bool]) -> None:
    """A worker: keeps all of its threads on one core; apart from the other, it is a run by itself."""
    config, cores, apart = options
    for thread in os.listdir("/proc/self/task"):
        with suppress(ProcessLookupError):  # it has just ended
            os.sched_setaffinity(int(thread), {cores[runtime.rank]})
    torch.set_num_threads(1)
    if apart:
        if runtime.rank:
            config.run = f"{config.run}_{runtime.rank}"
        runtime = Runtime(0, 1, 0, runtime.device)
    pretrain(runtime, config)


def summary(measured: list[dict[str, float]]) -> dict:
    """Medians over the repeats, and the repeats."""
    speeds = [values["images_per_second"] for values in measured]
    waits = [values["data_wait"] for values in measured]
    return {"images_per_second": statistics.median(speeds), "data_wait": statistics.median(waits), "repeats": speeds}


if __name__ == "__main__":
    main()
