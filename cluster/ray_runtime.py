"""The `Runtime` of a Ray Train worker, and what crosses between driver and workers besides.

    RUN/ray/20260131-120000-4711/    for as long as the run is up
      stop                           made by the driver: workers stop after their step
      messages_<rank>.jsonl          warnings of our packages, which the driver shows

Files in the run folder, because workers see it in any case and a Ray worker gets no signals: its training function
runs in a thread.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch

from cluster.errors import OUR_PACKAGES
from cluster.runtime import Runtime

STOP = "stop"
MESSAGES = "messages_*.jsonl"
STOP_POLL_SECONDS = 0.5


class RayRuntime(Runtime):
    """Rank, world and device as Ray Train assigned them; its process group is up when a worker starts."""

    def __init__(self, exchange: Path) -> None:
        context = ray.train.get_context()
        device = ray.train.torch.get_device()
        super().__init__(context.get_world_rank(), context.get_world_size(), context.get_local_rank(), device)
        self._stop = exchange / STOP
        self._asked, self._next_look = False, 0.0

    def report(self, metrics: Mapping[str, Any]) -> None:
        """Tell Ray Train; a barrier for all ranks."""
        ray.train.report(dict(metrics))

    def _asked_to_stop(self) -> bool:
        if not self._asked and time.monotonic() >= self._next_look:
            self._asked = self._stop.exists()
            self._next_look = time.monotonic() + STOP_POLL_SECONDS
        return self._asked


class MessageHandler(logging.Handler):
    """Writes the warnings of our packages where the driver finds them."""

    def __init__(self, exchange: Path, rank: int) -> None:
        super().__init__(logging.WARNING)
        self.path = exchange / MESSAGES.replace("*", str(rank))

    def emit(self, record: logging.LogRecord) -> None:
        """Append one line; a full disk must not end the training."""
        if record.name.partition(".")[0] in OUR_PACKAGES:
            try:
                with self.path.open("a") as file:
                    file.write(json.dumps([record.name, record.levelno, record.getMessage()]) + "\n")
            except OSError:
                self.handleError(record)


class MessageReader:
    """Reads what the `MessageHandler`s of all ranks wrote, each message once."""

    def __init__(self, exchange: Path) -> None:
        self.exchange = exchange
        self._shown: set[str] = set()

    def show(self) -> None:
        """Log what is new, in this process."""
        for path in self.exchange.glob(MESSAGES):
            for line in path.read_text().splitlines(keepends=True):
                if line.endswith("\n") and line not in self._shown:
                    self._shown.add(line)
                    name, level, message = json.loads(line)
                    logging.getLogger(name).log(level, "%s", message)
