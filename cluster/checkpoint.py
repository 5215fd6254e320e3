"""Checkpoints on disk: complete or absent, verified before use.

    checkpoints/
      step_00000200/
        state.pt          tensors and plain values, read back with weights_only
        manifest.json     {"version", "step", "files": {"state.pt": {"bytes", "sha256"}}}
      .step_00000400.4711 being written; renamed when whole, removed when found again

The manifest is written last inside the temporary folder, and the folder renamed after an fsync: what carries a
final name was complete. Damage that comes later is found by size and sha256, named, and passed over. The digest is
taken of the bytes on their way to the disk, so a checkpoint is neither read back nor held in memory twice.

One process writes to a folder (rank 0); any number may read.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cluster.errors import CheckpointError

VERSION = 1
STATE, MANIFEST = "state.pt", "manifest.json"
NAME = re.compile(r"step_(\d{8,})")
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
PLAIN = (torch.Tensor, torch.Size, torch.dtype, torch.device, str, bytes, bool, int, float, complex, type(None))

Signature = tuple[tuple[int, int, int], ...] | None  # inode, size and time of the files; None: one is missing

logger = logging.getLogger(__name__)


class CheckpointStore:
    """Checkpoints of one run.

    Args:
        folder: where they lie; made when the first is saved.
        keep: how many of the newest to keep, at least 1.
        on_broken: called with the folder and the fault of a checkpoint that `newest` passes over; a warning in the
            log unless given.
    """

    def __init__(
        self, folder: Path | str, *, keep: int = 3, on_broken: Callable[[Path, str], None] | None = None
    ) -> None:
        if keep < 1:
            raise CheckpointError(f"{folder}: keep={keep} checkpoints; keep at least 1")
        self.folder, self.keep = Path(folder), keep
        self.on_broken = on_broken or _warn
        self._verdicts: dict[Path, tuple[Signature, str | None]] = {}  # folder -> its files when read, the fault

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Write the checkpoint of `step`, drop the oldest beyond `keep`, and return its folder.

        Args:
            state: nested dicts, lists and tuples of tensors and plain values; anything else is a TypeError now,
                because weights_only would refuse it when it is needed.

        Raises:
            CheckpointError: the disk is full or refuses; earlier checkpoints are as they were.
        """
        _refuse_foreign(state, "state")
        final = self._path(step)
        temporary = self.folder / f".{final.name}.{os.getpid()}"
        try:
            self._remove_leftovers()
            temporary.mkdir(parents=True)
            manifest = {"version": VERSION, "step": step, "files": {STATE: _write_state(temporary / STATE, state)}}
            _write(temporary / MANIFEST, json.dumps(manifest).encode())
            _sync_folder(temporary)
            if final.exists():
                # Out of the way by a rename, which is short: only between the two is the step absent.
                os.replace(final, self.folder / f".{final.name}.replaced")
            os.replace(temporary, final)
            _sync_folder(self.folder)
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            remedy = "free some space" if error.errno in FULL else "make the folder writable"
            raise CheckpointError(
                f"{self.folder}: the checkpoint of step {step} could not be written ({error.strerror or error}); "
                f"earlier ones are whole; {remedy} and run the same command again"
            ) from error
        self._verdicts[final] = (_signature(final), None)
        self._remove_leftovers()
        self._drop_older_than(step)
        return final

    def steps(self) -> list[int]:
        """Steps with a checkpoint whose files have the sizes of its manifest, ascending."""
        return [step for step in self._found() if _fault(self._path(step), hashes=False) is None]

    def newest(self) -> int | None:
        """The newest step whose checkpoint is whole, bit for bit; broken ones are named, once, and passed over.

        What this store wrote or read itself is not read again while size, time and inode are the same.
        """
        for step in reversed(self._found()):
            folder = self._path(step)
            known = self._verdicts.get(folder)
            if (fault := self._verify(folder)) is None:
                return step
            if self._verdicts[folder] != known:
                self.on_broken(folder, fault)
        return None

    def load(self, step: int, map_location: str | torch.device = "cpu") -> dict[str, Any]:
        """The state saved at `step`.

        Raises:
            CheckpointError: there is none, it is damaged, or it holds what `save` never writes.
        """
        folder = self._path(step)
        if not folder.is_dir():
            there = ", ".join(map(str, self.steps())) or "none"
            raise CheckpointError(f"{self.folder}: no checkpoint of step {step}; there are: {there}")
        if (fault := self._verify(folder)) is not None:
            raise CheckpointError(f"{folder}: {fault}; remove it to go on from an earlier one")
        try:
            state = torch.load(folder / STATE, map_location=map_location, weights_only=True)
        except Exception as error:  # unpickling what others wrote raises anything
            raise CheckpointError(
                f"{folder / STATE}: holds something other than tensors and plain values ({_reason(error)}); it was "
                f"not written by this program; remove {folder}"
            ) from error
        if not isinstance(state, dict):
            raise CheckpointError(f"{folder / STATE}: holds a {type(state).__name__}, no checkpoint; remove {folder}")
        return state

    def _path(self, step: int) -> Path:
        return self.folder / f"step_{step:08d}"

    def _found(self) -> list[int]:
        paths = self.folder.iterdir() if self.folder.is_dir() else []
        return sorted(int(match[1]) for path in paths if (match := NAME.fullmatch(path.name)))

    def _verify(self, folder: Path) -> str | None:
        signature = _signature(folder)
        known = self._verdicts.get(folder)
        if known is None or known[0] != signature:
            self._verdicts[folder] = known = (signature, _fault(folder, hashes=True))
        return known[1]

    def _drop_older_than(self, newest: int) -> None:
        """Keep `keep` checkpoints up to the one just saved; a broken one takes no other's place."""
        before = [step for step in self._found() if step < newest]
        whole = [step for step in before if _fault(self._path(step), hashes=False) is None]
        kept = whole[-(self.keep - 1) :] if self.keep > 1 else []
        for step in set(before) - set(kept):
            self._verdicts.pop(self._path(step), None)
            shutil.rmtree(self._path(step), ignore_errors=True)

    def _remove_leftovers(self) -> None:
        for path in self.folder.glob(".step_*") if self.folder.is_dir() else []:
            shutil.rmtree(path, ignore_errors=True)


class _HashedFile:
    """A file to write to once, front to back; keeps size, sha256, and the error that the disk gave."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("wb")
        self.bytes, self.digest = 0, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            self.file.write(data)
        except OSError as error:
            self.error = error
            raise
        self.digest.update(data)
        size = memoryview(data).nbytes
        self.bytes += size
        return size

    def flush(self) -> None:
        self.file.flush()

    def close(self) -> None:
        try:
            self.file.flush()
            os.fsync(self.file.fileno())
        finally:
            self.file.close()


def _write_state(path: Path, state: dict[str, Any]) -> dict[str, Any]:
    file = _HashedFile(path)
    try:
        torch.save(state, file)  # type: ignore[arg-type]
    except Exception:
        # torch's zip writer turns the disk's refusal into an error of its own; the disk's is the one to tell.
        if file.error is not None:
            raise file.error from None
        raise
    finally:
        file.close()
    return {"bytes": file.bytes, "sha256": file.digest.hexdigest()}


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _signature(folder: Path) -> Signature:
    try:
        stats = [(folder / name).stat() for name in (STATE, MANIFEST)]
    except OSError:
        return None
    return tuple((stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in stats)


def _fault(folder: Path, hashes: bool) -> str | None:
    """What is wrong with a checkpoint, or None; `hashes` also compares contents."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if manifest["version"] != VERSION:
            return f"has version {manifest['version']}, this program reads {VERSION}"
        for name, expected in manifest["files"].items():
            size = (folder / name).stat().st_size
            if size != expected["bytes"]:
                return f"{name} has {size} bytes instead of {expected['bytes']}"
            if hashes:
                with (folder / name).open("rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() != expected["sha256"]:
                        return f"{name} is damaged (its sha256 is not that of the manifest)"
        if STATE not in manifest["files"]:
            return f"its manifest does not list {STATE}"
    except OSError as error:
        name = Path(error.filename).name if error.filename else folder.name
        return f"{name} cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is damaged"
    return None


def _refuse_foreign(value: Any, where: str) -> None:
    """TypeError for anything that loading with weights_only would refuse."""
    if type(value) in (dict, OrderedDict):
        for key, item in value.items():
            _refuse_foreign(key, f"{where}, key {key!r}")
            _refuse_foreign(item, f"{where}[{key!r}]")
    elif type(value) in (list, tuple, set):
        for index, item in enumerate(value):
            _refuse_foreign(item, f"{where}[{index}]")
    elif not isinstance(value, PLAIN) or type(value).__module__.partition(".")[0] not in ("builtins", "torch"):
        raise TypeError(f"{where} is a {type(value).__module__}.{type(value).__name__}; save tensors and plain values")


def _reason(error: BaseException) -> str:
    # torch wraps the reason into lines of advice on how to load what is not to be trusted.
    if found := re.search(r"GLOBAL ([\w.]+)", str(error)):
        return found[1]
    return (str(error).splitlines() or [type(error).__name__])[0]


def _warn(folder: Path, fault: str) -> None:
    logger.warning("checkpoint %s: %s; passed over", folder, fault)
