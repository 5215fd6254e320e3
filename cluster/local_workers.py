"""Workers of plain torch on this machine: one process each, watched until the last has ended; one alone is this one.

`torch.multiprocessing.spawn` tells which process ended first, not why the group failed: after a SIGKILL the others
fail too, with a lost connection, and may be the ones that it names. Here every worker says how it ended, and the
cause is told: an error written for the user, then a worker that was killed, then the earliest exception.

A worker that is killed, or meets a fault that may pass, is a lost worker, as on Ray: all are started again, and go on
from the newest checkpoint, until `max_failures` of them in a row were lost with no new checkpoint in between.

Whoever can connect to the store or to a worker is a member of the group: all of them listen on the loopback interface.
"""

from __future__ import annotations

import itertools
import logging
import multiprocessing.connection
import os
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from typing import Any, TypeVar

import torch.distributed as dist
import torch.multiprocessing

from cluster.errors import PassingError, first_line, is_ours, portable
from cluster.failures import is_transient, passing
from cluster.options import TIMEOUT_SECONDS, ClusterConfig
from cluster.runtime import Interruption, LocalRuntime, Runtime, on_sigterm, timeouts_told

C = TypeVar("C")
LOOPBACK, LOOPBACK_NAME = "127.0.0.1", "lo"
GRACE_SECONDS = 5.0  # for the others to say how they ended, once one has failed
RESTART_SECONDS = (1.0, 5.0, 20.0)  # before workers start again; the last also before each further start
TRACEBACK_CHARACTERS = 30_000  # fits into a pipe that no one reads before the worker has ended


logger = logging.getLogger(__name__)


@dataclass
class Failure:
    """How a worker ended that did not end well."""

    rank: int
    time: float = field(default_factory=time.monotonic)  # one clock for all processes of a machine
    error: Exception | None = None  # where it was written for the user
    traceback: str = ""


@dataclass
class Start:
    """What a group of workers is started with.

    Attributes:
        timeout_seconds: how long a worker waits for the others.
        newest: step of the newest checkpoint since the first start, -1 before there is one; rank 0 writes it.
        interruption: why the group before ended, where there was one.
    """

    timeout_seconds: float = TIMEOUT_SECONDS
    newest: Any = field(default_factory=lambda: torch.multiprocessing.get_context("forkserver").RawValue("q", -1))
    interruption: Interruption | None = None

    def runtime(self) -> LocalRuntime:
        """The runtime of a worker of the group."""
        return LocalRuntime(self.timeout_seconds, self.interruption, self._note)

    def _note(self, step: int) -> None:
        self.newest.value = step


def run_patiently(function: Callable[[Runtime, C], None], config: C, workers: int, options: ClusterConfig) -> None:
    """Run `function` on `workers` workers, and again where one was lost; see `cluster.runtime.run`.

    Args:
        options: of which `max_failures`, lost workers in a row, with no new checkpoint in between, after which the run
            ends, and `timeout_seconds`.
    """
    start, told = Start(options.timeout_seconds), threading.Event()
    steps: list[int] = []  # of the newest checkpoint, by lost worker
    with on_sigterm(told.set):
        while True:
            try:
                if workers == 1:
                    run_worker(function, config, start)
                else:
                    run_workers(function, config, workers, start)
                return
            except Exception as error:
                if not (is_ours(error) and is_transient(error)):
                    raise
                steps.append(start.newest.value)
                times = len(list(itertools.takewhile(lambda step: step == steps[-1], reversed(steps))))
                if times > options.max_failures or told.is_set():
                    if times == 1:
                        raise
                    raise PassingError(f"{error} ({times} times in a row without a new checkpoint)") from error
                reason = first_line(error)
            logger.warning("a worker was lost (%s); going on from the newest checkpoint", reason)
            start.interruption = Interruption("recovered", reason, time.time())
            if told.wait(RESTART_SECONDS[min(times, len(RESTART_SECONDS)) - 1]):
                return


def run_worker(function: Callable[[Runtime, C], None], config: C, start: Start) -> None:
    """Run `function` as the worker that the environment describes, in this process."""
    runtime = start.runtime()
    try:
        with on_sigterm(runtime.stop), timeouts_told(start.timeout_seconds):
            function(runtime, config)
    except Exception as error:
        if (fault := passing(error)) is None or fault is error:
            raise
        raise fault from error
    finally:
        runtime.close()


def run_workers(function: Callable[[Runtime, C], None], config: C, workers: int, start: Start | None = None) -> None:
    """Run `function` in `workers` processes; see `cluster.runtime.run` for what it raises."""
    start = start or Start()
    # What the function needs is imported once, not by every worker. Where a program has begun such processes before,
    # these share what those do, and import the rest.
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([function.__module__])
    store = _store()
    processes: list[ForkServerProcess] = []
    receivers: list[Connection] = []
    try:
        told = threading.Event()

        def tell() -> None:
            told.set()
            _terminate(processes)

        with on_sigterm(tell):
            with sigterm_held_back():
                for rank in range(workers):
                    receiver, sender = context.Pipe(duplex=False)
                    arguments = (function, config, start, rank, workers, store.port, dict(os.environ), sender)
                    process = context.Process(target=_work_in_process, args=arguments, name=f"worker {rank}")
                    process.start()
                    sender.close()
                    processes.append(process)
                    receivers.append(receiver)
            if told.is_set():  # another thread took the signal, while some had not been started
                _terminate(processes)
            _wait(processes)
        codes = [process.exitcode for process in processes]  # before the survivors are killed: None where one runs
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()
    failures = [failure for receiver in receivers if (failure := _received(receiver)) is not None]
    if any(codes) or failures:
        _raise_cause(codes, failures)


def _store() -> dist.TCPStore:
    """The store of the group. It lives here and has its port from the system: no other process can take it in between.

    It gets a socket that listens already: its own would listen on all interfaces, whatever host it is given.
    """
    listener = socket.create_server((LOOPBACK, 0))
    port = listener.getsockname()[1]
    return dist.TCPStore(LOOPBACK, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())


@contextmanager
def sigterm_held_back() -> Iterator[None]:
    """SIGTERM waits while the block lasts, and in processes started in it until they take it.

    One that imports still has no handler, and would die of what is to let it save and end. The server of processes
    hands its mask on: where it starts in this block, SIGTERM waits in all that it starts.
    """
    resource_tracker.ensure_running()  # it lets SIGTERM through as it starts
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _wait(processes: list[ForkServerProcess]) -> None:
    """Return when all have ended, or some time after one has failed."""
    running: dict[Any, ForkServerProcess] = {process.sentinel: process for process in processes}
    deadline: float | None = None
    while running:
        timeout = None if deadline is None else max(0.0, deadline - time.monotonic())
        ended = multiprocessing.connection.wait(list(running), timeout)
        if not ended:
            return
        for sentinel in ended:
            process = running.pop(sentinel)
            process.join()
            if process.exitcode and deadline is None:
                deadline = time.monotonic() + GRACE_SECONDS


def _terminate(processes: list[ForkServerProcess]) -> None:
    for process in processes:
        process.terminate()


def _received(receiver: Connection) -> Failure | None:
    """What a worker that has ended said last, or None."""
    try:
        failure: Failure = receiver.recv()
    except (EOFError, OSError):
        return None
    return failure


def _raise_cause(codes: list[int | None], failures: list[Failure]) -> None:
    failures.sort(key=lambda failure: failure.time)
    for failure in failures:
        if failure.error is not None:
            raise failure.error
    heard = {failure.rank for failure in failures}
    silent = {rank: code for rank, code in enumerate(codes) if code and rank not in heard}
    # An abort can be NCCL's answer to another rank's exception, which tells more.
    killed = {rank: code for rank, code in silent.items() if code != -signal.SIGABRT or not failures}
    for rank, code in killed.items():
        raise PassingError(
            f"worker {rank} of {len(codes)} {_how_it_died(code)}; run the same command again to go on from the newest "
            "checkpoint"
        )
    first = failures[0]
    raise RuntimeError(f"worker {first.rank} of {len(codes)} failed:\n\n{first.traceback}")


def _how_it_died(code: int) -> str:
    if code == -signal.SIGKILL:
        return "was killed (SIGKILL, as the system does when memory runs out)"
    return f"was killed ({signal.Signals(-code).name})" if code < 0 else f"ended with exit code {code}"


def _work_in_process(
    function: Callable[[Runtime, Any], None],
    config: Any,
    start: Start,
    rank: int,
    workers: int,
    port: int,
    environment: dict[str, str],
    sender: Connection,
) -> None:
    """Body of a worker process."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # where the server had started before
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which ends us
    threading.Thread(target=end_with_parent, daemon=True).start()
    os.environ |= environment | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(workers),
        "LOCAL_WORLD_SIZE": str(workers),
        "MASTER_ADDR": LOOPBACK,
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store runs in the parent, as under torchrun
        "GLOO_SOCKET_IFNAME": LOOPBACK_NAME,
        "NCCL_SOCKET_IFNAME": LOOPBACK_NAME,
    }
    try:
        runtime = start.runtime()
        with on_sigterm(runtime.stop), timeouts_told(start.timeout_seconds):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
            function(runtime, config)
    except Exception as error:
        # Said before the connections close: what the other ranks then raise is later, and no cause.
        failure = Failure(rank, traceback=traceback.format_exc()[-TRACEBACK_CHARACTERS:])
        if is_ours(fault := passing(error) or error):
            failure.error = portable(fault)
        sender.send(failure)
        raise SystemExit(1) from None
    runtime.close()


def end_with_parent() -> None:
    """End this process when its parent has ended, which a killed one cannot ask for."""
    parent = torch.multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
