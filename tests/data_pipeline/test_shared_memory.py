from __future__ import annotations

import errno
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

from data_pipeline.errors import DataError, LostProcessError
from data_pipeline.in_hand import Board
from data_pipeline.shared_memory import fault_of_processes, no_room

SMALL = "mount -t tmpfs -o size=1m tmpfs /dev/shm"
READ = """
import sys
from itertools import islice
import numpy as np
from data_pipeline.errors import DataError
from data_pipeline.loader import train_loader
from data_pipeline.masks import MaskDataset
from data_pipeline.samples import training_loader
try:
    kept = list(islice({loader}, 8))
except DataError as error:
    print(error)
"""
CANVASES = READ.format(loader="train_loader(sys.argv[1], canvas_size=256, batch_size=32, num_workers=2)")
SAMPLES = READ.format(
    loader="training_loader(MaskDataset(sys.argv[1], 'train', np.arange(48), 99), batch_size=32, num_workers=1)"
)


@pytest.mark.slow
@pytest.mark.parametrize("program", [CANVASES, SAMPLES], ids=["canvases", "samples"])
def test_loader__a_small_shared_memory_ends_the_run_in_one_line(scenes: Path, program: str):
    """As in a container, where /dev/shm has 64 MiB unless more is asked for."""
    try:
        subprocess.run(["unshare", "-m", "sh", "-c", SMALL], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"a /dev/shm of its own is not permitted here: {getattr(error, 'stderr', error)}")
    command = f"{SMALL} && exec {shlex.join([sys.executable, '-c', program, str(scenes)])}"
    result = subprocess.run(
        ["unshare", "-m", "sh", "-c", command], cwd=REPOSITORY, capture_output=True, text=True, timeout=60
    )
    (line,) = result.stdout.splitlines()
    assert line.startswith("/dev/shm: has room for 1 MiB") and "--shm-size" in line and "num_workers=0" in line
    assert "Traceback" not in result.stderr


def test_no_room__tells_the_size_and_what_is_free(tmp_path: Path):
    message = str(no_room("9 bytes of a batch did not fit", folder=str(tmp_path)))
    total, _, free = shutil.disk_usage(tmp_path)
    assert message.startswith(f"{tmp_path}: has room for {total // 2**20} MiB, of which ")
    assert abs(int(message.split("of which ")[1].split()[0]) - free // 2**20) < 1000
    assert "9 bytes" in message and "num_workers=0" in message and "\n" not in message


KILLED = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
CRASHED = RuntimeError("DataLoader worker (pid 7) is killed by signal: Segmentation fault. ")
GONE = "DataLoader worker (pid(s) 7) exited unexpectedly"


def caused(error: Exception, cause: Exception) -> Exception:
    """`error` as it is once it was raised from `cause`."""
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (KILLED, LostProcessError), (caused(RuntimeError(GONE), KILLED), LostProcessError),
        (RuntimeError(GONE), LostProcessError), (CRASHED, DataError), (caused(RuntimeError(GONE), CRASHED), DataError),
    ],
)  # fmt: skip
def test_fault_of_processes__another_may_do_what_a_killed_one_did_not(error: Exception, kind: type[DataError]):
    fault = fault_of_processes(error, Board(1))
    assert type(fault) is kind and "ended from outside" in str(fault) and "pid" in str(fault)
    assert "\n" not in str(fault)


def test_fault_of_processes__is_of_those_alone():
    board = Board(1)
    assert "/dev/shm" in str(fault_of_processes(OSError(errno.ENOSPC, "No space left on device"), board))
    assert fault_of_processes(RuntimeError("shapes do not fit"), board) is None
    assert fault_of_processes(OSError(errno.EACCES, "Permission denied"), board) is None
