"""The demo: the whole path on made-up scenes, on two cores without a GPU, ending with a report.

    OUT/
      scenes/             the data set
      runs/pretrain       pretraining
      codec               the exported codec
      runs/...            linear probes on its streams at several rates, on decoded JPEG, AVIF and HEVC, on clean pixels
      report.html

Every step leaves its result on disk and is passed over when it is there, so a demo that was stopped goes on. Probes
train one layer on what the same pretrained network makes of each input: it takes seconds, and all sides get the same.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import timm
import torch
from rich.console import Console

from cluster.runtime import on_sigterm
from data_pipeline.scenes import write_scenes
from downstream import finetune
from downstream.errors import TaskError
from downstream.evaluation.anchors import create_anchor
from downstream.evaluation.report import Report
from downstream.results import RESULTS
from pretrain.codec.precision import autocast
from pretrain.export import export
from pretrain.run import resolve, run

TRAIN, VAL, SIZE, SEED = 1500, 600, 64, 0
WORKERS = 2
RATES = (0.0, 0.5, 1.0)
ANCHORS = ("jpeg:1", "jpeg:20", "avif:1", "avif:20", "hevc:51", "hevc:42")  # each pair brackets the codec's rates
# How long the demo takes: what the machine's speed decides, in training images of ResNet-18, and what it hardly does.
PROBED_IMAGES, OTHER_SECONDS = 28_000, 100


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
        f"By a probe of this machine, the demo takes about {estimate_minutes()} minutes; the report will be {report}. "
        "Stopped, it goes on where it was.",
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

    inputs = {f"rate_{rate:g}": [f"rate={rate:g}"] for rate in RATES}
    for anchor in _usable(ANCHORS, console):
        inputs[anchor.replace(":", "_")] = ["input=pixels", f"anchor={anchor}"]
    inputs["clean"] = ["input=pixels"]
    results = []
    for name, options in inputs.items():
        folder = out / "runs" / name
        # In this process: starting Ray would take longer than the training.
        overrides = [f"codec={codec}", *options, f"data={data}", f"run={folder}", "launcher=local", "workers=1"]
        overrides += ["probe=true", *classification]
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
        name = row["anchor"] or (f"rate {row['rate']:g}" if row["input"] == "streams" else "clean")
        rates = "" if name == "clean" else f"{row['bpp']:.3f} bpp, {row['bpp_payload']:.3f} of payload"
        console.print(f"  {name:<8} {100 * row['top1']:4.1f} % top-1  {rates}", highlight=False, markup=False)
    console.print(f"report: {report}", style="bold", markup=False, soft_wrap=True)
    return report


def _usable(anchors: Sequence[str], console: Console) -> list[str]:
    """The anchors that this machine can encode; what is left out is told."""
    usable = []
    for anchor in anchors:
        try:
            create_anchor(anchor)
        except TaskError as error:
            console.print(f"left out: {error}", markup=False)
        else:
            usable.append(anchor)
    return usable


def estimate_minutes() -> int:
    """Minutes that the demo will take here, from a few training steps (two seconds, or four on a slow machine)."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network, images = timm.create_model("resnet18").to(device), torch.rand(32, 3, SIZE, SIZE, device=device)
    seconds = []
    for _ in range(4):  # the first prepares kernels
        start = time.perf_counter()
        with autocast(device, "bf16"):
            loss = network(images).float().square().mean()
        loss.backward()
        loss.item()
        seconds.append(time.perf_counter() - start)
    images_per_second = len(images) / min(seconds[1:])
    return max(1, round((OTHER_SECONDS + PROBED_IMAGES / images_per_second) / 60))


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
