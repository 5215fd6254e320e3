"""A build under way: what it has finished stays on disk, so that it can be interrupted at any moment and go on.

    .OUT.unfinished/            beside OUT
      plan.json                 what is built, from what, with which options; only an equal plan goes on
      steps.jsonl               a line for each finished shard: its entry, where to go on, what was rejected on the way
      lock                      held by the process that builds
      dataset/                  becomes OUT by one rename when all is done

A step is written after its shard is complete under its name, and a shard holds what the jobs since the last step gave:
so whatever is cut off, building on from the last step gives the bytes of a build that was never interrupted.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from cluster.locks import UNKNOWN
from data_pipeline.errors import DataError
from data_pipeline.files import open_file
from data_pipeline.manifest import Shard
from data_pipeline.parallel import ordered_map
from data_pipeline.shards import refuse_existing
from data_pipeline.sources import Rejected

logger = logging.getLogger(__name__)

PLAN, STEPS, LOCK, DATASET = "plan.json", "steps.jsonl", "lock", "dataset"
# What a build's processes share, whether they first look at an earlier build's shards or read images at once.
PRELOAD = ("data_pipeline.decoding",)


@dataclass(frozen=True)
class Step:
    """The jobs of a split up to `next_job` are done: they gave `shard` (None: no sample), and these rejections."""

    split: str
    next_job: int
    shard: Shard | None
    rejected: tuple[Rejected, ...]


class UnfinishedBuild:
    """The folder of a build of `out`; a context manager that holds its lock.

    If the block ends with an error, what was finished stays for the next build with an equal plan; if nothing was,
    the folder goes.

    Args:
        plan: what the build's bytes depend on, as JSON values.
        restart: discard what an earlier build left.

    Raises:
        DataError: `out` is there already, another process builds it, or an earlier build of another plan was left.
    """

    def __init__(self, out: Path, plan: Mapping[str, Any], *, restart: bool = False, num_processes: int | None = None):
        self.out, self.plan, self.restart, self.num_processes = out, dict(plan), restart, num_processes
        self._target = Path(os.path.abspath(out))
        self.folder = self._target.with_name(f".{self._target.name}.unfinished")
        self.dataset = self.folder / DATASET
        self.steps: list[Step] = []
        self._lock: BinaryIO | None = None

    def __enter__(self) -> Self:
        try:
            refuse_existing(self.out)
            self.dataset.mkdir(parents=True, exist_ok=True)
            self._acquire()
            if self.restart:
                (self.folder / PLAN).unlink(missing_ok=True)
            self._compare_plans()
            self._load_steps()
        except OSError as error:
            self._release()
            raise self._cannot_write(error) from error
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None and not self.steps:
            shutil.rmtree(self.folder, ignore_errors=True)
        self._release()
        if isinstance(value, OSError):
            raise self._cannot_write(value) from value

    def of_split(self, split: str) -> list[Step]:
        """The finished steps of a split, in order."""
        return [step for step in self.steps if step.split == split]

    def record(self, step: Step) -> None:
        """Note a step whose shard stands in `dataset`."""
        with (self.folder / STEPS).open("a") as file:
            file.write(_line(step))
            file.flush()
            os.fsync(file.fileno())
        self.steps.append(step)

    def publish(self) -> None:
        """Make `dataset` appear as `out`, and forget the build."""
        os.replace(self.dataset, self._target)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _acquire(self) -> None:
        # A POSIX lock: it ends with this process, and worker processes do not inherit it.
        self._lock = (self.folder / LOCK).open("wb")
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(
                f"{self.out}: is being built by another process; wait for it, or name another folder"
            ) from error
        except OSError as error:
            if error.errno not in UNKNOWN:
                raise
            logger.warning(
                "%s: its file system has no locks (%s); see that no other process builds the same",
                self.out,
                error.strerror,
            )

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _compare_plans(self) -> None:
        path = self.folder / PLAN
        try:
            earlier = json.loads(path.read_text())
        except (FileNotFoundError, ValueError):
            # None, or cut off while it was written, so before any step.
            (self.folder / STEPS).unlink(missing_ok=True)
            path.write_text(json.dumps(self.plan))
            return
        ours = json.loads(json.dumps(self.plan))
        if earlier == ours:
            return
        names = [name for name in {**earlier, **ours} if earlier.get(name) != ours.get(name)]
        if names == ["listing"]:
            difference = "its source has changed since"
        else:
            name = names[0]
            difference = f"{name}={earlier.get(name)} there, {ours.get(name)} here"
        raise DataError(
            f"{self.out}: an unfinished build of something else stands in {self.folder.name} ({difference}); "
            "finish that one, or begin anew with --restart"
        )

    def _load_steps(self) -> None:
        """Keep the steps whose shards are whole, up to the first that is not, and remove every other file."""
        path = self.folder / STEPS
        steps = []
        for line in path.read_text().splitlines(keepends=True) if path.is_file() else ():
            try:
                steps.append(_step(json.loads(line)) if line.endswith("\n") else None)
            except (ValueError, KeyError, TypeError):
                steps.append(None)
        known = [step for step in takewhile(lambda step: step is not None, steps) if step is not None]
        jobs = [(self.dataset, step.shard) for step in known]
        sound = ordered_map(_is_sound, jobs, self.num_processes, chunk=1, preload=PRELOAD)
        self.steps = [step for step, _ in takewhile(lambda pair: pair[1], zip(known, sound, strict=False))]
        if len(self.steps) < len(steps):
            path.write_text("".join(map(_line, self.steps)))
        kept = {step.shard.name for step in self.steps if step.shard is not None}
        for file in self.dataset.iterdir():
            if file.name not in kept:
                file.unlink()

    def _cannot_write(self, error: OSError) -> DataError:
        return DataError(
            f"{self.out}: cannot be written ({error.strerror or error}); free space or name another folder"
            + ("; the same command goes on from here" if self.steps else "")
        )


def _line(step: Step) -> str:
    return json.dumps(asdict(step)) + "\n"


def _step(fields: dict[str, Any]) -> Step:
    shard = fields["shard"]
    return Step(
        split=fields["split"],
        next_job=fields["next_job"],
        shard=None if shard is None else Shard.from_fields(shard),
        rejected=tuple(Rejected(**item) for item in fields["rejected"]),
    )


def _is_sound(job: tuple[Path, Shard | None]) -> bool:
    folder, shard = job
    if shard is None:
        return True
    try:
        with open_file(folder / shard.name) as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == shard.sha256
    except OSError:
        return False
