"""Two things that a task's network must be able to do: learn eight images by heart, and beat those that learned nothing.

    python tests/benchmarks/tasks.py --codec codec [--tasks detection ...] [--json figures.json]

fine-tunes each task on eight made-up scenes and measures it on the same eight, from real streams; 1 is perfect.

    python tests/benchmarks/tasks.py --runs runs/objects ... [--json figures.json]

measures complete runs of detection or instance segmentation beside the same network before its first step, and beside
a constant prediction: in every image, each class's mean box, its frequency as the score.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from cluster.runtime import LocalRuntime
from data_pipeline.objects import once
from data_pipeline.scenes import write_scenes
from data_pipeline.shards import Manifest
from data_pipeline.sources.annotations import encode_mask
from downstream import finetune
from downstream.results import percent, read_results
from downstream.tasks.detection import Detection, truth_of

DETECTOR = ["anchors=[8,16,32,64,128]", "flip=false", "lr=1e-3", "weight_decay=0", "batch_size=8"]
# Side of the scenes in pixels, and options; masks of small scenes would mostly measure how they are pasted.
BY_HEART: dict[str, tuple[int, list[str]]] = {
    "classification": (64, ["epochs=100", "batch_size=8", "lr=0.05", "scale_min=1", "label_smoothing=0",
                            "image_size=64", "canvas_size=64"]),
    "detection": (96, [*DETECTOR, "epochs=150"]),
    "instance_segmentation": (192, [*DETECTOR, "epochs=300"]),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--codec", type=Path, help="exported codec: learn eight scenes by heart on it")
    parser.add_argument("--tasks", nargs="*", choices=list(BY_HEART), default=list(BY_HEART))
    parser.add_argument("--runs", type=Path, nargs="*", default=[], help="complete runs, to compare with no learning")
    parser.add_argument("--seed", type=int, default=0, help="of the scenes")
    parser.add_argument("--json", type=Path, help="file for the figures")
    arguments = parser.parse_args()
    if arguments.codec is None and not arguments.runs:
        parser.error("name --codec or --runs")
    figures: dict[str, Any] = {}
    if arguments.codec is not None:
        figures["by_heart"] = {task: by_heart(task, arguments.codec, arguments.seed) for task in arguments.tasks}
        show("eight scenes, learned by heart", figures["by_heart"])
    for run in arguments.runs:
        figures[str(run)] = beside_nothing(run)
        show(str(run), figures[str(run)])
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


def show(title: str, rows: dict[str, dict[str, Any]]) -> None:
    table = Table(title, "metrics", "bpp", "seconds")
    for name, row in rows.items():
        shown = ", ".join(f"{row['titles'][key]} {percent(row[key])}" for key in row["titles"])
        table.add_row(name, shown, f"{row['bpp']:.3f}" if row.get("bpp") else "", f"{row['seconds']:.0f}")
    Console(width=160).print(table)


def by_heart(task: str, codec: Path, seed: int) -> dict[str, Any]:
    """Metrics on eight scenes after training on them."""
    size, options = BY_HEART[task]
    with tempfile.TemporaryDirectory() as scratch:
        data, start = Path(scratch) / "data", time.perf_counter()
        manifest = write_scenes(data, train=8, val=1, size=size, seed=seed)
        train = manifest.split("train")
        Manifest(manifest.name, manifest.classes, {"train": train, "val": train}).save(data)
        overrides = [f"codec={codec}", f"data={data}", f"run={scratch}/run", "launcher=local", *options]
        results = finetune.run(finetune.resolve(task, overrides))
    return chosen(results, results["metrics"], start)


def beside_nothing(run: Path) -> dict[str, dict[str, Any]]:
    """Metrics of a run, of its network untrained, and of a constant prediction."""
    results = read_results(run)
    titles = results["metrics"]
    config = finetune.load_run(run)
    with tempfile.TemporaryDirectory() as scratch:
        config.run, start = scratch, time.perf_counter()
        tuner = finetune.Finetuner(LocalRuntime(), config)
        task = tuner.task
        if not isinstance(task, Detection):
            raise SystemExit(f"{run}: a run of {config.task}; --runs compares runs that find objects")
        task.begin()
        untrained = chosen(task.evaluate(), titles, start)
        tuner.logger.close()
    start = time.perf_counter()
    constant = chosen(task.measure(constant_records(task)), titles, start)
    trained = {**chosen(results, titles, start), "seconds": results["seconds"]}
    return {"trained": trained, "untrained": untrained, "constant": constant}


def chosen(results: dict[str, Any], titles: dict[str, str], start: float) -> dict[str, Any]:
    figures = {key: results[key] for key in (*titles, "bpp", "bpp_payload") if key in results}
    return {**figures, "titles": titles, "seconds": time.perf_counter() - start}


def constant_records(task: Detection) -> list[dict[str, Any]]:
    """Records of the validation split in which every image is said to hold each class's mean training box."""
    boxes: dict[int, list[torch.Tensor]] = defaultdict(list)
    for (sample,) in once(task.dataset("train")):
        height, width = sample.image.shape[-2:]
        for box, label in zip(sample.objects.boxes, sample.objects.labels.tolist(), strict=True):
            boxes[label].append(box / torch.tensor([width, height, width, height]))
    total = sum(len(found) for found in boxes.values())
    records = []
    for (sample,) in once(task.dataset("val")):
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


if __name__ == "__main__":
    main()
