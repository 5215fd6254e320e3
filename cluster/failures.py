"""Why a group of workers ended, out of the exceptions of its ranks, and whether it is worth going on.

One cause brings many exceptions: where a worker is killed, the others lose their connections; where one raises, the
others wait until they are killed. What matters is told apart here, first to last: workers that were asked to start
anew, an error written for the user, a bug, a lost worker.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from cluster.errors import PassingError, PeerLost, Restart, first_line, is_ours, is_passing, last_line, reason_of

# Of gloo and NCCL when the other side is gone, and of a GPU that has fallen off: nothing that our code did.
NETWORK = re.compile(r"gloo|NCCL|[Cc]onnection (closed|reset|refused)|Broken pipe|[Ss]ocket")
TIMED_OUT = "Timed out waiting"  # gloo's words, where a collective gives up
PEER = "lost its connection to another"
WAITED = "waited for another longer than cluster.timeout_seconds"
DEVICE = re.compile(r"CUDA error|uncorrectable ECC|device-side|fell off the bus")


@dataclass(frozen=True)
class Cause:
    """Why workers ended.

    Attributes:
        kind: "restart": they were asked to; "told": an error written for the user; "bug": any other exception;
            "lost": a process, node or connection is gone, or storage does not answer: it is worth going on.
        rank: of the worker it began with, where one is known.
        reason: a few words.
        error: the exception of that rank.
    """

    kind: str
    rank: int | None
    reason: str
    error: Exception | None = None

    @property
    def what(self) -> str:
        """What happened to a lost worker."""
        return self.reason if self.reason in (PEER, WAITED) else f"was lost ({self.reason})"


def cause_of(failures: Mapping[int, Exception]) -> Cause:
    """The cause behind the exceptions of some ranks."""
    ranks = dict(sorted(failures.items()))
    for rank, error in ranks.items():
        if isinstance(error, Restart):
            return Cause("restart", rank, str(error), error)
    lost = {rank: error for rank, error in ranks.items() if _is_process_lost(error)}
    ours = {rank: error for rank, error in ranks.items() if is_ours(error) and not isinstance(error, PeerLost)}
    for rank, error in sorted(ours.items(), key=lambda item: is_transient(item[1])):  # what passes comes last
        return Cause("lost" if is_transient(error) else "told", rank, str(error), error)
    for rank, error in lost.items():
        return Cause("lost", rank, reason_of_death(error), error)
    for rank, error in ranks.items():
        if not isinstance(error, PeerLost):
            return Cause("bug", rank, first_line(error), error)
    for rank, error in ranks.items():
        return Cause("lost", rank, WAITED if TIMED_OUT in str(error) else PEER, error)
    return Cause("lost", None, "no worker said why")


def is_transient(error: BaseException) -> bool:
    """Whether an error of ours says that what failed may go well another time."""
    return bool(getattr(error, "transient", False))


def passing(error: Exception) -> Exception | None:
    """The one line of a fault that may pass, or None: storage that did not answer, an error that says so of itself.

    Args:
        error: as raised in a worker; what it was raised from counts, too.
    """
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    if is_transient(error) and is_ours(error):
        return error
    for each in chain:
        if isinstance(each, OSError) and is_passing(each):
            if is_ours(error):
                return PassingError(str(error))
            return PassingError(
                f"{each.filename or 'a file of the run'}: {reason_of(each)}; see that its storage answers and run the "
                "same command again"
            )
    return None


def is_peer_lost(error: BaseException) -> bool:
    """Whether an exception says that another worker, or the GPU, is gone."""
    return isinstance(error, RuntimeError) and bool(NETWORK.search(str(error)) or DEVICE.search(str(error)))


def reason_of_death(error: BaseException) -> str:
    """The shortest account of why a worker's process died, out of Ray's page about it."""
    text = str(error)
    if "OutOfMemory" in text or "running low on memory" in text:
        return "memory ran out"
    if "its node has died" in text:
        return "its node died"
    if "unavailable" in text:
        return "it does not answer"
    if "SIGKILL" in text or "connection error code 2" in text:
        return "its process was killed, as the system does when memory runs out"
    return last_line(error)


def _is_process_lost(error: BaseException) -> bool:
    """Whether Ray reports the process as gone, rather than what ran in it as failed."""
    return type(error).__module__.partition(".")[0] == "ray"
