"""Jobs on one real Ray with a token, which is shared by the tests of this module."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from conftest import NARROW, REPOSITORY, SHORT, Result, assert_refused, dicm

from cluster.drain import list_raylets

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

RAY = [sys.executable, "-m", "ray.scripts.scripts"]
RAY_ENVIRONMENT = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
QUICK = {"RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}


@dataclass
class Cluster:
    """A running Ray: its dashboard, its control service, a file with its token, and the environment of its nodes."""

    address: str
    gcs_address: str
    token_file: Path
    environment: dict[str, str]
    folder: str

    def __call__(self, *words: str | Path) -> Result:
        """`dicm cluster ...` with this cluster's address and token, from the root of the repository."""
        command, *rest = words
        return dicm("cluster", command, "--address", self.address, "--token-file", self.token_file, *rest)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # sockets lie in it, whose paths must be short
    token_file = tmp_path_factory.mktemp("token") / "token"
    token_file.write_text(secrets.token_hex(32))
    environment = {key: value for key, value in os.environ.items() if key not in RAY_ENVIRONMENT}
    environment |= QUICK | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token_file)}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"  # as if it were activated
    port, dashboard = free_port(), free_port()
    options = ["--head", f"--port={port}", "--num-cpus=0", "--num-gpus=0", f"--dashboard-port={dashboard}"]
    options += [f"--temp-dir={folder}", f"--ray-client-server-port={free_port()}"]
    try:
        start_node(options, environment)
        gcs_address = Path(folder, "ray_current_cluster").read_text().strip()
        yield Cluster(f"http://127.0.0.1:{dashboard}", gcs_address, token_file, environment, folder)
    finally:
        end_processes_of(folder, str(port))
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(autouse=True)
def _from_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    for name in RAY_ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


def start_node(options: list[str], environment: dict[str, str]) -> None:
    """Start a Ray node; returns when it is part of its cluster."""
    command = [*RAY, "start", *options, f"--dashboard-agent-listen-port={free_port()}"]
    subprocess.run(command, env=environment, check=True, stdin=subprocess.DEVNULL, capture_output=True, timeout=120)


def end_processes_of(folder: str, port: str) -> None:
    """Kill a cluster's processes, which name its folder or port, and theirs; `ray stop` would end those of others too."""
    ours = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            words = " ".join(process.cmdline())
            if folder in words or ("ray" in words and f":{port}" in words):
                ours += [process, *process.children(recursive=True)]
    for process in ours:
        with suppress(psutil.Error):
            process.kill()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def wait_for(condition, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def pretraining(scenes: Path, run: Path, *overrides: str) -> list[str]:
    options = [f"data={scenes}", f"run={run}", "launcher=local", "workers=1", *NARROW, *SHORT, *overrides]
    return ["--", "pretrain", "small", *options]


def test_submit__without_the_token_or_with_another_is_refused(
    cluster: Cluster, scenes: Path, runs: Path, tmp_path: Path
):
    words = pretraining(scenes, runs / "refused")
    result = dicm("cluster", "submit", "--address", cluster.address, *words)
    assert_refused(result, cluster.address, "asks for its token", "--token-file")
    (tmp_path / "token").write_text("0" * 64)
    result = dicm("cluster", "submit", "--address", cluster.address, "--token-file", tmp_path / "token", *words)
    assert_refused(result, cluster.address, "refuses the token", str(tmp_path / "token"))
    assert not (runs / "refused").exists()


def test_submit__waits_for_the_run_and_exits_as_it_does(cluster: Cluster, scenes: Path, runs: Path):
    run = runs / "one"
    short = ["only=[ssl]", "knn_samples=0"]
    result = cluster("submit", "--wait", *pretraining(scenes, run, *short))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "complete: " in result.stdout and "SUCCEEDED" in result.stdout
    assert (run / "summary.json").is_file()

    # Another config under the same run: the program's own line, and its exit code, reach the user.
    result = cluster("submit", "--wait", *pretraining(scenes, run, *short, "seed=4"))
    assert result.returncode == 2, result.stdout + result.stderr
    assert f"error: run={run} holds a run with other options (seed: 0 there, 4 here)" in result.stdout

    listed = cluster("list").stdout
    jobs = [line.split("│")[1:4] for line in listed.splitlines() if str(run) in line]
    assert [(status.strip(), job.strip()[-2:]) for job, status, _ in jobs] == [("SUCCEEDED", "-1"), ("FAILED", "-2")]
    assert "complete: " in cluster("logs", jobs[0][0].strip()).stdout
    newest = cluster("status", "one").stdout  # by its name, which no other run has
    assert jobs[1][0].strip() in newest and "FAILED" in newest and "seed: 0 there" in newest
    assert_refused(cluster("logs", "two"), "two: no such job or run", jobs[0][0].strip())
    assert "is over already (FAILED)" in cluster("stop", str(run)).stdout


def test_submit__two_at_the_same_moment_do_not_both_start(cluster: Cluster, scenes: Path, runs: Path):
    run = runs / "race"
    other = f"race-{hashlib.sha256(str(run).encode()).hexdigest()[:6]}-1"  # has begun since we looked
    words = ["job", "submit", "--address", cluster.address, "--submission-id", other, "--no-wait", "--", "true"]
    subprocess.run([*RAY, *words], env=cluster.environment, check=True, capture_output=True, timeout=60)
    assert_refused(cluster("submit", *pretraining(scenes, run)), f"run={run} is the run of job {other}")


def test_stop__saves_a_checkpoint_and_the_run_has_one_job_until_then(cluster: Cluster, scenes: Path, runs: Path):
    run = runs / "long"
    words = pretraining(scenes, run, "stages.ssl.epochs=5000", "checkpoint_every=100000")
    result = cluster("submit", *words)
    assert result.returncode == 0, result.stderr
    job = result.stdout.split()[2].rstrip(";")
    assert job in result.stdout.partition("follow:")[2]
    wait_for(lambda: (run / "metrics.jsonl").is_file() and (run / "metrics.jsonl").read_text().count("\n") > 1, 60)

    assert_refused(cluster("submit", *words), f"run={run} is the run of job {job}")
    follower = subprocess.Popen(
        [sys.executable, "-m", "dicm", "cluster", "logs", job, "-f", "--address", cluster.address],
        env=cluster.environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    result = cluster("stop", str(run))
    assert result.returncode == 0 and "STOPPED" in result.stdout, result.stdout + result.stderr
    printed, _ = follower.communicate(timeout=60)
    assert follower.returncode == 143 and "stopped with a checkpoint" in printed

    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    (checkpoint,) = (run / "checkpoints").iterdir()
    assert int(checkpoint.name.removeprefix("step_")) == last
    shown = dicm("cluster", "status", run).stdout
    assert f"{last} / " in shown and f"step {last}" in shown


def test_drain__announces_the_end_of_this_node_and_waits_for_its_work(cluster: Cluster):
    options = [f"--address={cluster.gcs_address}", "--num-cpus=1", f"--temp-dir={cluster.folder}"]
    command = [sys.executable, "-m", "dicm", "cluster", "drain"]

    def drain(node_id: str) -> subprocess.CompletedProcess[str]:
        words = [*command, "--seconds", "20", "--node", node_id]
        return subprocess.run(words, env=cluster.environment, capture_output=True, text=True, timeout=60, check=False)

    start_node(options, cluster.environment)
    ours = {raylet.is_head: raylet for raylet in list_raylets() if raylet.gcs_address == cluster.gcs_address}
    refused = drain(ours[True].node)
    assert refused.returncode == 2 and "is the head of its cluster" in refused.stderr
    begun = time.monotonic()
    drained = drain(ours[False].node)
    assert drained.returncode == 0, drained.stderr
    assert "no work is left" in drained.stdout and time.monotonic() - begun < 15
    wait_for(lambda: ours[False] not in list_raylets(), 30)  # Ray has taken it out
    assert ours[True] in list_raylets()
