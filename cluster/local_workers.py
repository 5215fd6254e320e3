"""Workers of plain torch on this machine: one process each, watched until the last has ended.

`torch.multiprocessing.spawn` tells which process ended first, not why the group failed: after a SIGKILL the others
fail too, with a lost connection, and may be the ones that it names. Here every worker says how it ended, and the
cause is told: an error written for the user, then a worker that was killed, then the earliest exception.

Whoever can connect to the store or to a worker is a member of the group: all of them listen on the loopback interface.
"""

from __future__ import annotations

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

from cluster.errors import RunError, is_ours, portable
from cluster.options import TIMEOUT_SECONDS
from cluster.runtime import LocalRuntime, Runtime, on_sigterm, timeouts_told

C = TypeVar("C")
LOOPBACK, LOOPBACK_NAME = "127.0.0.1", "lo"
GRACE_SECONDS = 5.0  # for the others to say how they ended, once one has failed
TRACEBACK_CHARACTERS = 30_000  # fits into a pipe that no one reads before the worker has ended


@dataclass
class Failure:
    """How a worker ended that did not end well."""

    rank: int
    time: float = field(default_factory=time.monotonic)  # one clock for all processes of a machine
    error: Exception | None = None  # where it was written for the user
    traceback: str = ""


def run_workers(
    function: Callable[[Runtime, C], None], config: C, workers: int, timeout_seconds: float = TIMEOUT_SECONDS
) -> None:
    """Run `function` in `workers` processes; see `cluster.runtime.run` for what it raises.

    Args:
        timeout_seconds: how long a worker waits for the others.
    """
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
                    arguments = (
                        function, config, rank, workers, store.port, timeout_seconds, dict(os.environ), sender,
                    )  # fmt: skip
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
        raise RunError(
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
    rank: int,
    workers: int,
    port: int,
    timeout_seconds: float,
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
        runtime = LocalRuntime(timeout_seconds)
        with on_sigterm(runtime.stop), timeouts_told(timeout_seconds):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
            function(runtime, config)
    except Exception as error:
        # Said before the connections close: what the other ranks then raise is later, and no cause.
        failure = Failure(rank, traceback=traceback.format_exc()[-TRACEBACK_CHARACTERS:])
        if is_ours(error):
            failure.error = portable(error)
        sender.send(failure)
        raise SystemExit(1) from None
    runtime.close()


def end_with_parent() -> None:
    """End this process when its parent has ended, which a killed one cannot ask for."""
    parent = torch.multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
