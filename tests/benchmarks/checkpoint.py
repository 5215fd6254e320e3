"""What saving costs training: the same run with checkpoints at the recipe's interval, and with none, in turns.

    python tests/benchmarks/checkpoint.py [--saves 3] [--repeat 3] [--json FILE] [KEY=VALUE ...]

Stage `ssl` of recipe `small` (ResNet-18, 64 px, batch 128, a checkpoint every 50 steps) on procedural scenes, plain torch, one
worker. Figures in --json, medians over the repeats:

- `save_wait`: share of the time that the training loop spends on handing states over; what `metrics.jsonl` logs.
- `slowdown`: time of all steps between the first and the last save, over that of the run without; the thread that writes
  takes part of the two cores, too.
- `megabytes`: of a checkpoint.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import smoke

from cluster.metrics import METRICS, read_rows
from data_pipeline.scenes import write_scenes
from pretrain.config import PretrainConfig
from pretrain.run import resolve, run

IMAGES = 256
FIRST_STEPS = 10  # warm-up


def options(data: Path, folder: Path, overrides: list[str]) -> PretrainConfig:
    """A run of stage `ssl` alone."""
    return resolve(
        "small",
        [f"data={data}", f"run={folder}", "workers=1", "launcher=local", "only=[ssl]", "log_every=10", "knn_samples=0",
         "picture_every=1000000", *overrides],
    )  # fmt: skip


def train(data: Path, folder: Path, epochs: float, overrides: list[str]) -> tuple[float, float]:
    """Seconds of all steps but the first ones, and the mean share that saving took."""
    config = options(data, folder, [*overrides, f"stages.ssl.epochs={epochs}"])
    rows = [row for row in read_rows(run(config) / METRICS) if "save_wait" in row and row["step"] > FIRST_STEPS]
    seconds = [10 * row["step_seconds"] for row in rows]
    return sum(seconds), statistics.fmean(row["save_wait"] for row in rows)


def small(folder: Path) -> list[str]:
    """Options of a tiny run."""
    tiny = [*smoke.NARROW, "image_size=32", "canvas_size=32", "stages.ssl.batch_size=8", "checkpoint_every=20"]
    return [*tiny, "--saves", "1", "--repeat", "1"]


def create_parser() -> argparse.ArgumentParser:
    """Its options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="options of the recipe, such as checkpoint_every=20")
    parser.add_argument("--saves", type=int, default=3)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", type=Path)
    smoke.add_option(parser)
    return parser


def main() -> None:
    """Measure, print and write."""
    arguments = smoke.parse(create_parser(), small)
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch, "scenes")
        with smoke.light_processes():
            write_scenes(data, train=IMAGES, val=1, size=64)
        wanted = options(data, Path(scratch), arguments.overrides)
        every, batch_size = wanted.checkpoint_every, wanted.stages[0].batch_size
        epochs = (arguments.saves * every + every // 2) * batch_size / IMAGES
        ratios, shares = [], []
        for number in range(arguments.repeat):
            times = {}
            for kind, interval in (("with", every), ("without", 10**6)):
                folder = Path(scratch, f"{kind}{number}")
                times[kind] = train(data, folder, epochs, [*arguments.overrides, f"checkpoint_every={interval}"])
            ratios.append(times["with"][0] / times["without"][0])
            shares.append(times["with"][1])
            print(f"save_wait {shares[-1]:.2%}, slowdown {ratios[-1]:.3f}", flush=True)
        size = max(path.stat().st_size for path in Path(scratch).glob("with0/checkpoints/*/state.pt"))
    figures = {
        "save_wait": statistics.median(shares),
        "slowdown": statistics.median(ratios),
        "megabytes": size / 1e6,
        "every": every,
    }
    for name, value in figures.items():
        print(f"{name:10s} {value:.4f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    with smoke.ended_by_sigterm():
        main()
