from __future__ import annotations

import errno
import fcntl
import logging
from pathlib import Path

import pytest

from cluster.locks import lock


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_lock__a_file_system_without_locks_is_named_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, code: int
):
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(code, "refused")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with caplog.at_level(logging.WARNING):
        assert not any(lock(0, fcntl.LOCK_EX, tmp_path) for _ in range(3))
    (record,) = caplog.records
    assert record.getMessage().startswith(f"{tmp_path}: its file system has no locks (refused)")


def test_lock__other_errors_stay_what_they_are(tmp_path: Path):
    with (tmp_path / "file").open("w") as one, (tmp_path / "file").open("w") as other:
        assert lock(one.fileno(), fcntl.LOCK_EX, tmp_path)
        with pytest.raises(BlockingIOError):
            lock(other.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB, tmp_path)
    with pytest.raises(OSError, match="Bad file descriptor"):
        lock(10**6, fcntl.LOCK_EX, tmp_path)
