"""Launching workers with Ray Train, on the cluster that RAY_ADDRESS names or on an embedded Ray.

The training function writes its own checkpoints and finds the newest complete one itself, so Ray is told only to start
workers, to connect them, and to start them again: when one is lost, when a node is about to go, when there is room for
more. What the controller decides is in `cluster.policies`. An embedded Ray lives as long as the call.
"""

from __future__ import annotations

import logging
import math
import os
import secrets
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

# Read by Ray, in this process, the controller or the workers, when it is imported or started.
DEFAULTS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_V2_ENABLED": "1",
    # A failure, or the end, is noticed that much later; a poll of a worker costs a millisecond.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # A start that counts on a node which died meanwhile is given up after that time and tried on the others. It covers
    # the reservation of places alone, which takes less than a second where the nodes are up.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10",
    # Workers of a failed group are killed in any case; the default waits half a minute for them to take leave of each
    # other, which those that wait for a dead one never do.
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "1",
    # Drain notices are ours to answer: Ray's watcher lets the workers run to the deadline and then loses their steps.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths mean what they mean in the driver
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
for name, value in DEFAULTS.items():
    os.environ.setdefault(name, value)  # what the user has set stays

import ray  # noqa: E402
import ray.train  # noqa: E402
import torch  # noqa: E402
from ray import cloudpickle  # noqa: E402
from ray.train import FailureConfig, RunConfig, ScalingConfig  # noqa: E402
from ray.train.torch import TorchConfig, TorchTrainer  # noqa: E402
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback  # noqa: E402

from cluster.clocks import check_clocks  # noqa: E402
from cluster.errors import PeerLost, Restart, RunError, first_line, is_ours, last_line, portable  # noqa: E402
from cluster.exchange import Exchange, MessageHandler, MessageReader  # noqa: E402
from cluster.failures import cause_of, is_peer_lost, passing  # noqa: E402
from cluster.machine import CPUS_VARIABLE, num_cpus  # noqa: E402
from cluster.options import ClusterConfig  # noqa: E402
from cluster.policies import Group, LiveNodesPolicy, RecoveryPolicy  # noqa: E402
from cluster.ray_runtime import RayRuntime  # noqa: E402
from cluster.runtime import Notice, Runtime, on_sigterm, threads_per_worker  # noqa: E402
from cluster.starting import environment, resume_collection, setup_hook  # noqa: E402

C = TypeVar("C")
OBJECT_STORE_BYTES = 200 * 2**20  # nothing large passes through it
MESSAGE_POLL_SECONDS = 0.5
CONNECT_SECONDS = 10.0
FRAME_HEADER, SETTINGS = 9, b"\x04"  # of HTTP/2, RFC 9113: length (3 bytes), type, flags, stream; the first type sent
HTTP2_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0" + SETTINGS + 5 * b"\0"
SETUP_HOOK = "worker_process_setup_hook"

logger = logging.getLogger(__name__)


def launch(
    function: Callable[[Runtime, C], None],
    config: C,
    *,
    workers: int | tuple[int, int],
    run_dir: str,
    options: ClusterConfig | None = None,
) -> None:
    """Run `function(runtime, config)` on Ray Train workers; see `cluster.runtime.run`.

    A function that loses a worker, or whose nodes change, is started again on all workers; it goes on from its newest
    checkpoint. Workers have the driver's working directory and import path.

    Args:
        workers: how many; or (least, most): as many as the nodes have room for at any time.

    Raises:
        RunError: workers could not be started, or were lost too often. An error of our own packages comes back as
            raised, any other as a RuntimeError with the worker's traceback.
    """
    options = options or ClusterConfig()
    least, most = (workers, workers) if isinstance(workers, int) else workers
    with _connected_ray(most * options.cpus_per_worker), _exchange_folder(Path(run_dir).absolute()) as exchange:
        scaling, backend = _resources(least, most, options)
        if not _address():
            _check_own_gpus(least, scaling, options)
        trainer = _Trainer(
            _worker,
            train_loop_config={
                "work": cloudpickle.dumps((function, config)),  # the controller need not import what it needs
                "exchange": exchange,
                "directory": Path.cwd(),
                # A cluster's nodes have other work, too; a Ray of our own is for this run alone.
                "cpus": options.cpus_per_worker if _address() else None,
            },
            torch_config=TorchConfig(backend=backend, timeout_s=math.ceil(options.timeout_seconds)),
            scaling_config=scaling,
            run_config=RunConfig(
                name=exchange.folder.name,  # a name used before would make Ray resume that run
                storage_path=str(exchange.folder.parent),
                failure_config=FailureConfig(max_failures=options.max_failures),
                callbacks=[Group(exchange)],
            ),
        )
        trainer.policies = {
            "scaling_policy": LiveNodesPolicy(scaling, exchange, autoscaled=bool(_address())),
            "failure_policy": RecoveryPolicy(exchange, options.max_failures),
        }
        with on_sigterm(exchange.ask_to_stop), _messages_shown(exchange):
            _fit(trainer, run_dir, exchange)


class _Trainer(TorchTrainer):
    """TorchTrainer under our policies; Ray Train chooses its own where the controller is made."""

    policies: dict[str, Any]

    def _create_default_callbacks(self) -> list[Any]:
        # Ray Data's would start a process with every group of workers, seconds of a core; ours read shards themselves.
        return [
            callback for callback in super()._create_default_callbacks() if not isinstance(callback, DatasetsCallback)
        ]

    def _initialize_and_run_controller(self, **options: Any) -> Any:
        function = _Carried(self._get_train_func())
        return super()._initialize_and_run_controller(**(options | self.policies | {"train_fn_ref": function}))


class _Carried:
    """A function that comes with the call that needs it.

    Ray Train puts it into the object store, and a new node may try for a minute to fetch it from one that is gone.
    """

    def __init__(self, function: Callable[[], Any]) -> None:
        self.data = cloudpickle.dumps(function)

    def get(self) -> Callable[[], Any]:
        """The function."""
        function: Callable[[], Any] = cloudpickle.loads(self.data)
        return function


def _fit(trainer: TorchTrainer, run_dir: str, exchange: Exchange) -> None:
    interrupt = signal.getsignal(signal.SIGINT)
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        if isinstance(getattr(error, "controller_failure", None), Restart):
            return  # stopped before there was a worker
        raise _told(error, run_dir, exchange) from None
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
    exchange: Exchange = options["exchange"]
    if not exchange.folder.is_dir():
        raise RunError(
            f"{exchange.run}: the run folder is not there on node {ray.util.get_node_ip_address()}; "
            "name one on storage that all nodes share, run=DIR"
        )
    runtime = RayRuntime(exchange)
    cpus = options["cpus"] or threads_per_worker(ray.train.get_context().get_local_world_size())
    os.environ[CPUS_VARIABLE] = str(cpus)
    if runtime.device.type == "cpu":
        torch.set_num_threads(cpus)
    logging.getLogger().addHandler(MessageHandler(exchange, str(runtime.rank)))
    try:
        check_clocks(runtime, exchange.place_of)
        function, config = cloudpickle.loads(options["work"])
        resume_collection()
        function(runtime, config)
    except Exception as error:
        if (fault := passing(error)) is not None:
            raise portable(fault) from None
        if is_ours(error):
            raise portable(error) from None
        if is_peer_lost(error):
            raise PeerLost(str(error)) from None
        raise
    if runtime.notice == Notice.RESTART:
        raise Restart("asked to")


def _told(error: Exception, run_dir: str, exchange: Exchange) -> Exception:
    """What to raise in the driver: our own error, a lost worker, or the first worker's traceback."""
    again = "run the same command again to go on from the newest checkpoint"
    failures: dict[int, Exception] = getattr(error, "worker_failures", {})
    if not failures:
        if "ModuleNotFoundError" in str(error):
            again = "install the same dicm at the same place on every node"
        return RunError(f"run={run_dir}: Ray Train could not go on ({last_line(error)}); {again}")
    cause = cause_of(failures)
    if cause.kind == "bug":
        return RuntimeError(f"worker {cause.rank} failed:\n\n{error}")
    who = "a worker" if cause.rank is None else exchange.place_of(cause.rank)
    if cause.kind == "told" and cause.error is not None:
        return _with_place(cause.error, who)
    if "memory ran out" in cause.reason:
        again = f"give a worker less to hold, micro_batch=N, or more memory; {again}"
    times = f" {lost} times in a row without a new checkpoint" if (lost := exchange.failures()) > 1 else ""
    return RunError(f"run={run_dir}: {who} {cause.what}{times}; {again}")


def _with_place(error: Exception, who: str) -> Exception:
    """An error of ours that also names the worker and its node."""
    try:
        return type(error)(f"{error} ({who})")
    except TypeError:  # one that takes more than a message
        return error


def _resources(least: int, most: int, options: ClusterConfig) -> tuple[ScalingConfig, str]:
    """What each worker gets of the connected Ray, and torch.distributed's backends for it."""
    there = ray.cluster_resources()
    gpus = int(there.get("GPU", 0))
    use_gpu = options.accelerator == "gpu" or (options.accelerator == "auto" and gpus > 0)
    each: dict[str, float] = {"CPU": options.cpus_per_worker}
    shared = use_gpu and least == most and 0 < gpus < most and options.accelerator == "auto"
    if use_gpu:
        each["GPU"] = 1 / math.ceil(most / gpus) if shared else 1
    # NCCL refuses two ranks on one GPU. Numbers on the CPU always go through gloo.
    backend = "cpu:gloo,cuda:nccl" if use_gpu and not shared else "gloo"
    scaling = ScalingConfig(
        num_workers=(least, most),
        use_gpu=use_gpu,
        resources_per_worker=each,
        placement_strategy=options.placement.upper(),
        elastic_resize_monitor_interval_s=options.resize_seconds,
    )
    return scaling, backend


@contextmanager
def _connected_ray(cpus: int) -> Iterator[None]:
    """A Ray to work on: the one this process is connected to, that of RAY_ADDRESS, or one of our own."""
    if ray.is_initialized():
        yield
        return
    if address := _address():
        _check_address(address)
    with _same_sigterm():
        _start_ray(address, cpus)
        try:
            yield
        finally:
            ray.shutdown()


@contextmanager
def _same_sigterm() -> Iterator[None]:
    """SIGTERM does after the block what it did before: Ray leaves a handler in this process and in all it forks."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def _start_ray(address: str | None, cpus: int) -> None:
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    logging.getLogger("ray").setLevel(logging.ERROR)
    try:
        if address:
            variables = _settings() | {"PYTHONPATH": _import_path()}
            ray.init(address, runtime_env={"env_vars": variables, SETUP_HOOK: setup_hook()}, **quiet)
        else:
            with environment("PYTHONPATH", _import_path()):
                ray.init(
                    "local",
                    num_cpus=max(cpus, num_cpus()),
                    include_dashboard=False,
                    runtime_env={SETUP_HOOK: setup_hook()},
                    object_store_memory=OBJECT_STORE_BYTES,
                    **quiet,
                )
    except Exception as error:  # Ray raises bare ones here, for a start that took too long among others
        if address:
            raise _no_cluster(address, error) from error
        raise RunError(
            f"Ray could not be started on this machine ({first_line(error)}); use launcher=local to run without it"
        ) from error


def _address() -> str | None:
    """Of the cluster to work on; None: a Ray of our own, on this machine."""
    address = os.environ.get("RAY_ADDRESS")
    return None if address in ("", "local") else address


def _check_own_gpus(least: int, scaling: ScalingConfig, options: ClusterConfig) -> None:
    """RunError where a Ray of our own has too few GPUs: it would wait for ever, no node will join it."""
    gpus = int(ray.cluster_resources().get("GPU", 0))
    needed = math.ceil(least * scaling._resources_per_worker_not_none.get("GPU", 0) - 1e-6)
    if gpus < needed:
        raise RunError(
            f"cluster.accelerator={options.accelerator} with {least} workers needs {needed} GPUs, and this machine has "
            f"{gpus}; name a cluster with RAY_ADDRESS, or use fewer workers, or cluster.accelerator=cpu"
        )


def _check_address(address: str) -> None:
    """RunError where no Ray listens at HOST:PORT; Ray itself tries for minutes and then ends the process."""
    if address.startswith(("http://", "https://")):
        raise RunError(
            f"RAY_ADDRESS={address}: a dashboard's URL, which `dicm cluster` alone takes; to run on that cluster from "
            "one of its nodes set RAY_ADDRESS=auto, or submit the command with `dicm cluster submit`"
        )
    host, _, port = address.rpartition(":")
    if "/" not in host and port.isdigit():
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS) as connection:
                is_ray = "RAY_USE_TLS" in os.environ or _speaks_http2(connection)
        except OSError as error:
            raise _no_cluster(address, error) from error
        if not is_ray:
            raise _no_cluster(address, ValueError("something else listens there"))


def _speaks_http2(connection: socket.socket) -> bool:
    """Whether the other side greets as gRPC servers do, of which Ray's control service is one."""
    connection.sendall(HTTP2_GREETING)
    answer = b""
    while len(answer) < FRAME_HEADER and (more := connection.recv(FRAME_HEADER - len(answer))):
        answer += more
    return answer[3:4] == SETTINGS


def _no_cluster(address: str, error: Exception) -> RunError:
    return RunError(
        f"RAY_ADDRESS={address}: no Ray cluster answers ({first_line(error)}); start one, or unset RAY_ADDRESS to "
        "run on this machine"
    )


@contextmanager
def _exchange_folder(run: Path) -> Iterator[Exchange]:
    """A fresh folder RUN/ray/NAME that workers share with the driver, removed at the end."""
    folder = run / "ray" / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(4)}"
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise RunError(f"run={run}: cannot be written ({error.strerror}); name a folder that can") from error
    try:
        yield Exchange(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):
            folder.parent.rmdir()


@contextmanager
def _messages_shown(exchange: Exchange) -> Iterator[None]:
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


def _import_path() -> str:
    """PYTHONPATH for workers: where this process imports from, less what comes with its Python."""
    own = (sys.prefix, sys.base_prefix)
    paths = [str(Path(path or ".").absolute()) for path in sys.path]
    return os.pathsep.join(dict.fromkeys(path for path in paths if not path.startswith(own)))


def _settings() -> dict[str, str]:
    """The settings above as this process has them: a cluster's own processes were started without them."""
    return {name: os.environ[name] for name in DEFAULTS}
