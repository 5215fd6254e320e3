from __future__ import annotations

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cluster.files import append_line, patiently, write_whole


def test_write_whole__two_writers_of_one_process_id(tmp_path: Path):
    """As in pods that share a folder: each has process 7. Here they are threads of one process."""
    path, contents = tmp_path / "file", [bytes([number]) * 10_000 for number in range(4)]

    def write(content: bytes) -> None:
        for _ in range(20):
            write_whole(path, content)
            assert path.read_bytes() in contents

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, contents))
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("before", ["", "whole\n", "whole\nto"])
def test_append_line__is_a_line_of_its_own(tmp_path: Path, before: str):
    path = tmp_path / "lines"
    path.write_text(before)
    append_line(path, "new")
    assert path.read_text() == (before if before.endswith("\n") or not before else before + "\n") + "new\n"


def failing(code: int, times: int) -> tuple[list[int], object]:
    calls: list[int] = []

    def attempt() -> str:
        calls.append(1)
        if len(calls) <= times:
            raise OSError(code, os.strerror(code))
        return "done"

    return calls, attempt


@pytest.mark.parametrize(("code", "times", "calls"), [(errno.ESTALE, 2, 3), (errno.EIO, 3, 3), (errno.ENOSPC, 1, 1)])
def test_patiently__tries_again_what_may_pass(monkeypatch: pytest.MonkeyPatch, code: int, times: int, calls: int):
    monkeypatch.setattr("cluster.files.RETRY_SECONDS", (0.0, 0.0))
    made, attempt = failing(code, times)
    if times < calls:
        assert patiently(attempt) == "done"  # type: ignore[arg-type]
    else:
        with pytest.raises(OSError, match=os.strerror(code)):
            patiently(attempt)  # type: ignore[arg-type]
    assert len(made) == calls
