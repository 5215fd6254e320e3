"""What semantic guidance costs: time of a contrastive step with guided and with unguided crops, taken in turns.

Both do all of a step: two views on the device, forward, backward, optimizer, momentum encoder. Reported are
medians and their ratio; the machine may be shared, so the two are interleaved.

    python tests/benchmarks/step.py [--recipe small] [--batch 64] [--repeats 15] [--json figures.json] [KEY=VALUE ...]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import smoke
import torch
from rich.console import Console
from rich.table import Table

from cluster.metrics import StepMeter
from cluster.runtime import LocalRuntime
from data_pipeline.scenes import write_scenes
from pretrain.config import PretrainConfig
from pretrain.run import resolve
from pretrain.trainer import Trainer

WARM_TURNS = 2


class Turns(StepMeter):
    """Makes every other step of a run a guided one, times both kinds, and ends the run after so many turns."""

    def __init__(self, runtime: LocalRuntime, config: PretrainConfig, count: int) -> None:
        super().__init__(runtime)
        self.runtime, self.heatmap, self.method, self.count = (
            runtime,
            config.ssl.heatmap,
            config.ssl.heatmap.method,
            count,
        )
        self.times: dict[str, list[float]] = {"guided": [], "unguided": []}

    def data_arrived(self) -> None:
        """A step begins."""
        super().data_arrived()
        self.kind = min(self.times, key=lambda kind: len(self.times[kind]))
        self.heatmap.method = self.method if self.kind == "guided" else "none"
        self.begin = time.perf_counter()

    def step_done(self, num_samples: int) -> None:
        """It has ended."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times[self.kind].append(time.perf_counter() - self.begin)
        if len(self.times["unguided"]) == self.count:
            self.runtime.stop()
        super().step_done(num_samples)


def small(folder: Path) -> list[str]:
    """Options of a tiny run."""
    return ["--batch", "4", "--repeats", "2", *smoke.NARROW]


def create_parser() -> argparse.ArgumentParser:
    """Its options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="options of the recipe")
    parser.add_argument("--recipe", default="small")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    smoke.add_option(parser)
    return parser


def main() -> None:
    arguments = smoke.parse(create_parser(), small)
    torch.set_num_threads(arguments.threads)

    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "scenes"
        with smoke.light_processes():
            write_scenes(data, train=max(arguments.batch, 8), val=1, size=64)
        options = [f"data={data}", f"run={scratch}/run", "workers=1", "launcher=local", "ssl.heatmap.warmup=0",
                   "only=[ssl]", f"stages.ssl.batch_size={arguments.batch}", "stages.ssl.epochs=100000",
                   "log_every=100000", "picture_every=100000"]  # fmt: skip
        config = resolve(arguments.recipe, [*options, *arguments.overrides])
        method, runtime = config.ssl.heatmap.method, LocalRuntime()
        trainer = Trainer(runtime, config)
        turns = Turns(runtime, config, WARM_TURNS + arguments.repeats)
        trainer.meter = turns
        trainer.train()
        trainer.close()

    medians = {name: statistics.median(seconds[WARM_TURNS:]) for name, seconds in turns.times.items()}
    cost = medians["guided"] / medians["unguided"] - 1
    heatmap = config.ssl.heatmap
    table = Table("crops", "ms a step", "images/s", title=f"{arguments.recipe}: {config.codec.backbone}, {config.image_size} px, "
                  f"batch {arguments.batch}, {method} of {heatmap.layer} at {heatmap.size} px")  # fmt: skip
    for name, seconds in medians.items():
        table.add_row(name, f"{1000 * seconds:.1f}", f"{arguments.batch / seconds:.1f}")
    console = Console(width=110)
    console.print(table)
    console.print(f"guidance costs {100 * cost:.1f} % of an unguided step")
    if arguments.json:
        figures = {"guided_seconds": medians["guided"], "unguided_seconds": medians["unguided"], "cost": cost}
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
