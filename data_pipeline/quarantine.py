"""Bad samples met while a run reads: counted, named in a file, and the end of the run where they are too many.

    {"rank": 0, "split": "train", "index": 7, "key": "n01440764_7", "shard": "train-000000.tar", "reason": "..."}

A line of `quarantine.jsonl` for each bad sample that a rank meets, once; several ranks may name the same one in
different epochs. Lines are appended under a lock, also on a file system that nodes share. Where that has no locks, each
process writes a file of its own, `quarantine_NAME.jsonl`.
"""

from __future__ import annotations

import fcntl
import json
import secrets
from pathlib import Path
from typing import NamedTuple

from cluster.files import append_to
from cluster.locks import lock
from data_pipeline.errors import DataError

FILE = "quarantine.jsonl"
MOST_SHARE = 0.001  # of the samples read so far
LEAST_READ = 10_000  # what counts as read from the start: ten bad samples are allowed early on
MOST_NAMED = 20  # in the message


class BadSample(NamedTuple):
    """A sample that cannot be used and why."""

    index: int  # type: ignore[assignment]  # hides tuple.index
    key: str
    shard: str
    reason: str


class Quarantine:
    """Counts one rank's bad samples of a split, and writes them to FOLDER/quarantine.jsonl if there is a folder."""

    def __init__(self, folder: str | Path | None = None, split: str = "train", rank: int = 0):
        self.path = Path(folder) / FILE if folder else None
        self.split, self.rank = split, rank
        self.num_read = 0
        self._is_shared = True  # with other processes, through a lock
        self.bad: dict[int, BadSample] = {}  # by dataset index, each once

    def read(self, count: int) -> None:
        """So many samples were asked for."""
        self.num_read += count

    def add(self, sample: BadSample) -> None:
        """A bad sample was met.

        Raises:
            DataError: they are more than 0.1 % of the samples read so far, these counted as at least 10 000.
        """
        if sample.index in self.bad:
            return
        self.bad[sample.index] = sample
        self._write(sample)
        if len(self.bad) > MOST_SHARE * max(self.num_read, LEAST_READ):
            keys = [f"{bad.key} ({bad.shard})" for bad in self.bad.values()]
            named = ", ".join(keys[:MOST_NAMED]) + (f" and {len(keys) - MOST_NAMED} more" if keys[MOST_NAMED:] else "")
            raise DataError(
                f"{len(self.bad)} of {self.num_read} samples read of {self.split} by rank {self.rank} cannot be used: "
                f"{named}; the last: {sample.reason}; {f'all are in {self.path}; ' if self.path else ''}"
                "build the data set again"
            )

    def _write(self, sample: BadSample) -> None:
        if self.path is None:
            return
        line = json.dumps({"rank": self.rank, "split": self.split, **sample._asdict()})
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a+b") as file:
                if self._is_shared and not lock(file.fileno(), fcntl.LOCK_EX, self.path.parent):
                    self._is_shared = False
                    self.path = self.path.with_stem(f"{self.path.stem}_{secrets.token_hex(8)}")
                    self._write(sample)
                    return
                append_to(file, line)
        except OSError as error:
            raise DataError(f"{self.path}: cannot be written ({error.strerror}); make its folder writable") from error
