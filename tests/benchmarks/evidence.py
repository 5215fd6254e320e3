"""Rate and accuracy against every codec people know, from official layouts to a report, within a budget of time.

    python tests/benchmarks/evidence.py --data ROOT --budget-minutes 170 [--out evidence] [--only tiny_imagenet20 ...]
        [--seeds 3] [--scale 1.0] [--parallel N] [--no-ablations] [--json FILE]

ROOT holds data sets in the official layouts: tiny_imagenet20, clothing (ImageFolder), camvid_as_cityscapes, raccoon_voc;
those that are there are used, and scenes are drawn besides. For each: build shards, pretrain a codec without labels and
export it, fine-tune the task on clean pixels, sweep codecs and rates from there (`dicm evaluate`), with the first seed;
then ablations of the codec; then further seeds. The first data set's codec is pretrained from nothing; those of the
others begin with it (where channels are gated, with its backbone), and only their codec stage runs on their own images.
Every step is a command that can be typed, is passed over when its result is there (refused where another command made
it), and goes on where it was stopped: at the end of the budget the one that runs gets SIGTERM and saves.
The report tells what there is, `report.html` and `markdown/`.

Prints the claims with what was found. Figures in --json: `claims` (name -> wanted, found), `deltas` (study -> codec ->
BD-rate and BD-accuracy against HEVC intra), `seconds` by step.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import smoke
import torch
from evidence_plan import ABLATIONS, DONE, LATENTS, STUDIES, Step, Study, plan
from rich.console import Console
from rich.table import Table

from cluster.files import write_whole
from cluster.machine import num_cpus
from downstream.errors import TaskError
from downstream.evaluation.points import points_of, resolve
from downstream.evaluation.rate_accuracy import Curve, curves_of, deltas, rate_at
from downstream.evaluation.report import report_of_sweeps
from downstream.evaluation.sweep import is_done, sweep
from downstream.evaluation.sweep_report import read_sweeps, savings_at

GRACE_SECONDS = 180  # for a step that was told to stop


def small(folder: Path) -> list[str]:
    """Options of a tiny run: what comes before a study's last step is done, and the budget ends within that one."""
    study = next(study for study in STUDIES if study.name == "tiny_imagenet20")
    (folder / "sets" / str(study.folder)).mkdir(parents=True)
    places = ["--data", str(folder / "sets"), "--out", str(folder / "out")]
    options = [*places, "--budget-minutes", "0.02", "--parallel", "1"]
    options += ["--only", study.name, "--seeds", "1", "--no-ablations"]
    *done, sweep_step, _ = plan([study], create_parser().parse_args(options))
    for step in [*done, sweep_step]:
        step.result.parent.mkdir(parents=True, exist_ok=True)
    clean = done.pop().result.parent
    smoke.classification(clean, smoke.codec(folder), smoke.scenes(folder), "input=pixels")
    wanted = ["anchors=hevc:51,hevc:42", "epochs=1", "parallel=1", "protocols=adapted"]
    sweep(resolve(study.task, [f"runs={clean}", f"out={sweep_step.result.parent}", *wanted]))
    for step in [*done, sweep_step]:
        step.result.touch()
    return options


def create_parser() -> argparse.ArgumentParser:
    """Its options."""
    # Small networks on CPUs: a process a core does nearly twice the work of one process on two cores.
    parallel = 1 if torch.cuda.is_available() else num_cpus()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of data sets in their official layouts")
    parser.add_argument("--budget-minutes", type=float, required=True, help="after which no step runs on")
    parser.add_argument("--out", type=Path, default=Path("evidence"), help="folder for data, runs and the report")
    parser.add_argument("--only", nargs="*", choices=[study.name for study in STUDIES], help="studies; all by default")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0, help="of all numbers of epochs")
    parser.add_argument("--parallel", type=int, default=parallel, help="points of a sweep at a time; %(default)s here")
    parser.add_argument("--no-ablations", action="store_true")
    parser.add_argument("--json", type=Path, help="file for the figures")
    smoke.add_option(parser)
    return parser


def main() -> None:
    arguments = smoke.parse(create_parser(), small)
    deadline = time.monotonic() + 60 * arguments.budget_minutes
    studies = [
        study for study in STUDIES
        if (not arguments.only or study.name in arguments.only)
        and (study.folder is None or (arguments.data / study.folder).is_dir())
    ]  # fmt: skip
    record = Record(arguments.out / "steps.json")
    steps = list(plan(studies, arguments))
    for step in steps:
        record.check(step)
    for step in steps:
        if not step.result.exists() and not run(step, deadline, record):
            print(f"the budget ends in step {step.name}; the same command goes on there")
            break
    figures = tell(studies, arguments, [step.typed for step in steps if step.result.exists()])
    if arguments.json:
        arguments.json.write_text(json.dumps({**figures, "seconds": record.seconds}, indent=2) + "\n")


def run(step: Step, deadline: float, record: Record) -> bool:
    """Do a step; False where the budget ended before it was done, or it was stopped (SystemExit: it failed)."""
    print(f"== {step.name}\n{step.typed}", flush=True)
    if time.monotonic() >= deadline:
        return False
    record.begin(step)
    start = time.monotonic()
    child = subprocess.Popen(
        [sys.executable, "-m", "dicm", *step.command], env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    )
    try:
        child.wait(max(1.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return False
    finally:
        if child.poll() is None:  # also where this process is told to end
            stop(child)
        record.end(step, time.monotonic() - start)
    if child.returncode:
        raise SystemExit(f"step {step.name} failed with exit code {child.returncode}")
    if step.result.name.startswith(DONE) and all_done(step):
        step.result.touch()
    return step.result.exists()


def stop(child: subprocess.Popen) -> None:
    """SIGTERM, time to save, and then SIGKILL."""
    child.send_signal(signal.SIGTERM)
    try:
        child.wait(GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def all_done(sweep: Step) -> bool:
    """Whether a sweep has all its points: `dicm evaluate` that is told to stop ends without an error."""
    _, task, *overrides = sweep.command
    config = resolve(task, overrides)
    return all(is_done(Path(config.out), point) for point in points_of(config))


class Record:
    """The command of each step that was begun, and its seconds over all invocations."""

    def __init__(self, path: Path):
        self.path = path
        self.steps: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else {}

    @property
    def seconds(self) -> dict[str, float]:
        return {name: facts["seconds"] for name, facts in self.steps.items()}

    def check(self, step: Step) -> None:
        """Refuse (SystemExit) a result that another command made: of another --scale, or other data."""
        before = self.steps.get(step.name)
        if before is not None and before["work"] != step.work:
            raise SystemExit(
                f"{self.path.parent}: step {step.name} was begun with\n  {before['work']}\nand is\n  {step.work}\nnow; "
                "use another --out"
            )

    def begin(self, step: Step) -> None:
        self.steps.setdefault(step.name, {"work": step.work, "seconds": 0.0})
        self._write()

    def end(self, step: Step, seconds: float) -> None:
        self.steps[step.name]["seconds"] = round(self.steps[step.name]["seconds"] + seconds, 1)
        self._write()

    def _write(self) -> None:
        write_whole(self.path, json.dumps(self.steps, indent=2) + "\n")


def tell(studies: list[Study], arguments: argparse.Namespace, commands: list[str]) -> dict[str, Any]:
    """Write the report of what there is; print and return claims and BD figures."""
    folders: list[Path] = []
    found: dict[str, list[Curve]] = {}
    for study in studies:
        sweeps = sorted((arguments.out / study.name).glob("*/sweep_*"))
        # A further seed counts once it has all points: means over different seeds are no curve.
        sweeps = [
            folder for folder in sweeps
            if (folder / "results.json").is_file() and (folder.parent.name.endswith("_0") or (folder / DONE).exists())
        ]  # fmt: skip
        folders += sweeps
        if rows := read_sweeps(sweeps):
            found[study.name] = curves_of(rows)
    if not folders:
        return {"claims": {}, "deltas": {}}
    first = arguments.out / studies[0].name / "whole_0" / "pretrain"
    labels = [
        label for label in ABLATIONS if any(curve.codec == label for curves in found.values() for curve in curves)
    ]
    report = report_of_sweeps(folders, first if first.is_dir() else None, "hevc", labels, commands)
    report.write_html(arguments.out / "report.html")
    report.write_markdown(arguments.out / "markdown")
    claims = {name: (wanted, measured) for name, wanted, measured in claims_of(found)}
    table = Table("claim", "wanted", "found")
    for name, (wanted, measured) in claims.items():
        table.add_row(name, wanted, measured)
    Console(width=140).print(table)
    print(f"report: {arguments.out}/report.html")
    gains = {
        name: {
            f"{curve.codec}, {curve.protocol}": {
                "rate": gain.rate,
                "accuracy": gain.accuracy,
                "warnings": gain.warnings,
            }
            for curve, gain in deltas(curves, "hevc")
        }
        for name, curves in found.items()
    }
    return {"claims": claims, "deltas": gains}


def claims_of(found: dict[str, list[Curve]]) -> Iterator[tuple[str, str, str]]:
    """Each claim: its name, what is wanted, what was found."""
    wanted = {"tiny_imagenet20": -60, "clothing": -60, "raccoon": -30, "scenes_boxes": -30, "scenes_masks": -30}
    for name, curves in found.items():
        adapted = {curve.codec: curve for curve in curves if curve.protocol == "adapted"}
        gains = {curve.codec: gain for curve, gain in deltas(list(adapted.values()), "hevc")}
        if name in wanted and "dicm" in gains:
            rate = gains["dicm"].rate
            shown = "curves share no accuracy" if rate is None else f"{100 * rate:+.1f} %"
            yield f"{name}: BD-rate against HEVC intra", f"at most {wanted[name]} %", shown
        if name in ("tiny_imagenet20", "clothing") and {"dicm", "hevc"} <= adapted.keys():
            yield lowest_rate_claim(name, adapted["dicm"], adapted["hevc"])
        yield from savings_claims(name, adapted)
        for label in ABLATIONS:
            if label in adapted and "dicm" in adapted:
                ((_, gain),) = deltas([adapted["dicm"], adapted[label]], "dicm")
                shown = "curves share no accuracy" if gain.rate is None else f"{100 * gain.rate:+.1f} %"
                yield f"{name}: BD-rate {label} against the whole", "above 0 %", shown


def savings_claims(name: str, adapted: dict[str, Curve]) -> Iterator[tuple[str, str, str]]:
    """What static gates save: of each latent, against channels by variance and against pixels."""
    pixel_codec = next((study.pixel_codec.partition(":")[0] for study in STUDIES if study.name == name), "")
    for label, pixels in (("dicm", "hevc"), (LATENTS, pixel_codec)):
        ours = adapted.get(f"{label} static 32")
        for against, least in ((f"{label} variance 32", 15.8), (pixels, 80.0)):
            if ours is None or against not in adapted:
                continue
            saved = savings_at(ours, adapted[against])
            shown = f"{100 * saved[1]:.1f} % at {100 * saved[0]:.1f} %" if saved else "no accuracy that both reach"
            yield f"{name}: bits that {label} static 32 saves against {against}", f"at least {least} %", shown


def lowest_rate_claim(name: str, ours: Curve, hevc: Curve) -> tuple[str, str, str]:
    """At our lowest rate: our accuracy, and HEVC's at twice the bytes, from the rate at which it has ours."""
    lowest = ours.points[0]
    needed = rate_at(hevc, lowest.accuracy)
    if needed is not None:
        shown = f"{100 * lowest.accuracy:.1f} %; HEVC needs {needed / lowest.bpp:.2f} times the bytes for it"
    elif lowest.accuracy > hevc.frontier()[-1].accuracy:
        shown = f"{100 * lowest.accuracy:.1f} %, above all of HEVC's"
    else:
        least = hevc.frontier()[0]
        shown = f"{100 * lowest.accuracy:.1f} % at {lowest.bpp:.4f} bpp; HEVC's lowest {100 * least.accuracy:.1f} % at {least.bpp:.4f}"
    return f"{name}: top-1 at the lowest rate, against HEVC at twice the bytes", "at least 2 times", shown


if __name__ == "__main__":
    torch.set_num_threads(num_cpus())
    try:
        with smoke.ended_by_sigterm():
            main()
    except TaskError as error:
        raise SystemExit(f"error: {error}") from error
