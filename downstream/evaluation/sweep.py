"""Sweeps: a task over codecs and rates, in one tidy table.

    OUT/
      sweep.yaml                                 the options
      points/RUN/hevc-42@0.5-adapted/            a fine-tune for every point, with its results and costs.json
      results.csv  results.json                  a row for every point that is done

Every point starts from a base run, the task fine-tuned on clean pixels. Two protocols:

    frozen     that very network reads what a codec leaves of the image: one head for all
    adapted    it is fine-tuned on what that codec leaves, for the same epochs with each codec

Networks that read gated latents have no common head; they are trained with the base run's as their teacher, and count
as adapted. A sweep that was stopped goes on where it was, one that is given more points adds them.
"""

from __future__ import annotations

import csv
import io
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import MISSING
from torch.utils.flop_counter import FlopCounterMode

from cluster.errors import is_ours
from cluster.files import write_whole
from cluster.recipes import change_config, config_diff, load_config, load_saved, save_config
from downstream import finetune
from downstream.channels import select_channels
from downstream.errors import StoppedError, TaskError
from downstream.evaluation.anchors import check_anchor
from downstream.results import read_results
from downstream.tasks import task_class
from downstream.tasks.semantic_segmentation import TEACHER
from pretrain.codec.feature_codec import FeatureCodec

PROTOCOLS = ("frozen", "adapted")
POINTS, COSTS, OPTIONS = "points", "costs.json", "sweep.yaml"
TABLE = ("results.csv", "results.json")
COST_IMAGES, COST_REPEATS = 8, 3
COLUMNS = (
    "task", "data", "run", "seed", "codec", "quality", "protocol", "metric", "value", "bpp", "bpp_payload", "images",
    "encode_ms", "decode_ms", "encode_macs", "decode_macs", "train_seconds",
)  # fmt: skip
DEFAULT_RATES = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass
class SweepConfig:
    """What a sweep covers."""

    task: str = MISSING
    runs: list[str] = field(default_factory=list)  # complete fine-tunes on clean pixels, one for each seed or codec
    out: str = "runs/sweep"  # running again with the same one goes on
    anchors: list[str] = field(default_factory=list)  # names, or NAME:QUALITY[@SCALE]
    qualities: list[str] = field(default_factory=list)  # for anchors that were given without one: 37, 42@0.5
    anchor_weights: str = "zoo"  # of models of CompressAI's; or a folder with NAME-QUALITY.safetensors
    streams: bool = True  # the runs' own codecs too
    rates: list[float] = field(default_factory=list)  # of a codec with a range of them; five by default
    gates: list[str] = field(default_factory=list)  # of tasks that read latents: dynamic, none, static:N, variance:N
    protocols: list[str] = field(default_factory=lambda: list(PROTOCOLS))
    epochs: int = 5  # protocol adapted
    options: list[str] = field(default_factory=list)  # further options of every adapted run: lr=0.01
    against: str = "hevc"  # the anchor that BD-rates are relative to
    parallel: int = 1  # points at a time; they share the cores, or the GPU

    def validate(self) -> None:
        """Refuse what cannot work, before any work starts (TaskError)."""
        task_class(self.task)
        if not self.runs:
            raise TaskError("runs is empty; name complete runs of `dicm finetune ... input=pixels`: runs=a,b")
        for protocol in self.protocols:
            if protocol not in PROTOCOLS:
                raise TaskError(f"protocols={protocol} is unknown; use one of {', '.join(PROTOCOLS)}")
        for key in ("epochs", "parallel"):
            if getattr(self, key) < 1:
                raise TaskError(f"{key}={getattr(self, key)} is impossible; it must be at least 1")
        for text in self.specs():
            check_anchor(text)
        for rate in self.rates:
            if not 0 <= rate <= 1:
                raise TaskError(f"rates={rate:g} is impossible; rates lie in 0..1")
        for text in self.gates:
            gate_options(text)
        if not self.specs() and not self.streams:
            raise TaskError("streams=false without anchors leaves nothing to measure; name anchors=jpeg:10,jpeg:30")

    def specs(self) -> list[str]:
        """Every anchor with every quality."""
        bare = [name for name in self.anchors if ":" not in name]
        if bare and not self.qualities:
            raise TaskError(f"anchors={bare[0]} has no quality; give qualities=40,47 or anchors={bare[0]}:40")
        pairs = [f"{name}:{quality}" for name in bare for quality in self.qualities]
        return [*(name for name in self.anchors if ":" in name), *pairs]


@dataclass(frozen=True)
class Point:
    """A network on what one codec leaves of an image, at one rate.

    Attributes:
        run: base run.
        codec, quality: as tables name them: "hevc" and "42@0.5"; "dicm" and a rate; "dicm static" and its channels.
        options: of the fine-tune, over those of the base run.
        waits_for: name of the point whose gate chooses this one's channels.
    """

    run: str
    codec: str
    quality: str
    protocol: str
    options: tuple[str, ...]
    waits_for: str | None = None

    @property
    def name(self) -> str:
        """Of its folder, in that of its base run."""
        return "-".join([self.codec.replace(" ", "_"), *([self.quality] if self.quality else []), self.protocol])


@dataclass
class Progress:
    """What a sweep tells while it runs."""

    done: int
    total: int
    point: Point
    row: dict[str, Any]


def resolve(task: str, overrides: list[str]) -> SweepConfig:
    """The options of `dicm evaluate TASK key=value ...`, checked (RecipeError, TaskError)."""
    return load_config(SweepConfig, None, [f"task={task}", *overrides], Path())


def sweep(config: SweepConfig, tell: Callable[[Progress], None] = lambda _: None) -> list[dict[str, Any]]:
    """Measure every point that is not done, in `parallel` processes; returns the rows of all, as the table has them.

    Args:
        tell: is called when a point is done.

    Raises:
        TaskError: a base run is of no use; points failed, after all others were measured.
    """
    out = Path(config.out)
    points = points_of(config)
    _check_folder(config, out)
    save_config(config, out / OPTIONS)
    failures: list[str] = []
    for wave in (
        [point for point in points if point.waits_for is None],
        [point for point in points if point.waits_for is not None],
    ):
        failures += _measure(config, wave, out, points, tell)
    rows = collect(out)
    write_table(out, rows)
    if failures:
        raise TaskError(f"{len(failures)} of {len(points)} points failed, the others are in {out}; {failures[0]}")
    return rows


def points_of(config: SweepConfig) -> list[Point]:
    """The points of a sweep (TaskError: a base run is missing, incomplete or not on clean pixels)."""
    names = [Path(run).name for run in config.runs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise TaskError(f"runs has two folders called {twice[0]}; points are filed under these names, rename one")
    points: list[Point] = []
    for run in config.runs:
        base = _base(config.task, Path(run))
        points += [
            point for point in (*_anchor_points(config, run), *_own_points(config, run, base))
            if point.protocol in config.protocols
        ]  # fmt: skip
    return points


def _base(task: str, run: Path) -> Any:
    """The options of a base run."""
    base = finetune.load_run(run)
    if base.task != task:
        raise TaskError(f"runs={run} is a run of {base.task}, not of {task}")
    if base.input != "pixels" or base.anchor is not None:
        raise TaskError(
            f"runs={run} reads {base.anchor or base.input}; a sweep starts from runs with input=pixels alone"
        )
    read_results(run)
    return base


def _anchor_points(config: SweepConfig, run: str) -> Iterator[Point]:
    for text in config.specs():
        spec = check_anchor(text)
        options = ["input=pixels", f"anchor={spec}"]
        if config.anchor_weights != "zoo":
            options.append(f"anchor_weights={Path(config.anchor_weights) / f'{spec.name}-{spec.quality}.safetensors'}")
        quality = str(spec).partition(":")[2]
        for protocol in PROTOCOLS:
            yield Point(run, spec.name, quality, protocol, tuple(options))


def _own_points(config: SweepConfig, run: str, base: Any) -> Iterator[Point]:
    """Those of the run's own codec: its features, or gated latents."""
    if not config.streams:
        return
    rates: list[float | None] = [None]
    if base.codec is not None and FeatureCodec.from_pretrained(base.codec).config.rate_points > 1:
        rates = [*(config.rates or DEFAULT_RATES)]
    elif config.rates:
        raise TaskError(f"rates={config.rates}: the codec of {run} has one rate; leave them out")
    gates = config.gates or (["dynamic"] if config.task == "semantic_segmentation" else [])
    teacher = f"teacher={Path(run) / TEACHER}"
    for rate in rates:
        rated = ["input=streams", f"rate={'null' if rate is None else f'{rate:g}'}"]
        quality = "" if rate is None else f"{rate:g}"
        if not gates:
            for protocol in PROTOCOLS:
                yield Point(run, "dicm", quality, protocol, tuple(rated))
        for text in gates:
            options = [*rated, *gate_options(text), teacher]
            named = " ".join(part for part in (f"gate {text.replace(':', ' ')}", quality) if part)
            waits = (
                f"dicm-gate_dynamic{f'_{quality}' if quality else ''}-adapted" if text.startswith("static") else None
            )
            yield Point(run, "dicm", named.replace(" ", "_"), "adapted", tuple(options), waits)


def gate_options(text: str) -> list[str]:
    """Options of a gate: "dynamic", "none", "static:32" or "variance:32" (TaskError: another)."""
    name, _, count = text.partition(":")
    counted = name in ("static", "variance")
    if name not in ("dynamic", "none", "static", "variance") or counted != (count.isdecimal() and int(count) > 0):
        raise TaskError(f"gates={text} is unknown; use dynamic, none, static:N or variance:N, N channels")
    return [f"gate={name}", *([f"num_channels={count}"] if counted else [])]


def _check_folder(config: SweepConfig, out: Path) -> None:
    """Refuse to mix sweeps of different tasks, epochs or options in one folder (TaskError)."""
    path = out / OPTIONS
    if not path.is_file():
        return
    before = load_saved(SweepConfig, path)
    keys = {"task", "epochs", "options", "anchor_weights"}
    differences = [item for item in config_diff(before, config) if item.key.partition(".")[0] in keys]
    if differences:
        item = differences[0]
        raise TaskError(
            f"out={out} holds a sweep with other options ({item.key}: {item.before} there, {item.after} here); use "
            "another folder"
        )


def _measure(
    config: SweepConfig, points: list[Point], out: Path, all_points: list[Point], tell: Callable[[Progress], None]
) -> list[str]:
    """Measure points that are not done; what went wrong with those that failed."""
    waiting = [point for point in points if not (folder_of(out, point) / COSTS).is_file()]
    failures: list[str] = []
    if not waiting:
        return failures
    threads = max(1, len(os.sched_getaffinity(0)) // config.parallel)

    def count() -> int:
        return sum((folder_of(out, point) / COSTS).is_file() for point in all_points)

    if config.parallel == 1:
        for point in waiting:
            try:
                row = measure_point(config, point, out)
            except StoppedError:
                raise
            except TaskError as error:
                failures.append(f"{point.name}: {error}")
            else:
                tell(Progress(count(), len(all_points), point, row))
        return failures
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(config.parallel, len(waiting)), context, torch.set_num_threads, (threads,)) as pool:
        running = {pool.submit(measure_point, config, point, out): point for point in waiting}
        try:
            for future in as_completed(running):
                point = running[future]
                if (fault := future.exception()) is None:
                    tell(Progress(count(), len(all_points), point, future.result()))
                elif isinstance(fault, StoppedError) or not is_ours(fault):
                    raise fault
                else:
                    failures.append(f"{point.name}: {fault}")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return failures


def folder_of(out: Path, point: Point) -> Path:
    """The fine-tune of a point."""
    return out / POINTS / Path(point.run).name / point.name


def measure_point(config: SweepConfig, point: Point, out: Path) -> dict[str, Any]:
    """Fine-tune, or go on with it; measure costs; the row of the table."""
    folder = folder_of(out, point)
    options = point_config(config, point, folder)
    results = finetune.run(options)
    costs = costs_of(folder)
    facts = {"point": {**asdict(point), "options": list(point.options)}, "seed": options.seed, **costs}
    write_whole(folder / COSTS, json.dumps(facts, indent=2) + "\n")
    return row_of(facts, results)


def point_config(config: SweepConfig, point: Point, folder: Path) -> Any:
    """The options of a point's fine-tune: those of its base run, but for what the point names."""
    base, adapted = finetune.load_run(Path(point.run)), point.protocol == "adapted"
    options = list(point.options)
    if point.waits_for is not None:
        count = next(option for option in options if option.startswith("num_channels=")).partition("=")[2]
        chosen, _ = select_channels(folder.parent / point.waits_for, int(count), folder.parent / f"{point.name}.json")
        options = [option for option in options if not option.startswith("num_channels=")] + [f"channels={chosen}"]
    own: dict[str, Any] = {
        "run": str(folder), "launcher": "local", "workers": 1, "epochs": config.epochs if adapted else 0,
        "init": None if any(option.startswith("teacher=") for option in options) else point.run,
    }  # fmt: skip
    return change_config(replace(base, **own), [*options, *(config.options if adapted else [])])


def costs_of(folder: Path) -> dict[str, float | None]:
    """Time of one image by itself and multiply-adds, of a complete run: medians over a few validation images.

    `encode_ms` from pixels to bytes, `decode_ms` from bytes to the task's answer; multiply-adds a pixel of both,
    of convolutions and matrix products.
    """
    tuner = finetune.open_run(folder)
    tuner.logger.close()
    task = tuner.task
    task.model.eval()
    times: dict[str, list[float]] = {"encode": [], "decode": []}
    macs: dict[str, float] = {"encode": 0.0, "decode": 0.0}
    pixels = 0
    for image in task.examples(COST_IMAGES):
        stream = task.stream_of(image)

        def answer(stream: bytes = stream) -> None:
            task.predict(*task.receive_stream(stream))

        def encode(image: torch.Tensor = image) -> None:
            task.stream_of(image)

        for name, work in (("encode", encode), ("decode", answer)):
            work()
            for _ in range(COST_REPEATS):
                start = time.perf_counter()
                work()
                times[name].append(time.perf_counter() - start)
            with FlopCounterMode(display=False) as counter:
                work()
            macs[name] += counter.get_total_flops() / 2
        pixels += image.shape[-2] * image.shape[-1]
    return {
        **{f"{name}_ms": round(1e3 * statistics.median(values), 3) for name, values in times.items()},
        **{f"{name}_macs": round(count / pixels, 1) for name, count in macs.items()},
    }


def collect(out: Path) -> list[dict[str, Any]]:
    """The rows of all points that are done."""
    rows = []
    for path in sorted((out / POINTS).glob(f"*/*/{COSTS}")):
        facts = json.loads(path.read_text())
        rows += [row_of(facts, read_results(path.parent))]
    return rows


def row_of(facts: dict[str, Any], results: dict[str, Any]) -> dict[str, Any]:
    """A row of the table, by column, and behind these every metric under its own name."""
    metric = next(iter(results["metrics"]))
    point = facts["point"]
    row = {
        "task": results["task"], "data": Path(results["data"]).name, "run": Path(point["run"]).name,
        "codec": point["codec"], "quality": point["quality"], "protocol": point["protocol"], "metric": metric,
        "value": results[metric], "train_seconds": results["seconds"],
    }  # fmt: skip
    measured = {**facts, **results, **row}
    return {**{column: measured.get(column) for column in COLUMNS}, **{key: results[key] for key in results["metrics"]}}


def write_table(out: Path, rows: list[dict[str, Any]]) -> None:
    """OUT/results.csv and OUT/results.json."""
    buffer = io.StringIO()
    names = list(dict.fromkeys(key for row in rows for key in row)) or list(COLUMNS)
    writer = csv.DictWriter(buffer, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(out / TABLE[0], buffer.getvalue())
    write_whole(out / TABLE[1], json.dumps(rows, indent=2) + "\n")
