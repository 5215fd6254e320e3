"""Sweeps: a task over codecs and rates, in one tidy table.

    OUT/
      sweep.yaml                                 the options
      points/RUN/hevc-42@0.5-adapted/            a fine-tune for every point, with its results and costs.json
      results.csv  results.json                  a row for every point that is done

Every point starts from a base run, the task fine-tuned on clean pixels. Two protocols:

    frozen     that very network reads what a codec leaves of the image: one head for all
    adapted    it is fine-tuned on what that codec leaves, for the same epochs with each codec

Networks that read gated latents have no common head; they are trained with the base run's as their teacher, and count
as adapted. A sweep that was stopped goes on where it was, one that is given more points adds them; what a point was
measured with, codec, data and options, must be as it was.
"""

from __future__ import annotations

import csv
import io
import json
import multiprocessing
import signal
import statistics
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from cluster.errors import is_ours
from cluster.local_workers import end_with_parent, sigterm_held_back
from cluster.machine import num_cpus
from cluster.options import ClusterConfig
from cluster.recipes import change_config, config_diff, load_saved, save_config
from cluster.runtime import on_sigterm
from downstream import finetune
from downstream.channels import select_channels
from downstream.errors import StoppedError, TaskError
from downstream.evaluation.points import Point, SweepConfig, data_of, points_of, run_name
from downstream.evaluation.rate_accuracy import check_seeds
from downstream.files import write_file
from downstream.results import RESULTS, read_results
from downstream.runs import load_run
from downstream.tasks import task_class

POINTS, COSTS, OPTIONS = "points", "costs.json", "sweep.yaml"
TABLE = ("results.csv", "results.json")
COST_IMAGES, COST_REPEATS = 8, 3
GRACE_SECONDS = 10  # that a process has to save what it measures
COLUMNS = (
    "task", "data", "run", "seed", "codec", "quality", "protocol", "metric", "value", "bpp", "bpp_payload", "images",
    "encode_ms", "decode_ms", "encode_macs", "decode_macs", "parallel", "train_seconds",
)  # fmt: skip


@dataclass
class Progress:
    """What a sweep tells while it runs."""

    done: int
    total: int
    point: Point
    row: dict[str, Any]


def sweep(config: SweepConfig, tell: Callable[[Progress], None] = lambda _: None) -> list[dict[str, Any]]:
    """Measure every point that is not done, in `parallel` processes; returns the rows of all, as the table has them.

    Args:
        tell: is called when a point is done.

    Raises:
        TaskError: a base run is of no use; points failed, after all others were measured.
        StoppedError: the sweep was told to stop.
    """
    out = Path(config.out)
    points = points_of(config)
    _check_options(config, points, out)
    _check_done(config, points, out)
    save_config(config, out / OPTIONS)
    failures: list[str] = []
    _told.clear()
    try:
        with on_sigterm(_stop):
            for wave in (
                [point for point in points if point.waits_for is None],
                [point for point in points if point.waits_for is not None],
            ):
                failures += _measure(config, wave, out, points, tell)
    finally:  # of one that is stopped, too
        rows = collect(out)
        write_table(out, rows)
    if failures:
        raise TaskError(f"{len(failures)} of {len(points)} points failed, the others are in {out}; {failures[0]}")
    return rows


def _check_options(config: SweepConfig, points: list[Point], out: Path) -> None:
    """See that every point's options are possible before one is measured (RecipeError, TaskError, CodecError)."""
    for point in points:
        options = point_config(config, point, folder_of(out, point), chosen=False)
        if any(option.startswith("gate=") for option in point.options):
            task = task_class(config.task)
            task.check_codec(options, task.load_codec(options))


def _check_done(config: SweepConfig, points: list[Point], out: Path) -> None:
    """Refuse to mix sweeps of different tasks, epochs, options, codecs or data in one folder (TaskError)."""
    path = out / OPTIONS
    if not path.is_file() or not any((out / POINTS).glob(f"*/*/{COSTS}")):
        return
    keys = {"task", "epochs", "options", "anchor_options", "stream_options", "anchor_weights"}
    before = load_saved(SweepConfig, path)
    differences = [item for item in config_diff(before, config) if item.key.partition(".")[0] in keys]
    if differences:
        item = differences[0]
        raise TaskError(
            f"out={out} holds a sweep with other options ({item.key}: {item.before} there, {item.after} here); use "
            "another folder"
        )
    data = data_of(points[0].run)
    for path in (out / POINTS).glob(f"*/*/{COSTS}"):
        if data_of(path.parent) != data:
            raise TaskError(f"out={out} holds a sweep on other data ({load_run(path.parent).data}); use another folder")
    check_seeds([*collect(out), *(_identity(point) for point in points)])
    for point in points:
        if not is_done(out, point):
            continue
        try:  # what is complete is compared with what it was begun with, and not run again
            finetune.run(point_config(config, point, folder_of(out, point)))
        except TaskError as error:
            raise TaskError(
                f"out={out}: {point.name} was measured with something else: {error}; or name another out= or label="
            ) from error


def _identity(point: Point) -> dict[str, Any]:
    """What a point's row will say of what it is."""
    base = load_run(Path(point.run))
    return {
        "task": base.task, "data": Path(base.data).name, "run": run_name(point.run), "seed": base.seed,
        "codec": point.codec, "quality": point.quality, "protocol": point.protocol,
    }  # fmt: skip


def _measure(
    config: SweepConfig, points: list[Point], out: Path, all_points: list[Point], tell: Callable[[Progress], None]
) -> list[str]:
    """Measure points that are not done; what went wrong with those that failed."""
    waiting = [point for point in points if not is_done(out, point)]
    failures: list[str] = []

    def collect_one(point: Point, measured: Callable[[], dict[str, Any]]) -> None:
        try:
            row = measured()
        except Exception as error:
            # What users can put right must not keep the other points waiting; a bug, or a notice to stop, must.
            if isinstance(error, StoppedError) or not is_ours(error):
                raise
            failures.append(f"{point.name}: {error}")
        else:
            done = sum(is_done(out, each) for each in all_points)
            tell(Progress(done, len(all_points), point, row))

    if config.parallel == 1:
        for point in waiting:
            collect_one(point, partial(measure_point, config, point, out))
    elif waiting:
        threads = max(1, num_cpus() // config.parallel)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])  # imported once for all
        workers = min(config.parallel, len(waiting))
        with ProcessPoolExecutor(workers, context, _start_worker, (threads,)) as pool:
            with sigterm_held_back():  # by processes that have no handler yet, too
                if _told.is_set():  # before there were any to be told
                    raise StoppedError(f"stopped before {waiting[0].name}; the same command goes on with {out}")
                running = {pool.submit(measure_point, config, point, out): point for point in waiting}
            try:
                for future in as_completed(running):
                    collect_one(running[future], future.result)
            except BrokenProcessPool as error:
                _end_survivors()
                raise TaskError(
                    f"parallel={config.parallel}: a process was ended from outside, perhaps for want of memory; the "
                    f"same command goes on with {out}, with a smaller parallel= if need be"
                ) from error
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    return failures


_told = threading.Event()  # to stop; of a sweep or of one of its processes
_listening = ExitStack()  # of such a process


def _stop() -> None:
    """Stop at the next step, in all processes."""
    _told.set()
    for worker in multiprocessing.active_children():
        worker.terminate()


def _end_survivors() -> None:
    """End the processes of a broken pool: it has sent SIGTERM, of which one that waits for a point only takes note."""
    for worker in multiprocessing.active_children():
        worker.join(GRACE_SECONDS)
        worker.kill()


def _start_worker(threads: int) -> None:
    """Begin a process of a sweep: what it measures listens to SIGTERM, and so does it between two points."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    _listening.enter_context(on_sigterm(_told.set))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def folder_of(out: Path, point: Point) -> Path:
    """The fine-tune of a point."""
    return out / POINTS / run_name(point.run) / point.name


def is_done(out: Path, point: Point) -> bool:
    """Whether a point has its row."""
    return all((folder_of(out, point) / name).is_file() for name in (COSTS, RESULTS))


def measure_point(config: SweepConfig, point: Point, out: Path) -> dict[str, Any]:
    """Fine-tune, or go on with it; measure costs; the row of the table (StoppedError: told to stop)."""
    if _told.is_set():
        raise StoppedError(f"stopped before {point.name}; the same command goes on with {out}")
    folder = folder_of(out, point)
    options = point_config(config, point, folder)
    results = finetune.run(options)
    costs = costs_of(folder)
    facts = {"point": {**asdict(point), "options": list(point.options)}, "seed": options.seed,
             "parallel": config.parallel, **costs}  # fmt: skip
    write_file(folder / COSTS, json.dumps(facts, indent=2) + "\n")
    return row_of(facts, results)


def point_config(config: SweepConfig, point: Point, folder: Path, chosen: bool = True) -> Any:
    """The options of a point's fine-tune: those of its base run, but for what the point names.

    Args:
        chosen: choose the channels that it takes over from another point's gate, where that was not done; else it gets
            a gate that chooses as many by itself.
    """
    base, adapted = load_run(Path(point.run)), point.protocol == "adapted"
    options = list(point.options)
    if point.waits_for is not None:
        count = next(option for option in options if option.startswith("num_channels=")).partition("=")[2]
        path = folder.parent / f"{point.name}.json"
        if not chosen:
            options.append("gate=variance")
        else:
            if not path.is_file() or not (folder / RESULTS).is_file():
                select_channels(folder.parent / point.waits_for, int(count), path)
            options = [option for option in options if not option.startswith("num_channels=")] + [f"channels={path}"]
    own: dict[str, Any] = {
        "run": str(folder), "launcher": "local", "workers": 1, "epochs": config.epochs if adapted else 0,
        "checkpoints": None, "cache_folder": None, "cluster": ClusterConfig(),
        "init": None if any(option.startswith("gate=") for option in options) else point.run,
    }  # fmt: skip
    further = [*config.options, *(config.anchor_options if "input=pixels" in options else config.stream_options)]
    return change_config(replace(base, **own), [*options, *(further if adapted else [])])


def costs_of(folder: Path) -> dict[str, float | None]:
    """Time of one image by itself and multiply-adds, of a complete run: medians over a few validation images.

    `encode_ms` from pixels to bytes, `decode_ms` from bytes to the task's answer; multiply-adds a pixel of both,
    of convolutions and matrix products.
    """
    task = finetune.open_run(folder).task
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
        "task": results["task"], "data": Path(results["data"]).name, "run": run_name(point["run"]),
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
    write_file(out / TABLE[0], buffer.getvalue())
    write_file(out / TABLE[1], json.dumps(rows, indent=2) + "\n")
