"""The training loop: from batches of canvases to checkpoints, metrics and pictures.

    RUN/
      config.yaml                  resolved options
      .lock                        host and process of the driver, while it is at work
      metrics.jsonl, tensorboard/  what was measured, rank 0
      checkpoints/step_NNNNNNNN/   complete or absent
      samples/                     heatmaps with boxes and crops, as seen in training
      quarantine.jsonl             samples that could not be used, if there were any
      summary.json                 written when the run is complete

A step is a pure function of (checkpoint, batch, seed, step, rank): every random draw of a step comes from
generators seeded by these, so a run that is killed and started again repeats the same losses, and no state of a
random generator has to be saved.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.io import encode_png

from cluster.checkpoint import open_checkpoints
from cluster.errors import CheckpointError
from cluster.finite import FiniteCheck, gradient_norm
from cluster.metrics import MetricsLogger, StepMeter, log_recovery
from cluster.runtime import Runtime
from data_pipeline.cache import ShardCache
from data_pipeline.loader import CanvasBatch, CanvasLoader, train_loader
from data_pipeline.manifest import Manifest
from pretrain.codec.backbone import pad_to
from pretrain.codec.coder import Z_STRIDE
from pretrain.codec.feature_codec import FeatureCodec
from pretrain.codec.klt import begin_as_klt, num_images
from pretrain.codec.precision import autocast
from pretrain.config import PretrainConfig, StageConfig
from pretrain.errors import ConfigError
from pretrain.evaluation import measure_knn, write_summary
from pretrain.guided_views import GuidedViews
from pretrain.initialize import begins_compression, checkpoint_activations, create_codec
from pretrain.objectives import Losses
from pretrain.ssl.encoder import Encoder
from pretrain.ssl.methods import create_method
from pretrain.ssl.pictures import guidance_picture
from pretrain.stages import Stage, set_trained_parts, total_steps

CHECKPOINT_VERSION = 2
KLT_BATCH = 64
RATE_WEIGHTS = (1e-9, 1e9)  # what the dual ascent stays within: far beyond weights of use, far within a float32


@dataclass
class Progress:
    """Where a run stands; saved with every checkpoint."""

    stage: int = -1
    step: int = 0  # of the run
    stage_step: int = 0
    stage_samples: int = 0
    samples_seen: int = 0  # position in the order of samples
    rate_weight: float = 0.0


def pretrain(runtime: Runtime, config: PretrainConfig) -> None:
    """What every worker runs: all stages of `config`, from the newest checkpoint of its run folder."""
    trainer = Trainer(runtime, config)
    try:
        trainer.train()
    finally:
        trainer.close()


class Trainer:
    """Runs the stages of `config` on one rank."""

    def __init__(self, runtime: Runtime, config: PretrainConfig):
        self.runtime, self.config, self.device = runtime, config, runtime.device
        self.run = Path(config.run)
        self.manifest = Manifest.load(config.data)
        self.dataset_size = self.manifest.split(config.split).num_samples

        torch.manual_seed(config.seed)
        self.codec: FeatureCodec = create_codec(config)
        encoder = Encoder(self.codec.backbone, self.codec.redundancy)
        self.method = create_method(config.ssl, encoder, distributed=runtime.world > 1)
        memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
        self.codec.to(self.device, memory_format=memory_format)  # type: ignore[call-overload]
        self.method.to(self.device, memory_format=memory_format)  # type: ignore[call-overload]
        if config.activation_checkpointing:
            checkpoint_activations(self.codec)
        self.generator = torch.Generator(self.device)
        self.views = GuidedViews(config, self.method.momentum_encoder, self.generator)

        self.progress = Progress()
        self.stage: Stage | None = None
        self.store = open_checkpoints(config, self.run, on_saved=runtime.report_checkpoint)
        self.optimizer_state = self._restore()
        self.first_step = self.saved_step = self.progress.step
        self.logger = MetricsLogger(self.run, rank=runtime.rank, step=self.progress.step, publish=runtime.publish)
        self.meter = StepMeter(runtime)
        self.finite = FiniteCheck(runtime)
        self.total_steps = total_steps(config, self.dataset_size)

    def train(self) -> None:
        """All stages that are not done yet; ends early, with a checkpoint, when told to stop.

        Raises:
            ConfigError: on every rank, where a loss, a gradient or the state is not finite; what was saved is finite.
        """
        for index in range(max(self.progress.stage, 0), len(self.config.stages)):
            stage = self._enter_stage(index)
            for batch in self._batches(stage):
                self._train_step(stage, batch)
                if self.runtime.should_stop:
                    self._save(stage)
                    self.store.wait()
                    return self.runtime.barrier()  # the first worker that ends may take the others with it
                if self.progress.step % self.config.checkpoint_every == 0:
                    self._save(stage)
            self._save(stage)
            self._evaluate(stage)
        self.store.wait()
        return write_summary(self.runtime, self.config, self.codec, asdict(self.progress))

    def close(self) -> None:
        """Let what is on its way to the disk arrive there; whether it does matters to `train` alone."""
        with suppress(CheckpointError):
            self.store.wait()
        self.logger.close()

    def _batches(self, stage: Stage) -> Any:
        """This rank's batches until the stage has seen all its samples."""
        loader = self._loader(
            stage.config.batch_size,
            rank=self.runtime.rank,
            world=self.runtime.world,
            num_workers=self.config.num_workers,
            samples_seen=self.progress.samples_seen,
        )
        return itertools.takewhile(lambda _: self.progress.stage_samples < stage.num_samples, loader)

    def _loader(self, batch_size: int, **share: int) -> CanvasLoader:
        """Batches of the run's data in its order: whole ones from the beginning, or what `share` says."""
        config = self.config
        return train_loader(
            config.data,
            config.split,
            canvas_size=config.canvas_size,
            batch_size=batch_size,
            seed=config.seed,
            shuffle_shards=config.shuffle_shards,
            num_lanes=config.num_lanes,
            cache=ShardCache.of_size(config.shard_cache, config.shard_cache_limit),
            quarantine=self.run,
            **share,
        )

    def _train_step(self, stage: Stage, batch: CanvasBatch) -> None:
        config, progress = self.config, self.progress
        self.meter.data_arrived()
        self._seed(progress.step)
        learning_rate = stage.set_learning_rate(progress.stage_step)
        losses = self._forward_backward(stage, batch)
        grad_norm = gradient_norm(stage.parameters)
        if stage.config.clip:
            torch.nn.utils.clip_grads_with_norm_(stage.parameters, stage.config.clip, grad_norm)
        self.finite.note(progress.step + 1, losses.total, grad_norm)
        stage.optimizer.step()
        stage.optimizer.zero_grad(set_to_none=True)
        if stage.contrastive:
            self.method.update_momentum(progress.stage_samples / stage.num_samples)
        if stage.config.target_bpp is not None:
            bpp = self.runtime.mean({"bpp": float(losses.parts["bpp"])})["bpp"]
            progress.rate_weight = dual_ascent(
                progress.rate_weight, bpp, stage.config.target_bpp, stage.config.dual_rate
            )

        num_samples = len(batch.label) * self.runtime.world
        progress.step += 1
        progress.stage_step += 1
        progress.stage_samples += num_samples
        progress.samples_seen += num_samples
        self.meter.step_done(num_samples)
        if progress.step == self.first_step + 1:
            log_recovery(self.logger, self.runtime, progress.step)
        done = progress.stage_samples >= stage.num_samples
        if progress.step % config.log_every == 0 or done:
            self._log(stage, losses, grad_norm, learning_rate)
        if stage.contrastive and (progress.stage_step % config.picture_every == 1 or done):
            self._picture(batch)
        if config.knn_every and not done and self._crossed_epochs(config.knn_every, num_samples):
            self._evaluate(stage)

    def _forward_backward(self, stage: Stage, batch: CanvasBatch) -> Losses:
        """Gradients of this rank's batch, in micro-batches where it is to be cut; returns the means of their losses."""
        num_chunks = self.config.num_micro_batches(len(batch.label))
        canvases = batch.canvas.to(self.device, non_blocking=True).tensor_split(num_chunks)
        aspects = batch.aspect.to(self.device, non_blocking=True).tensor_split(num_chunks)
        rate_weight = torch.tensor(self.progress.rate_weight, device=self.device)
        losses: list[Losses] = []
        for canvas, aspect in zip(canvases, aspects, strict=True):
            views = self._views(stage, canvas, aspect)
            last = len(losses) == num_chunks - 1
            with nullcontext() if last or not stage.distributed else stage.objective.no_sync():  # type: ignore[operator]
                with autocast(self.device, self.config.precision):
                    loss = stage.objective(*views, rate_weight)
                (loss.total / num_chunks).backward()
            losses.append(Losses(loss.total.detach(), loss.parts))
        return mean_losses(losses)

    def _views(self, stage: Stage, canvas: Tensor, aspect: Tensor) -> tuple[Tensor, ...]:
        if stage.contrastive:
            return self.views.pair(canvas, aspect, stage.image_size, self._guided)[:2]
        return (self.views.natural(canvas, aspect, stage.image_size),)

    @property
    def _guided(self) -> bool:
        """Crops are guided once the encoder has seen `warmup` epochs of images."""
        heatmap = self.config.ssl.heatmap
        return heatmap.method != "none" and self.progress.samples_seen >= heatmap.warmup * self.dataset_size

    def _seed(self, step: int) -> None:
        state = np.random.SeedSequence((self.config.seed, step, self.runtime.rank)).generate_state(2)
        self.generator.manual_seed(int(state[0]))
        torch.manual_seed(int(state[1]))

    def _enter_stage(self, index: int) -> Stage:
        progress, options = self.progress, self.config.stages[index]
        if progress.stage != index:
            progress.stage, progress.stage_step, progress.stage_samples = index, 0, 0
            progress.rate_weight = options.rate
            self.codec.update()  # a frozen RE rounds around the medians of its trained prior
            if begins_compression(self.config, index):
                self.codec.eval()
                begin_as_klt(self.codec, self._first_features(options))
        stage = Stage(options, self.config, self.codec, self.method, self.runtime, self.dataset_size)
        if self.optimizer_state is not None:
            stage.optimizer.load_state_dict(self.optimizer_state)
            self.optimizer_state = None
        self.meter.restart()
        self.stage = stage
        return stage

    def _first_features(self, options: StageConfig) -> Iterator[Tensor]:
        """f2 of random crops, as many as a KLT needs or as there are images; the same on every rank of any world."""
        size = options.image_size or self.config.image_size
        self.generator.manual_seed(self.config.seed)
        batch_size = min(KLT_BATCH, self.dataset_size)
        num_batches = math.ceil(min(num_images(size), self.dataset_size) / batch_size)
        for batch in itertools.islice(self._loader(batch_size), num_batches):
            views = self.views.natural(batch.canvas.to(self.device), batch.aspect.to(self.device), size)
            yield self.codec.eliminate(self.codec.backbone.head(pad_to(views, Z_STRIDE)))[0]

    def _save(self, stage: Stage) -> None:
        """Hand the state over to be written while training goes on; none that is not finite (ConfigError)."""
        if self.saved_step == self.progress.step:
            return
        if hasattr(stage.optimizer, "consolidate_state_dict"):
            stage.optimizer.consolidate_state_dict()  # OSS: every rank sends its share to rank 0
        state = self._state(stage) if self.runtime.rank == 0 else {}
        self._check_finite(stage)
        if not self.finite.is_finite(state):
            raise self._diverged(stage, f"the state after step {self.progress.step} is not finite")
        if self.runtime.rank == 0:
            self.store.save_soon(self.progress.step, state)
        self.saved_step = self.progress.step
        self.meter.saved()

    def _check_finite(self, stage: Stage) -> None:
        """ConfigError, on every rank, once a step was not finite; called where this waits for nothing more."""
        if (step := self.finite.first_bad()) is not None:
            raise self._diverged(stage, f"the loss or its gradient is not finite at step {step}")

    def _diverged(self, stage: Stage, what: str) -> ConfigError:
        kept = f"the checkpoint of step {self.saved_step} is kept" if self.saved_step else "there is no checkpoint"
        return ConfigError(
            f"run={self.run}: stage {stage.name}: {what}; {kept}; start a new run with a smaller "
            f"stages.{stage.name}.lr than {stage.config.lr:g}"
        )

    def _state(self, stage: Stage) -> dict[str, Any]:
        method = {k: v for k, v in self.method.state_dict().items() if not k.startswith("encoder.")}
        return {
            "version": CHECKPOINT_VERSION,
            "progress": asdict(self.progress),
            "manifest": self.manifest.hash,
            "codec": self.codec.state_dict(),
            "method": method,
            "optimizer": stage.optimizer.state_dict(),
        }

    def _restore(self) -> dict[str, Any] | None:
        """Load the newest complete checkpoint that all ranks see; returns the optimizer's state."""
        step = self.runtime.broadcast(self.store.newest() if self.runtime.rank == 0 else None)
        if step is None:
            return None
        state = self.store.load(step)
        if state.get("version") != CHECKPOINT_VERSION:
            raise CheckpointError(
                f"{self.store.where}: step {step} has version {state.get('version')}, this dicm reads "
                f"{CHECKPOINT_VERSION}; use another run folder"
            )
        if state["manifest"] != self.manifest.hash:
            raise CheckpointError(
                f"{self.run}: its checkpoints were trained on another data set than {self.config.data}; "
                "use another run folder"
            )
        self.progress = Progress(**state["progress"])
        self.codec.load_state_dict(state["codec"])
        self.method.load_state_dict(state["method"], strict=False)
        return state["optimizer"]

    def _evaluate(self, stage: Stage) -> None:
        row = measure_knn(self.runtime, self.config, self.codec, self.manifest, stage.config)
        if row:
            self.logger.log(self.progress.step, {"stage": stage.name, **row})
            if self.config.keep_best and "knn" in row:
                self._save(stage)
                if self.runtime.rank == 0:
                    self.store.note_score(self.progress.step, row["knn"])
        set_trained_parts(stage.config, self.codec, self.method)
        self.meter.restart()

    def _crossed_epochs(self, epochs: float, num_samples: int) -> bool:
        interval = epochs * self.dataset_size
        return self.progress.samples_seen // interval > (self.progress.samples_seen - num_samples) // interval

    def _log(self, stage: Stage, losses: Losses, grad_norm: Tensor, learning_rate: float) -> None:
        names = ["loss", *losses.parts]
        values = torch.stack([losses.total, *losses.parts.values()]).float().tolist()
        row = self.runtime.mean(dict(zip(names, values, strict=True)))
        row["grad_norm"] = float(grad_norm)
        self.logger.log(
            self.progress.step,
            {
                "total_steps": self.total_steps,
                "stage": stage.name,
                "samples_seen": self.progress.samples_seen,
                "epoch": self.progress.stage_samples / self.dataset_size,
                **row,
                "lr": learning_rate,
                "rate_weight": self.progress.rate_weight,
                **self.meter.rates(),
            },
        )
        self._check_finite(stage)

    def _picture(self, batch: CanvasBatch) -> None:
        """Heatmap, box and crops of the first images of a batch, as a PNG and in TensorBoard."""
        if self.runtime.rank != 0 or self.config.ssl.heatmap.method == "none":
            return
        canvas, aspect = batch.canvas[:6].to(self.device), batch.aspect[:6].to(self.device)
        guidance = self.views.guidance(canvas)
        *_, crops = self.views.pair(canvas, aspect, self.config.image_size, self._guided)
        boxes = guidance.boxes
        area = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).mean()
        picture = guidance_picture(canvas.cpu(), guidance.heat.float().cpu(), boxes.cpu(), crops.cpu())
        self.logger.log(self.progress.step, {"box_area": float(area)})
        self.logger.image("guidance", self.progress.step, picture)
        path = self.run / "samples" / f"guidance_{self.progress.step:08d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        # By Python: torchvision's own writer does not say why a storage refuses.
        path.write_bytes(encode_png(picture).numpy().tobytes())


def mean_losses(losses: list[Losses]) -> Losses:
    """Mean of the micro-batches' losses, name by name."""
    total = torch.stack([loss.total for loss in losses]).mean()
    return Losses(total, {name: torch.stack([loss.parts[name] for loss in losses]).mean() for name in losses[0].parts})


def dual_ascent(rate_weight: float, bpp: float, target_bpp: float, dual_rate: float) -> float:
    """The next rate weight: above this one while the measured rate `bpp` is above `target_bpp`, below it under it.

    Gradient ascent on the Lagrange multiplier's logarithm, so the weight stays positive and one step size serves
    weights of any magnitude. It stays within `RATE_WEIGHTS`, and as it is after a rate that is not a number.
    """
    if math.isnan(bpp):
        return rate_weight
    excess = math.log(max(bpp, 1e-9) / target_bpp)
    weight = rate_weight * math.exp(dual_rate * min(max(excess, -1.0), 1.0))
    return min(max(weight, RATE_WEIGHTS[0]), RATE_WEIGHTS[1])
