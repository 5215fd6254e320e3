"""Launching workers with Ray Train, on the cluster that RAY_ADDRESS names or on an embedded Ray.

The training function writes its own checkpoints to the run folder and finds the newest complete one itself, so Ray is
told only to start workers, to connect them, and to say when one is lost. An embedded Ray lives as long as the call.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

# Read by Ray when it is imported or started.
DEFAULTS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # a failure or the end is noticed that much later
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths mean what they mean in the driver
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "3",  # of workers that wait for one that has failed
}
for name, value in DEFAULTS.items():
    os.environ.setdefault(name, value)  # what the user has set stays

import ray  # noqa: E402
import ray.train  # noqa: E402
import torch  # noqa: E402
from ray.train import FailureConfig, RunConfig, ScalingConfig  # noqa: E402
from ray.train.torch import TorchConfig, TorchTrainer  # noqa: E402

from cluster.errors import RunError, is_ours, portable  # noqa: E402
from cluster.ray_runtime import STOP, MessageHandler, MessageReader, RayRuntime  # noqa: E402
from cluster.runtime import Runtime, on_sigterm, threads_per_worker  # noqa: E402

C = TypeVar("C")
OBJECT_STORE_BYTES = 200 * 2**20  # nothing large passes through it
MESSAGE_POLL_SECONDS = 0.5
CONNECT_SECONDS = 10.0

logger = logging.getLogger(__name__)


def launch(function: Callable[[Runtime, C], None], config: C, *, workers: int, run_dir: str) -> None:
    """Run `function(runtime, config)` on `workers` Ray Train workers; see `cluster.runtime.run`.

    Each has a CPU, and a GPU where there are any: its own, or a share of one where workers outnumber them. Workers
    have the driver's working directory and import path.

    Raises:
        RunError: workers could not be started, or one failed. An error of our own packages comes back as raised,
            any other as a RuntimeError with the worker's traceback.
    """
    with _connected_ray(workers), _exchange_folder(Path(run_dir).absolute()) as exchange:
        scaling, backend = _resources(workers)
        trainer = TorchTrainer(
            _worker,
            train_loop_config={
                "function": function,
                "config": config,
                "exchange": exchange,
                "directory": Path.cwd(),
                "threads": threads_per_worker(workers),
            },
            torch_config=TorchConfig(backend=backend),
            scaling_config=scaling,
            run_config=RunConfig(
                name=exchange.name,  # a name used before would make Ray resume that run
                storage_path=str(exchange.parent),
                failure_config=FailureConfig(max_failures=0),
            ),
        )
        with on_sigterm((exchange / STOP).touch), _messages_shown(exchange):
            _fit(trainer, run_dir)


def _fit(trainer: TorchTrainer, run_dir: str) -> None:
    interrupt = signal.getsignal(signal.SIGINT)
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise _cause(error, run_dir) from None
    except SystemExit:
        raise KeyboardInterrupt from None  # Ray Train's answer to Ctrl-C, after it has ended its workers
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, interrupt)  # Ray Train took it and does not give it back


def _worker(options: dict[str, Any]) -> None:
    """Body of a Ray Train worker."""
    directory: Path = options["directory"]
    if not directory.is_dir():
        raise RunError(f"{directory}: the working directory does not exist on every node; use storage that they share")
    os.chdir(directory)
    runtime = RayRuntime(options["exchange"])
    if runtime.device.type == "cpu":
        torch.set_num_threads(options["threads"])
    logging.getLogger().addHandler(MessageHandler(options["exchange"], runtime.rank))
    try:
        options["function"](runtime, options["config"])
    except Exception as error:
        if is_ours(error):
            raise portable(error) from None
        raise


def _cause(error: Exception, run_dir: str) -> Exception:
    """What to raise in the driver: our own error, a lost worker, or the first worker's traceback."""
    failures: dict[int, Exception] = dict(sorted(getattr(error, "worker_failures", {}).items()))
    for failure in failures.values():
        if is_ours(failure):
            return failure
    again = "run the same command again to go on from the newest checkpoint"
    for rank, failure in failures.items():
        if type(failure).__module__.partition(".")[0] == "ray":  # of the process, not of what ran in it
            return RunError(f"run={run_dir}: worker {rank} was lost ({_reason(failure)}); {again}")
    if failures:
        return RuntimeError(f"worker {next(iter(failures))} failed:\n\n{error}")
    return RunError(f"run={run_dir}: Ray Train could not go on ({_reason(error)}); {again}")


def _reason(error: BaseException) -> str:
    """The shortest account of why an actor died, out of Ray's page about it."""
    text = str(error)
    if "OutOfMemory" in text or "running low on memory" in text:
        return "memory ran out"
    if "SIGKILL" in text or "connection error code 2" in text:
        return "its process was killed, as the system does when memory runs out"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _resources(workers: int) -> tuple[ScalingConfig, str]:
    """What each worker gets of the connected Ray, and torch.distributed's backends for it."""
    there = ray.cluster_resources()
    cpus, gpus = int(there.get("CPU", 0)), int(there.get("GPU", 0))
    if cpus < workers:
        logger.warning("workers=%d: the cluster has %d CPUs; waiting for it to grow", workers, cpus)
    each: dict[str, float] = {"CPU": 1}
    if gpus:
        each["GPU"] = 1 / math.ceil(workers / gpus)
    # NCCL refuses two ranks on one GPU. Numbers on the CPU always go through gloo.
    backend = "cpu:gloo,cuda:nccl" if gpus >= workers else "gloo"
    return ScalingConfig(num_workers=workers, use_gpu=gpus > 0, resources_per_worker=each), backend


@contextmanager
def _connected_ray(workers: int) -> Iterator[None]:
    """A Ray to work on: the one this process is connected to, that of RAY_ADDRESS, or one of our own."""
    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS")
    if address == "local":
        address = None
    if address:
        _check_address(address)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    logging.getLogger("ray").setLevel(logging.ERROR)
    try:
        if address:
            ray.init(address, runtime_env={"env_vars": {"PYTHONPATH": _import_path()}}, **quiet)
        else:
            # No one drains a Ray that ends with this call; the watcher would be one more process to start.
            os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
            with _environment("PYTHONPATH", _import_path()):
                ray.init(
                    "local",
                    num_cpus=max(workers, os.cpu_count() or 1),
                    include_dashboard=False,
                    object_store_memory=OBJECT_STORE_BYTES,
                    **quiet,
                )
    except Exception as error:  # Ray raises bare ones here, for a start that took too long among others
        if address:
            raise _no_cluster(address, error) from error
        raise RunError(
            f"Ray could not be started on this machine ({_first_line(error)}); use launcher=local to run without it"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _check_address(address: str) -> None:
    """RunError where nothing listens at HOST:PORT; Ray itself tries for minutes and then ends the process."""
    host, _, port = address.rpartition(":")
    if "/" not in host and port.isdigit():
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
        except OSError as error:
            raise _no_cluster(address, error) from error


def _no_cluster(address: str, error: Exception) -> RunError:
    return RunError(
        f"RAY_ADDRESS={address}: no Ray cluster answers ({_first_line(error)}); start one, or unset RAY_ADDRESS to "
        "run on this machine"
    )


@contextmanager
def _exchange_folder(run: Path) -> Iterator[Path]:
    """A fresh folder RUN/ray/NAME that workers share with the driver, removed at the end."""
    exchange = run / "ray" / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    try:
        exchange.mkdir(parents=True)
    except OSError as error:
        raise RunError(f"run={run}: cannot be written ({error.strerror}); name a folder that can") from error
    try:
        yield exchange
    finally:
        shutil.rmtree(exchange, ignore_errors=True)
        with suppress(OSError):
            exchange.parent.rmdir()


@contextmanager
def _messages_shown(exchange: Path) -> Iterator[None]:
    """Show the workers' warnings in this process while the block lasts."""
    reader, ended = MessageReader(exchange), threading.Event()

    def follow() -> None:
        while not ended.wait(MESSAGE_POLL_SECONDS):
            reader.show()

    thread = threading.Thread(target=follow, name="messages", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        reader.show()


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _import_path() -> str:
    """PYTHONPATH for workers: where this process imports from, less what comes with its Python."""
    own = (sys.prefix, sys.base_prefix)
    paths = [str(Path(path or ".").absolute()) for path in sys.path]
    return os.pathsep.join(dict.fromkeys(path for path in paths if not path.startswith(own)))


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
