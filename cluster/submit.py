"""Ray Jobs: a dicm command runs on a cluster, from a copy of the working tree, and outlives the shell it came from.

    tree, `pretrain RECIPE k=v ...`  -->  zip  -->  dashboard  -->  driver `python -m dicm ...` on the head node
                                                                    workers wherever the cluster has room

The job's id is the run's name, a digest of its whole path, and a number that counts the run's jobs: `r50-3f2a9c-2`.
Ray takes an id once, so two submissions of one run at the same moment cannot both start.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import posixpath
import re
import shlex
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.commands import Command, normal
from cluster.errors import RunError
from cluster.packing import write_package
from cluster.starting import environment

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
CONNECT_SECONDS = 10.0
STOP_SECONDS = 300  # from SIGTERM to SIGKILL: a step, and a checkpoint
STOPPED_CODE = 143  # of a job that was stopped: 128 + SIGTERM
POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Job:
    """A job as the cluster knows it; times in seconds since 1970, None where there is none yet."""

    id: str
    status: str  # PENDING, RUNNING, SUCCEEDED, FAILED, STOPPED
    run: str | None
    command: str
    begun: float | None
    ended: float | None
    exit_code: int | None
    message: str

    @property
    def is_over(self) -> bool:
        """Whether it will not run any more."""
        return self.status in ("SUCCEEDED", "FAILED", "STOPPED")


def read_token(token_file: Path | None) -> tuple[str | None, str]:
    """The cluster's token and where it was found (RunError for a file that cannot be read, or for what is no token)."""
    if token_file is None and (token := os.environ.get("RAY_AUTH_TOKEN", "").strip()):
        return _checked(token, "RAY_AUTH_TOKEN"), "RAY_AUTH_TOKEN"
    named = token_file or os.environ.get("RAY_AUTH_TOKEN_PATH")
    if not named:
        return None, ""
    try:
        token = Path(named).expanduser().read_text("utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"{named}: the token cannot be read ({getattr(error, 'strerror', 'no text')})") from error
    if not token:
        raise RunError(f"{named}: holds no token")
    return _checked(token, str(named)), str(named)


def _checked(token: str, source: str) -> str:
    """A token that can be sent; the error does not show it."""
    if not re.fullmatch(r"[\x21-\x7e]+", token):
        raise RunError(
            f"{source}: holds no token, but a text with characters that no token has (blanks, line ends or letters "
            "beyond ASCII); take the one that the cluster's head was started with"
        )
    return token


def dashboard_address(address: str | None) -> str:
    """URL of a dashboard: `address`, RAY_API_SERVER_ADDRESS, RAY_ADDRESS if it is a URL, or this machine's."""
    url = address or os.environ.get("RAY_API_SERVER_ADDRESS")
    if not url:
        ray_address = os.environ.get("RAY_ADDRESS", "")
        url = ray_address if ray_address.startswith(("http://", "https://")) else DEFAULT_ADDRESS
    if not url.startswith(("http://", "https://")):
        raise RunError(f"address {url}: not a dashboard's URL; write for example {DEFAULT_ADDRESS}")
    return url.rstrip("/")


class Jobs:
    """The jobs of one cluster, through its dashboard.

    Args:
        address: URL of the dashboard; see `dashboard_address` for what holds without it.
        token_file: file with the cluster's token; else RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH name it.

    Raises:
        RunError: no dashboard answers, or it refuses the token.
    """

    def __init__(self, address: str | None = None, token_file: Path | None = None) -> None:
        self.address = dashboard_address(address)
        token, source = read_token(token_file)
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._check_answers(headers, source)
        from ray.job_submission import JobSubmissionClient

        for name in ("ray.dashboard.modules.job.sdk", "ray.dashboard.modules.dashboard_sdk"):
            logging.getLogger(name).setLevel(logging.ERROR)  # they say what they upload
        with self._asking(), environment("RAY_API_SERVER_ADDRESS", self.address):  # Ray prefers it to the argument
            self._client = JobSubmissionClient(self.address, headers=headers)

    def submit(self, command: Command, tree: Path, files: list[Path]) -> Job:
        """Start a job that runs `command` in a copy of `files` (RunError where the run has one already)."""
        jobs = [job for job in self.all() if job.run == command.run]
        for job in jobs:
            if not job.is_over:
                raise self._taken(command, job.id)
        stem = f"{_name(command.run)}-{hashlib.sha256(command.run.encode()).hexdigest()[:6]}"
        numbers = [int(job.id.rpartition("-")[2]) for job in jobs if re.fullmatch(re.escape(stem) + r"-\d+", job.id)]
        job_id = f"{stem}-{max(numbers, default=0) + 1}"
        with tempfile.TemporaryDirectory() as folder, self._asking():
            package = Path(folder) / "tree.zip"
            write_package(tree, files, package)
            try:
                self._client.submit_job(
                    entrypoint=f"exec python -m dicm {shlex.join(command.words)}",
                    submission_id=job_id,
                    metadata={"run": command.run, "command": shlex.join(command.words)},
                    runtime_env={
                        "working_dir": str(package),
                        "env_vars": {"PYTHONUNBUFFERED": "1", "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)},
                    },
                )
            except RuntimeError as error:
                if "already exists" in str(error):
                    raise self._taken(command, job_id) from error
                raise
        return self.find(job_id)

    def all(self) -> list[Job]:
        """All jobs that were submitted to the cluster, the oldest first."""
        with self._asking():
            details = self._client.list_jobs()
        jobs = [_job(one) for one in details if one.submission_id]
        return sorted(jobs, key=lambda job: job.begun or 0.0)

    def find(self, name: str) -> Job:
        """The job with this id; or the newest of the run with this path or, if only one run has it, this name.

        Raises:
            RunError: there is none, or runs in several folders have the name.
        """
        jobs = self.all()
        by_id = [job for job in jobs if job.id == name]
        by_path = [job for job in jobs if job.run == normal(name)]
        by_name = [job for job in jobs if job.run is not None and posixpath.basename(job.run) == name]
        for found in (by_id, by_path):
            if found:
                return found[-1]
        runs = sorted({str(job.run) for job in by_name})
        if len(runs) > 1:
            raise RunError(f"{name}: several runs have this name: {', '.join(runs)}; give the path or the job's id")
        if by_name:
            return by_name[-1]
        there = ", ".join(job.id for job in jobs[-5:]) or "none"
        raise RunError(f"{name}: no such job or run at {self.address}; the newest jobs there: {there}")

    def logs(self, job: Job) -> str:
        """What the job has printed so far."""
        with self._asking():
            return str(self._client.get_job_logs(job.id))

    def follow(self, job: Job, write: Callable[[str], object]) -> Job:
        """Give `write` what the job has printed and prints, until it is over; returns how it ended."""

        async def follow() -> None:
            async for lines in self._client.tail_job_logs(job.id):
                write(lines)

        with self._asking(f"the job goes on; follow it with: dicm cluster logs {job.id} --follow"):
            asyncio.run(follow())
        return self.wait(job)

    def wait(self, job: Job, seconds: float = float("inf")) -> Job:
        """The job once it is over, or as it is after `seconds`."""
        end = time.monotonic() + seconds
        while not (now := self.find(job.id)).is_over and time.monotonic() < end:
            time.sleep(POLL_SECONDS)
        return now

    def stop(self, job: Job) -> None:
        """Ask the job to stop: its driver gets SIGTERM, and has `STOP_SECONDS` to save a checkpoint."""
        with self._asking():
            self._client.stop_job(job.id)

    def _taken(self, command: Command, job_id: str) -> RunError:
        return RunError(
            f"run={command.run} is the run of job {job_id}, which is not over; follow it with `dicm cluster logs "
            f"{job_id} --follow`, or stop it with `dicm cluster stop {job_id}`"
        )

    def _check_answers(self, headers: dict[str, str], source: str) -> None:
        """RunError unless a Ray dashboard answers that takes our token; one try."""
        import requests

        try:
            answer = requests.get(f"{self.address}/api/version", headers=headers, timeout=CONNECT_SECONDS)
        except requests.RequestException as error:
            raise RunError(
                f"address {self.address}: no Ray dashboard answers ({_network_reason(error)}); is the cluster up, "
                "and its tunnel or port-forward open?"
            ) from error
        if answer.status_code == 401:
            raise RunError(
                f"address {self.address}: the cluster asks for its token; set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH, "
                "or give --token-file FILE"
            )
        if answer.status_code == 403:
            raise RunError(
                f"address {self.address}: the cluster refuses the token from {source}; take the one that its head "
                "was started with"
            )
        if answer.status_code != 200 or "ray_version" not in answer.text:
            raise RunError(f"address {self.address}: what answers is no Ray dashboard (status {answer.status_code})")

    @contextmanager
    def _asking(self, remedy: str = "try again") -> Iterator[None]:
        """Ray's and the network's errors as one line."""
        from aiohttp import ClientError
        from ray.exceptions import AuthenticationError

        try:
            yield
        except (RuntimeError, OSError, ClientError, AuthenticationError) as error:  # requests' errors are OSErrors
            raise RunError(f"address {self.address}: {_reason(error)}; {remedy}") from error


def exit_code(job: Job) -> int:
    """Exit code for a shell: that of the job's program; 143 if it was stopped, 128 + N if signal N ended it.

    Raises:
        RunError: its program never started.
    """
    if job.status == "STOPPED":
        return STOPPED_CODE
    if job.status == "SUCCEEDED":
        return 0
    if job.exit_code is None:
        raise RunError(f"job {job.id}: its program did not start or was lost ({_first_line(job.message)})")
    return job.exit_code if job.exit_code >= 0 else 128 - job.exit_code


def _job(details: Any) -> Job:
    metadata: Mapping[str, str] = details.metadata or {}
    return Job(
        id=details.submission_id,
        status=str(getattr(details.status, "value", details.status)),
        run=metadata.get("run") or _run_of(details.entrypoint),
        command=metadata.get("command") or details.entrypoint,
        begun=details.start_time / 1000 if details.start_time else None,
        ended=details.end_time / 1000 if details.end_time else None,
        exit_code=details.driver_exit_code,
        message=details.message or "",
    )


def _run_of(entrypoint: str) -> str | None:
    """The run of a job that was not submitted here, for example by a RayJob."""
    try:
        words = shlex.split(entrypoint)
    except ValueError:
        return None
    return next((normal(word.removeprefix("run=")) for word in words if word.startswith("run=")), None)


def _name(run: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", posixpath.basename(run)).strip("-")[:40] or "run"


def _network_reason(error: Exception) -> str:
    text = str(error)
    for sign, reason in (
        ("timed out", f"no answer within {CONNECT_SECONDS:.0f} s"),
        ("refused", "connection refused"),
        ("resolve", "unknown host"),
        ("Name or service", "unknown host"),
        ("SSL", "TLS failed"),
    ):
        if sign in text:
            return reason
    return type(error).__name__


def _reason(error: BaseException) -> str:
    """The last line with words in it: of a traceback that the server sent, what was raised."""
    lines = [line.strip(" .") for line in str(error).splitlines() if line.strip(" .")]
    return lines[-1] if lines else type(error).__name__


def _first_line(text: str) -> str:
    return (text.strip().splitlines() or ["no reason given"])[0]
