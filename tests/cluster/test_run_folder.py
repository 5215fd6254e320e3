from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cluster.checkpoint import CheckpointStore
from cluster.errors import RunError
from cluster.run_folder import LOCK, held_run, how_it_stopped
from pretrain.config import PretrainConfig

REPOSITORY = Path(__file__).parents[2]
HOLD = (
    "import sys\nfrom cluster.run_folder import held_run\nwith held_run(sys.argv[1]):\n    print('held', flush=True)\n"
)


def driver(run: Path, body: str) -> subprocess.Popen[str]:
    """A process that holds the run, and does `body` meanwhile."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD + body, str(run)], env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_held_run__a_second_driver_is_refused_and_told_by_whom(tmp_path: Path):
    run = tmp_path / "runs" / "one"
    process = driver(run, "    sys.stdin.read()\n")
    for _ in range(2):  # to be refused does not free it
        with pytest.raises(RunError, match=rf"run={run} is in use: process {process.pid} on ") as caught, held_run(run):
            raise AssertionError
        assert socket.gethostname() in str(caught.value)
        assert "\n" not in str(caught.value)
    process.communicate("")
    with held_run(run), pytest.raises(RunError, match=f"process {os.getpid()} on"), held_run(run):
        raise AssertionError
    assert not run.exists()  # what was made for nothing is removed
    run.mkdir(parents=True)
    with held_run(run):
        assert [path.name for path in run.iterdir()] == [LOCK]
    assert list(run.iterdir()) == []


@pytest.mark.parametrize("forks", [False, True], ids=["alone", "with a child that lives on"])
def test_held_run__of_a_killed_driver_goes_on_at_once(tmp_path: Path, forks: bool):
    # One write a line: with an unbuffered stdout `print` makes two, and those of parent and child may mix.
    child = "    import os, time\n    pid = os.fork()\n    os.write(1, b'%d\\n' % pid)\n    time.sleep(600)\n"
    process = driver(tmp_path, child if forks else "    print(0, flush=True); sys.stdin.read()\n")
    assert process.stdout is not None
    children = [int(process.stdout.readline()) for _ in range(2 if forks else 1)]
    process.send_signal(signal.SIGKILL)
    process.wait()
    try:
        assert (tmp_path / LOCK).is_file()
        with held_run(tmp_path):
            assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    finally:
        for child_pid in filter(None, children):
            os.kill(child_pid, signal.SIGKILL)


def leave_record(run: Path, **facts: object) -> None:
    """What a driver on another machine left, whose file system keeps locks to itself."""
    record = {"host": "far", "machine": "another", "pid": 7, "begun": "2026-01-31 12:00:00", "beats": 3, **facts}
    (run / LOCK).write_text(json.dumps(record).ljust(512))


def test_held_run__what_another_machine_left_behind_is_watched_then_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr("cluster.run_folder.WATCH_SECONDS", 0.3)
    leave_record(tmp_path)
    with held_run(tmp_path):
        assert "process 7 on far, begun 2026-01-31 12:00:00, was at work here" in caplog.text


def test_held_run__a_driver_of_another_machine_that_gives_signs_is_not_disturbed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("time.sleep", lambda _: leave_record(tmp_path, beats=4))
    leave_record(tmp_path)
    with pytest.raises(RunError, match=r"is in use: process 7 on far"), held_run(tmp_path):
        raise AssertionError


def test_held_run__gives_signs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("cluster.run_folder.BEAT_SECONDS", 0.01)
    with held_run(tmp_path):
        while json.loads((tmp_path / LOCK).read_text())["beats"] < 2:
            pass


def test_held_run__under_torchrun_the_first_process_holds_it_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with held_run(tmp_path):
        monkeypatch.setenv("RANK", "1")
        with held_run(tmp_path):
            pass


@pytest.mark.parametrize("place", ["/proc/none/run", "file/run", "file"])
def test_held_run__a_place_where_no_folder_can_be(tmp_path: Path, place: str):
    (tmp_path / "file").touch()
    said = rf"^run={re.escape(str(tmp_path / place))}: cannot be written \("
    with pytest.raises(RunError, match=said), held_run(tmp_path / place):
        raise AssertionError


def test_how_it_stopped__names_a_checkpoint_only_where_there_is_one(tmp_path: Path):
    config = PretrainConfig(data="d")
    assert (
        how_it_stopped(config, tmp_path)
        == f"stopped in {tmp_path} before the first checkpoint; the same command begins again"
    )
    CheckpointStore(tmp_path / "checkpoints").save(3, {"model": torch.zeros(3)})
    assert how_it_stopped(config, tmp_path) == f"stopped with a checkpoint in {tmp_path}; the same command continues"
