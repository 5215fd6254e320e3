"""What each process of a group has in hand, told where one of them dies.

A decoder that crashes and a kernel that is short of memory end a process without a word. What it had begun stays
in memory that its parent shares, so that the error names the file.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
from collections.abc import Container
from multiprocessing.context import BaseContext

SIZE = 1024  # bytes of a line; of a longer one the end stays, where the file's name is

_line: memoryview | None = None  # of this process; None where nobody would read it


class Board:
    """A line for each process of a group. Processes get it as an argument when they start, not later.

    Args:
        num_processes: that are ever started.
        context: that starts them.
    """

    def __init__(self, num_processes: int, context: BaseContext | None = None):
        context = context or multiprocessing.get_context()
        self._lines = context.RawArray(ctypes.c_char, SIZE * num_processes)
        self._num_joined = context.Value("i", 0)

    def join(self) -> None:
        """Take the next line for this process."""
        global _line
        with self._num_joined:
            place = self._num_joined.value % (len(self._lines) // SIZE)
            self._num_joined.value += 1
        _line = memoryview(self._lines).cast("B")[place * SIZE : (place + 1) * SIZE]

    def texts(self, pids: Container[int] | None = None) -> list[str]:
        """What processes, or those of `pids`, have in hand; those that put it down have nothing."""
        lines = (self._lines.raw[start : start + SIZE] for start in range(0, len(self._lines), SIZE))
        found = (line.rstrip(b"\0").partition(b" ") for line in lines)
        return [os.fsdecode(text) for pid, _, text in found if text and (pids is None or int(pid) in pids)]


def take(text: str) -> None:
    """Say what this process begins."""
    if _line is not None:
        pid = b"%d " % os.getpid()
        _line[:] = (pid + os.fsencode(text)[len(pid) - SIZE :]).ljust(SIZE, b"\0")


def put_down() -> None:
    """Say that this process is done with what it began."""
    if _line is not None:
        _line[:] = bytes(SIZE)
