"""What a run measures of itself: kNN accuracy of its features and the bytes of its real streams.

kNN (Wu et al. 2018) needs no training, so it tells at any time how much of the classes the frozen features hold.
Images are the central squares of the samples, at the run's `image_size`, without augmentation.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cluster.files import write_whole
from cluster.runtime import Runtime
from data_pipeline.cache import ShardCache
from data_pipeline.loader import eval_loader
from data_pipeline.manifest import Manifest
from data_pipeline.views import center_images, normalize
from pretrain.codec.feature_codec import FeatureCodec
from pretrain.codec.precision import autocast
from pretrain.config import PretrainConfig, StageConfig
from pretrain.ssl.evaluation import knn_accuracy

EVALUATION_BATCH = 128
NUM_STREAMS = 256  # of which the rate of a run is the mean; a quarter for each of several rates


def pooled_features(codec: FeatureCodec, images: Tensor, depth: str) -> Tensor:
    """Pooled layer4 (N, D) of normalised images (N, 3, H, W), read at `depth`: f1, f2 or f3.

    f2 and f3 are those of the frozen codec, with real rounding.
    """
    if depth == "f3":
        features = codec.features(images)
    else:
        features = codec.backbone.head(images)
        if depth == "f2":
            features, _ = codec.eliminate(features)
    return codec.backbone.pool(codec.backbone.tail(features)[-1])


def depth_of(stage: StageConfig) -> str:
    """How deep the path of features goes once `stage` has trained: f1, f2 or f3."""
    if "compression" in stage.trains:
        return "f3"
    return "f2" if "redundancy" in stage.trains else "f1"


def has_labels(data: str, split: str, cache: ShardCache | None = None) -> bool:
    """Whether images of a split have a label, judged by the first; the classes of a data set may be those of boxes."""
    loader = eval_loader(data, split, canvas_size=8, batch_size=1, limit=1, cache=cache)
    return all(bool(batch.label.ge(0).all()) for batch in loader)


def measure_knn(
    runtime: Runtime, config: PretrainConfig, codec: FeatureCodec, manifest: Manifest, stage: StageConfig
) -> dict[str, float]:
    """{"knn": accuracy in 0..1, of val against train}; empty where labels or a val split are missing.

    Leaves the codec in eval mode. Every rank embeds its share of the images.
    """
    if not config.knn_samples or not manifest.classes or "val" not in manifest.splits:
        return {}
    cache = ShardCache.of_size(config.shard_cache, config.shard_cache_limit)
    if not all(has_labels(config.data, split, cache) for split in (config.split, "val")):
        return {}
    codec.eval()
    banks: list[Tensor] = []
    for split in (config.split, "val"):
        limit = min(config.knn_samples, manifest.split(split).num_samples)
        loader = eval_loader(
            config.data,
            split,
            canvas_size=config.canvas_size,
            batch_size=EVALUATION_BATCH,
            rank=runtime.rank,
            world=runtime.world,
            limit=limit - limit % runtime.world,  # no rank without a share
            cache=cache,
            quarantine=config.run,
        )
        features, labels = [], []
        with torch.inference_mode():
            for batch in loader:
                canvas, aspect = batch.canvas.to(runtime.device), batch.aspect.to(runtime.device)
                images = normalize(center_images(canvas, aspect, config.image_size).float().div(255))
                with autocast(runtime.device, config.precision):
                    features.append(pooled_features(codec, images, depth_of(stage)).float())
                labels.append(batch.label.to(runtime.device))
        banks += [runtime.gather(torch.cat(features)), runtime.gather(torch.cat(labels))]
    train_features, train_labels, val_features, val_labels = banks
    return {"knn": knn_accuracy(train_features, train_labels, val_features, val_labels)}


def measure_streams(
    runtime: Runtime, config: PretrainConfig, codec: FeatureCodec, split: str, limit: int, rate: float | None = None
) -> dict[str, float]:
    """Mean size of real streams over `limit` images of `split`, in bits per pixel and bytes.

    A collective: every rank codes its share of the images.
    """
    codec.eval()
    loader = eval_loader(
        config.data,
        split,
        canvas_size=config.canvas_size,
        batch_size=32,
        rank=runtime.rank,
        world=runtime.world,
        limit=limit,
        cache=ShardCache.of_size(config.shard_cache, config.shard_cache_limit),
        quarantine=config.run,
    )
    streams: list[bytes] = []
    for batch in loader:
        streams += codec.encode_batch(center_images(batch.canvas, batch.aspect, config.image_size), rate)
    share = runtime.mean({"bytes": float(sum(map(len, streams))), "images": float(len(streams))})
    num_bytes = share["bytes"] / share["images"]
    return {
        "bpp": num_bytes * 8 / config.image_size**2,
        "bytes": num_bytes,
        "images": round(share["images"] * runtime.world),
        "image_size": config.image_size,
    }


def write_summary(runtime: Runtime, config: PretrainConfig, codec: FeatureCodec, progress: dict[str, Any]) -> None:
    """Write RUN/summary.json: progress, and the real rate where a compression network was trained. A collective."""
    summary: dict[str, Any] = {"progress": progress}
    if any("compression" in stage.trains for stage in config.stages):
        splits = Manifest.load(config.data).splits
        split = "val" if "val" in splits else config.split
        codec = codec.to("cpu")
        if runtime.world > 1:  # the last step has left each rank statistics of its own; the checkpoint has rank 0's
            for name, buffer in codec.named_buffers():
                if "running_" in name:
                    dist.broadcast(buffer, src=0)
        summary["streams"] = {"split": split, **measure_streams(runtime, config, codec, split, NUM_STREAMS)}
        if config.codec.rate_points > 1:
            rates = [step / 4 for step in range(5)]
            summary["streams"]["bpp_at_rate"] = {
                f"{rate:g}": measure_streams(runtime, config, codec, split, NUM_STREAMS // 4, rate)["bpp"]
                for rate in rates
            }
    if runtime.rank == 0:
        write_whole(Path(config.run) / "summary.json", json.dumps(summary, indent=2) + "\n")
    runtime.barrier()
