"""Metrics of a run: metrics.jsonl and TensorBoard from rank 0, and a progress bar in the driver that follows them.

    {"step": 40, "time": 1767225600.0, "total_steps": 900, "stage": "ssl", "loss": 1.5, "images_per_second": 97.0, ...}

One row of JSON a line, flushed as it is written. NaN and infinities are written as null, because JSON has neither.
The bar reads the file, so it is the same whether the workers run in this process, in others, or on other machines
that share the run folder.
"""

from __future__ import annotations

import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cluster.errors import RunError, reason_of, remedy_of
from cluster.files import write_whole
from cluster.runtime import Runtime

METRICS = "metrics.jsonl"
PLAIN_SECONDS = 15.0  # between lines where the output is no terminal
POLL_SECONDS = 0.2


class MetricsLogger:
    """Appends rows to RUN/metrics.jsonl and RUN/tensorboard; silent on ranks other than 0.

    Rows after `step`, left by a run that was killed past its last checkpoint, and a torn last line are dropped, so
    that a resumed run continues one clean record; what happened to the run itself stays. RunError where the disk
    refuses.

    Args:
        run: run folder, made if it is missing.
        step: of the checkpoint from which the run goes on; 0 for a new one.
        publish: takes the finite numbers of each row, too.
    """

    def __init__(
        self,
        run: Path | str,
        *,
        rank: int = 0,
        step: int = 0,
        publish: Callable[[Mapping[str, float]], None] | None = None,
    ) -> None:
        self.enabled, self.publish, self.recoveries = rank == 0, publish, 0
        if not self.enabled:
            return
        from torch.utils.tensorboard import SummaryWriter  # half a second that other ranks need not spend

        self.run = Path(run)
        path = self.run / METRICS
        with self._writing():
            rows = [row for row in read_rows(path) if row["step"] <= step or "event" in row]
            self.recoveries = sum("event" in row for row in rows)
            write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))
            self._file = path.open("a")
            self._writer = SummaryWriter(self.run / "tensorboard", purge_step=step + 1)

    def log(self, step: int, values: dict[str, Any]) -> None:
        """One row at `step`; finite numbers also become TensorBoard scalars."""
        if not self.enabled:
            return
        row = {"step": step, "time": round(time.time(), 3), **values}
        finite = {key: value for key, value in row.items() if not isinstance(value, float) or math.isfinite(value)}
        with self._writing():
            self._file.write(json.dumps({**dict.fromkeys(row), **finite}) + "\n")
            self._file.flush()
            for key in values.keys() & finite.keys():
                if isinstance(value := values[key], int | float):
                    self._writer.add_scalar(key, value, step)
        if self.publish is not None:
            self.publish({key: value for key, value in finite.items() if isinstance(value, int | float)})

    def image(self, tag: str, step: int, image: torch.Tensor) -> None:
        """A picture (3, H, W) uint8 for TensorBoard."""
        if self.enabled:
            with self._writing():
                self._writer.add_image(tag, image, step)

    def close(self) -> None:
        """Flush and close both files."""
        if self.enabled:
            with self._writing(), closing(self._writer):
                self._file.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunError(
                f"{self.run}: metrics cannot be written ({reason_of(error)}); {remedy_of(error)} and run the same "
                "command again"
            ) from error


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file, none where there is no file; what is torn or no row is left out.

    Raises:
        OSError: the storage does not say, which is not to be taken for none.
    """
    try:
        with path.open(errors="replace") as file:
            return [row for line in file if (row := _parse(line)) is not None]
    except (FileNotFoundError, IsADirectoryError):
        return []


class StepMeter:
    """Speed of training, and what it waited for, since the last reading; times in seconds.

    Args:
        runtime: its group's size is what speed is divided by; of a GPU, the memory is read, too.
    """

    def __init__(self, runtime: Runtime) -> None:
        self.world, self.device = runtime.world, runtime.device
        self.restart()

    def restart(self) -> None:
        """Forget what was counted; called after work that is not training."""
        self.start = self.mark = time.perf_counter()
        self.waited, self.saving, self.samples, self.steps = 0.0, 0.0, 0, 0

    def data_arrived(self) -> None:
        """A batch was handed over."""
        self.waited += time.perf_counter() - self.mark

    def step_done(self, num_samples: int) -> None:
        """A step over `num_samples` images of all ranks ended."""
        self.samples += num_samples
        self.steps += 1
        self.mark = time.perf_counter()

    def saved(self) -> None:
        """A checkpoint was handed over, which the time since the last step was spent on."""
        self.saving += time.perf_counter() - self.mark
        self.mark = time.perf_counter()

    def rates(self) -> dict[str, float]:
        """Images a second, seconds a step, and shares of time spent on waiting for data and on saving; starts anew."""
        elapsed = max(time.perf_counter() - self.start, 1e-9)
        rates = {
            "world": self.world,
            "images_per_second": self.samples / elapsed,
            "images_per_second_per_worker": self.samples / elapsed / self.world,
            "step_seconds": elapsed / max(self.steps, 1),
            "data_wait": self.waited / elapsed,
            "save_wait": self.saving / elapsed,
        }
        if self.device.type == "cuda":
            rates["gpu_memory"] = torch.cuda.max_memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        self.restart()
        return rates


def log_recovery(logger: MetricsLogger, runtime: Runtime, step: int) -> None:
    """A row on why this group of workers took over from another, after its first step; nothing where none did.

    `seconds` lie between the moment when the controller noticed and this one, by the clocks of the two nodes.
    """
    if (cause := runtime.interruption) is not None:
        seconds = round(max(0.0, time.time() - cause.time), 2)
        row = {"event": cause.event, "reason": cause.reason, "world": runtime.world, "seconds": seconds}
        logger.log(step, {**row, "recoveries": logger.recoveries + 1})


class ProgressFollower:
    """Draws the progress of the run in `run` while its `with` block lasts: a bar, or a line now and then.

    Under torchrun only the first process draws.

    Args:
        run: run folder; its metrics may appear later.
        total: steps of the whole run.
        console: where to draw; standard error unless given.
    """

    def __init__(self, run: Path | str, total: int, console: Console | None = None) -> None:
        self.path, self.total = Path(run) / METRICS, total
        self.console = console or Console(file=sys.stderr, markup=False)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="progress", daemon=True)
        self._inode, self._position = -1, 0
        with suppress(OSError):  # mostly there is no file; what cannot be asked now is read from its start, and drawn
            stat = self.path.stat()
            self._inode, self._position = stat.st_ino, stat.st_size  # rows of an earlier start are no progress of this
        self._last: dict[str, Any] = {}

    def __enter__(self) -> Self:
        if os.environ.get("RANK", "0") == "0":
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _follow(self) -> None:
        if self.console.is_terminal:
            self._draw_bar()
        else:
            self._print_lines()

    def _draw_bar(self) -> None:
        text = TextColumn("{task.description}", markup=False)
        columns = (text, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self.console) as progress:
            task = progress.add_task("starting", total=self.total)
            begun = ended = False
            while not ended:
                ended = self._ended.wait(POLL_SECONDS)
                if self._read():
                    if not begun:
                        # The steps before a restart took no time now; they must not count as speed.
                        progress.reset(task, completed=self._last["step"], total=self.total)
                        begun = True
                    progress.update(task, completed=self._last["step"], description=self._text())

    def _print_lines(self) -> None:
        printed, next_line = 0, time.monotonic()
        ended = False
        while not ended:
            ended = self._ended.wait(POLL_SECONDS)
            self._read()
            step = self._last.get("step", 0)
            if step > printed and (ended or time.monotonic() >= next_line):
                text = f"step {step}/{self.total}  {self._text()}"
                self.console.print(text, highlight=False, markup=False, soft_wrap=True)
                printed, next_line = step, time.monotonic() + PLAIN_SECONDS

    def _read(self) -> bool:
        """Take in the whole lines that were appended; True where a row of training came."""
        try:
            with self.path.open("rb") as file:
                inode = os.fstat(file.fileno()).st_ino
                if inode != self._inode:  # made or replaced by the logger that starts now
                    self._inode, self._position = inode, 0
                file.seek(self._position)
                appended = file.read()
        except OSError:
            return False
        whole = appended[: appended.rfind(b"\n") + 1]
        self._position += len(whole)
        rows = [row for line in whole.decode(errors="replace").splitlines() if (row := _parse(line)) and "loss" in row]
        if rows:
            self._last = rows[-1]
        return bool(rows)

    def _text(self) -> str:
        parts = [str(self._last.get("stage", "training"))]
        forms = (("loss", "loss {:.3f}"), ("bpp", "{:.3f} bpp"), ("images_per_second", "{:.0f} images/s"))
        for key, form in forms:
            if isinstance(self._last.get(key), int | float):
                parts.append(form.format(self._last[key]))
        return "  ".join(parts)


def _parse(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None
