"""Fine-tuning a task on the frozen codec: workers, checkpoints, logging, and evaluation on real streams.

    RUN/
      config.yaml  metrics.jsonl  tensorboard/  checkpoints/
      quarantine.jsonl  samples that could not be used, if there were any
      results.json      the metric and the rate on the validation split; written when the run is complete

As in pretraining, every random draw of a step is seeded by (seed, step, rank), so a killed run goes on as if
nothing had been.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.scheduler import CosineLRScheduler
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import update_bn

from cluster import runtime as launcher
from cluster.checkpoint import CheckpointStore
from cluster.metrics import MetricsLogger, ProgressFollower
from cluster.recipes import config_diff, load_config, load_saved, save_config
from cluster.runtime import Runtime
from data_pipeline.cache import ShardCache
from data_pipeline.loader import CanvasBatch, eval_loader, train_loader
from data_pipeline.shards import Manifest, ShardReader
from data_pipeline.views import ViewConfig, center_images, random_crops, resample
from downstream.config import FinetuneConfig
from downstream.errors import TaskError
from downstream.evaluation.anchors import Anchor
from downstream.frozen import FrozenCodec, PixelInput
from downstream.tasks.classification import Classifier, count_correct
from pretrain.codec.feature_codec import FeatureCodec

RECIPES = Path(__file__).parent / "recipes"
RESULTS = "results.json"
EVALUATION_BATCH = 64
STATISTICS_SAMPLES = 2048  # training images that give the final statistics of batch norms
PROBE_STEPS, PROBE_LR = 300, 0.01
FREE_KEYS = {
    "run",
    "workers",
    "launcher",
    "num_workers",
    "cache",
    "cache_limit",
    "log_every",
    "checkpoint_every",
    "keep_checkpoints",
}


def resolve(task: str, overrides: list[str]) -> FinetuneConfig:
    """The options of `dicm finetune TASK key=value ...`, checked (RecipeError, TaskError)."""
    return load_config(FinetuneConfig, task, overrides, RECIPES)


def run(config: FinetuneConfig) -> dict[str, Any]:
    """Fine-tune, or go on with the run in `config.run`; returns its results.

    Raises:
        TaskError, DataError, CodecError: the data set lacks what the task needs; data or codec are unusable.
    """
    folder = Path(config.run)
    codec = FeatureCodec.from_pretrained(config.codec)
    config.image_size = config.image_size or codec.extra.get("image_size", 224)
    config.canvas_size = config.canvas_size or codec.extra.get("canvas_size", config.image_size)
    num_samples = check_data(config)
    check_earlier_run(config, folder)
    if not (folder / RESULTS).is_file():
        folder.mkdir(parents=True, exist_ok=True)
        save_config(config, folder / "config.yaml")
        with ProgressFollower(folder, num_steps(config, num_samples)):
            launcher.run(finetune, config, workers=config.workers, launcher=config.launcher, run_dir=config.run)
    if not (folder / RESULTS).is_file():
        raise TaskError(f"run={folder} was stopped; it has a checkpoint, the same command continues")
    return json.loads((folder / RESULTS).read_text())


def check_data(config: FinetuneConfig) -> int:
    """Number of training samples; TaskError where the data set lacks what classification needs."""
    manifest = Manifest.load(config.data)
    for split in ("train", "val"):
        if split not in manifest.splits:
            raise TaskError(
                f"{config.data} has no {split} split, it has {', '.join(manifest.splits)}; "
                "build it with `dicm data build imagefolder SRC OUT --val-fraction 0.1`"
            )
        if manifest.split(split).num_samples == 0:
            raise TaskError(f"{config.data}: its {split} split is empty; build the data set again with more images")
    reader = ShardReader(config.data, manifest.split("train"), cache_of(config))
    first = json.loads(reader.read(0).get("json") or b"{}")
    if not manifest.classes or first.get("label") is None:
        raise TaskError(f"{config.data} has no labels; classification needs class folders in the source")
    num_samples = manifest.split("train").num_samples
    if not config.workers * 2 <= config.batch_size <= num_samples:
        raise TaskError(
            f"batch_size={config.batch_size} must lie in {config.workers * 2}..{num_samples} for {config.workers} "
            f"worker(s) and the {num_samples} training samples of {config.data}"
        )
    return num_samples


def cache_of(config: FinetuneConfig) -> ShardCache:
    """The cache of the data set's shards, where it is at a URL."""
    return ShardCache.of_size(config.cache, config.cache_limit)


def check_earlier_run(config: FinetuneConfig, folder: Path) -> None:
    """Refuse to continue a run under other options (TaskError with the difference)."""
    path = folder / "config.yaml"
    if folder.is_file():
        raise TaskError(f"run={folder} is a file; name a folder")
    if not path.is_file():
        return
    differences = [item for item in config_diff(load_saved(FinetuneConfig, path), config) if item.key not in FREE_KEYS]
    if differences:
        shown = "; ".join(f"{item.key}: {item.before} there, {item.after} here" for item in differences[:3])
        raise TaskError(f"run={folder} holds a run with other options ({shown}); use another run folder")


def num_steps(config: FinetuneConfig, num_samples: int) -> int:
    """Optimizer steps of a whole run."""
    return PROBE_STEPS if config.probe else config.epochs * (num_samples // config.batch_size)


def finetune(runtime: Runtime, config: FinetuneConfig) -> None:
    """What every worker runs."""
    Finetuner(runtime, config).train()


class Finetuner:
    """One rank of a fine-tune."""

    def __init__(self, runtime: Runtime, config: FinetuneConfig):
        assert config.image_size is not None
        assert config.canvas_size is not None
        self.runtime, self.config, self.device = runtime, config, runtime.device
        self.image_size, self.canvas_size = config.image_size, config.canvas_size
        self.manifest = Manifest.load(config.data)
        codec = FeatureCodec.from_pretrained(config.codec)
        torch.manual_seed(config.seed)
        self.model = Classifier(codec.backbone, len(self.manifest.classes), config.probe).to(
            self.device, memory_format=torch.channels_last
        )  # type: ignore[call-overload]
        anchor = Anchor.parse(config.anchor) if config.anchor else None
        self.input: FrozenCodec | PixelInput
        if config.input == "streams":
            self.input = FrozenCodec(codec, self.device, config.rate)
        else:
            self.input = PixelInput(codec, anchor, self.device)
        self.num_steps = num_steps(config, self.manifest.split("train").num_samples)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.SGD(
            trained, lr=config.lr, momentum=0.9, weight_decay=config.weight_decay, nesterov=True
        )
        self.scheduler = CosineLRScheduler(
            self.optimizer,
            t_initial=self.num_steps,
            warmup_t=round(config.warmup * self.num_steps),
            warmup_lr_init=config.lr * 1e-2,
            warmup_prefix=True,
            t_in_epochs=False,
        )
        self.step = 0
        self.store = CheckpointStore(Path(config.run) / "checkpoints", keep=config.keep_checkpoints)
        self._restore()
        self.logger = MetricsLogger(config.run, rank=runtime.rank, step=self.step)
        self.started = time.perf_counter()

    def train(self) -> None:
        """Train, evaluate on real streams, write the results."""
        try:
            if self.config.probe:
                self._train_probe()
            elif self._train_network():
                self._settle_statistics()
            else:
                return
            self._save()
            self._write_results(self.evaluate())
        finally:
            self.logger.close()

    def _train_network(self) -> bool:
        """Train tail and head; False where the run was told to stop."""
        config, runtime = self.config, self.runtime
        module = DistributedDataParallel(self.model) if runtime.world > 1 else self.model
        loader = train_loader(
            config.data,
            canvas_size=self.canvas_size,
            batch_size=config.batch_size,
            rank=runtime.rank,
            world=runtime.world,
            num_workers=config.num_workers,
            seed=config.seed,
            samples_seen=self.step * (config.batch_size // runtime.world) * runtime.world,
            cache=cache_of(config),
            quarantine=config.run,
        )
        generator = torch.Generator(self.device)
        self.model.train()
        start, images = time.perf_counter(), 0
        for batch in itertools.islice(loader, self.num_steps - self.step):
            self._seed(generator)
            self.scheduler.step_update(self.step)
            views = self._views(batch, generator)
            labels = self._labels(batch)
            with self._autocast():
                features = self.input.features(views)
                logits = module(features)
                loss = self.model.loss(logits, labels, config.label_smoothing)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.step += 1
            images += len(labels) * runtime.world
            if self.step % config.log_every == 0 or self.step == self.num_steps:
                accuracy = count_correct(logits.detach(), labels)[0] / len(labels)
                row = runtime.mean({"loss": float(loss.detach()), "train_top1": float(accuracy)})
                rate = images / (time.perf_counter() - start)
                self._log({**row, "images_per_second": rate, "lr": self.optimizer.param_groups[0]["lr"]})
                start, images = time.perf_counter(), 0
            if runtime.should_stop:
                self._save()
                return False
            if self.step % config.checkpoint_every == 0:
                self._save()
        return True

    def _settle_statistics(self) -> None:
        """Take batch-norm statistics anew, over training images as they are evaluated, averaged over ranks.

        The tail comes with statistics of other features and weights; running means of a short run still hold them.
        """
        config, runtime = self.config, self.runtime
        samples = min(STATISTICS_SAMPLES, self.manifest.split("train").num_samples)
        loader = train_loader(
            config.data,
            canvas_size=self.canvas_size,
            batch_size=config.batch_size,
            rank=runtime.rank,
            world=runtime.world,
            seed=config.seed,
            cache=cache_of(config),
            quarantine=config.run,
        )
        batches = itertools.islice(loader, samples // config.batch_size)
        with self._autocast():
            features = (self.input.features(center_images(b.canvas, b.aspect, self.image_size)) for b in batches)
            update_bn(features, self.model)
        for buffer in self.model.buffers():
            if buffer.is_floating_point():
                buffer.copy_(runtime.gather(buffer[None]).mean(dim=0))

    def _views(self, batch: CanvasBatch, generator: torch.Generator) -> Tensor:
        """Random crops, half of them mirrored, (N, 3, S, S) uint8: what a camera would have sent."""
        canvas, aspect = batch.canvas.to(self.device), batch.aspect.to(self.device)
        crops = random_crops(aspect, ViewConfig(scale_min=self.config.scale_min), generator)
        flip = torch.rand(len(canvas), generator=generator, device=self.device) < 0.5
        return resample(canvas, crops, self.image_size, flip).mul_(255).round_().to(torch.uint8)

    def _labels(self, batch: CanvasBatch) -> Tensor:
        """Labels (N,) on the device; TaskError where an image has none, which would be learned as a class."""
        if bool((batch.label < 0).any()):
            index = int(batch.index[batch.label < 0][0])
            raise TaskError(f"{self.config.data}: image {index} has no label; build the data set again without it")
        return batch.label.to(self.device)

    def _train_probe(self) -> None:
        """Train the head on pooled features of the training images, embedded once, full batch, by Adam."""
        self.model.eval()
        if self.step == self.num_steps:
            return
        features, labels = self._embed("train")
        self.model.norm.train()
        self.model.norm.momentum = None  # one pass gives the exact statistics
        self.model.norm(features)
        self.model.norm.eval()
        inputs = self.model.norm(features)
        optimizer = torch.optim.Adam(self.model.head.parameters(), lr=PROBE_LR, weight_decay=1e-4)
        for step in range(1, PROBE_STEPS + 1):
            loss = self.model.loss(self.model.head(inputs), labels, 0.0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            self.step = step
            if step % 50 == 0:
                self._log({"loss": float(loss.detach())})

    @torch.no_grad()
    def _embed(self, split: str) -> tuple[Tensor, Tensor]:
        """Pooled features and labels of a split, of all ranks."""
        features, labels = [], []
        num_samples = self.manifest.split(split).num_samples
        for batch in self._evaluation_batches(split, num_samples - num_samples % self.runtime.world):
            with self._autocast():
                f3 = self.input.features(center_images(batch.canvas, batch.aspect, self.image_size))
                features.append(self.model.pooled(f3).float())
            labels.append(self._labels(batch))
        return self.runtime.gather(torch.cat(features)), self.runtime.gather(torch.cat(labels))

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Accuracies and rates over the validation split, from real streams, on every rank."""
        self.model.eval()
        sums = torch.zeros(5, dtype=torch.float64)
        for batch in self._evaluation_batches("val", None):
            images = center_images(batch.canvas, batch.aspect, self.image_size)
            f3, sizes, payloads = self.input.through_streams(images)
            with self._autocast():
                logits = self.model(f3)
            correct = count_correct(logits, self._labels(batch)).cpu()
            sums += torch.tensor([*correct, sizes.sum(), payloads.sum(), len(images)], dtype=torch.float64)
        total = self.runtime.gather(sums[None].to(self.device)).sum(0).tolist()
        top1, top5, num_bytes, num_payload, count = total
        pixels = count * self.image_size**2
        return {
            "top1": top1 / count,
            "top5": top5 / count,
            "bpp": 8 * num_bytes / pixels,
            "bpp_payload": 8 * num_payload / pixels,
            "images": int(count),
        }

    def _evaluation_batches(self, split: str, limit: int | None) -> Any:
        return eval_loader(
            self.config.data,
            split,
            canvas_size=self.canvas_size,
            batch_size=EVALUATION_BATCH,
            rank=self.runtime.rank,
            world=self.runtime.world,
            limit=limit,
            cache=cache_of(self.config),
            quarantine=self.config.run,
        )

    def _write_results(self, measured: dict[str, float]) -> None:
        if self.runtime.rank == 0:
            facts = {
                key: value
                for key, value in asdict(self.config).items()
                if key in ("task", "codec", "data", "input", "rate")
            }
            results = {
                **facts,
                "anchor": self.config.anchor,
                "probe": self.config.probe,
                "image_size": self.image_size,
                "classes": list(self.manifest.classes),
                **measured,
                "seconds": round(time.perf_counter() - self.started, 1),
            }
            write_results(Path(self.config.run), results)
        self.runtime.barrier()

    def _log(self, row: dict[str, Any]) -> None:
        name = "probe" if self.config.probe else "finetune"
        self.logger.log(self.step, {"total_steps": self.num_steps, "stage": name, **row})

    def _save(self) -> None:
        if self.runtime.rank == 0:
            state = {"step": self.step, "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
            self.store.save(self.step, state)
        self.runtime.barrier()

    def _restore(self) -> None:
        step = self.runtime.broadcast(self.store.newest() if self.runtime.rank == 0 else None)
        if step is not None:
            state = self.store.load(step)
            self.step = state["step"]
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])

    def _seed(self, generator: torch.Generator) -> None:
        state = np.random.SeedSequence((self.config.seed, self.step, self.runtime.rank)).generate_state(2)
        generator.manual_seed(int(state[0]))
        torch.manual_seed(int(state[1]))

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")


def write_results(folder: Path, results: dict[str, Any]) -> None:
    """Write RUN/results.json, whole or not at all."""
    temporary = folder / f".{RESULTS}.{os.getpid()}"
    temporary.write_text(json.dumps(results, indent=2) + "\n")
    os.replace(temporary, folder / RESULTS)


def evaluate_run(folder: Path) -> dict[str, Any]:
    """Evaluate a complete run again, in this process, and rewrite its results.

    Raises:
        TaskError: not a run folder, or a run that is not complete: its results would pass for the final ones.
    """
    if not (folder / "config.yaml").is_file():
        raise TaskError(f"{folder}: not a run folder (no config.yaml); name one that `dicm finetune` wrote")
    config = load_saved(FinetuneConfig, folder / "config.yaml")
    done, total = CheckpointStore(folder / "checkpoints").newest() or 0, num_steps(config, check_data(config))
    if done < total or not (folder / RESULTS).is_file():
        raise TaskError(
            f"{folder}: the run is not complete (step {done} of {total}); "
            f"`dicm finetune {config.task} ... run={folder}` goes on with it"
        )
    config.run = str(folder)
    tuner = Finetuner(launcher.LocalRuntime(), config)
    try:
        results = {**json.loads((folder / RESULTS).read_text()), **tuner.evaluate()}
    finally:
        tuner.logger.close()
    write_results(folder, results)
    return results
