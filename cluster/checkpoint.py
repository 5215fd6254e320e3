"""Checkpoints on disk: complete or absent, verified before use.

    checkpoints/
      step_00000200/
        state.pt          tensors and plain values, read back with weights_only
        manifest.json     {"step", "files": {"state.pt": {"bytes", "sha256"}}}
      .step_00000400.123  being written; renamed when whole, removed when found again

The manifest is written last inside the temporary folder, and the folder renamed after an fsync: what carries the
final name was complete. Damage that comes later is found by its size and sha256, named, and passed over.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch

from cluster.errors import CheckpointError

STATE, MANIFEST = "state.pt", "manifest.json"


class CheckpointStore:
    """Checkpoints of one run.

    Args:
        folder: where they lie; made when the first is saved.
        keep: how many of the newest to keep.
    """

    def __init__(self, folder: Path | str, *, keep: int = 3):
        self.folder, self.keep = Path(folder), keep

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Write the checkpoint of `step`, then drop the oldest beyond `keep`.

        Raises:
            CheckpointError: the disk is full or refuses; earlier checkpoints are as they were.
        """
        final = self._path(step)
        temporary = self.folder / f".{final.name}.{os.getpid()}"
        try:
            self._remove_leftovers()
            temporary.mkdir(parents=True)
            file = {STATE: _write_state(temporary / STATE, state)}
            _write(temporary / MANIFEST, json.dumps({"step": step, "files": file}).encode())
            shutil.rmtree(final, ignore_errors=True)
            os.replace(temporary, final)
            _sync_folder(self.folder)
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise CheckpointError(
                f"{self.folder}: the checkpoint of step {step} could not be written ({error.strerror or error}); earlier "
                "ones are whole; free some space and run the same command again"
            ) from error
        for old in self.steps()[: -self.keep]:
            shutil.rmtree(self._path(old), ignore_errors=True)
        return final

    def steps(self) -> list[int]:
        """Steps with a checkpoint whose files have the sizes of its manifest, ascending."""
        paths = self.folder.glob("step_*") if self.folder.is_dir() else []
        return sorted(int(path.name.removeprefix("step_")) for path in paths if self._fault(path, hashes=False) is None)

    def newest(self) -> int | None:
        """The newest step whose checkpoint is whole, bit for bit; broken ones are named in a warning."""
        paths = sorted(self.folder.glob("step_*"), reverse=True) if self.folder.is_dir() else []
        for path in paths:
            fault = self._fault(path, hashes=True)
            if fault is None:
                return int(path.name.removeprefix("step_"))
            warnings.warn(f"{path}: {fault}; passed over", stacklevel=2)
        return None

    def load(self, step: int, map_location: str | torch.device = "cpu") -> dict[str, Any]:
        """The state saved at `step` (CheckpointError where it is missing or foreign)."""
        path = self._path(step) / STATE
        try:
            return torch.load(path, map_location=map_location, weights_only=True)
        except (OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
            raise CheckpointError(
                f"{path}: cannot be read ({str(error).splitlines()[0]}); remove {path.parent} to go on from an earlier one"
            ) from error

    def _path(self, step: int) -> Path:
        return self.folder / f"step_{step:08d}"

    def _fault(self, path: Path, hashes: bool) -> str | None:
        """What is wrong with a checkpoint, or None."""
        try:
            files = json.loads((path / MANIFEST).read_text())["files"]
            for name, expected in files.items():
                size = (path / name).stat().st_size
                if size != expected["bytes"]:
                    return f"{name} has {size} bytes instead of {expected['bytes']}"
                if hashes:
                    with (path / name).open("rb") as file:
                        if hashlib.file_digest(file, "sha256").hexdigest() != expected["sha256"]:
                            return f"{name} is damaged (sha256)"
        except (OSError, ValueError, KeyError, TypeError) as error:
            return f"incomplete ({error})"
        return None

    def _remove_leftovers(self) -> None:
        for path in self.folder.glob(".step_*") if self.folder.is_dir() else []:
            shutil.rmtree(path, ignore_errors=True)


def _write_state(path: Path, state: dict[str, Any]) -> dict[str, Any]:
    # Through memory, because torch's zip writer turns a full disk into an exception of no type in particular.
    buffer = io.BytesIO()
    torch.save(state, buffer)
    data = buffer.getbuffer()
    _write(path, data)
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _write(path: Path, data: bytes | memoryview) -> None:
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
