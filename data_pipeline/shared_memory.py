"""How decoding processes hand tensors over: through shared memory, files in /dev/shm, of which containers have little.

torch moves the tensors of a batch there in a thread that has no one to tell what went wrong: where there is no room the
batch is gone, and whoever waits for it waits for ever. So they are moved before, where an error can be raised.
"""

from __future__ import annotations

import errno
import os
import re
from typing import Any

from torch import Tensor
from torch.utils.data import get_worker_info

from data_pipeline.errors import DataError, LostProcessError
from data_pipeline.in_hand import Board

FOLDER = "/dev/shm"
NO_ROOM = os.strerror(errno.ENOSPC)
MIB = 2**20
# Of torch's DataLoader.
DEAD = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([0-9, ]+)\)")
CRASHED = re.compile(r"killed by signal: (?!Killed)")


def move_to_shared_memory(batch: Any) -> None:
    """Move all tensors in nested lists and tuples to shared memory, in place; nothing outside of a decoding process.

    Raises:
        DataError: there is no room for them.
    """
    if get_worker_info() is None:
        return
    if isinstance(batch, Tensor):
        try:
            batch.share_memory_()
        except RuntimeError as error:
            if NO_ROOM not in str(error):
                raise
            raise no_room(f"{batch.numel() * batch.element_size()} bytes of a batch did not fit") from error
    elif isinstance(batch, (list, tuple)):
        for part in batch:
            move_to_shared_memory(part)


def no_room(what: str, folder: str = FOLDER) -> DataError:
    """The error of a /dev/shm that is full: its size, what is free, and what to do."""
    status = os.statvfs(folder)
    size, free = (status.f_frsize * blocks // MIB for blocks in (status.f_blocks, status.f_bavail))
    return DataError(
        f"{folder}: has room for {size} MiB, of which {free} MiB are free, and {what}; give the container more (docker "
        "run --shm-size=8g; in Kubernetes an emptyDir of medium Memory), or use fewer decoding processes, "
        "num_workers=0 for none"
    )


def fault_of_processes(error: Exception, board: Board) -> DataError | None:
    """What to tell of an error that torch raised for a decoding process; None where it is about something else.

    Args:
        board: what each of the processes has in hand.

    Returns:
        A LostProcessError where a process was killed, a DataError where it crashed and would crash again.
    """
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return no_room("the queues of decoding processes did not fit")
    if not isinstance(error, RuntimeError) or (dead := DEAD.search(str(error))) is None:
        return None
    reason = f"{error.__cause__ or error}".split(". ")[0].rstrip(".")
    held = " and ".join(board.texts([int(pid) for pid in dead[1].split(", ")]))
    line = (
        f"a decoding process was ended from outside{f' while it read {held}' if held else ''}, perhaps for want of "
        f"memory ({reason}); run the same again, with a smaller num_workers if need be, 0 for none, or build the data "
        "set again without that sample"
    )
    return DataError(line) if CRASHED.search(reason) else LostProcessError(line)
