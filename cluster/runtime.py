"""The runtime of a worker: its rank, its device, and the few things that ranks do together.

A training function takes a `Runtime` and a config and knows nothing of how it was launched. `run` launches it as plain
torch (in this process, in spawned ones, or under torchrun) or through Ray Train; only the last imports ray.

What ranks tell each other here are numbers and small objects on the CPU, through gloo, so that asking every step
whether to stop never waits for a GPU; `gather` goes through the device's own backend.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from enum import IntEnum
from types import FrameType
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist

from cluster.errors import PassingError, RunError
from cluster.failures import TIMED_OUT
from cluster.machine import num_cpus
from cluster.options import TIMEOUT_SECONDS, ClusterConfig

C = TypeVar("C")
WorkerFunction = Callable[["Runtime", C], None]
CPU = torch.device("cpu")
NOTICE = "dicm_notice"  # in the store of a group: what a rank other than 0 was told
TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Notice(IntEnum):
    """What workers are told; of several, the greatest holds."""

    NONE = 0
    RESTART = 1  # save and end: another group goes on
    STOP = 2  # save and end


class Interruption(NamedTuple):
    """Why the last group of workers ended: `event` (recovered, resized, drained), a reason, the time it was noticed."""

    event: str
    reason: str
    time: float


class _Word:
    """Rank 0's notice, on its way to all ranks."""

    def __init__(self, notice: Notice) -> None:
        self.flag = torch.tensor(int(notice))
        self.work = dist.broadcast(self.flag, src=0, async_op=True)

    def arrived(self) -> Notice:
        """Wait for it."""
        assert self.work is not None  # every rank is in the group
        self.work.wait()
        return Notice(int(self.flag.item()))


class Runtime:
    """What a worker knows of its group; a world of one needs no process group.

    Attributes:
        rank, world: of all workers; local_rank: on this machine.
        device: where this worker computes.
        place: rank and node, to be shown.
        notice: what `should_stop` last said.
        interruption: why the group before this one ended, where there was one.
    """

    interruption: Interruption | None = None
    notice = Notice.NONE

    def __init__(self, rank: int, world: int, local_rank: int, device: torch.device) -> None:
        self.rank, self.world, self.local_rank, self.device = rank, world, local_rank, device
        self.place = f"rank {rank} on node {socket.gethostname()}"
        self._word: _Word | None = None
        self._passed_on = Notice.NONE

    @property
    def should_stop(self) -> bool:
        """True on every rank once any of them was told to save and end; a collective where there are several ranks.

        Asked after every step, so nobody waits. Rank 0 says while the next step is computed what it was told, or found
        in the group's store, where the others write what they were told; all act on it with the next question. A
        broadcast takes log2(world) hops, so that the second step hears of a notice at any size.
        """
        notice = self._look_for_notice()
        if self.world > 1:
            word, self._word = self._word, _Word(self._passed(notice))
            notice = word.arrived() if word is not None else Notice.NONE
        self.notice = notice
        return notice != Notice.NONE

    def mean(self, values: Mapping[str, float]) -> dict[str, float]:
        """The mean over ranks of each value; every rank gives the same names in the same order."""
        if self.world == 1:
            return dict(values)
        total = torch.tensor(list(values.values()), dtype=torch.float64)
        dist.all_reduce(total)
        return dict(zip(values, (total / self.world).tolist(), strict=True))

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Tensors (n_rank, ...) of all ranks, concatenated along dimension 0 in the order of ranks, on every rank."""
        if self.world == 1:
            return tensor
        sizes = torch.zeros(self.world, dtype=torch.int64)
        sizes[self.rank] = len(tensor)
        dist.all_reduce(sizes)
        longest = int(sizes.max())
        padded = tensor.new_zeros((longest, *tensor.shape[1:]))
        padded[: len(tensor)] = tensor
        parts = [torch.empty_like(padded) for _ in range(self.world)]
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes.tolist(), strict=True)])

    def broadcast(self, value: Any) -> Any:
        """Rank 0's `value`, on every rank."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=CPU)
        return box[0]

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world > 1:
            dist.all_reduce(torch.zeros(1))

    def report_checkpoint(self, step: int) -> None:
        """Tell the launcher that the checkpoint of `step` is complete. Plain torch has no one to tell."""

    def publish(self, values: Mapping[str, float]) -> None:
        """Show the present numbers of the run to whoever watches the cluster. Plain torch has no one to show them."""

    def _look_for_notice(self) -> Notice:
        """What this rank was told."""
        return Notice.NONE

    def _passed(self, notice: Notice) -> Notice:
        """Of rank 0, the greatest notice that any rank was told so far; the others leave theirs in the store."""
        store = dist.distributed_c10d._get_default_store()
        if self.rank == 0:
            return max(notice, Notice(int(store.get(NOTICE)))) if store.check([NOTICE]) else notice
        if notice > self._passed_on:
            store.set(NOTICE, str(int(notice)))
            self._passed_on = notice
        return notice


class LocalRuntime(Runtime):
    """Plain torch: rank and world as torchrun (or `run`) put them into the environment, or a world of one.

    Args:
        timeout_seconds: how long a collective waits for the other ranks.
        interruption: why the group before this one ended, where there was one.
        on_checkpoint: called with the step of a checkpoint that is complete.

    Raises:
        RunError: the environment has a part of what torchrun sets.
    """

    def __init__(
        self,
        timeout_seconds: float = TIMEOUT_SECONDS,
        interruption: Interruption | None = None,
        on_checkpoint: Callable[[int], None] | None = None,
    ) -> None:
        rank, world, local_rank, local_world = 0, 1, 0, 1
        if under_torchrun():
            rank, world = number_of("RANK"), number_of("WORLD_SIZE")
            local_rank, local_world = number_of("LOCAL_RANK", 0), number_of("LOCAL_WORLD_SIZE", world)
        super().__init__(rank, world, local_rank, device_of(local_rank))
        self.interruption, self._on_checkpoint = interruption, on_checkpoint
        self._told = threading.Event()
        self._joined = world > 1 and not dist.is_initialized()
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        elif world > 1:
            torch.set_num_threads(threads_per_worker(local_world))
        if self._joined:
            dist.init_process_group(backend_for(local_world), timeout=timedelta(seconds=timeout_seconds))

    def close(self) -> None:
        """Leave the process group."""
        if self._joined:
            dist.destroy_process_group()

    def report_checkpoint(self, step: int) -> None:
        """Tell the process that started this one, where it listens."""
        if self._on_checkpoint is not None:
            self._on_checkpoint(step)

    def stop(self) -> None:
        """Make `should_stop` true; what SIGTERM, the notice that a scheduler gives, does while `run` lasts."""
        self._told.set()

    def _look_for_notice(self) -> Notice:
        return Notice.STOP if self._told.is_set() else Notice.NONE


def device_of(local_rank: int) -> torch.device:
    """The GPU of the worker `local_rank`, shared where there are more workers than GPUs; else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", local_rank % torch.cuda.device_count())
    return CPU


def backend_for(local_world: int) -> str:
    """gloo for tensors on the CPU; NCCL for those on GPUs, unless workers share one, which NCCL refuses."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return "cpu:gloo,cuda:nccl" if gpus and gpus >= local_world else "gloo"


def threads_per_worker(workers: int) -> int:
    """Compute threads for each of `workers` on this machine, of the cores that they may use together."""
    return max(1, num_cpus() // workers)


@contextmanager
def on_sigterm(action: Callable[[], None]) -> Iterator[None]:
    """Call `action` at SIGTERM while the block lasts, and those of the blocks around it.

    A run that has nothing left to stop when it is told may be one of many: what does them one by one listens, too. Off
    the main thread, where signals never arrive, nothing is called.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _tell_all)
    _actions.append(action)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        _actions.remove(action)


_actions: list[Callable[[], None]] = []  # of the blocks that SIGTERM reaches now


def _tell_all(number: int, frame: FrameType | None) -> None:
    for action in tuple(_actions):
        action()


def run(
    function: WorkerFunction[C],
    config: C,
    *,
    workers: int,
    launcher: str,
    run_dir: str,
    cluster: ClusterConfig | None = None,
) -> None:
    """Run `function(runtime, config)` on `workers` workers and wait for them.

    SIGTERM makes `runtime.should_stop` true on every worker; `run` returns when they have returned. Ctrl-C ends them.

    Args:
        function: importable by name, as are the classes in `config`.
        launcher: "local" is plain torch: this process for one worker, spawned ones for several, or the processes
            that torchrun started, whose number then counts; "ray" is Ray Train.
        run_dir: folder of the run, on storage that all workers share.
        cluster: how Ray spreads the workers, how often workers may be lost, how long they wait for each other; without
            it plain torch ends with the first that is lost. torchrun counts for itself, `--max-restarts`.

    Raises:
        RunError: workers were lost too often, or none could be started. An error of our own packages comes back as it
            was raised in the worker; of several workers, any other arrives as a RuntimeError with its traceback.
    """
    if workers < 1:
        raise RunError(f"workers={workers}: at least one worker has to do it")
    options = cluster or ClusterConfig()
    if launcher == "ray":
        from cluster.launch import launch

        launch(function, config, workers=options.workers(workers), run_dir=run_dir, options=options)
    elif launcher != "local":
        raise RunError(f"launcher={launcher}: there are local, ray")
    else:
        from cluster.local_workers import Start, run_patiently, run_worker

        if under_torchrun():
            run_worker(function, config, Start(options.timeout_seconds))
        else:
            run_patiently(function, config, workers, options if cluster else replace(options, max_failures=0))


def under_torchrun() -> bool:
    """Whether something outside has already started the workers, this process being one of them.

    Raises:
        RunError: a part of its variables is missing, or contradicts the others.
    """
    there = [name for name in ("RANK", "WORLD_SIZE") if name in os.environ]
    if not there:
        return False
    missing = [name for name in TORCHRUN if name not in os.environ]
    if missing:
        shown = ", ".join(f"{name}={os.environ[name]}" for name in there)
        raise RunError(
            f"{shown} is set without {', '.join(missing)}; start the command with torchrun, which sets them all, or "
            f"unset {', '.join(there)}"
        )
    rank, world = number_of("RANK"), number_of("WORLD_SIZE")
    if rank >= world:
        raise RunError(f"RANK={rank} is invalid with WORLD_SIZE={world}; it must lie in 0..{world - 1}")
    return True


def number_of(variable: str, default: int | None = None) -> int:
    """A number of torchrun's in the environment (RunError: it is none)."""
    value = os.environ.get(variable)
    if value is None and default is not None:
        return default
    if value is None or not value.isdecimal():
        raise RunError(f"{variable}={value} is invalid; torchrun sets a whole number from 0")
    return int(value)


def alone() -> Runtime:
    """The runtime of a process that works by itself, whatever started it."""
    return Runtime(0, 1, 0, device_of(0))


@contextmanager
def timeouts_told(seconds: float) -> Iterator[None]:
    """Make one line of what gloo says where a collective has waited too long (PassingError)."""
    try:
        yield
    except RuntimeError as error:
        if TIMED_OUT not in str(error):
            raise
        raise PassingError(
            f"a worker waited {seconds:g} s in vain for another one, which may hang in reading or writing; see what "
            "holds that up and run the same command again, with a greater cluster.timeout_seconds= where it only needs "
            "longer"
        ) from error
