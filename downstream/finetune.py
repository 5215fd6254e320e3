"""Fine-tuning a task on the frozen codec: workers, checkpoints, logging, and evaluation on real streams.

    RUN/
      config.yaml  metrics.jsonl  tensorboard/  checkpoints/
      inputs.json       what codec, data and files were, by content
      teacher.pt        semantic_segmentation: the network on raw images that it trained first
      streams/          cache=bitstreams: the training set, encoded
      quarantine.jsonl  samples that could not be used, if there were any
      results.json      metrics and rate on the validation split; written when the run is complete

What differs from task to task is in `downstream/tasks`. As in pretraining, every random draw of a step is seeded by
(seed, step, rank), so a killed run goes on as if nothing had been.
"""

from __future__ import annotations

import itertools
import time
from contextlib import nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cluster import runtime as launcher
from cluster.checkpoint import open_checkpoints
from cluster.errors import CheckpointError
from cluster.finite import FiniteCheck, gradient_norm
from cluster.metrics import MetricsLogger, ProgressFollower, StepMeter, log_recovery
from cluster.recipes import load_config, read_recipe, save_config
from cluster.run_folder import check_folder, held_run, how_it_stopped
from cluster.runtime import Runtime
from data_pipeline.manifest import Manifest
from downstream.batches import split_batch
from downstream.config import FinetuneConfig
from downstream.errors import StoppedError, TaskError
from downstream.inputs import check_inputs, inputs_of, write_inputs
from downstream.results import RESULTS, read_results, write_results
from downstream.runs import RECIPES, check_earlier_run, check_init, load_run, trained_weights
from downstream.stream_cache import build_streams, prepare_folder
from downstream.tasks import task_class
from downstream.tasks.task import Found, average_buffers
from pretrain.codec.pretrained import keep

ENCODING_LOG_SECONDS = 15.0
FACTS = (
    "task", "codec", "data", "val_split", "input", "anchor", "rate", "classes", "probe", "image_size", "latents",
    "gate", "transform", "train_head",
)  # fmt: skip


def resolve(recipe: str, overrides: list[str]) -> FinetuneConfig:
    """The options of `dicm finetune RECIPE key=value ...`, checked (RecipeError, TaskError).

    Args:
        recipe: a task's name, or a YAML file with `task: NAME` in it.
    """
    name = str(read_recipe(recipe, RECIPES).get("task"))
    config = load_config(task_class(name).Config, recipe, overrides, RECIPES)
    if config.task != name:
        raise TaskError(f"task={config.task} contradicts the recipe of {name}; run `dicm finetune {config.task} ...`")
    return config


def run(config: FinetuneConfig) -> dict[str, Any]:
    """Fine-tune, or go on with the run in `config.run`; returns its results.

    Raises:
        TaskError, DataError, CodecError: the data set lacks what the task needs; data or codec are unusable.
        StoppedError: the run was told to stop.
        RunError: the run folder is in use or cannot be made; a worker failed.
    """
    folder, task = Path(config.run), task_class(config.task)
    check_folder(folder)
    keep(config.codec, folder)
    codec, manifest = task.load_codec(config), Manifest.load(config.data)
    task.fill_in(config, codec, manifest)
    inputs = inputs_of(config, codec, manifest)
    check_earlier_run(config, folder, inputs)
    if (folder / RESULTS).is_file():
        return read_results(folder)
    task.check_codec(config, codec)
    check_init(config)
    found = task.check_data(config, manifest)
    with held_run(folder):
        prepare_folder(config, inputs)
        save_config(config, folder / "config.yaml")
        write_inputs(folder, inputs)
        with ProgressFollower(folder, sum(config.stages(found.num_samples).values())):
            launcher.run(
                finetune,
                Job(config, found),
                workers=config.workers,
                launcher=config.launcher,
                run_dir=config.run,
                cluster=config.cluster,
            )
    if not (folder / RESULTS).is_file():
        raise StoppedError(how_it_stopped(config, folder))
    return read_results(folder)


class Job(NamedTuple):
    """What a worker is told: a run's options, and what its data set holds."""

    config: FinetuneConfig
    found: Found


def finetune(runtime: Runtime, job: Job) -> None:
    """What every worker runs."""
    Finetuner(runtime, *job).train()


class Stage(NamedTuple):
    """A part of a run, from step `start` up to step `end`."""

    name: str
    start: int
    end: int


def stages_of(steps: dict[str, int]) -> list[Stage]:
    """Stages one after the other, of so many steps each."""
    ends = list(itertools.accumulate(steps.values()))
    return [Stage(name, end - count, end) for (name, count), end in zip(steps.items(), ends, strict=True)]


class Finetuner:
    """One rank of a fine-tune; `enter` the last stage to evaluate what was trained.

    Args:
        found: what `check_data` says of the data set.
    """

    def __init__(self, runtime: Runtime, config: FinetuneConfig, found: Found):
        self.runtime, self.config, self.device = runtime, config, runtime.device
        kind = task_class(config.task)
        self.task = kind(config, kind.load_codec(config), runtime, found)
        self.left_out = found.left_out
        self.stages = stages_of(config.stages(found.num_samples))
        self.num_steps = self.stages[-1].end
        self.store = open_checkpoints(config, config.run, on_saved=runtime.report_checkpoint)
        newest = runtime.broadcast(self.store.newest() if runtime.rank == 0 else None)
        self.step: int = newest or 0
        self.meter, self.first_step = StepMeter(runtime), self.step
        self.finite = FiniteCheck(runtime)
        self.started = time.perf_counter()

    @property
    def model(self) -> nn.Module:
        """What is trained now."""
        return self.task.model

    def train(self) -> None:
        """Train every stage that is left, evaluate on real streams, write the results."""
        self.logger = MetricsLogger(
            self.config.run, rank=self.runtime.rank, step=self.step, publish=self.runtime.publish
        )
        try:
            if self.config.cache == "bitstreams" and self.step < self.num_steps and not self._encode_once():
                return
            for stage in self.stages:
                # The last one is entered even when it is done: its network is evaluated.
                if self.step >= stage.end and stage is not self.stages[-1]:
                    continue
                self.enter(stage)
                if not self._train_network(stage):
                    return
            if self.num_steps == 0:  # what was not trained is kept all the same: results are of a network at hand
                self._save()
            self.store.wait()
            self._write_results(self.task.evaluate())
        finally:
            with suppress(CheckpointError):  # `wait` above raises what matters
                self.store.wait()
            self.logger.close()

    def enter(self, stage: Stage) -> None:
        """Make a stage's network, optimizer and schedule, as the newest checkpoint left them."""
        self.task.enter(stage.name)
        self.optimizer = self.task.optimizer()
        self.scheduler = None
        if steps := stage.end - stage.start:  # none with epochs=0
            self.scheduler = self.task.scheduler(self.optimizer, steps)
        self.samples_seen = 0  # of this stage
        if self.step > stage.start:
            state = self.store.load(self.step)
            # Runs of before workers could change in number had one global batch.
            self.samples_seen = state.get("samples_seen", (self.step - stage.start) * self.config.batch_size)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
        elif self.config.init is not None and stage is self.stages[-1]:
            self.task.start_from(trained_weights(Path(self.config.init)))

    def _encode_once(self) -> bool:
        """Fill the cache of streams; a line of metrics every few seconds. False where the run was told to stop."""
        start, last = time.perf_counter(), 0.0

        def log(done: int, total: int) -> None:
            nonlocal last
            if (seconds := time.perf_counter() - start) > last + ENCODING_LOG_SECONDS:
                last = seconds
                self.logger.log(self.step, {"stage": "streams", "parts": done, "of_parts": total})

        if not build_streams(self.task, log):
            return False
        self.logger.log(self.step, {"stage": "streams", "encoding_seconds": round(time.perf_counter() - start, 2)})
        return True

    def _train_network(self, stage: Stage) -> bool:
        """Train what a stage trains; False where the run was told to stop."""
        config, runtime = self.config, self.runtime
        if self.step >= stage.end:
            return True
        if self.step == stage.start and (self.config.init is None or stage is not self.stages[-1]):
            self.task.begin()
        module = DistributedDataParallel(self.model) if runtime.world > 1 else self.model
        global_batch = config.batch_size // runtime.world * runtime.world
        batches = self.task.batches(self.samples_seen)
        generator = torch.Generator(self.device)
        self.model.train()
        self.meter.restart()
        for batch in itertools.islice(batches, stage.end - self.step):
            self.meter.data_arrived()
            self._seed(generator)
            if self.scheduler is not None:
                self.scheduler.step_update(self.step - stage.start)
            row = self._forward_backward(module, batch, generator)
            self.finite.note(self.step + 1, row["loss"], gradient_norm(self.model.parameters()))
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.step += 1
            self.samples_seen += global_batch
            self.meter.step_done(global_batch)
            if self.step == self.first_step + 1:
                log_recovery(self.logger, runtime, self.step)
            if self.step % config.log_every == 0 or self.step == stage.end:
                row = runtime.mean({name: float(value) for name, value in row.items()})
                self._log({**row, "lr": self.optimizer.param_groups[0]["lr"], **self.meter.rates()})
                self._check_finite()
            if self.step == stage.end:  # `finish` comes before the checkpoint that says that the stage is done
                break
            if runtime.should_stop:
                self._save()
                self.store.wait()
                runtime.barrier()  # the first worker that ends may take the others with it
                return False
            if self.step % config.checkpoint_every == 0:
                self._save()
        average_buffers(self.model, runtime)
        self.task.finish()
        self._save()
        return True

    def _forward_backward(self, module: nn.Module, batch: Any, generator: torch.Generator) -> dict[str, Any]:
        """Gradients of this rank's batch, in micro-batches where it is to be cut; the loss and what there is to log."""
        parts = split_batch(batch, self.config.micro_batch, self.config.least_images)
        share = sum(count for _, count in parts)
        row: dict[str, Any] = {}
        for number, (part, count) in enumerate(parts):
            waits = number < len(parts) - 1 and isinstance(module, DistributedDataParallel)
            with module.no_sync() if waits else nullcontext():  # type: ignore[operator]
                with self.task.autocast():
                    loss, figures = self.task.loss(module, part, generator)
                (loss * (count / share)).backward()
            for name, value in {"loss": loss.detach(), **figures}.items():
                row[name] = row.get(name, 0.0) + value * (count / share)
        return row

    def _check_finite(self) -> None:
        """TaskError, on every rank, once a step was not finite; called where this waits for nothing more."""
        if (step := self.finite.first_bad()) is not None:
            raise self._diverged(f"the loss or its gradient is not finite at step {step}")

    def _diverged(self, what: str) -> TaskError:
        return TaskError(
            f"run={self.config.run}: stage {self.task.stage}: {what}; checkpoints that were saved before are kept; "
            f"start a new run with a smaller lr than {self.config.lr:g}"
        )

    def _write_results(self, measured: dict[str, Any]) -> None:
        if self.runtime.rank == 0:
            options = asdict(self.config)
            results = {
                **{key: options[key] for key in FACTS if key in options},
                "metrics": self.task.metrics,
                "numbers": self.task.numbers,
                "left_out": self.left_out,
                **measured,
                "seconds": round(time.perf_counter() - self.started, 1),
            }
            write_results(Path(self.config.run), results)
        self.runtime.barrier()

    def _log(self, row: dict[str, Any]) -> None:
        self.logger.log(self.step, {"total_steps": self.num_steps, "stage": self.task.stage, **row})

    def _save(self) -> None:
        """Hand the state over to be written while training goes on; none that is not finite (TaskError)."""
        state = {
            "step": self.step,
            "samples_seen": self.samples_seen,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        self._check_finite()
        if not self.finite.is_finite(state):
            raise self._diverged(f"the state after step {self.step} is not finite")
        if self.runtime.rank == 0:
            self.store.save_soon(self.step, state)
        self.meter.saved()

    def _seed(self, generator: torch.Generator) -> None:
        state = np.random.SeedSequence((self.config.seed, self.step, self.runtime.rank)).generate_state(2)
        generator.manual_seed(int(state[0]))
        torch.manual_seed(int(state[1]))


def evaluate_run(folder: Path) -> dict[str, Any]:
    """Evaluate a complete run again, in this process, and rewrite its results.

    Raises:
        TaskError: not a run folder, or a run that is not complete: its results would pass for the final ones.
    """
    tuner = open_run(folder)  # first: it says what a folder lacks
    results = {**read_results(folder), **tuner.task.evaluate()}
    write_results(folder, results)
    return results


def create_tuner(config: FinetuneConfig) -> Finetuner:
    """The tuner of a run of one process, its options filled in and its data looked at."""
    task = task_class(config.task)
    manifest = Manifest.load(config.data)
    task.fill_in(config, task.load_codec(config), manifest)
    return Finetuner(launcher.alone(), config, task.check_data(config, manifest))


def open_run(folder: Path) -> Finetuner:
    """A complete run with its data and trained network, in this process.

    Raises:
        TaskError: not a run folder, or a run that is not complete.
    """
    config = load_run(folder)
    task, manifest = task_class(config.task), Manifest.load(config.data)
    check_inputs(folder, inputs_of(config, task.load_codec(config), manifest))
    found = task.check_data(config, manifest)
    done = open_checkpoints(config, folder).newest() or 0
    total = sum(config.stages(found.num_samples).values())
    if done < total or not (folder / RESULTS).is_file():
        raise TaskError(
            f"{folder}: the run is not complete (step {done} of {total}); "
            f"`dicm finetune {config.task} ... run={folder}` goes on with it"
        )
    tuner = Finetuner(launcher.alone(), config, found)
    tuner.enter(tuner.stages[-1])
    return tuner
