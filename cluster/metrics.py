"""Metrics of a run: metrics.jsonl and TensorBoard from rank 0, and a progress bar in the driver that follows them.

The bar reads the file, so it is the same whether the workers run in this process, in others or on other machines
that share the run folder.
"""

from __future__ import annotations

import json
import math
import os
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

METRICS = "metrics.jsonl"
PLAIN_SECONDS = 15.0  # between lines where the output is no terminal


class MetricsLogger:
    """Appends rows to RUN/metrics.jsonl and RUN/tensorboard; silent on ranks other than 0.

    Rows after `step`, left by a run that was killed past its last checkpoint, and a torn last line are dropped, so
    that a resumed run continues one clean record.
    """

    def __init__(self, run: Path | str, *, rank: int = 0, step: int = 0):
        self.enabled = rank == 0
        if not self.enabled:
            return
        from torch.utils.tensorboard import SummaryWriter

        run = Path(run)
        run.mkdir(parents=True, exist_ok=True)
        path = run / METRICS
        rows = [row for row in read_rows(path) if row["step"] <= step]
        temporary = path.with_name(f".{METRICS}.{os.getpid()}")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
        os.replace(temporary, path)
        self._file = path.open("a")
        self._writer = SummaryWriter(run / "tensorboard", purge_step=step + 1)

    def log(self, step: int, values: dict[str, Any]) -> None:
        """One row at `step`; numbers also become TensorBoard scalars. A NaN or infinity is written as null."""
        if not self.enabled:
            return
        row = {"step": step, "time": round(time.time(), 3), **values}
        for key, value in row.items():
            if isinstance(value, float) and not math.isfinite(value):
                row[key] = None
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        for key, value in values.items():
            if isinstance(value, int | float):
                self._writer.add_scalar(key, value, step)

    def image(self, tag: str, step: int, image: torch.Tensor) -> None:
        """A picture (3, H, W) uint8 for TensorBoard."""
        if self.enabled:
            self._writer.add_image(tag, image, step)

    def close(self) -> None:
        """Flush and close both files."""
        if self.enabled:
            self._file.close()
            self._writer.close()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The whole rows of a metrics file; a torn last line is left out."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


class ProgressFollower:
    """Draws the progress of the run in `run` while its `with` block lasts: a bar, or a line now and then.

    Args:
        run: run folder.
        total: steps of the whole run.
    """

    def __init__(self, run: Path | str, total: int, console: Console | None = None):
        self.path, self.total = Path(run) / METRICS, total
        self.console = console or Console(file=sys.stderr)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._position = self.path.stat().st_size if self.path.is_file() else 0
        self._last: dict[str, Any] = {}

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _follow(self) -> None:
        if not self.console.is_terminal:
            next_line = time.monotonic() + PLAIN_SECONDS
            while not self._ended.wait(0.5):
                if self._read() and time.monotonic() >= next_line:
                    self.console.print(f"step {self._last['step']}/{self.total}  {self._text()}", highlight=False)
                    next_line = time.monotonic() + PLAIN_SECONDS
            if self._read() or self._last:
                self.console.print(f"step {self._last['step']}/{self.total}  {self._text()}", highlight=False)
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self.console) as progress:
            task = progress.add_task("starting", total=self.total)
            while not self._ended.wait(0.2):
                if self._read():
                    progress.update(task, completed=self._last["step"], description=self._text())
            if self._read() or self._last:
                progress.update(task, completed=self._last["step"], description=self._text())

    def _read(self) -> bool:
        """Take in what was appended; True where a row of training came."""
        if not self.path.is_file():
            return False
        if self.path.stat().st_size < self._position:
            self._position = 0  # rewritten by a resumed run
        with self.path.open() as file:
            file.seek(self._position)
            lines = file.readlines()
        came = False
        for line in lines:
            if not line.endswith("\n"):
                break
            self._position += len(line.encode())
            row = json.loads(line)
            if "loss" in row:
                self._last, came = row, True
        return came

    def _text(self) -> str:
        row = self._last
        parts = [f"{row.get('stage', '')}"]
        for key, form in (("loss", "loss {:.3f}"), ("bpp", "{:.3f} bpp"), ("images_per_second", "{:.0f} images/s")):
            if isinstance(row.get(key), int | float):
                parts.append(form.format(row[key]))
        return "  ".join(parts)
