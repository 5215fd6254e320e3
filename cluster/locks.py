"""Locks of files that end with their process (flock), and file systems that know none.

Network file systems without a lock service, and some in user space, refuse every lock. What is shared there has to be
safe without: files under names of their own that are renamed when they are whole.
"""

from __future__ import annotations

import errno
import fcntl
import logging
from pathlib import Path

UNKNOWN = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)  # what file systems without locks answer

logger = logging.getLogger(__name__)
_told: set[Path] = set()  # folders whose file system was named in the log


def lock(descriptor: int, operation: int, folder: Path) -> bool:
    """Lock or unlock an open file; False where its file system knows no locks, which the log says once.

    Args:
        operation: as for `fcntl.flock`.
        folder: in which the file lies, to be shown.

    Raises:
        BlockingIOError: with LOCK_NB, another process has it.
        OSError: anything else that is wrong.
    """
    try:
        fcntl.flock(descriptor, operation)
    except OSError as error:
        if error.errno not in UNKNOWN:
            raise
        if folder not in _told:
            _told.add(folder)
            logger.warning(
                "%s: its file system has no locks (%s); processes that share it work without them",
                folder,
                error.strerror,
            )
        return False
    return True
