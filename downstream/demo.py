"""The demo: the whole path on made-up scenes, on two cores without a GPU, ending with a report.

    OUT/
      scenes/             the data set
      runs/pretrain       pretraining
      codec               the exported codec
      runs/...            classification on its streams at several rates, and on pixels decoded from JPEG
      report.html

Every step leaves its result on disk and is passed over when it is there, so a demo that was stopped goes on.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from rich.console import Console

from cluster.runtime import on_sigterm
from data_pipeline.scenes import write_scenes
from downstream import finetune
from downstream.errors import TaskError
from downstream.evaluation.report import Report
from downstream.results import RESULTS
from pretrain.export import export
from pretrain.run import resolve, run

TRAIN, VAL, SIZE, SEED = 2000, 400, 64, 0
WORKERS = 2
MINUTES = 28  # measured on two cores with AVX2 alone, in float32
RATES = (0.0, 1.0)
JPEG_QUALITIES = (1, 20)


def run_demo(
    out: Path,
    console: Console,
    *,
    train: int = TRAIN,
    val: int = VAL,
    pretraining: Sequence[str] = (),
    classification: Sequence[str] = (),
) -> Path:
    """Run what is not done yet in `out`; returns the report's path.

    Args:
        train, val: scenes to draw.
        pretraining, classification: further `key=value` options of the two.
    """
    report = out / "report.html"
    console.print(
        f"The demo takes about {MINUTES} minutes on two cores, less where they compute in bfloat16; the report will be "
        f"{report}. Stopped, it goes on where it was.",
        markup=False,
    )
    timings = Timings(out / "timings.json", console)
    data, folder, codec = out / "scenes", out / "runs" / "pretrain", out / "codec"
    commands = [f"dicm data scenes {data} --train {train} --val {val} --size {SIZE}"]
    timings.step("draw scenes", data, lambda: write_scenes(data, train=train, val=val, size=SIZE, seed=SEED))

    overrides = [f"data={data}", f"run={folder}", f"workers={WORKERS}", *pretraining]
    commands += [f"dicm pretrain demo {' '.join(overrides)}", f"dicm export {folder} {codec}"]
    timings.step("pretrain", folder / "summary.json", partial(run, resolve("demo", overrides)))
    timings.step("export", codec / "README.md", partial(export, folder, codec))

    inputs = {
        **{f"rate_{rate:g}": [f"rate={rate:g}"] for rate in RATES},
        **{f"jpeg_{quality}": ["input=pixels", f"anchor=jpeg:{quality}"] for quality in JPEG_QUALITIES},
    }
    results = []
    for name, options in inputs.items():
        folder = out / "runs" / name
        # In this process: starting Ray would take longer than the training.
        overrides = [
            f"codec={codec}",
            *options,
            f"data={data}",
            f"run={folder}",
            "launcher=local",
            "workers=1",
            "epochs=3",
            "lr=0.05",
            *classification,
        ]
        commands.append(f"dicm finetune classification {' '.join(overrides)}")
        task = finetune.resolve("classification", overrides)
        timings.step(f"classify, {name}", folder / RESULTS, partial(finetune.run, task))
        results.append(json.loads((folder / RESULTS).read_text()))

    pages = Report(
        "dicm demo: made-up scenes",
        results,
        out / "runs" / "pretrain",
        [codec],
        data,
        timings.seconds,
        commands,
    )
    pages.write(report)
    for row in results:
        name = row["anchor"] or f"rate {row['rate']:g}"
        line = f"  {name:<10} {row['bpp']:.3f} bpp  {100 * row['top1']:.1f} % top-1"
        console.print(line, highlight=False, markup=False)
    console.print(f"report: {report}", style="bold", markup=False, soft_wrap=True)
    return report


class Timings:
    """Runs the steps of the demo that are not done, and keeps the time that each took."""

    def __init__(self, path: Path, console: Console):
        self.path, self.console = path, console
        self.seconds: dict[str, float] = json.loads(path.read_text()) if path.is_file() else {}

    def step(self, name: str, result: Path, work: Callable[[], object]) -> None:
        """Do `work` unless `result` is there."""
        if result.exists():
            return
        self.console.print(name, style="bold", markup=False)
        start = time.perf_counter()
        told = threading.Event()
        try:
            with on_sigterm(told.set):
                work()
        finally:  # a step that was interrupted and goes on later counts both times
            self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - start, 1)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(self.seconds, indent=2) + "\n")
        if not result.exists():
            raise TaskError(f"{name} was stopped before {result} was written; the same command goes on from there")
        if told.is_set():  # by a notice that came when there was nothing left to stop
            raise TaskError(f"stopped after {name}; the same command goes on from there")
