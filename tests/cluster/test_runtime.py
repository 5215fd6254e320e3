from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import is_alive

sys.path.insert(0, str(Path(__file__).parent))  # workers import the functions by name

from worker_functions import (
    Options,
    clocks_apart,
    die,
    facts_of,
    fail_with_a_bug,
    fail_with_our_error,
    lose_a_worker,
    sleep_on_one_rank,
    step_until_told,
    told_at_the_third_step,
    write_facts,
)

from cluster.errors import CheckpointError, PassingError, RunError
from cluster.machine import num_cpus
from cluster.options import ClusterConfig
from cluster.runtime import LocalRuntime, alone, on_sigterm, run

REPOSITORY = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{Path(__file__).parent}"}
LOOPBACK = {"0100007F", "00000000000000000000000001000000"}  # as /proc/net/tcp and tcp6 write it
TORCHRUN = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
HIDE_RAY = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "ray": raise ImportError("ray is hidden")
sys.meta_path.insert(0, Hidden())
"""


def local(function, options: Options, workers: int = 2) -> None:
    run(function, options, workers=workers, launcher="local", run_dir=options.folder)


def check_facts(facts: list[dict]) -> None:
    """What two workers agree on, whoever launched them."""
    assert [(fact["rank"], fact["world"], fact["local_rank"]) for fact in facts] == [(0, 2, 0), (1, 2, 1)]
    for fact in facts:
        assert fact["mean"] == {"loss": 0.5, "step": 2.0**40 + 1}
        assert fact["sum"] == 3.0
        assert fact["gathered"] == [[0.0, 0.0], [1.0, 1.0], [1.0, 1.0]]
        assert fact["broadcast"] == {"step": 7, "from": 0}
        assert fact["should_stop"] is False
        if not torch.cuda.is_available():
            assert fact["threads"] == max(1, num_cpus() // 2)


def test_run__one_worker_in_this_process(tmp_path: Path):
    threads, handler = torch.get_num_threads(), signal.getsignal(signal.SIGTERM)
    local(write_facts, Options(str(tmp_path)), workers=1)
    (fact,) = facts_of(tmp_path, 1)
    assert (fact["rank"], fact["world"], fact["mean"]["loss"], fact["sum"]) == (0, 1, 0.0, 1.0)
    assert fact["gathered"] == [[0.0, 0.0]]
    assert torch.get_num_threads() == threads
    assert signal.getsignal(signal.SIGTERM) == handler


def test_local_runtime__takes_sigterm_only_while_it_runs():
    """One that predicts or evaluates must not keep its process from being stopped."""
    handler = signal.getsignal(signal.SIGTERM)
    runtime = LocalRuntime()
    assert signal.getsignal(signal.SIGTERM) == handler and not runtime.should_stop
    runtime.stop()
    assert runtime.should_stop


def test_on_sigterm__tells_the_blocks_around_it_too():
    heard: list[str] = []
    with on_sigterm(lambda: heard.append("outer")):
        with on_sigterm(lambda: heard.append("inner")):
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
    assert heard == ["outer", "inner", "outer"]


def test_run__errors_of_one_worker_keep_their_traceback(tmp_path: Path):
    with pytest.raises(KeyError, match="no such key"):
        local(fail_with_a_bug, Options(str(tmp_path), rank=0), workers=1)


def test_run__two_workers_reduce_gather_and_broadcast_where_ray_is_hidden(tmp_path: Path):
    program = HIDE_RAY + (
        "from worker_functions import Options, write_facts\n"
        "from cluster.runtime import run\n"
        "if __name__ == '__main__':\n"
        "    run(write_facts, Options(sys.argv[1]), workers=2, launcher='local', run_dir=sys.argv[1])\n"
    )
    (tmp_path / "main.py").write_text(program)
    result = subprocess.run(
        [sys.executable, tmp_path / "main.py", tmp_path], env=ENVIRONMENT, capture_output=True, text=True, timeout=100,
        check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    facts = facts_of(tmp_path, 2)
    check_facts(facts)
    assert not any(fact["ray"] for fact in facts)
    # Nothing that another machine could reach: anyone who can is a member of the group.
    assert all(fact["listening"] and set(fact["listening"]) <= LOOPBACK for fact in facts)


def test_run__torchruns_environment_is_honoured(tmp_path: Path):
    """Two processes that torchrun started; `workers` says 8, which is not theirs to start."""
    program = (
        "import sys\n"
        "from worker_functions import Options, write_facts\n"
        "from cluster.runtime import run\n"
        "run(write_facts, Options(sys.argv[1]), workers=8, launcher='local', run_dir=sys.argv[1])\n"
    )
    (tmp_path / "main.py").write_text(program)
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", tmp_path / "main.py",
         tmp_path], env=ENVIRONMENT, capture_output=True, timeout=200, check=True,
    )  # fmt: skip
    check_facts(facts_of(tmp_path, 2))


def test_run__our_error_in_a_worker_comes_back_as_it_was_raised(tmp_path: Path):
    with pytest.raises(CheckpointError) as caught:
        local(fail_with_our_error, Options(str(tmp_path)))
    assert str(caught.value) == f"{tmp_path}: a line for the user"


def test_run__a_bug_in_a_worker_comes_back_with_its_traceback(tmp_path: Path):
    with pytest.raises(RuntimeError, match=r"worker 1 of 2 failed:(.|\n)*in fail_with_a_bug(.|\n)*KeyError"):
        local(fail_with_a_bug, Options(str(tmp_path)))


@pytest.mark.parametrize("wait", [False, True])
def test_run__a_killed_worker_is_named_and_the_others_do_not_hang(tmp_path: Path, wait: bool):
    begun = time.monotonic()
    with pytest.raises(RunError, match=r"worker 1 of 2 was killed \(SIGKILL.*run the same command again"):
        local(die, Options(str(tmp_path), wait=wait))
    assert time.monotonic() - begun < 100


def losing(folder: Path, faults: str, workers: int, max_failures: int = 2) -> list[str]:
    """Why each start of a run followed, which suffers those faults one after the other."""
    (folder / "faults").write_text(faults)
    run(
        lose_a_worker, Options(str(folder), rank=0), workers=workers, launcher="local", run_dir=str(folder),
        cluster=ClusterConfig(max_failures=max_failures),
    )  # fmt: skip
    return (folder / "starts").read_text().splitlines()


def test_run__storage_that_does_not_answer_is_a_lost_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr("cluster.local_workers.RESTART_SECONDS", (0.0,))
    starts = losing(tmp_path, "stale saved-stale stale", workers=1)  # twice in a row, as a checkpoint came in between
    assert starts[0] == "first" and len(starts) == 4
    assert all(start.startswith("/shared/train-000000.tar: Stale file handle") for start in starts[1:])
    assert caplog.text.count("going on from the newest checkpoint") == 3


def test_run__storage_that_never_answers_ends_it_with_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("cluster.local_workers.RESTART_SECONDS", (0.0,))
    with pytest.raises(
        PassingError, match=r"Stale file handle.*\(3 times in a row without a new checkpoint\)"
    ) as caught:
        losing(tmp_path, "stale stale stale", workers=1)
    assert "\n" not in str(caught.value)
    with pytest.raises(PassingError, match=r"Stale file handle.*same command again$"):
        losing(tmp_path, "stale", workers=1, max_failures=0)


def test_run__a_killed_worker_of_two_starts_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("cluster.local_workers.RESTART_SECONDS", (0.0,))
    starts = losing(tmp_path, "kill stale", workers=2)
    assert [start.partition(" (")[0] for start in starts[:2]] == ["first", "worker 0 of 2 was killed"]
    assert "Stale file handle" in starts[2]


@pytest.mark.parametrize("workers", [1, 2])
def test_run__sigterm_lets_every_worker_stop_at_the_same_step(tmp_path: Path, workers: int):
    program = (
        "import sys\n"
        "from worker_functions import Options, step_until_told\n"
        "from cluster.runtime import run\n"
        "if __name__ == '__main__':\n"
        "    run(step_until_told, Options(sys.argv[1]), workers=int(sys.argv[2]), launcher='local', run_dir=sys.argv[1])\n"
        "    print('returned')\n"
    )
    (tmp_path / "main.py").write_text(program)
    process = subprocess.Popen(
        [sys.executable, tmp_path / "main.py", tmp_path, str(workers)], env=ENVIRONMENT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    while not (tmp_path / "begun").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "returned\n"), err
    assert len({(tmp_path / f"stopped_{rank}").read_text() for rank in range(workers)}) == 1


@pytest.mark.parametrize("there", [1, 2])
def test_run__sigterm_while_workers_still_import_is_an_orderly_stop_too(tmp_path: Path, there: int):
    """They have no handler yet; and the second one may not even have been started."""
    program = (
        "import multiprocessing, os, signal, sys, threading\n"
        "from worker_functions import Options, step_until_told\n"
        "from cluster.runtime import run\n"
        "def tell():\n"
        "    while len(multiprocessing.active_children()) < int(sys.argv[2]): pass\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "if __name__ == '__main__':\n"
        "    threading.Thread(target=tell, daemon=True).start()\n"
        "    run(step_until_told, Options(sys.argv[1]), workers=2, launcher='local', run_dir=sys.argv[1])\n"
        "    print('returned')\n"
    )
    (tmp_path / "main.py").write_text(program)
    result = subprocess.run(
        [sys.executable, tmp_path / "main.py", tmp_path, str(there)], env=ENVIRONMENT, capture_output=True, text=True,
        timeout=100, check=False,
    )  # fmt: skip
    assert (result.returncode, result.stdout) == (0, "returned\n"), result.stderr
    assert len({(tmp_path / f"stopped_{rank}").read_text() for rank in range(2)}) == 1


def test_run__workers_end_with_the_process_that_started_them(tmp_path: Path):
    program = (
        "import sys\n"
        "from worker_functions import Options, step_until_told\n"
        "from cluster.runtime import run\n"
        "if __name__ == '__main__':\n"
        "    run(step_until_told, Options(sys.argv[1]), workers=2, launcher='local', run_dir=sys.argv[1])\n"
    )
    (tmp_path / "main.py").write_text(program)
    process = subprocess.Popen(
        [sys.executable, tmp_path / "main.py", tmp_path], env=ENVIRONMENT, stderr=subprocess.PIPE
    )
    while not (tmp_path / "begun").exists():
        assert process.poll() is None
        time.sleep(0.05)
    worker = int((tmp_path / "pids").read_text())
    process.kill()
    process.communicate(timeout=60)
    end = time.monotonic() + 20
    while is_alive(worker):
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("workers", "launcher", "word"), [(0, "local", "workers=0"), (1, "slurm", "launcher=slurm: there are local, ray")]
)
def test_run__what_cannot_be_launched_is_named(tmp_path: Path, workers: int, launcher: str, word: str):
    with pytest.raises(RunError, match=word):
        run(step_until_told, Options(str(tmp_path)), workers=workers, launcher=launcher, run_dir=str(tmp_path))


def test_check_clocks__a_node_minutes_behind_is_named(tmp_path: Path):
    run(clocks_apart, Options(str(tmp_path)), workers=2, launcher="local", run_dir=str(tmp_path))
    said = (tmp_path / "said").read_text()
    assert said.startswith("worker 1 on node far-1: its clock is 300 s behind rank 0's")
    assert "\n" not in said


@pytest.mark.parametrize(("told", "steps"), [(0, {"4"}), (1, {"4", "5"})])
def test_should_stop__all_ranks_hear_within_two_steps_whichever_was_told(tmp_path: Path, told: int, steps: set[str]):
    local(told_at_the_third_step, Options(str(tmp_path), rank=told))
    heard = {(tmp_path / f"stopped_{rank}").read_text() for rank in range(2)}
    assert len(heard) == 1 and heard <= steps


def test_run__a_worker_that_hangs_ends_the_run_after_the_time_that_was_set(tmp_path: Path):
    options = ClusterConfig(timeout_seconds=3, max_failures=0)
    with pytest.raises(
        RunError, match=r"a worker waited 3 s in vain for another one.*cluster\.timeout_seconds"
    ) as error:
        run(
            sleep_on_one_rank, Options(str(tmp_path)), workers=2, launcher="local", run_dir=str(tmp_path),
            cluster=options,
        )  # fmt: skip
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 is set without RANK, MASTER_ADDR, MASTER_PORT; start"),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "1"},
            "RANK=0, WORLD_SIZE=2 is set without MASTER_ADDR; start",
        ),
        ({"RANK": "0"}, "RANK=0 is set without WORLD_SIZE, MASTER_ADDR, MASTER_PORT; start"),
        (TORCHRUN | {"RANK": "2"}, "RANK=2 is invalid with WORLD_SIZE=2; it must lie in 0..1"),
        (TORCHRUN | {"WORLD_SIZE": "two"}, "WORLD_SIZE=two is invalid"),
        (TORCHRUN | {"LOCAL_RANK": "-1"}, "LOCAL_RANK=-1 is invalid"),
    ],
)
@pytest.mark.parametrize("workers", [1, 2])
def test_run__half_of_torchruns_variables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], words: str, workers: int
):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RunError, match=re.escape(words)) as error:
        local(write_facts, Options(str(tmp_path)), workers=workers)
    assert "\n" not in str(error.value)


def test_alone__looks_at_none_of_torchruns_variables(monkeypatch: pytest.MonkeyPatch):
    """What predicts or evaluates has no group to join."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    runtime = alone()
    assert (runtime.rank, runtime.world) == (0, 1) and not runtime.should_stop
