from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # workers import the functions by name

from worker_functions import (
    Options,
    die,
    die_once_write_facts_and_step,
    facts_of,
    fail_with_our_error,
    lose_a_worker,
    write_facts,
)

from cluster.errors import CheckpointError, RunError
from cluster.machine import num_cpus
from cluster.options import ClusterConfig
from cluster.runtime import run

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def _ray() -> Iterator[None]:
    """The embedded Ray of `launch`, kept over the tests that share it."""
    from cluster.launch import _connected_ray

    before = signal.getsignal(signal.SIGTERM)
    with _connected_ray(2):
        yield
    assert signal.getsignal(signal.SIGTERM) == before  # Ray's own would go on into every process forked from this one


def on_ray(function, folder: Path, **options) -> None:
    run(
        function, Options(str(folder)), workers=2, launcher="ray", run_dir=str(folder),
        cluster=ClusterConfig(**options),
    )  # fmt: skip


@pytest.mark.parametrize("address", ["127.0.0.1:9", "nowhere.invalid:6379"])
def test_launch__no_cluster_at_ray_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str):
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(RunError, match=rf"RAY_ADDRESS={address}: no Ray cluster answers.*unset RAY_ADDRESS"):
        on_ray(write_facts, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_launch__something_else_at_ray_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    server = HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"127.0.0.1:{server.server_port}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    try:
        with pytest.raises(RunError, match=rf"RAY_ADDRESS={address}: no Ray cluster answers \(something else listens"):
            on_ray(write_facts, tmp_path)
    finally:
        server.shutdown()


def test_launch__a_dashboards_url_as_ray_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    with pytest.raises(RunError, match=r"^RAY_ADDRESS=http://127.0.0.1:8265: a dashboard's URL.*RAY_ADDRESS=auto"):
        on_ray(write_facts, tmp_path)


def test_told__a_bug_in_a_worker_keeps_its_traceback():
    from ray.train import WorkerGroupError

    from cluster.exchange import Exchange
    from cluster.launch import _told

    text = "[Rank 1 Error Snippet]:\nTraceback (most recent call last):\n  File x, line 1\nKeyError: 'no such key'"
    told = _told(WorkerGroupError(text, {1: KeyError("no such key")}), "runs/one", Exchange(Path("nowhere")))
    assert type(told) is RuntimeError  # no error of ours: not one line, but all there is to know
    assert text in str(told)


@dataclass
class Trained:
    """What a run left in its folder, and the warnings that reached the user, by the time of its workers' facts."""

    folder: Path
    warnings: list[str]


@pytest.fixture(scope="module")
def trained(_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A run, in a folder relative to where the user stands: it loses a worker, its next workers write their facts and
    then step until SIGTERM tells them to stop."""
    folder, said = tmp_path_factory.mktemp("trained"), Said()

    def tell() -> None:
        while not (folder / "begun").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=tell, daemon=True).start()
    logging.getLogger().addHandler(said)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            on_ray(die_once_write_facts_and_step, Path("."))
    finally:
        logging.getLogger().removeHandler(said)
    return Trained(folder, said.warnings)


class Said(logging.Handler):
    """Keeps warnings."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.warnings: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.warnings.append(record.getMessage())


@pytest.mark.cluster
@pytest.mark.slow
def test_launch__two_workers_reduce_gather_and_broadcast(trained: Trained):
    facts = facts_of(trained.folder, 2)
    assert [(fact["rank"], fact["world"], fact["local_rank"]) for fact in facts] == [(0, 2, 0), (1, 2, 1)]
    for fact in facts:
        assert fact["mean"] == {"loss": 0.5, "step": 2.0**40 + 1}
        assert fact["sum"] == 3.0
        assert fact["gathered"] == [[0.0, 0.0], [1.0, 1.0], [1.0, 1.0]]
        assert fact["broadcast"] == {"step": 7, "from": 0}
        assert fact["directory"] == str(trained.folder)
        if not torch.cuda.is_available():
            assert fact["threads"] == max(1, num_cpus() // 2)
    left = {"died", "pids", "begun", *(f"{name}_{rank}" for name in ("ended", "stopped") for rank in range(2))}
    assert {path.name for path in trained.folder.iterdir()} == {"0.json", "1.json", *left}
    # What both workers had to say reaches the user, once.
    lost, said = trained.warnings
    assert "worker 1 " in lost and "going on from the newest checkpoint" in lost
    assert said == "checkpoint .: damaged; passed over"


@pytest.mark.cluster
@pytest.mark.slow
def test_launch__goes_on_after_a_lost_worker(trained: Trained):
    ended = [json.loads((trained.folder / f"ended_{rank}").read_text()) for rank in range(2)]
    assert ended == [[2, "recovered"], [2, "recovered"]]


@pytest.mark.cluster
@pytest.mark.slow
def test_launch__sigterm_lets_every_worker_stop_at_the_same_step(trained: Trained):
    assert len({(trained.folder / f"stopped_{rank}").read_text() for rank in range(2)}) == 1


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.usefixtures("_ray")
def test_launch__our_error_in_a_worker_comes_back_as_it_was_raised(tmp_path: Path):
    with pytest.raises(CheckpointError) as caught:
        on_ray(fail_with_our_error, tmp_path)
    said = re.fullmatch(rf"{tmp_path}: a line for the user \((.*)\)", str(caught.value))
    assert said
    assert re.match(r"worker 1 on node [\d.]+ \([0-9a-f]{8}, process \d+\)", said[1])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.usefixtures("_ray")
def test_launch__storage_that_does_not_answer_is_a_lost_worker(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "faults").write_text("stale")
    on_ray(lose_a_worker, tmp_path)
    first, second = (tmp_path / "starts").read_text().splitlines()
    assert first == "first" and "was lost (/shared/train-000000.tar: Stale file handle" in second
    assert "Stale file handle" in caplog.text and "going on from the newest checkpoint" in caplog.text


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.usefixtures("_ray")
def test_launch__workers_lost_too_often_are_named_and_the_others_do_not_hang(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    lost = r"worker 1 on node [\d.]+ \(.*\) was lost \(its process was killed"
    with pytest.raises(RunError, match=rf"{lost}.*2 times.*run the same command again") as caught:
        on_ray(die, tmp_path, max_failures=1)
    assert "\n" not in str(caught.value)
    assert re.search(rf"{lost}.*; going on from the newest checkpoint", caplog.text)


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.usefixtures("_ray")
def test_launch__stops_while_it_waits_for_nodes_and_says_what_it_waits_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    def tell() -> None:
        while "waiting for nodes" not in caplog.text:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=tell, daemon=True).start()
    on_ray(write_facts, tmp_path, cpus_per_worker=1000)
    assert "room for 0 of at least 2 workers (1000 CPU each); waiting for nodes" in caplog.text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.usefixtures("_ray")
def test_check_address__of_a_cluster():
    import ray

    from cluster.launch import _check_address

    _check_address(ray.get_runtime_context().gcs_address)


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.usefixtures("_ray")
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the GPUs that are missed")
def test_launch__gpus_that_this_machine_has_not_are_not_waited_for(tmp_path: Path):
    with pytest.raises(
        RunError, match=r"^cluster.accelerator=gpu with 2 workers needs 2 GPUs, .* has 0; name a cluster"
    ):
        on_ray(write_facts, tmp_path, accelerator="gpu")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.cluster
@pytest.mark.slow
def test_launch__ctrl_c_ends_the_workers_and_leaves_the_terminal_clean(tmp_path: Path):
    program = (
        "import sys\n"
        "from worker_functions import Options, step_until_told\n"
        "from cluster.runtime import run\n"
        "try: run(step_until_told, Options(sys.argv[1]), workers=2, launcher='ray', run_dir=sys.argv[1])\n"
        "except KeyboardInterrupt: print('interrupted')\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{Path(__file__).parent}"}
    process = subprocess.Popen(
        [sys.executable, "-c", program, tmp_path],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    while not (tmp_path / "begun").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    worker = Path("/proc", (tmp_path / "pids").read_text())
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=120) == ("interrupted\n", "")
    end = time.monotonic() + 20
    while worker.exists():
        assert time.monotonic() < end
        time.sleep(0.05)
