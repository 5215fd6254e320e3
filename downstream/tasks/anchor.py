"""Training an anchor: a model of CompressAI's on pixels, for comparison on the user's own data.

Not a vision task, but trained, resumed and launched as one. Loss: lmbda * 255^2 * MSE + bits per pixel, CompressAI's,
with the weights that its zoo was trained with at each quality. The quantiles of factorized priors are solved from the
priors when training ends, so there is no second optimizer.

    RUN.safetensors     weights and coder tables, for `anchor_weights`; beside the run folder RUN
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from compressai.entropy_models import EntropyBottleneck
from compressai.losses import RateDistortionLoss
from compressai.models.vbr import ScaleHyperpriorVbr
from safetensors.torch import save
from torch import Tensor, nn

from data_pipeline.loader import CanvasBatch, eval_loader, train_loader
from data_pipeline.manifest import Manifest
from data_pipeline.views import ViewConfig, center_images, random_crops, resample
from downstream.compressai_latents import create_latents
from downstream.compressai_models import LAMBDAS, MODELS, level_of, most_quality, new_model
from downstream.config import FinetuneConfig, need_batches, need_splits
from downstream.errors import TaskError
from downstream.files import write_file
from downstream.frozen import RateMeter
from downstream.tasks.task import Found, Task, shard_cache_of
from pretrain.codec.entropy import solve_quantiles
from pretrain.codec.feature_codec import FeatureCodec

EVALUATION_BATCH, EVALUATION_IMAGES = 16, 64
REMEDY = "build it with `dicm data build imagefolder SRC OUT --val-fraction 0.1`"
NO_TASK = "an anchor is a codec of pixels and predicts nothing; use it with `dicm evaluate ... anchors=NAME:QUALITY`"


@dataclass
class AnchorConfig(FinetuneConfig):
    """Options of the training of an anchor."""

    task: str = "anchor"
    codec: str | None = None
    input: str = "pixels"
    model: str = "bmshj2018-hyperprior"  # of CompressAI's
    quality: int = 3  # 1..8: width and lmbda are the zoo's; of a -vbr model the one rate that is trained
    lmbda: float | None = None  # in place of the quality's
    image_size: int = 256  # pixels of training crops
    canvas_size: int | None = None  # pixels of the square that images are decoded to; that of crops if not given
    scale_min: float = 0.4  # least area of a training crop over that of the image
    epochs: int = 100
    batch_size: int = 16
    optimizer: str = "adam"
    lr: float = 1e-4
    weight_decay: float = 0.0
    precision: str = "fp32"

    def validate(self) -> None:
        """As `FinetuneConfig.validate`."""
        super().validate()
        if self.model not in MODELS:
            raise TaskError(f"model={self.model} is unknown; use one of {', '.join(MODELS)}")
        if not 1 <= self.quality <= (most := most_quality(self.model)):
            raise TaskError(f"quality={self.quality} is impossible; {self.model} has 1..{most}")
        if self.lmbda is not None and self.lmbda <= 0:
            raise TaskError(f"lmbda={self.lmbda:g} is impossible; it must be positive")
        if self.image_size < 64 or self.image_size % 64:
            raise TaskError(f"image_size={self.image_size} is impossible; models take multiples of 64")
        if self.cache != "none" or self.anchor is not None or self.input != "pixels":
            raise TaskError("an anchor is trained on pixels as they are; leave input, anchor and cache out")
        self.within(0.01, 1.0, "scale_min")

    def needs_codec(self) -> bool:
        """It reads pixels."""
        return False


class Anchor(Task[AnchorConfig, CanvasBatch]):
    """An image model's training; it sees nothing in images, so there is nothing to predict."""

    Config = AnchorConfig
    metrics: ClassVar[dict[str, str]] = {}
    numbers: ClassVar[dict[str, str]] = {"psnr": "PSNR, dB"}
    model: Any

    @classmethod
    def load_codec(cls, config: AnchorConfig, folder: str | None = None) -> FeatureCodec | None:
        return None

    @classmethod
    def check_data(cls, config: AnchorConfig, manifest: Manifest) -> Found:
        """Number of training images."""
        need_splits(config, {name: split.num_samples for name, split in manifest.splits.items()}, REMEDY)
        num_samples = manifest.split(config.train_split).num_samples
        need_batches(config, num_samples)
        return Found(num_samples)

    def make_source(self) -> Any:
        """Made of the model, once it is there."""
        return None

    def network(self) -> nn.Module:
        model = new_model(self.config.model, self.config.quality)
        for bottleneck in _bottlenecks(model):  # no gradient reaches them
            bottleneck.quantiles.requires_grad_(False)
        if isinstance(model, ScaleHyperpriorVbr):  # nor its gains, which name the rates
            model.Gain.requires_grad_(False)
        return model

    def batches(self, samples_seen: int) -> Iterator[CanvasBatch]:
        config, runtime = self.config, self.runtime
        return iter(
            train_loader(
                config.data, config.train_split, canvas_size=self._canvas_size, batch_size=config.batch_size,
                rank=runtime.rank, world=runtime.world, num_workers=config.num_workers, seed=config.seed,
                samples_seen=samples_seen, cache=shard_cache_of(config), quarantine=config.run,
            )
        )  # fmt: skip

    @property
    def _canvas_size(self) -> int:
        return self.config.canvas_size or self.config.image_size

    def loss(
        self, module: Callable[..., Any], batch: CanvasBatch, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Any]]:
        """Rate and distortion of random crops, half of them mirrored."""
        canvas, aspect = batch.canvas.to(self.device), batch.aspect.to(self.device)
        crops = random_crops(aspect, ViewConfig(scale_min=self.config.scale_min), generator)
        flip = torch.rand(len(canvas), generator=generator, device=self.device) < 0.5
        images = resample(canvas, crops, self.config.image_size, flip)
        lmbda = self.config.lmbda or LAMBDAS[self.config.quality]
        losses = RateDistortionLoss(lmbda)(module(images, **level_of(self.model, self.config.quality)), images)
        return losses["loss"], {"bpp": losses["bpp_loss"].detach(), "mse": losses["mse_loss"].detach()}

    def finish(self) -> None:
        """Solve the quantiles; write weights and tables beside the run folder."""
        for bottleneck in _bottlenecks(self.model):
            solve_quantiles(bottleneck)
        if self.runtime.rank == 0:
            tensors = {name: tensor.cpu().contiguous() for name, tensor in _updated(self.model).state_dict().items()}
            write_file(weights_path(Path(self.config.run)), save(tensors))
        self.runtime.barrier()

    @torch.no_grad()
    def evaluate(self) -> dict[str, Any]:
        """PSNR and rate of a few validation images, from real streams."""
        latents = create_latents(_updated(self.model), self.device, self.config.quality)
        rates, errors, size = RateMeter(), torch.zeros(2, dtype=torch.float64), self.config.image_size
        for image in self.examples(EVALUATION_IMAGES)[self.runtime.rank :: self.runtime.world]:
            stream = latents.encode(image.to(self.device))
            decoded = latents.decode_image(stream)[0].cpu()
            rates.add_one(len(stream), latents.payload_bytes(stream), size, size, 0)
            errors += torch.tensor([float(F.mse_loss(decoded, image.float() / 255)), 1.0], dtype=torch.float64)
        measured = rates.rates(self.runtime)
        total, count = self.runtime.gather(errors[None].to(self.device)).sum(0).tolist()
        return {"psnr": -10 * math.log10(max(total / count, 1e-10)), **measured}

    def examples(self, count: int) -> list[Tensor]:
        """The first validation images, cut square."""
        loader = eval_loader(
            self.config.data, self.config.val_split, canvas_size=self._canvas_size, batch_size=EVALUATION_BATCH,
            limit=count, cache=shard_cache_of(self.config), quarantine=self.config.run,
        )  # fmt: skip
        return [
            image for batch in loader for image in center_images(batch.canvas, batch.aspect, self.config.image_size)
        ]

    def view(self, number: int, view: int) -> tuple[Tensor, dict[str, Any]]:
        raise TaskError("an anchor is trained on pixels; cache=bitstreams has nothing to encode")

    def predict(self, received: Any, height: int, width: int) -> dict[str, Any]:
        raise TaskError(NO_TASK)

    def receive_image(self, image: Tensor) -> tuple[Any, int]:
        raise TaskError(NO_TASK)

    def receive_stream(self, stream: bytes) -> tuple[Any, int, int]:
        raise TaskError(NO_TASK)

    def draw(self, picture: Tensor, prediction: dict[str, Any], score: float) -> Tensor:
        raise TaskError(NO_TASK)


def weights_path(run: Path) -> Path:
    """The weights of the run in folder `run`."""
    return run.with_name(f"{run.name}.safetensors")


def _bottlenecks(model: nn.Module) -> list[EntropyBottleneck]:
    return [module for module in model.modules() if isinstance(module, EntropyBottleneck)]


def _updated(model: Any) -> Any:
    """A copy of a model with coder tables of its present weights."""
    made = copy.deepcopy(model).eval()
    made.update(force=True)
    return made
