"""The run folder from the driver's side: it is made, held by one driver at a time, and said to be stopped.

    RUN/.lock     {"host", "machine", "pid", "begun", "beats"}, while a driver is at work

A driver holds a lock of the kernel's on the file, which ends with its process, however it ends: a run that was killed
is gone on with at once. A file system of many machines may know no locks, or keep them on each machine to itself, so
the holder also counts up `beats` every few seconds. Who finds the lock free, but the file of another machine, watches
it for a few of them: one that stands still was left behind by a machine that has died.
"""

from __future__ import annotations

import fcntl
import functools
import itertools
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cluster.checkpoint import Kept, open_checkpoints
from cluster.errors import CheckpointError, RunError

LOCK = ".lock"
BEAT_SECONDS = 5.0
WATCH_SECONDS = 3 * BEAT_SECONDS
RECORD_BYTES = 512  # of a record, always: it is overwritten in place, which takes no space of a full disk

logger = logging.getLogger(__name__)
_held: set[int] = set()  # descriptors of this process


def check_folder(run: Path | str) -> None:
    """See that a run folder is, or can become, a folder that this process may look into (RunError)."""
    folder = Path(run)
    try:
        if folder.is_file():
            raise RunError(f"run={folder} is a file; name a folder")
        (folder / LOCK).exists()
    except OSError as error:
        raise _unusable(folder, error) from error


@contextmanager
def held_run(run: Path | str) -> Iterator[None]:
    """Make the run folder and hold it while the block lasts, against other drivers; under torchrun rank 0 does.

    Raises:
        RunError: the folder cannot be made or written to; another driver is at work in it.
    """
    folder = Path(run)
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    begun = time.strftime("%Y-%m-%d %H:%M:%S")
    try:
        is_new = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _open_locked(folder, begun)
    except OSError as error:
        raise _unusable(folder, error) from error
    ended = threading.Event()
    beating = threading.Thread(target=_beat, args=(descriptor, begun, ended), name="run lock", daemon=True)
    _held.add(descriptor)
    try:
        beating.start()
        yield
    finally:
        ended.set()
        beating.join()
        _held.discard(descriptor)
        if _is_at(folder / LOCK, descriptor):
            with suppress(OSError):  # the next driver finds a file that no one has locked
                (folder / LOCK).unlink(missing_ok=True)
        os.close(descriptor)
        if is_new:  # and empty: what was refused leaves nothing behind
            with suppress(OSError):
                folder.rmdir()


def how_it_stopped(options: Kept, run: Path | str) -> str:
    """What to say of a run that was told to stop: whether there is a checkpoint to go on from."""
    try:
        steps = open_checkpoints(options, run).steps()
    except CheckpointError:  # the run has ended well; whether its storage answers now is the next one's business
        return f"stopped in {run}; the same command continues"
    if steps:
        return f"stopped with a checkpoint in {run}; the same command continues"
    return f"stopped in {run} before the first checkpoint; the same command begins again"


def _open_locked(folder: Path, begun: str) -> int:
    """A descriptor of the folder's lock file, locked, with a record of this process in it."""
    path = folder / LOCK
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            has_locks = _lock(folder, descriptor)
            if _is_at(path, descriptor):  # else the one before us removed it as it ended
                before = _read(descriptor)
                if before and not (has_locks and before.get("machine") == _machine()):
                    _watch(folder, before)
                _write(descriptor, begun, 0)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _lock(folder: Path, descriptor: int) -> bool:
    """Lock the file; False where its file system knows no locks (RunError: another process has it)."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise _taken(folder, _read(descriptor)) from error
    except OSError:
        return False
    return True


def _watch(folder: Path, before: dict[str, Any]) -> None:
    """Wait until a record has stood still for long enough to be of no one (RunError: it did not)."""
    logger.warning("%s: %s was at work here; waiting %.0f s for a sign of it", folder, _who(before), WATCH_SECONDS)
    end = time.monotonic() + WATCH_SECONDS
    while time.monotonic() < end:
        time.sleep(WATCH_SECONDS / 10)
        # Opened anew: that is when a network's file system asks the server.
        try:
            with (folder / LOCK).open("rb") as file:
                now = _read(file.fileno())
        except FileNotFoundError:  # removed as it ended, a moment ago
            now = {}
        if now != before:
            raise _taken(folder, now)


def _beat(descriptor: int, begun: str, ended: threading.Event) -> None:
    """Count up until `ended`; a storage that refuses for a while must not end the run."""
    for beats in itertools.count(1):
        if ended.wait(BEAT_SECONDS):
            return
        with suppress(OSError):
            _write(descriptor, begun, beats)


def _write(descriptor: int, begun: str, beats: int) -> None:
    record = {"begun": begun, "beats": beats, "host": socket.gethostname(), "machine": _machine(), "pid": os.getpid()}
    os.pwrite(descriptor, json.dumps(record).encode().ljust(RECORD_BYTES), 0)


def _read(descriptor: int) -> dict[str, Any]:
    """The record in a lock file; empty where there is none, or it is being written."""
    try:
        record = json.loads(os.pread(descriptor, RECORD_BYTES, 0))
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def _unusable(folder: Path, error: OSError) -> RunError:
    return RunError(f"run={folder}: cannot be written ({error.strerror}); name a folder that can")


def _taken(folder: Path, record: dict[str, Any]) -> RunError:
    return RunError(
        f"run={folder} is in use: {_who(record)} is at work in it; wait for it or stop it, or name another run folder"
    )


def _who(record: dict[str, Any]) -> str:
    if not record:
        return "another process"
    return f"process {record.get('pid')} on {record.get('host')}, begun {record.get('begun')},"


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether the open file is the one at `path`."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except OSError:
        return False


@functools.cache
def _machine() -> str:
    """What tells this machine, as long as it is up, from all others: containers share names, and kernels keep locks."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def _forget_in_child() -> None:
    """A process forked to decode images holds no run, even where it outlives the driver."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_forget_in_child)
