from __future__ import annotations

import errno
import pickle

import pytest

from cluster.errors import CheckpointError, PassingError, PeerLost, Restart, RunError
from cluster.failures import cause_of, is_peer_lost, passing
from data_pipeline.errors import DataError, LostProcessError, StoreError


class ActorDiedError(Exception):
    """As Ray's: raised for a process, not by what ran in it."""


ActorDiedError.__module__ = "ray.exceptions"
GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:545] Read error: Connection reset by peer"


@pytest.mark.parametrize(
    ("failures", "kind", "rank", "word"),
    [
        ({0: PeerLost(GLOO), 1: ActorDiedError("killed by SIGKILL")}, "lost", 1, "killed"),
        ({0: PeerLost(GLOO), 1: CheckpointError("disk full")}, "told", 1, "disk full"),
        ({0: PeerLost(GLOO), 2: KeyError("no such key")}, "bug", 2, "no such key"),
        ({0: PeerLost(GLOO), 1: PeerLost(GLOO)}, "lost", 0, "lost its connection"),
        ({1: Restart("asked to"), 0: PeerLost(GLOO)}, "restart", 1, "asked"),
        ({0: KeyError("a follow-up"), 1: ActorDiedError("OutOfMemory")}, "lost", 1, "memory ran out"),
        ({0: StoreError("s3 does not answer")}, "lost", 0, "s3"),
        ({0: DataError("no such split")}, "told", 0, "split"),
        ({0: StoreError("s3"), 1: DataError("no such split")}, "told", 1, "split"),
        ({0: PeerLost(GLOO), 1: PassingError("Stale file handle")}, "lost", 1, "Stale"),
        ({}, "lost", None, "no worker"),
    ],
)
def test_cause_of__tells_the_cause_from_what_follows(failures, kind: str, rank: int | None, word: str):
    cause = cause_of(failures)
    assert (cause.kind, cause.rank) == (kind, rank)
    assert word in cause.reason


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError(GLOO), True),
        (RuntimeError("NCCL error: remote process exited"), True),
        (RuntimeError("CUDA error: uncorrectable ECC error encountered"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError(GLOO), False),
    ],
)
def test_is_peer_lost__a_bug_is_none(error: Exception, lost: bool):
    assert is_peer_lost(error) is lost


def raised(error: Exception, cause: Exception | None = None) -> Exception:
    """`error` as it is once it was raised from `cause`."""
    try:
        raise error from cause
    except type(error) as caught:
        return caught


STALE, FULL = OSError(errno.ESTALE, "Stale file handle", "/shared/a.tar"), OSError(errno.ENOSPC, "No space left", "/x")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (STALE, "/shared/a.tar: Stale file handle; see that its storage answers"),
        (OSError(errno.EIO, "Input/output error"), "a file of the run: Input/output error"),
        (raised(RunError("metrics cannot be written"), STALE), "metrics cannot be written"),
        (raised(CheckpointError("could not be written"), STALE), "could not be written"),
        (raised(KeyError("key"), STALE), "Stale file handle"),
        (StoreError("s3"), "s3"),
        (LostProcessError("a decoding process"), "a decoding process"),
        (FULL, None),
        (FileNotFoundError(errno.ENOENT, "No such file"), None),
        (raised(RunError("metrics cannot be written"), FULL), None),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None),
    ],
)
def test_passing__one_line_of_what_may_go_well_another_time(error: Exception, words: str | None):
    fault = passing(error)
    assert (fault is None) == (words is None)
    if fault is not None:
        assert str(words) in str(fault) and "\n" not in str(fault)
        assert cause_of({0: pickle.loads(pickle.dumps(fault))}).kind == "lost"  # from a worker's process, too
