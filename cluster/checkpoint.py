"""Checkpoints of a run: complete or absent, verified before use, written beside the training.

    checkpoints/                or s3://bucket/run/checkpoints
      step_00000200/
        state.pt                tensors and plain values, read back with weights_only
        manifest.json           {"version", "step", "score", "files": {"state.pt": {"bytes", "sha256"}}}

What carries a final name, or has a manifest in a store, was complete. Damage that comes later is found by size and
sha256, named, and passed over; where all are damaged nothing goes on, because that would begin anew. The digest is
taken of the bytes on their way to the disk, so a checkpoint is not read back. `save_soon` copies the state and returns;
a thread writes it.

One process writes to a folder (rank 0); any number may read.
"""

from __future__ import annotations

import json
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch

from cluster.checkpoint_faults import VERSION, Fault, find_fault, read_manifest, unreadable
from cluster.checkpoint_folders import STATE, Signature, StoreFolder, open_folder, step_name
from cluster.errors import CheckpointError, UnreadableError, reason_of, remedy_of

PLAIN = (torch.Tensor, torch.Size, torch.dtype, torch.device, str, bytes, bool, int, float, complex, type(None))

logger = logging.getLogger(__name__)


class Kept(Protocol):
    """Options of a run that say where its checkpoints lie and which of them are kept."""

    @property
    def checkpoints(self) -> str | None:
        """A folder or URL; None: in the run folder."""

    @property
    def keep_checkpoints(self) -> int:
        """How many of the newest."""

    @property
    def keep_every(self) -> int:
        """Besides, one in so many steps; 0: none."""

    @property
    def keep_best(self) -> bool:
        """Besides, the one with the highest score."""


def open_checkpoints(options: Kept, run: Path | str, on_saved: Callable[[int], None] | None = None) -> CheckpointStore:
    """The checkpoints of the run in folder `run`: in it, or where its options say."""
    return CheckpointStore(
        options.checkpoints or Path(run) / "checkpoints",
        keep=options.keep_checkpoints,
        keep_every=options.keep_every,
        keep_best=options.keep_best,
        on_saved=on_saved,
    )


class CheckpointStore:
    """Checkpoints of one run.

    Args:
        folder: where they lie, a path or a URL that fsspec knows; made when the first is saved.
        keep: how many of the newest to keep, at least 1.
        keep_every: besides, one in so many steps; 0: none.
        keep_best: besides, the one with the highest score.
        on_broken: called with the name and the fault of a checkpoint that `newest` passes over; a warning in the log
            unless given.
        on_saved: called with the step of a checkpoint that has become complete, by the thread that wrote it.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        keep: int = 3,
        keep_every: int = 0,
        keep_best: bool = False,
        on_broken: Callable[[str, str], None] | None = None,
        on_saved: Callable[[int], None] | None = None,
    ) -> None:
        if keep < 1:
            raise CheckpointError(f"{folder}: keep={keep} checkpoints; keep at least 1")
        self.where = str(folder)
        self.keep, self.keep_every, self.keep_best = keep, keep_every, keep_best
        self.on_broken, self.on_saved = on_broken or _warn, on_saved
        try:
            self.folder = open_folder(folder)
        except (ImportError, ValueError) as error:
            raise CheckpointError(
                f"checkpoints={folder} cannot be opened ({reason_of(error)}); use a folder, or install what is "
                "missing: pip install 'dicm[s3]' for s3://"
            ) from error
        self._verdicts: dict[int, tuple[Signature, Fault | None]] = {}  # step -> its files when read, the fault
        self._undropped: set[int] = set()  # of which the log has been told
        self._left_over = False  # whether the log has been told of what others left
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def save(self, step: int, state: dict[str, Any], score: float | None = None) -> str:
        """Write the checkpoint of `step`, drop those that are not to be kept, and return its name.

        Args:
            state: nested dicts, lists and tuples of tensors and plain values; anything else is a TypeError now,
                because weights_only would refuse it when it is needed.
            score: how good the model is, the higher the better, where that is known.

        Raises:
            CheckpointError: the disk is full or refuses; earlier checkpoints are as they were.
        """
        self.wait()
        _refuse_foreign(state, "state")
        self._write(step, state, score)
        return self._name(step)

    def save_soon(self, step: int, state: dict[str, Any], score: float | None = None) -> None:
        """Copy `state` and let a thread `save` it; an error is raised by the next call or by `wait`."""
        self.wait()
        _refuse_foreign(state, "state")
        copy = _copy(state)

        def write() -> None:
            try:
                self._write(step, copy, score)
            except Exception as error:
                self._error = error

        self._thread = threading.Thread(target=write, name=f"checkpoint {step}")
        self._thread.start()

    def wait(self) -> None:
        """Until what `save_soon` took is complete (CheckpointError: it could not be written)."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def note_score(self, step: int, score: float) -> None:
        """Note how good a checkpoint turned out to be, for `keep_best`; nothing where there is none of that step."""
        self.wait()
        if step in self.steps():
            with self._writing(step):
                manifest = {**read_manifest(self.folder, step), "score": score}
                self.folder.rewrite_manifest(step, json.dumps(manifest).encode())
            self._verdicts[step] = (self.folder.signature(step), None)

    def steps(self) -> list[int]:
        """Steps with a checkpoint whose files have the sizes of its manifest, ascending."""
        return [step for step in self._found() if self._fault(step, hashes=False) is None]

    def newest(self) -> int | None:
        """The newest step whose checkpoint is whole, bit for bit; broken ones are named, once, and passed over.

        None where there is no checkpoint at all. What this store wrote or read itself is not read again while its files
        are the same.

        Raises:
            CheckpointError: there are checkpoints, but none can be used.
            UnreadableError: one could not be read, so that it is not known whether it is damaged.
        """
        faults: dict[int, Fault] = {}
        for step in reversed(self._found()):
            known = self._verdicts.get(step)
            if (fault := self._verify(step)) is None:
                return step
            faults[step] = fault
            if self._verdicts[step] != known:
                self.on_broken(self._name(step), fault.what)
        if faults:
            shown = "; ".join(f"{step_name(step)}: {fault.what}" for step, fault in list(faults.items())[:3])
            raise CheckpointError(
                f"{self.where}: none of the {len(faults)} checkpoints there can be used ({shown}); put a whole one "
                "back, or remove the folder to begin anew"
            )
        return None

    def load(self, step: int, map_location: str | torch.device = "cpu") -> dict[str, Any]:
        """The state saved at `step`.

        Raises:
            CheckpointError: there is none, it is damaged, or it holds what `save` never writes.
        """
        name = self._name(step)
        if step not in self._found():
            there = ", ".join(map(str, self.steps())) or "none"
            raise CheckpointError(f"{self.where}: no checkpoint of step {step}; there are: {there}")
        if (fault := self._verify(step)) is not None:
            raise CheckpointError(f"{name}: {fault.what}; remove it to go on from an earlier one")
        try:
            with self._opened(step) as file:
                state = torch.load(file, map_location=map_location, weights_only=True)
        except (OSError, UnreadableError) as error:
            raise unreadable(f"{name}/{STATE}", error) from error
        except Exception as error:  # unpickling what others wrote raises anything
            raise CheckpointError(
                f"{name}/{STATE}: holds something other than tensors and plain values ({reason_of(error)}); it was "
                f"not written by this program; remove {name}"
            ) from error
        finally:
            if isinstance(self.folder, StoreFolder):
                self.folder.forget()
        if not isinstance(state, dict):
            raise CheckpointError(f"{name}/{STATE}: holds a {type(state).__name__}, no checkpoint; remove {name}")
        return state

    def _write(self, step: int, state: dict[str, Any], score: float | None) -> None:
        def manifest_of(size: int, sha256: str) -> bytes:
            files = {STATE: {"bytes": size, "sha256": sha256}}
            return json.dumps({"version": VERSION, "step": step, "score": score, "files": files}).encode()

        with self._writing(step):
            self.folder.write(step, lambda file: torch.save(state, file), manifest_of)
            self._verdicts[step] = (self.folder.signature(step), None)
        if self.on_saved is not None:
            try:
                self.on_saved(step)
            except OSError as error:
                raise CheckpointError(
                    f"{self._name(step)}: is complete, but that could not be noted ({reason_of(error)}); "
                    f"{remedy_of(error)} and run the same command again"
                ) from error
        try:
            self._drop(step)
        except Exception as error:  # the checkpoint is complete: what is left lying is no reason to end a run
            logger.warning("%s: what to keep could not be told (%s); nothing was removed", self.where, reason_of(error))
        try:
            self.folder.remove_leftovers()
        except Exception as error:  # as above
            if not self._left_over:
                self._left_over = True
                logger.warning(
                    "%s: what writers that died left could not be removed (%s) and takes up space; allow this program "
                    "to list uploads and to delete, or let the store drop them by a rule of its own",
                    self.where,
                    reason_of(error),
                )

    def _writing(self, step: int) -> AbstractContextManager[None]:
        return _writing(f"{self.where}: the checkpoint of step {step} could not be written")

    def _found(self) -> list[int]:
        try:
            return self.folder.steps()
        except Exception as error:  # the stores' libraries share no class of their own
            raise CheckpointError(
                f"{self.where}: cannot be read ({reason_of(error)}); check the address, the credentials and the network"
            ) from error

    def _opened(self, step: int) -> BinaryIO:
        try:
            return self.folder.read(step, STATE)
        except Exception as error:  # the stores' libraries share no class of their own
            raise UnreadableError(reason_of(error)) from error

    def _verify(self, step: int) -> Fault | None:
        signature = self.folder.signature(step)
        known = self._verdicts.get(step)
        if known is None or known[0] != signature or signature is None:
            self._verdicts[step] = known = (signature, self._fault(step, hashes=True))
        return known[1]

    def _fault(self, step: int, hashes: bool) -> Fault | None:
        return find_fault(self.folder, step, self._name(step), hashes=hashes)

    def _drop(self, newest: int) -> None:
        """Keep what is to be kept of the checkpoints up to the one just saved; a broken one takes no other's place."""
        whole, damaged = [], []
        for step in [step for step in self._found() if step < newest]:
            try:
                fault = self._fault(step, hashes=False)
            except UnreadableError as error:  # may be whole, and the only one that is
                logger.warning("%s", error)
                continue
            if fault is None:
                whole.append(step)
            elif fault.is_damage:
                damaged.append(step)
        kept = set(whole[-(self.keep - 1) :] if self.keep > 1 else [])
        if self.keep_every:
            first_of = {step // self.keep_every: step for step in reversed(whole)}
            kept |= set(first_of.values())
        if self.keep_best:
            scores = {step: read_manifest(self.folder, step).get("score") for step in [*whole, newest]}
            scores = {step: score for step, score in scores.items() if score is not None}
            kept |= {max(scores, key=lambda step: (scores[step], step))} if scores else set()
        for step in [*damaged, *whole]:
            if step not in kept:
                self._remove(step)

    def _remove(self, step: int) -> None:
        """Drop a checkpoint; where that is refused, say so once: a run does not end for it."""
        self._verdicts.pop(step, None)
        try:
            self.folder.remove(step)
        except Exception as error:  # the stores' libraries share no class of their own
            if step not in self._undropped:
                self._undropped.add(step)
                logger.warning(
                    "%s: could not be removed (%s) and takes up space; allow this program to delete, or remove it",
                    self._name(step),
                    reason_of(error),
                )

    def _name(self, step: int) -> str:
        return f"{self.where.rstrip('/')}/{step_name(step)}"


@contextmanager
def _writing(what: str) -> Iterator[None]:
    """Turns what a disk or a store says while it is written to into one line."""
    try:
        yield
    except TypeError:  # of what is written, not of where
        raise
    except Exception as error:  # the stores' libraries share no class of their own
        raise CheckpointError(
            f"{what} ({reason_of(error)}); earlier ones are whole; {remedy_of(error)} and run the same command again"
        ) from error


def _copy(value: Any) -> Any:
    """`value` with its tensors copied to the CPU."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return type(value)((key, _copy(item)) for key, item in value.items())
    if type(value) in (list, tuple, set):
        return type(value)(_copy(item) for item in value)
    return value


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


def _warn(name: str, fault: str) -> None:
    logger.warning("checkpoint %s: %s; passed over", name, fault)
