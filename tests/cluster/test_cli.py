from __future__ import annotations

import json
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import ray
from conftest import REPOSITORY, assert_refused, dicm

sys.path.insert(0, str(Path(__file__).parent))

from command_lines import check_command_line, commands_in, without_assignments

from cluster.drain import busy_workers, find_raylet
from cluster.errors import RunError
from cluster.submit import Job, dashboard_address, exit_code, read_token

DOCUMENT = REPOSITORY / "docs" / "cluster.md"
ELSEWHERE = ("helm", "docker", "kubectl", "export", "source", "ssh")
NODE = "8f51f68008391bb9555dbd766689f22da5ed8c3862fa4698d3ca8638"


@pytest.fixture(autouse=True)
def _no_cluster_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("command", ["submit", "list", "status", "logs", "stop", "drain"])
def test_help__every_command_has_an_example(command: str):
    result = dicm("cluster", command, "--help")
    assert result.returncode == 0
    assert f"dicm cluster {command}" in result.stdout.split("Example", 1)[1]


@pytest.mark.parametrize("words", commands_in(DOCUMENT), ids=" ".join)
def test_docs__every_command_exists(words: list[str]):
    command = without_assignments(words)
    if command[0] not in ELSEWHERE:
        check_command_line(command[: command.index(">")] if ">" in command else command)
    for word in command:
        if word.startswith("cluster/manifests/"):
            assert (REPOSITORY / word).is_file()


def test_docs__quote_lines_that_the_program_says():
    sources = [*(REPOSITORY / "cluster").glob("*.py"), REPOSITORY / "pretrain" / "run.py",
               REPOSITORY / "data_pipeline" / "shared_memory.py"]  # fmt: skip
    said = "".join(
        re.sub(r'"\n\s*f?"', "", path.read_text()) for path in sources
    )  # literals over several lines, joined
    troubles = DOCUMENT.read_text().partition("## If it does not work")[2]
    quoted = re.findall(r"^\| `([^`]+)` \|", troubles, re.MULTILINE)
    assert len(quoted) >= 10
    for line in quoted:
        assert line in said, line


@pytest.mark.parametrize("words", [["list"], ["stop", "r50"], ["logs", "r50"], ["status", "r50"]])
def test_address__where_nothing_listens_is_one_line_at_once(words: list[str]):
    begun = time.monotonic()
    result = dicm("cluster", *words, "--address", "http://127.0.0.1:9")
    assert_refused(result, "http://127.0.0.1:9", "no Ray dashboard answers", "connection refused")
    assert time.monotonic() - begun < 10


def test_address__a_host_that_never_answers_costs_ten_seconds_at_most(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("cluster.submit.CONNECT_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert_refused(dicm("cluster", "list", "--address", address), address, "no answer within")


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """Address of a web server of this process."""
    server = HTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture
def other_server() -> Iterator[str]:
    """Address of a web server that is no Ray dashboard."""

    class Other(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"hello")

        def log_message(self, *_: object) -> None:
            pass

    with serving(Other) as address:
        yield address


def test_address__of_something_else_is_told(other_server: str):
    assert_refused(dicm("cluster", "list", "--address", other_server), other_server, "no Ray dashboard")


def test_dashboard_address__option_then_environment_then_this_machine(monkeypatch: pytest.MonkeyPatch):
    assert dashboard_address(None) == "http://127.0.0.1:8265"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")  # as unset
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")  # of a cluster's control service, which takes no jobs
    assert dashboard_address(None) == "http://127.0.0.1:8265"
    monkeypatch.setenv("RAY_ADDRESS", "https://ray.example.com/")
    assert dashboard_address(None) == "https://ray.example.com"
    assert dashboard_address("http://head:8265") == "http://head:8265"
    with pytest.raises(RunError, match=r"address head:8265: not a dashboard's URL"):
        dashboard_address("head:8265")


def test_read_token__from_files_and_the_environment_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert read_token(None) == (None, "")
    (tmp_path / "token").write_text("abc\n")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    assert read_token(None) == ("abc", str(tmp_path / "token"))
    monkeypatch.setenv("RAY_AUTH_TOKEN", "def")
    assert read_token(None) == ("def", "RAY_AUTH_TOKEN")
    assert read_token(tmp_path / "token")[0] == "abc"
    (tmp_path / "empty").touch()
    for name in ("empty", "missing"):
        with pytest.raises(RunError, match=f"{name}: .*token"):
            read_token(tmp_path / name)


@pytest.mark.parametrize("token", ["tok\u20acn", "two words", "two\nlines"])
def test_read_token__what_could_not_be_sent_is_told_and_not_shown(token: str, tmp_path: Path, monkeypatch):
    (tmp_path / "token").write_text(token)
    assert_refused(dicm("cluster", "list", "--token-file", tmp_path / "token"), f"{tmp_path / 'token'}: holds no token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", token)
    result = dicm("cluster", "list")
    assert_refused(result, "RAY_AUTH_TOKEN: holds no token", "take the one")
    assert token not in result.stderr


def test_status__of_a_folder_that_is_none_says_so(tmp_path: Path):
    nowhere = ("--address", "http://127.0.0.1:9")
    missing = tmp_path / "runs" / "r50"
    assert_refused(dicm("cluster", "status", missing, *nowhere), f"{missing}: no such folder here", "no Ray dashboard")
    assert_refused(dicm("cluster", "status", tmp_path, *nowhere), f"{tmp_path}: holds no run (no config.yaml)")


class Dashboard(BaseHTTPRequestHandler):
    """What a dashboard says of its jobs."""

    words, message = "pretrain small 'only=[codec]'", "failed in [/tmp/x]"

    def do_GET(self) -> None:
        job = {
            "type": "SUBMISSION", "submission_id": "[b]-1", "status": "FAILED", "entrypoint": "python", "driver_exit_code": 2,
            "metadata": {"run": "/runs/[b]", "command": self.words}, "message": self.message,
        }  # fmt: skip
        version = {"version": "4", "ray_version": ray.__version__, "ray_commit": ray.__commit__, "session_name": "s"}
        answer = [job] if self.path.startswith("/api/jobs") else version
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *_: object) -> None:
        pass


def test_status__and_list_show_commands_and_reasons_as_they_are():
    with serving(Dashboard) as address:
        shown = dicm("cluster", "status", "/runs/[b]", "--address", address, "--watch")
        listed = dicm("cluster", "list", "--address", address)
    assert shown.returncode == listed.returncode == 0, shown.stderr + listed.stderr
    for text in ("[b]-1", "/runs/[b]", Dashboard.words, Dashboard.message, "--watch is for run folders"):
        assert text in shown.stdout
    assert "[b]-1" in listed.stdout and "/runs/[b]" in listed.stdout


def test_submit__a_typo_fails_before_anything_is_sent():
    address = ("--address", "http://127.0.0.1:9")  # would be refused too, but later
    assert_refused(
        dicm("cluster", "submit", *address, "--", "pretrain", "small", "data=/d", "run=/r", "wrkers=2"), "workers?"
    )
    assert_refused(
        dicm("cluster", "submit", *address, "--", "pretrain", "smal", "data=/d", "run=/r"), "did you mean small?"
    )
    assert_refused(dicm("cluster", "submit", *address, "--", "finetune", "detection", "codec=/c"), "data is missing")
    assert_refused(dicm("cluster", "submit", *address, "--", "demo"), "'demo' is no command for a job")
    assert_refused(
        dicm("cluster", "submit", *address, "--", "pretrain", "small", "data=/d"), "run=runs/pretrain", "/shared"
    )


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [("SUCCEEDED", 0, 0), ("FAILED", 2, 2), ("FAILED", 1, 1), ("FAILED", -9, 137), ("STOPPED", None, 143)],
)
def test_exit_code__is_the_programs_own(status: str, code: int | None, expected: int):
    assert exit_code(Job("r-1", status, "/r", "pretrain small", 0.0, 1.0, code, "")) == expected


def test_exit_code__a_program_that_never_started_is_told():
    with pytest.raises(RunError, match=r"job r-1: its program did not start or was lost \(no such image\)"):
        exit_code(Job("r-1", "FAILED", "/r", "pretrain small", 0.0, 1.0, None, "no such image\nmore"))


def process(proc: Path, pid: int, parent: int, *words: str) -> None:
    folder = proc / str(pid)
    folder.mkdir()
    (folder / "cmdline").write_bytes(b"\0".join(word.encode() for word in words) + b"\0")
    (folder / "stat").write_text(f"{pid} (ray) in it) S {parent} 1 1")


def raylet(proc: Path, pid: int, node: str, resources: str = "CPU,2") -> None:
    words = (f"--node_id={node}", "--gcs-address=10.0.0.1:6379", f"--static_resource_list={resources}")
    process(proc, pid, 1, "/x/ray/core/src/ray/raylet/raylet", *words)


def test_find_raylet__the_one_of_this_machine(tmp_path: Path):
    with pytest.raises(RunError, match="no Ray node runs on this machine"):
        find_raylet(proc=tmp_path)
    raylet(tmp_path, 10, NODE)
    found = find_raylet(proc=tmp_path)
    assert (found.node, found.gcs_address, found.pid, found.is_head) == (NODE, "10.0.0.1:6379", 10, False)
    raylet(tmp_path, 11, "0" * 56, "node:__internal_head__,1.0")
    with pytest.raises(RunError, match=r"several Ray nodes run on this machine \(00000000, 8f51f680\); name one"):
        find_raylet(proc=tmp_path)
    assert find_raylet("0000", tmp_path).is_head
    assert find_raylet(NODE[:6], tmp_path).pid == 10


def test_busy_workers__are_actors_and_tasks_of_that_node_alone(tmp_path: Path):
    raylet(tmp_path, 10, NODE)
    for pid, parent, title in ((20, 10, "ray::IDLE"), (21, 10, "ray::DashboardAgent"), (23, 11, "ray::RayTrainWorker")):
        process(tmp_path, pid, parent, title)
    assert busy_workers(find_raylet(proc=tmp_path), tmp_path) == []
    process(tmp_path, 24, 10, "ray::RayTrainWorker.run")
    assert busy_workers(find_raylet(proc=tmp_path), tmp_path) == ["ray::RayTrainWorker.run"]
