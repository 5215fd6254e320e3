"""How the C library hands out memory, for processes that code large pictures on a CPU."""

from __future__ import annotations

import ctypes
import sys

# Parameters of glibc's mallopt (malloc.h), and the most that fits its int.
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
MOST = (1 << 31) - 1


def keep_freed_memory() -> bool:
    """Let this process use freed memory again instead of returning it; False where there is no glibc.

    glibc gives blocks of 32 MiB and more back to the system at once and gets the next one page by page, each page
    cleared. The features of a picture of 2048 x 2048 are such blocks, and its every operator then waits for them: a
    pixel costs a third more than in a small picture. The process keeps what it needed most until it ends.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(option, MOST) == 1 for option in (MMAP_THRESHOLD, TRIM_THRESHOLD))
