"""Launching workers with Ray Train, on the cluster that RAY_ADDRESS names or on an embedded Ray.

The function writes its own checkpoints to the run folder and finds the newest complete one itself, so Ray is told
only to start workers and to start them again after a failure.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from collections.abc import Callable
from typing import Any, TypeVar

# Read by Ray when it is imported or started.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import ray
import ray.train
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from cluster.errors import RunError
from cluster.ray_runtime import RayRuntime
from cluster.runtime import Runtime, threads_per_worker

C = TypeVar("C")
OBJECT_STORE_BYTES = 200 * 2**20  # nothing large passes through it


def launch(function: Callable[[Runtime, C], None], config: C, *, workers: int, run_dir: str) -> None:
    """Run `function(runtime, config)` on `workers` Ray Train workers, each with a GPU where the cluster has them.

    Raises:
        RunError: workers could not be started, or one failed. An error of our own packages comes back as raised.
    """
    started = not ray.is_initialized()
    if started:
        _start_ray(workers)
    try:
        with tempfile.TemporaryDirectory(prefix="dicm-ray-") as scratch:
            _fit(function, config, workers, run_dir, scratch)
    finally:
        if started:
            ray.shutdown()


def _fit(function: Callable[[Runtime, C], None], config: C, workers: int, run_dir: str, scratch: str) -> None:
    use_gpu = ray.cluster_resources().get("GPU", 0) >= workers
    trainer = TorchTrainer(
        _worker,
        train_loop_config={
            "function": function,
            "config": config,
            "threads": threads_per_worker(workers),
        },
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=use_gpu),
        # Ray's own bookkeeping; checkpoints and metrics go to the run folder.
        run_config=RunConfig(name="ray", storage_path=scratch, failure_config=FailureConfig(max_failures=0)),
    )
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        for failure in getattr(error, "worker_failures", {}).values():
            if (own := user_error(failure)) is not None:
                raise own from None
        raise RunError(
            f"run={run_dir}: a worker failed ({_last_line(error)}); "
            "run the same command again to go on from the newest checkpoint"
        ) from error


def _worker(options: dict[str, Any]) -> None:
    torch.set_num_threads(options["threads"])
    options["function"](RayRuntime(), options["config"])


def user_error(failure: BaseException | None) -> Exception | None:
    """The error of our own packages in a worker's failure, looked for along causes, or None."""
    seen: set[int] = set()
    while failure is not None and id(failure) not in seen:
        seen.add(id(failure))
        if type(failure).__module__.partition(".")[0] in ("cluster", "data_pipeline", "pretrain", "downstream"):
            return failure if isinstance(failure, Exception) else None
        failure = getattr(failure, "cause", None) or failure.__cause__
    return None


def _start_ray(workers: int) -> None:
    logging.getLogger("ray").setLevel(logging.ERROR)
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    path = os.pathsep.join([*(p for p in sys.path if p), os.environ.get("PYTHONPATH", "")])
    options["runtime_env"] = {"env_vars": {"PYTHONPATH": path}}
    if not os.environ.get("RAY_ADDRESS"):
        options |= {
            "num_cpus": max(workers, os.cpu_count() or 1),
            "include_dashboard": False,
            "object_store_memory": OBJECT_STORE_BYTES,
        }
    try:
        ray.init(**options)
    except (ConnectionError, OSError) as error:
        raise RunError(
            f"RAY_ADDRESS={os.environ.get('RAY_ADDRESS')}: no Ray cluster answers ({str(error).splitlines()[0]}); "
            "start one, or unset RAY_ADDRESS to run on this machine"
        ) from error


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
