"""What tasks must be able to do: learn eight images by heart, beat what learned nothing, gain from streams kept.

    python tests/benchmarks/tasks.py by-heart CODEC [--tasks detection ...] [--options K=V ...] [--json FILE]

fine-tunes each task on eight made-up scenes and measures it on the same eight, from real streams; 1 is perfect. For the
maps of semantic segmentation what their resolution, an eighth of the image, can show at best is printed too.

    python tests/benchmarks/tasks.py beside RUN ... [--json FILE]

measures complete runs beside the same network before its first step, and beside a constant prediction: the most frequent
class; for objects in every image each class's mean box, its frequency as the score.

    python tests/benchmarks/tasks.py cache CODEC DATA [--tasks detection_small ...] [--epochs 3] [--options K=V ...]

trains with cache=none and with cache=bitstreams, in turns: images a second, seconds to fill the cache, bytes of both.

    python tests/benchmarks/tasks.py step [--anyway]

time and GPU memory of one ResNet-50 step of each task with its full recipe; skipped where no GPU is. `--smoke`, alone,
runs a tiny one of every part.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import smoke
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from cluster.metrics import read_rows
from data_pipeline.manifest import Manifest
from data_pipeline.masks import IGNORE
from data_pipeline.samples import once
from data_pipeline.scenes import write_scenes
from data_pipeline.shards import ShardReader, facts_of
from data_pipeline.sources.annotations import encode_mask
from downstream import finetune
from downstream.evaluation.segmentation import SegmentationMetric, scores
from downstream.results import percent, read_results
from downstream.runs import load_run
from downstream.tasks.detection import Detection, truth_of
from downstream.tasks.semantic_segmentation import SemanticSegmentation
from pretrain.codec.config import CodecConfig
from pretrain.codec.feature_codec import FeatureCodec

DETECTOR = ["anchors=[8,16,32,64,128]", "flip=false", "lr=1e-3", "weight_decay=0", "batch_size=8"]
# Recipe, side of the scenes in pixels, options; masks of small scenes would mostly measure how they are pasted.
BY_HEART: dict[str, tuple[str, int, list[str]]] = {
    "classification": ("classification", 64, ["epochs=100", "batch_size=8", "lr=0.05", "scale_min=1",
                                              "label_smoothing=0", "image_size=64", "canvas_size=64"]),
    "detection": ("detection_small", 96, [*DETECTOR, "epochs=150"]),
    "instance_segmentation": ("instance_segmentation_small", 192, [*DETECTOR, "epochs=300"]),
    "semantic_segmentation": ("semantic_segmentation_small", 192,
                              ["gate=none", "short_side=192", "height=192", "width=192", "scale_min=1", "scale_max=1",
                               "batch_size=8", "epochs=250", "teacher_epochs=1", "feature_weight=0"]),
}  # fmt: skip
STEPS, WARM = 20, 5


def small(folder: Path) -> list[list[str]]:
    """The commands of a tiny run of every part."""
    codec, data = str(smoke.codec(folder)), str(smoke.scenes(folder))
    run = smoke.classification(folder / "run", Path(codec), Path(data))
    return [
        ["by-heart", codec, "--tasks", "classification", "--options", "epochs=2"],
        ["beside", str(run)],
        ["cache", codec, data, "--epochs", "5", "--options", "batch_size=8"],
        ["step", "--anyway"],
    ]


def create_parser() -> argparse.ArgumentParser:
    """Its options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    heart = parts.add_parser("by-heart")
    heart.add_argument("codec", type=Path)
    heart.add_argument("--tasks", nargs="*", choices=list(BY_HEART), default=list(BY_HEART))
    heart.add_argument("--options", nargs="*", default=[])
    heart.add_argument("--seed", type=int, default=0, help="of the scenes")
    compare = parts.add_parser("beside")
    compare.add_argument("runs", type=Path, nargs="+")
    cache = parts.add_parser("cache")
    cache.add_argument("codec", type=Path)
    cache.add_argument("data", type=Path)
    cache.add_argument("--tasks", nargs="*", default=["classification"], help="recipes")
    cache.add_argument("--epochs", type=int, default=3)
    cache.add_argument("--options", nargs="*", default=[])
    step = parts.add_parser("step")
    step.add_argument("--anyway", action="store_true", help="on a CPU too, with small networks and images")
    for part in (heart, compare, cache, step):
        part.add_argument("--json", type=Path, help="file for the figures")
    smoke.add_option(parser)
    return parser


def main() -> None:
    words, parser = sys.argv[1:], create_parser()
    for command in small(smoke.scratch()) if "--smoke" in words else [words]:
        measure(parser.parse_args(command))


def measure(arguments: argparse.Namespace) -> None:
    """One part: measure, print, write."""
    if arguments.part == "by-heart":
        figures = {task: by_heart(task, arguments.codec, arguments.seed, arguments.options) for task in arguments.tasks}
        show("eight scenes, learned by heart", figures)
    elif arguments.part == "beside":
        figures = {str(run): beside_nothing(run) for run in arguments.runs}
        for run, rows in figures.items():
            show(f"{run}, loss {rows['trained']['losses']}", rows)
    elif arguments.part == "cache":
        figures = {task: both_ways(task, arguments) for task in arguments.tasks}
        show_cache(figures)
    elif not (torch.cuda.is_available() or arguments.anyway):
        print("no GPU here: skipped")
        return
    else:
        figures = {task: one_step(task, not torch.cuda.is_available()) for task in BY_HEART}
        show_steps(figures)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


def show(title: str, rows: dict[str, dict[str, Any]]) -> None:
    table = Table(title, "metrics", "bpp", "seconds")
    for name, row in rows.items():
        shown = ", ".join(f"{row['titles'][key]} {percent(row[key])}" for key in row["titles"])
        if "best_possible" in row:
            shown += f", at best {percent(row['best_possible'])}"
        table.add_row(name, shown, f"{row['bpp']:.3f}" if row.get("bpp") else "", f"{row['seconds']:.0f}")
    Console(width=160).print(table)


def by_heart(task: str, codec: Path, seed: int, further: list[str]) -> dict[str, Any]:
    """Metrics on eight scenes after training on them."""
    recipe, size, options = BY_HEART[task]
    with tempfile.TemporaryDirectory() as scratch:
        data, start = Path(scratch) / "data", time.perf_counter()
        with smoke.light_processes():
            write_scenes(data, train=8, val=1, size=size, seed=seed)
        overrides = [f"codec={codec}", f"data={data}", f"run={scratch}/run", "launcher=local", "val_split=train"]
        results = finetune.run(finetune.resolve(recipe, [*overrides, *options, *further]))
        figures = chosen(results, results["metrics"], start)
        if task == "semantic_segmentation":
            figures["best_possible"] = best_possible(Path(scratch) / "run")
    return figures


def best_possible(run: Path) -> float | None:
    """mIoU of the true masks reduced to an eighth and enlarged again: what the logits' resolution allows."""
    tuner = finetune.open_run(run)
    task = tuner.task
    assert isinstance(task, SemanticSegmentation)
    count = len(task.config.classes)
    metric = SegmentationMetric(count)
    for sample in once(task.dataset("train")):
        mask = sample.mask.long()
        known = torch.where(mask == IGNORE, count, mask)
        planes = F.one_hot(known, count + 1).permute(2, 0, 1)[None, :-1].float()
        size = [-(-side // 8) for side in mask.shape]
        reduced = F.interpolate(F.interpolate(planes, size, mode="area"), mask.shape, mode="bilinear")
        metric.update(reduced.argmax(dim=1), mask[None])
    return scores(metric.confusion())["miou"]


def beside_nothing(run: Path) -> dict[str, dict[str, Any]]:
    """Metrics of a run, of its network untrained, and of a constant prediction."""
    results = read_results(run)
    titles = results["metrics"]
    config: Any = load_run(run)
    if config.task == "semantic_segmentation" and config.input == "streams":
        config.teacher = config.teacher or str(run / "teacher.pt")
    with tempfile.TemporaryDirectory() as scratch:
        config.run, start = scratch, time.perf_counter()
        tuner = finetune.create_tuner(config)
        tuner.enter(tuner.stages[-1])
        tuner.task.begin()
        untrained = chosen(tuner.task.evaluate(), titles, start)
    start = time.perf_counter()
    trained = {**chosen(results, titles, start), "seconds": results["seconds"], "losses": losses(run)}
    rows = {"trained": trained, "untrained": untrained}
    if isinstance(tuner.task, Detection):
        rows["constant"] = chosen(tuner.task.measure(constant_records(tuner.task)), titles, start)
    elif config.task == "classification":
        counts = Counter(labels(config.data, config.val_split))
        ranked = [label for label, _ in Counter(labels(config.data, config.train_split)).most_common(5)]
        top1, top5 = (sum(counts[label] for label in ranked[:n]) / counts.total() for n in (1, 5))
        rows["constant"] = {"top1": top1, "top5": top5, "titles": titles, "seconds": time.perf_counter() - start}
    else:
        shown = {"miou": titles["miou"]}
        rows["constant"] = {"miou": results["constant_miou"], "titles": shown, "seconds": 0.0}
    return rows


def chosen(results: dict[str, Any], titles: dict[str, str], start: float) -> dict[str, Any]:
    figures = {key: results[key] for key in (*titles, "bpp", "bpp_payload") if key in results}
    return {**figures, "titles": titles, "seconds": time.perf_counter() - start}


def losses(run: Path) -> str:
    """The mean loss over the first and over the last tenth of the rows of the stage that ended a run."""
    rows = [row for row in read_rows(run / "metrics.jsonl") if row.get("loss") is not None]
    values = [row["loss"] for row in rows if row["stage"] == rows[-1]["stage"]]
    tenth = max(1, len(values) // 10)
    return f"{statistics.mean(values[:tenth]):.2f} to {statistics.mean(values[-tenth:]):.2f}"


def labels(data: str, split: str) -> list[int]:
    reader = ShardReader(data, Manifest.load(data).split(split))
    return [facts_of(reader.read(index))["label"] for index in range(len(reader))]


def constant_records(task: Detection) -> list[dict[str, Any]]:
    """Records of the validation split in which every image is said to hold each class's mean training box."""
    boxes: dict[int, list[torch.Tensor]] = defaultdict(list)
    for sample in once(task.dataset(task.config.train_split)):
        height, width = sample.image.shape[-2:]
        for box, label in zip(sample.objects.boxes, sample.objects.labels.tolist(), strict=True):
            boxes[label].append(box / torch.tensor([width, height, width, height]))
    total = sum(len(found) for found in boxes.values())
    records = []
    for sample in once(task.dataset(task.config.val_split)):
        height, width = sample.image.shape[-2:]
        means = [torch.stack(boxes[label]).mean(0) * torch.tensor([width, height, width, height]) for label in boxes]
        found: dict[str, Any] = {
            "boxes": [box.tolist() for box in means], "labels": list(boxes),
            "scores": [len(given) / total for given in boxes.values()],
        }  # fmt: skip
        if task.masks:
            found["masks"] = [rectangle(box, height, width) for box in means]
        records.append({
            "image": sample.index, "height": height, "width": width, "truth": truth_of(sample.objects), "found": found
        })  # fmt: skip
    return records


def rectangle(box: torch.Tensor, height: int, width: int) -> dict[str, Any]:
    left, top, right, bottom = (round(side) for side in box.tolist())
    mask = np.zeros((height, width), np.uint8)
    mask[top:bottom, left:right] = 1
    return encode_mask(mask)


def both_ways(recipe: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Images a second without and with the cache, in turns, and what the cache costs."""
    speeds: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as scratch:
        streams = Path(scratch) / "streams"
        places = [f"codec={arguments.codec}", f"data={arguments.data}", "launcher=local", f"epochs={arguments.epochs}"]
        seconds = 0.0
        for turn in range(2):
            for cache in ("none", "bitstreams"):
                run = Path(scratch) / f"{cache}{turn}"
                options = [f"cache={cache}", "cache_views=2", f"cache_folder={streams}", f"run={run}", "log_every=5"]
                finetune.run(finetune.resolve(recipe, [*places, *options, *arguments.options]))
                rows = read_rows(run / "metrics.jsonl")
                speeds[cache] += [
                    row["images_per_second"] for row in rows[1:] if row["stage"] not in ("teacher", "streams")
                ]
                seconds = max([seconds, *(row.get("encoding_seconds", 0.0) for row in rows)])
        stored = sum(path.stat().st_size for path in streams.glob("*.tar"))
        views = len(Manifest.load(streams).splits)
    split = Manifest.load(arguments.data).split("train")
    none, kept = (statistics.median(speeds[name]) for name in ("none", "bitstreams"))
    return {"none": none, "bitstreams": kept, "ratio": kept / none, "filling": seconds, "views": views,
            "stream_bytes": stored, "image_bytes": sum(shard.bytes for shard in split.shards)}  # fmt: skip


def show_cache(figures: dict[str, dict[str, float]]) -> None:
    table = Table("task", "images/s", "with streams", "ratio", "filling, s", "views", "shards of streams", "of images")
    for task, row in figures.items():
        sizes = [f"{row[key] / 1e6:.2f} MB" for key in ("stream_bytes", "image_bytes")]
        speeds = [f"{row['none']:.1f}", f"{row['bitstreams']:.1f}", f"{row['ratio']:.2f}", f"{row['filling']:.0f}"]
        table.add_row(task, *speeds, str(row["views"]), *sizes)
    Console(width=140).print(table)


def one_step(task: str, small: bool) -> dict[str, float]:
    """Seconds and peak GPU memory of a step of a task on a codec of a ResNet-50 with random weights."""
    recipe, size = (BY_HEART[task][0], 64) if small else (task, 512)
    with tempfile.TemporaryDirectory() as scratch:
        with smoke.light_processes():
            write_scenes(Path(scratch) / "data", train=64, val=2, size=size)
        torch.manual_seed(0)
        config = CodecConfig(backbone="resnet18") if small else CodecConfig()
        FeatureCodec(config).eval().save_pretrained(
            Path(scratch) / "codec", {"image_size": 64 if small else 224, "canvas_size": 64 if small else 256}
        )
        options = ["height=64", "width=64", "short_side=64"] if small and task == "semantic_segmentation" else []
        places = [f"codec={scratch}/codec", f"data={scratch}/data", f"run={scratch}/run", "launcher=local"]
        tuner = finetune.create_tuner(finetune.resolve(recipe, [*places, *options]))
        for stage in tuner.stages:  # the last is measured; one before it leaves what it needs
            tuner.enter(stage)
            if stage is not tuner.stages[-1]:
                tuner.task.finish()
        tuner.task.begin()
        tuner.model.train()
        seconds, generator = [], torch.Generator(tuner.device)
        batches = iter(tuner.task.batches(0))
        for number in range(WARM + STEPS if not small else 2):
            batch = next(batches)
            if number == WARM and not small:
                torch.cuda.reset_peak_memory_stats()
            start = now(tuner.device)
            with tuner.task.autocast():
                loss, _ = tuner.task.loss(tuner.model, batch, generator)
            loss.backward()
            tuner.optimizer.step()
            tuner.optimizer.zero_grad(set_to_none=True)
            seconds.append(now(tuner.device) - start)
        memory = torch.cuda.max_memory_allocated() / 2**30 if tuner.device.type == "cuda" else 0.0
    measured = seconds[WARM:] or seconds
    return {"batch_size": tuner.config.batch_size, "size": size, "seconds": statistics.median(measured), "gib": memory}


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def show_steps(figures: dict[str, dict[str, float]]) -> None:
    table = Table("task", "batch size", "scenes, px", "ms a step", "images/s", "peak memory, GiB")
    for task, row in figures.items():
        rate = row["batch_size"] / row["seconds"]
        memory = f"{row['gib']:.1f}" if row["gib"] else "-"
        cells = [str(row["batch_size"]), str(row["size"]), f"{1e3 * row['seconds']:.0f}", f"{rate:.1f}", memory]
        table.add_row(task, *cells)
    Console(width=120).print(table)


if __name__ == "__main__":
    with smoke.ended_by_sigterm():
        main()
