"""The runtime of a worker: its rank, its device, and the few things that ranks do together.

A training function takes a `Runtime` and a config and knows nothing of how it was launched. `run` launches it as plain
torch, in this process, in spawned ones or under torchrun, or through Ray Train; only the last imports ray.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.multiprocessing.spawn import ProcessException, ProcessExitedException

from cluster.errors import RunError

C = TypeVar("C")
WorkerFunction = Callable[["Runtime", C], None]
PREEMPTION_SIGNALS = (signal.SIGTERM,)


class Runtime:
    """What a worker knows of its group; collectives go through torch.distributed where there are several ranks.

    Attributes:
        rank, world: of all workers; local_rank: on this machine.
        device: where this worker computes.
    """

    def __init__(self, rank: int = 0, world: int = 1, local_rank: int = 0, device: torch.device | None = None):
        self.rank, self.world, self.local_rank = rank, world, local_rank
        self.device = device or default_device(local_rank)
        self._stop = threading.Event()
        if threading.current_thread() is threading.main_thread():
            for number in PREEMPTION_SIGNALS:
                signal.signal(number, lambda *_: self._stop.set())

    @property
    def should_stop(self) -> bool:
        """True on every rank once any of them was told to stop (SIGTERM); a collective."""
        if self.world == 1:
            return self._stop.is_set()
        flag = torch.tensor(float(self._stop.is_set()), device=self.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag.item())

    def mean(self, values: Mapping[str, float]) -> dict[str, float]:
        """The mean over ranks of each value; every rank gives the same names."""
        if self.world == 1:
            return dict(values)
        tensor = torch.tensor(list(values.values()), dtype=torch.float32, device=self.device)
        dist.all_reduce(tensor)
        return dict(zip(values, (tensor / self.world).tolist(), strict=True))

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Tensors of equal shapes of all ranks, concatenated along dimension 0, on every rank."""
        if self.world == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.world)]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    def broadcast(self, value: Any) -> Any:
        """Rank 0's `value`, on every rank."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world > 1:
            dist.barrier()

    def report(self, metrics: Mapping[str, Any]) -> None:
        """Tell the launcher how far this worker is; nothing to tell in plain torch."""


class LocalRuntime(Runtime):
    """Plain torch: rank and world from torchrun's environment, or a world of one."""

    def __init__(self) -> None:
        environment = os.environ
        world = int(environment.get("WORLD_SIZE", 1))
        local_rank = int(environment.get("LOCAL_RANK", 0))
        super().__init__(int(environment.get("RANK", 0)), world, local_rank)
        if world > 1 and not dist.is_initialized():
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")

    def close(self) -> None:
        """Leave the process group."""
        if dist.is_initialized():
            dist.destroy_process_group()


def default_device(local_rank: int) -> torch.device:
    """The GPU of this rank where there is one, the CPU otherwise."""
    return torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")


def threads_per_worker(workers: int) -> int:
    """Compute threads for each of `workers` on this machine."""
    return max(1, len(os.sched_getaffinity(0)) // workers)


def run(function: WorkerFunction[C], config: C, *, workers: int, launcher: str, run_dir: str) -> None:
    """Run `function(runtime, config)` on `workers` workers and wait for them.

    Args:
        function: importable by name, as are the classes in `config`.
        launcher: "local" is plain torch: this process for one worker, spawned ones for several, or the processes
            that torchrun started; "ray" is Ray Train.
        run_dir: folder of the run, on storage that all workers share.

    Raises:
        RunError: a worker died. An error of our own packages comes back as it was raised in the worker.
    """
    if launcher == "ray":
        from cluster.launch import launch

        launch(function, config, workers=workers, run_dir=run_dir)
    elif workers == 1 or "WORLD_SIZE" in os.environ:
        _work(function, config)
    else:
        _spawn(function, config, workers)


def _work(function: WorkerFunction[C], config: C) -> None:
    before = {number: signal.getsignal(number) for number in PREEMPTION_SIGNALS}
    runtime = LocalRuntime()
    try:
        function(runtime, config)
    finally:
        runtime.close()
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)


def _spawn(function: WorkerFunction[C], config: C, workers: int) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    errors = context.SimpleQueue()
    processes = torch.multiprocessing.start_processes(
        _spawned, args=(function, config, workers, port, errors), nprocs=workers, join=False
    )
    assert processes is not None
    try:
        while not processes.join():
            pass
    except ProcessException as error:
        if not errors.empty():
            raise errors.get() from None
        if isinstance(error, ProcessExitedException):
            cause = error.signal_name or f"exit code {error.exit_code}"
            raise RunError(
                f"worker {error.error_index} died ({cause}); "
                "run the same command again to go on from the newest checkpoint"
            ) from None
        raise


def _spawned(local_rank: int, function: WorkerFunction[C], config: C, workers: int, port: int, errors: Any) -> None:
    os.environ |= {
        "RANK": str(local_rank),
        "LOCAL_RANK": str(local_rank),
        "WORLD_SIZE": str(workers),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(threads_per_worker(workers))
    try:
        _work(function, config)
    except ValueError as error:
        # An error that was written for the user goes back whole; others print their traceback.
        if type(error).__module__.partition(".")[0] not in ("builtins", "torch"):
            errors.put(error)
        raise
