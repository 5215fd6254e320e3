"""A run as a table, from what it writes: rows of metrics.jsonl, and the names of its checkpoints.

Needs no cluster: whoever sees the run folder sees the run. A value that the rows do not hold is shown as `-`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from cluster.checkpoint import CheckpointStore
from cluster.errors import CheckpointError
from cluster.metrics import METRICS, read_rows

RECENT_ROWS = 20  # over which the speed is taken that the time left follows from
EVENTS = ("recovered", "resized", "drained")
SHOWN_EVENTS = 3
NONE = "-"


def status_table(
    rows: list[dict[str, Any]], *, title: str = "", checkpoint: int | str | None = None, now: float | None = None
) -> Table:
    """What the rows of a run say of it.

    Args:
        rows: of metrics.jsonl, in order; those with a loss are training's, those with an event are recoveries.
        checkpoint: step of the newest one; or why it is not known.
        now: seconds since 1970; the clock's if not given.
    """
    now = time.time() if now is None else now
    training = [row for row in rows if "loss" in row]
    events = [row for row in rows if row.get("event") in EVENTS]
    last = training[-1] if training else {}
    table = Table(title=Text(title) if title else None, title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column()
    for name, value in (
        ("stage", str(last.get("stage", NONE))),
        ("step", f"{last.get('step', 0)} / {last.get('total_steps', NONE)}"),
        ("epoch", _number(last, "epoch", "{:.2f}")),
        ("loss", _number(last, "loss", "{:.4f}")),
        ("bpp", _number(last, "bpp", "{:.4f}")),
        ("lr", _number(last, "lr", "{:.2e}")),
        ("workers", _number(last, "world", "{:.0f}")),
        ("images/s", _number(last, "images_per_second", "{:.1f}")),
        ("images/s a worker", _number(last, "images_per_second_per_worker", "{:.1f}")),
        ("step time", _number(last, "step_seconds", "{:.3f} s")),
        ("waiting for data", _number(last, "data_wait", "{:.1%}")),
        ("GPU memory", _number(last, "gpu_memory", "{:.1f} GiB", 2**-30)),
        ("time left", _duration(seconds_left(rows))),
        ("last row", _ago(rows[-1] if rows else {}, now)),
        ("newest checkpoint", _checkpoint(training, checkpoint, now)),
        ("recoveries", str(len(events))),
    ):
        table.add_row(name, Text(value))
    for event in events[-SHOWN_EVENTS:]:
        table.add_row("", Text(_event(event, now)))
    return table


def seconds_left(rows: list[dict[str, Any]]) -> float | None:
    """Until the last step at the speed of the newest rows since the last recovery; None where it is not known."""
    recent: list[dict[str, Any]] = []
    for row in reversed(rows):
        if "event" in row or len(recent) == RECENT_ROWS:
            break
        if "loss" in row and "time" in row:
            recent.append(row)
    if not recent or not isinstance(recent[0].get("total_steps"), int):
        return None
    newest, oldest = recent[0], recent[-1]
    steps = newest["total_steps"] - newest["step"]
    if newest["step"] > oldest["step"]:
        each = (newest["time"] - oldest["time"]) / (newest["step"] - oldest["step"])
    elif isinstance(newest.get("step_seconds"), int | float):
        each = newest["step_seconds"]
    else:
        return None
    return float(max(0.0, steps * each))


def newest_checkpoint(run: Path) -> int | str | None:
    """Step of the newest complete checkpoint of a run, in its folder or where its config says.

    None: there is none. A text: why that cannot be told from here; the table is worth showing without it.
    """
    try:
        config = yaml.safe_load((run / "config.yaml").read_text())
        place = config.get("checkpoints") or str(run / "checkpoints")
    except (OSError, yaml.YAMLError, AttributeError):
        place = str(run / "checkpoints")
    try:
        return max(CheckpointStore(place).steps(), default=None)
    except CheckpointError as error:
        return str(error)


def show(run: Path, console: Console, *, every: float | None = None) -> None:
    """Print the table of the run in folder `run`; with `every`, draw it anew after so many seconds until Ctrl-C."""

    def draw() -> RenderableType:
        if not (run / METRICS).is_file():
            return Text(f"{run}: the run has begun, there are no metrics yet")
        return status_table(read_rows(run / METRICS), title=str(run), checkpoint=newest_checkpoint(run))

    if every is None or not console.is_terminal:
        drawn = draw()
        console.print(drawn, soft_wrap=isinstance(drawn, Text))  # a line stays whole, in files and pipes too
    else:
        _draw_until_interrupted(draw, console, every)


def _draw_until_interrupted(draw: Callable[[], RenderableType], console: Console, every: float) -> None:
    with Live(draw(), console=console, auto_refresh=False) as live:
        try:
            while True:
                time.sleep(every)
                live.update(draw(), refresh=True)
        except KeyboardInterrupt:
            return


def _number(row: dict[str, Any], key: str, form: str, factor: float = 1) -> str:
    value = row.get(key)
    return form.format(value * factor) if isinstance(value, int | float) else NONE


def _checkpoint(training: list[dict[str, Any]], step: int | str | None, now: float) -> str:
    """The step, and the age of the row that was written next to it: storages have no common clock."""
    if step is None:
        return "none"
    if isinstance(step, str):
        return f"not known: {step}"
    beside = [row for row in training if row["step"] <= step]
    return f"step {step}, {_ago(beside[-1] if beside else {}, now)}"


def _event(row: dict[str, Any], now: float) -> str:
    seconds, world = _number(row, "seconds", "{:.1f} s"), _number(row, "world", "{:.0f}")
    return (
        f"{row['event']} at step {row['step']}, {_ago(row, now)}: {row.get('reason', NONE)}; {world} workers, {seconds}"
    )


def _ago(row: dict[str, Any], now: float) -> str:
    written = row.get("time")
    return f"{_duration(max(0.0, now - written))} ago" if isinstance(written, int | float) else NONE


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return NONE
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
