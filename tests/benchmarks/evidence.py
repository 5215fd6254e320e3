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
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from cluster.files import write_whole
from downstream.errors import TaskError
from downstream.evaluation.points import points_of, resolve
from downstream.evaluation.rate_accuracy import Curve, curves_of, deltas, rate_at
from downstream.evaluation.report import report_of_sweeps
from downstream.evaluation.sweep import is_done
from downstream.evaluation.sweep_report import read_sweeps, savings_at

DONE = "done"  # in the folder of a sweep that has all its points
GRACE_SECONDS = 180  # for a step that was told to stop
TRANSFORM_EPOCHS = 10  # of gate and transform by themselves, before a student of a sweep has its epochs
RATES = "rates=0,0.25,0.5,0.75,1"
# Both sizes where curves cross: below about 0.2 bpp a picture of half the sides is the better one.
HEVC = "hevc:51,hevc:47,hevc:42,hevc:51@0.5,hevc:47@0.5,hevc:42@0.5"
OTHERS = "jpeg:5,jpeg:20,webp:0,webp:20,avif:10,avif:30"
# Options of pretrainings without a part, or with one that the recipe leaves out. Those that change the codec stage alone
# start from the whole one's backbone, and the task from its network on clean pixels.
ABLATIONS: dict[str, list[str]] = {
    "without gated convolutions": ["codec.rgc_orders=[0,0,0]"],
    "without ViT hyperprior": ["codec.hyperprior=conv"],
    "without context model": ["codec.context=none"],
    "rates not balanced": ["stages.codec.balance=0"],
    "without the KLT to begin with": ["stages.codec.klt=false"],
    "fidelity at f3 alone": ["stages.codec.distortion=1", "stages.codec.features=[0,0,0]"],
    "with redundancy elimination": ["codec.redundancy=true"],
    "without guidance": ["ssl.heatmap.method=none"],
    "without contrastive stage": ["only=[codec]"],
}
OWN_BACKBONE = ("without guidance", "without contrastive stage")
STAGES = {"with redundancy elimination": "redundancy,codec"}  # the stage joint would change the backbone


@dataclass(frozen=True)
class Study:
    """One data set and one task on it.

    Attributes:
        folder: below the data root; None draws scenes.
        layout: of `dicm data build`.
        recipe: of the fine-tune.
        pretrain, options, anchor_options: further options of pretraining, of the fine-tune on clean pixels (sweeps
            have them from there), and of a sweep's points on pixels.
        epochs: of the stages of pretraining, at scale 1.
        task_epochs, adapt_epochs: at scale 1.
        anchors, others: of the sweep, and of one that comes behind what tells more.
        gates: of the sweep, for a task that reads latents.
        ablate: whether ablations are measured here.
        codec_of: another study, whose codec this one reads.
    """

    name: str
    folder: str | None
    layout: str
    task: str
    recipe: str
    pretrain: list[str] = field(default_factory=list)
    epochs: dict[str, float] = field(default_factory=dict)
    options: list[str] = field(default_factory=list)
    anchor_options: list[str] = field(default_factory=list)
    task_epochs: int = 10
    adapt_epochs: int = 5
    anchors: str = HEVC
    others: str = ""
    gates: str = ""
    ablate: bool = False
    codec_of: str | None = None


# Boxes and masks are found at f3, classes told at layer4.
FINDING = ["stages.codec.distortion=3", "stages.codec.features=[1,0.3,0.2]", "stages.codec.rates=[24,8,2.5,0.8,0.25]"]
CLASSIFICATION = {"task": "classification", "recipe": "classification",
                  "anchor_options": ["train_head=true", "cache=bitstreams", "cache_views=2"]}  # fmt: skip
STUDIES = [
    Study("tiny_imagenet20", "tiny_imagenet20", "imagefolder", **CLASSIFICATION, task_epochs=20, adapt_epochs=5,
          epochs={"ssl": 40, "codec": 12}, others=OTHERS, ablate=True),
    Study("clothing", "clothing", "imagefolder", **CLASSIFICATION, task_epochs=20, adapt_epochs=5,
          pretrain=["image_size=128", "canvas_size=144"], epochs={"ssl": 40, "codec": 16}),
    Study("camvid", "camvid_as_cityscapes", "cityscapes", "semantic_segmentation", "semantic_segmentation_small",
          pretrain=["image_size=128", "canvas_size=192", "codec.context=none", "stages.ssl.batch_size=64"],
          epochs={"ssl": 200, "codec": 200}, task_epochs=60, adapt_epochs=30, gates="dynamic,static:32,static:16,variance:32,variance:16",
          anchors="hevc:51,hevc:47,hevc:42,hevc:37,hevc:32"),
    Study("raccoon", "raccoon_voc", "voc", "detection", "detection_small",
          options=["val_split=test", "max_side=320", "voc07=true"],
          pretrain=["image_size=128", "canvas_size=144", *FINDING], epochs={"ssl": 120, "codec": 120}, task_epochs=24,
          adapt_epochs=12, anchors="hevc:51,hevc:47,hevc:42,hevc:37"),
    Study("scenes_boxes", None, "scenes", "detection", "detection_small",
          options=["anchors=[8,16,32,64,128]"], epochs={"ssl": 20, "codec": 20},
          pretrain=["image_size=96", "canvas_size=96", *FINDING], task_epochs=10, adapt_epochs=5,
          anchors="hevc:51,hevc:47,hevc:42,hevc:37"),
    Study("scenes_masks", None, "scenes", "instance_segmentation", "instance_segmentation_small",
          options=["anchors=[8,16,32,64,128]"], epochs={"ssl": 20, "codec": 20},
          pretrain=["image_size=96", "canvas_size=96", *FINDING], task_epochs=10, adapt_epochs=5, codec_of="scenes_boxes",
          anchors="hevc:51,hevc:47,hevc:42,hevc:37"),
]  # fmt: skip


@dataclass(frozen=True)
class Step:
    """A command of `dicm` and the file that says that it is done."""

    name: str
    command: list[str]
    result: Path

    @property
    def typed(self) -> str:
        """The command as a shell reads it."""
        return shlex.join(["dicm", *self.command])

    @property
    def work(self) -> str:
        """What of the command its result depends on."""
        return shlex.join(part for part in self.command if not part.startswith("parallel="))


def main() -> None:
    # Small networks on CPUs: a process a core does nearly twice the work of one process on two cores.
    parallel = 1 if torch.cuda.is_available() else len(os.sched_getaffinity(0))
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
    arguments = parser.parse_args()

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


def plan(studies: list[Study], arguments: argparse.Namespace) -> Iterator[Step]:
    """All steps, the most telling first."""
    for study in studies:
        yield data_step(study, arguments)
        yield from codec_steps(study, arguments, "whole", first_codec(studies, study, arguments, 0), 0)
        yield sweep_step(study, arguments, "whole", "dicm", 0)
    if not arguments.no_ablations:
        for study in studies:
            for label, options in ABLATIONS.items() if study.ablate else ():
                if label not in OWN_BACKBONE:
                    start = place_of(study, arguments, "whole", 0) / "codec"
                    stages = f"only=[{STAGES.get(label, 'codec')}]"
                    options = [*options, f"init={start}", "init_parts=[backbone]", stages]
                yield from codec_steps(study, arguments, label, options, 0)
                yield sweep_step(study, arguments, label, label, 0)
    for study in studies:
        if study.others:
            yield sweep_step(study, arguments, "whole", "dicm", 0, others=True)
    for seed in range(1, arguments.seeds):
        for study in studies:
            yield from codec_steps(study, arguments, "whole", first_codec(studies, study, arguments, seed), seed)
            yield sweep_step(study, arguments, "whole", "dicm", seed)


def first_codec(studies: list[Study], study: Study, arguments: argparse.Namespace, seed: int) -> list[str]:
    """Options with which a later study's pretraining begins with the first one's codec, or with its backbone alone."""
    if study is studies[0]:
        return []
    codec = place_of(studies[0], arguments, "whole", seed) / "codec"
    parts = "backbone" if study.gates else "backbone,compression"  # a gated latent has no context model
    return [f"init={codec}", f"init_parts=[{parts}]", "only=[codec]"]


def shards_of(study: Study, arguments: argparse.Namespace) -> Path:
    return arguments.out / "data" / (study.folder or f"scenes{study.pretrain[0].partition('=')[2]}")


def data_step(study: Study, arguments: argparse.Namespace) -> Step:
    out = shards_of(study, arguments)
    if study.folder is None:
        size = study.pretrain[0].partition("=")[2]
        command = ["data", "scenes", str(out), "--train", "3000", "--val", "300", "--size", size]
    else:
        command = ["data", "build", study.layout, str(arguments.data / study.folder), str(out)]
    return Step(f"{study.name}: data", command, out / "dataset.json")


def codec_steps(
    study: Study, arguments: argparse.Namespace, variant: str, options: list[str], seed: int
) -> Iterator[Step]:
    """Pretraining, export, and the task on clean pixels."""
    place, data = place_of(study, arguments, variant, seed), shards_of(study, arguments)
    codec = (arguments.out / (study.codec_of or study.name) / place.name) / "codec"
    epochs = [f"stages.{name}.epochs={count * arguments.scale:g}" for name, count in study.epochs.items()]
    run_options = [f"data={data}", f"run={codec.parent / 'pretrain'}", "launcher=local", "workers=1", f"seed={seed}"]
    name = f"{study.name}: {variant}, seed {seed}"
    pretraining = ["pretrain", "evidence", *run_options, *study.pretrain, *epochs, *options]
    yield Step(f"{name}, pretraining", pretraining, codec.parent / "pretrain" / "summary.json")
    yield Step(f"{name}, export", ["export", str(codec.parent / "pretrain"), str(codec)], codec / "README.md")
    base = base_of(study, arguments, variant, seed)
    if variant in ABLATIONS and variant not in OWN_BACKBONE:
        return
    length = [f"epochs={max(1, round(study.task_epochs * arguments.scale))}"]
    if study.task == "semantic_segmentation":
        length += ["gate=none", f"transform_epochs={max(1, round(TRANSFORM_EPOCHS * arguments.scale))}"]
    yield Step(
        f"{name}, clean pixels",
        ["finetune", study.recipe, f"codec={codec}", f"data={data}", f"run={base}", "input=pixels", "launcher=local",
         f"seed={seed}", *length, *study.options],
        base / "results.json",
    )  # fmt: skip


def sweep_step(
    study: Study, arguments: argparse.Namespace, variant: str, label: str, seed: int, others: bool = False
) -> Step:
    """The sweep of one codec; anchors go with the whole one alone, `others` without the codec into the same folder."""
    out = place_of(study, arguments, variant, seed) / f"sweep_{study.task}"
    command = [
        "evaluate", study.task, f"runs={base_of(study, arguments, variant, seed)}", f"out={out}", f"label={label}", RATES,
        f"epochs={max(1, round(study.adapt_epochs * arguments.scale))}", f"parallel={arguments.parallel}",
    ]  # fmt: skip
    if variant == "whole":
        command += [f"anchors={study.others}", "streams=false"] if others else [f"anchors={study.anchors}"]
        command += [f"anchor_options=[{','.join(study.anchor_options)}]"] if study.anchor_options else []
    else:
        command += ["protocols=adapted"]
    if variant in ABLATIONS and variant not in OWN_BACKBONE:
        command += [f"codec={out.parent / 'codec'}"]
    if study.gates:
        command += [f"gates={study.gates}"]
    name = f"{study.name}: {variant}, seed {seed}, sweep{' of other codecs' if others else ''}"
    return Step(name, command, out / (f"{DONE}_others" if others else DONE))


def place_of(study: Study, arguments: argparse.Namespace, variant: str, seed: int) -> Path:
    return arguments.out / study.name / f"{variant.replace(' ', '_')}_{seed}"


def base_of(study: Study, arguments: argparse.Namespace, variant: str, seed: int) -> Path:
    """The task on clean pixels that a sweep starts from."""
    if variant in ABLATIONS and variant not in OWN_BACKBONE:
        variant = "whole"
    return place_of(study, arguments, variant, seed) / f"clean_{study.task}_{variant.replace(' ', '_')}_{seed}"


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
        child.send_signal(signal.SIGTERM)
        try:
            child.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        return False
    finally:
        record.end(step, time.monotonic() - start)
    if child.returncode:
        raise SystemExit(f"step {step.name} failed with exit code {child.returncode}")
    if step.result.name.startswith(DONE) and all_done(step):
        step.result.touch()
    return step.result.exists()


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
        sweeps = [folder for folder in sweeps if (folder / "results.json").is_file()]
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
        for against, least in (("dicm variance 32", 15.8), ("hevc", 80.0)):
            if "dicm static 32" in adapted and against in adapted:
                saved = savings_at(adapted["dicm static 32"], adapted[against])
                shown = (
                    "no accuracy that both reach"
                    if saved is None
                    else f"{100 * saved[1]:.1f} % at {100 * saved[0]:.1f} %"
                )
                yield f"{name}: bits that static 32 saves against {against}", f"at least {least} %", shown
        for label in ABLATIONS:
            if label in adapted and "dicm" in adapted:
                ((_, gain),) = deltas([adapted["dicm"], adapted[label]], "dicm")
                shown = "curves share no accuracy" if gain.rate is None else f"{100 * gain.rate:+.1f} %"
                yield f"{name}: BD-rate {label} against the whole", "above 0 %", shown


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
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    try:
        main()
    except TaskError as error:
        raise SystemExit(f"error: {error}") from error
