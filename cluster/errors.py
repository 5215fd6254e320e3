"""Errors of the ground floor that a user can put right, and how such errors are told from bugs."""

from __future__ import annotations

import errno
import pickle
import re

OUR_PACKAGES = frozenset({"cluster", "data_pipeline", "pretrain", "downstream"})
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the disk, a quota, a limit of the process
# What a storage that others share says while a server restarts, a mount is replaced or the network is down.
PASSING = frozenset({
    errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EREMOTEIO, errno.ENOTCONN, errno.ESHUTDOWN, errno.ECONNRESET,
    errno.ECONNABORTED, errno.ECONNREFUSED, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH,
})  # fmt: skip


class RunError(ValueError):
    """A run that cannot start or go on: one line with what, and what to do."""


class RecipeError(RunError):
    """A recipe or an override that is wrong: one line with key, value and the nearest valid one."""


class CheckpointError(RunError):
    """A checkpoint that cannot be written or read: one line with the folder and the remedy."""


class UnreadableError(CheckpointError):
    """A checkpoint of which nothing is known, because its storage does not answer."""

    transient = True  # a run on a cluster goes on after it


class PassingError(RunError):
    """A fault that may pass: storage that did not answer, or a process of a worker that was killed."""

    transient = True


class Restart(Exception):  # noqa: N818  # no error: how a worker ends that is to start anew
    """Raised in a worker that has saved and ends, so that a group of another size can start."""


class PeerLost(RuntimeError):  # noqa: N818  # not this worker's own error
    """Raised in a worker whose collective failed because another worker, or a device, is gone."""


def is_passing(error: OSError) -> bool:
    """Whether a storage may do later what it did not do now, as a full disk or a missing file would not."""
    return error.errno in PASSING or isinstance(error, TimeoutError)


def remedy_of(error: BaseException) -> str:
    """What to do about a storage that did not take what was written to it."""
    if isinstance(error, OSError) and error.errno in FULL:
        return "free some space"
    if isinstance(error, OSError) and is_passing(error):
        return "see that its storage answers"
    return "see that it can be written to"


def is_ours(error: BaseException) -> bool:
    """Whether `error` was written for the user (its class stands in one of our packages), or is a bug."""
    return type(error).__module__.partition(".")[0] in OUR_PACKAGES


def portable(error: Exception) -> Exception:
    """`error` itself where it survives the way between processes whole, else a RunError of its message."""
    try:
        copy = pickle.loads(pickle.dumps(error))
    except Exception:
        return RunError(str(error))
    return error if str(copy) == str(error) else RunError(str(error))


def first_line(error: BaseException) -> str:
    """What an error says first, or its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def reason_of(error: BaseException) -> str:
    """The few words in which a disk, a store or torch says why."""
    # torch wraps the reason into lines of advice on how to load what is not to be trusted.
    if found := re.search(r"GLOBAL ([\w.]+)", str(error)):
        return found[1]
    return (isinstance(error, OSError) and error.strerror) or first_line(error)


def last_line(error: BaseException) -> str:
    """What an error says last: of an error that holds another's traceback, what was raised there."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
