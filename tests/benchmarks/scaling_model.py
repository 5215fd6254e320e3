"""A plan for scale on paper: what a step of each stage costs on 8 to 1024 GPUs, and what gives out first.

    python tests/benchmarks/scaling_model.py [--recipe dicm_resnet50] [--measure --data PHOTOS] [--json FILE] [INPUT=VALUE ...]

What the recipe's network needs is counted on the network itself (`scaling_counts`), the shards that a node reads come
from the real order of samples, and all about machines is one of `scaling_costs.Inputs`. No figure here was timed on a
GPU. `--measure` times on this machine what can be timed on it and goes on with that; PHOTOS is a folder of images.
Tables are Markdown; docs/scaling.md explains them.

Figures in --json: `inputs`, `counts`, and the rows of each table under its title.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path

import smoke
from scaling_costs import (
    GIB,
    Inputs,
    Step,
    best_interval,
    goodput,
    model_step,
    sharded_optimizer,
    shards_fetched,
    shards_touched,
)
from scaling_counts import StageCounts, count_stages, measure

from pretrain.run import resolve

WORLDS = (8, 16, 32, 64, 128, 256, 512, 1024)
LEAST_IMAGES = 2  # a GPU, or the recipe is refused
LARGEST_BATCH = 8192  # up to which a learning rate that grows with it was shown to cost no accuracy (Goyal et al. 2017)
CACHES = (64, 200)  # GiB: the default of shard_cache_limit, and enough for all of ImageNet


def strong(counts: list[StageCounts], inputs: Inputs, fetched: dict[int, float]) -> list[dict]:
    """The recipe as it is: its batch is split over more and more GPUs."""
    rows = []
    for stage in counts:
        base: tuple[float, ...] = ()
        for world in WORLDS:
            images = stage.batch_size / world
            if images < LEAST_IMAGES:
                rows.append({"stage": stage.name, "GPUs": f"{world} and more", "images a GPU": "refused"})
                break
            steps = [model_step(stage, world, stage.batch_size, inputs, utilisation, fetched[world])
                     for utilisation in (inputs.utilisation_low, inputs.utilisation_high)]  # fmt: skip
            speeds = [stage.batch_size / step.seconds for step in steps]
            base = base or tuple(speed / world for speed in speeds)
            step, hours = steps[1], [stage.epochs * inputs.num_images / speed / 3600 for speed in speeds]
            rows.append({
                "stage": stage.name, "GPUs": world, "images a GPU": f"{images:g}", **milliseconds(step),
                "step, ms": span([1000 * step.seconds for step in steps], 1),
                "images/s": span(speeds, 0), "efficiency": span([s / b / world for s, b in zip(speeds, base, strict=True)], 2),
                "stage, hours": span(hours, 0), "first": step.bottleneck,
            })  # fmt: skip
    return rows


def weak(stage: StageCounts, queue: int, lr: float, inputs: Inputs, fetched: dict[int, float]) -> list[dict]:
    """The batch grows with the GPUs, each of which keeps what it has at 8."""
    rows, base = [], 0.0
    for world in WORLDS:
        batch = stage.batch_size * world // WORLDS[0]
        step = model_step(stage, world, batch, inputs, inputs.utilisation_high, fetched[world])
        speed = batch / step.seconds
        base = base or speed / world
        gathered = 0.0 if inputs.exchange else stage.shuffled_bytes * batch  # of one view: as it comes and joined
        limits = {
            "shuffle": step.parts["key shuffle"] > step.parts.get("compute", step.parts.get("launches", 0.0)),
            "stop flag": step.parts["stop flag"] > 0.1 * step.seconds,
            "storage": step.feeds["storage"] >= step.seconds,
            "decoding": step.feeds["decoding"] >= step.seconds,
            "batch": batch > LARGEST_BATCH,
            "memory": gathered > inputs.gpu_memory / 4,
            "queue": 2 * batch >= queue,
        }
        rows.append({
            "GPUs": world, "batch": batch, "lr": f"{lr * world / WORLDS[0]:.3g}",
            "steps an epoch": inputs.num_images // batch, "steps in the queue": f"{queue / (2 * batch):.3g}",
            "gathered, GB": f"{gathered / 1e9:.1f}", **milliseconds(step), "step, ms": f"{1000 * step.seconds:.1f}",
            "images/s": f"{speed:.0f}", "efficiency": f"{speed / world / base:.2f}",
            "beyond a limit": ", ".join(name for name, reached in limits.items() if reached) or "-",
        })  # fmt: skip
    return rows


def changes(stage: StageCounts, inputs: Inputs, fetched: dict[int, float]) -> list[dict]:
    """Efficiency of the stage, over 8 GPUs of the plan as it is, with parts of the plan changed."""
    plans = {
        "as it is": inputs,
        "eight network cards a node": replace(inputs, inter_bandwidth=8 * inputs.inter_bandwidth),
        "keys shuffled by exchange": replace(inputs, exchange=True),
        "these, half of the launches": replace(inputs, exchange=True, launch=inputs.launch / 2),
    }
    plans["these, shards in the cache"] = replace(plans["these, half of the launches"], sample_bytes=0.0)

    def speed(plan: Inputs, world: int, batch: int) -> float:
        return batch / world / model_step(stage, world, batch, plan, plan.utilisation_high, fetched[world]).seconds

    rows = []
    for name, plan in plans.items():
        row: dict = {"plan": name}
        for kind, worlds in (("batch 256", (16, 32, 64, 128)), ("batch grows", (16, 128, 1024))):
            for world in worlds:
                batch = stage.batch_size if kind == "batch 256" else stage.batch_size * world // WORLDS[0]
                row[f"{kind}, {world}"] = f"{speed(plan, world, batch) / speed(inputs, 8, stage.batch_size):.2f}"
        rows.append(row)
    return rows


def data(stage: StageCounts, inputs: Inputs, touched: dict[int, float]) -> list[dict]:
    """What a node reads of a remote store at the pace of compute alone, images of its GPUs being all that it does."""
    epoch = inputs.num_images * inputs.sample_bytes / 1e9
    pace = inputs.peak_flops * inputs.utilisation_high / stage.flops  # images a second and GPU
    rows = []
    for world, share in touched.items():
        nodes = world // inputs.gpus_per_node
        row = {"GPUs": world, "shards a node": f"{share * inputs.num_shards:.0f}", "over an equal part": f"{share * nodes:.2f}",
               "GB in the first epoch": f"{share * epoch:.1f}"}  # fmt: skip
        seconds = inputs.num_images / (pace * world)
        for cache in CACHES:
            later = shards_fetched(nodes, inputs, cache * GIB)
            row[f"later, {cache} GiB"] = f"{later * epoch:.1f}"
        row |= {"GB/s a node, first": f"{share * epoch / seconds:.2f}", "of the store, first": f"{share * nodes * epoch / seconds:.1f}",
                "cores a GPU to decode": f"{pace * inputs.decode:.1f}"}  # fmt: skip
        rows.append(row)
    return rows


def failures(stage: StageCounts, inputs: Inputs, every: int, fetched: dict[int, float]) -> list[dict]:
    """Checkpoints and restarts, with the batch growing; a checkpoint holds up training, or is written beside it."""
    rows = []
    for world in WORLDS:
        between = 1 / (inputs.node_failures * world / inputs.gpus_per_node)
        write, copy = stage.checkpoint_bytes / inputs.checkpoint_write, stage.checkpoint_bytes / inputs.device_to_host
        restart = inputs.restart + world * stage.checkpoint_bytes / inputs.storage_total  # each rank reads it whole
        batch = stage.batch_size * world // WORLDS[0]
        seconds = model_step(stage, world, batch, inputs, inputs.utilisation_high, fetched[world]).seconds
        held, beside = best_interval(write, between), max(best_interval(copy, between), write)
        rows.append({
            "GPUs": world, "hours between failures": f"{between / 3600:.1f}", "restart, s": f"{restart:.0f}",
            "best interval, s": f"{held:.0f}", "goodput": f"{100 * goodput(held, write, between, restart):.2f} %",
            "beside: best, s": f"{beside:.0f}", "goodput ": f"{100 * goodput(beside, copy, between, restart, write):.2f} %",
            f"every {every} steps: s": f"{every * seconds:.0f}",
            "goodput  ": f"{100 * goodput(every * seconds, write, between, restart):.2f} %",
        })  # fmt: skip
    return rows


def counted(counts: list[StageCounts], inputs: Inputs) -> list[dict]:
    """What was counted on the network, and what sharding the optimizer's state would save and cost."""
    rows = []
    for stage in counts:
        oss = {f"OSS on {world}, ms": f"{1000 * sharded_optimizer(stage, world, inputs):.0f}" for world in (16, 128)}
        rows.append({
            "stage": stage.name, "batch": stage.batch_size, "trained, M": f"{stage.num_parameters / 1e6:.2f}",
            "GFLOP an image": f"{stage.forward_flops / 1e9:.1f} + {stage.backward_flops / 1e9:.1f}",
            "operators": stage.launches, "gradients, MB": f"{stage.gradient_bytes / 1e6:.1f}",
            "broadcast, kB": f"{stage.buffer_bytes / 1e3:.1f}",
            "shuffled, MB": f"{stage.shuffled_bytes * stage.batch_size / 1e6:.1f}",
            "keys, kB": f"{stage.key_bytes * stage.batch_size / 1e3:.1f}",
            "optimizer, MB": f"{stage.optimizer_bytes / 1e6:.1f}", "checkpoint, MB": f"{stage.checkpoint_bytes / 1e6:.1f}", **oss,
        })  # fmt: skip
    return rows


def milliseconds(step: Step) -> dict[str, str]:
    """The parts of a step as columns."""
    busy = next(iter(step.parts.values()))
    others = {name: f"{1000 * seconds:.1f}" for name, seconds in list(step.parts.items())[1:]}
    return {"busy, ms": f"{1000 * busy:.1f}", **others}


def span(values: Sequence[float], digits: int) -> str:
    """Two figures, of low and of high utilisation, or one where they print alike."""
    texts = list(dict.fromkeys(f"{value:.{digits}f}" for value in values))
    return " to ".join(texts)


def markdown(rows: list[dict]) -> str:
    """A table; columns are those of the first row."""
    names = list(rows[0])
    lines = [names, ["---"] * len(names), *([str(row.get(name, "")) for name in names] for row in rows)]
    return "\n".join("| " + " | ".join(cell.strip() for cell in line) + " |" for line in lines)


def tables(recipe: str, inputs: Inputs, counts: list[StageCounts]) -> dict[str, list[dict]]:
    """All tables by their titles."""
    config = resolve(recipe, ["data=unread", "workers=1"])
    touched = {world: shards_touched(world // inputs.gpus_per_node, inputs) for world in WORLDS}
    fetched = {world: share * (world // inputs.gpus_per_node) for world, share in touched.items()}  # in the first epoch
    first, lr = counts[0], config.stages[0].lr
    return {
        "Counted": counted(counts, inputs),
        "The recipe on more GPUs": strong(counts, inputs, fetched),
        f"Stage {first.name}, batch and learning rate grow with the GPUs": weak(
            first, config.ssl.queue, lr, inputs, fetched
        ),
        f"Efficiency of stage {first.name}, the plan changed": changes(first, inputs, fetched),
        f"Shards of stage {first.name}": data(first, inputs, touched),
        f"Checkpoints and failures of stage {first.name}": failures(first, inputs, config.checkpoint_every, fetched),
    }


def small(folder: Path) -> list[str]:
    """Options of a tiny run."""
    return ["--recipe", "small"]


def create_parser() -> argparse.ArgumentParser:
    """Its options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "inputs", nargs="*", metavar="INPUT=VALUE", help="of " + ", ".join(field.name for field in fields(Inputs))
    )
    parser.add_argument("--recipe", default="dicm_resnet50")
    parser.add_argument("--measure", action="store_true", help="with --data")
    parser.add_argument("--data", type=Path, help="folder of images to decode")
    parser.add_argument("--json", type=Path, help="file for the figures")
    smoke.add_option(parser)
    return parser


def main() -> None:
    arguments = smoke.parse(create_parser(), small)
    inputs, counts = replace(Inputs(), **given(arguments.inputs)), count_stages(arguments.recipe)
    if arguments.measure:
        measured = measure(arguments.data, max(stage.checkpoint_bytes for stage in counts), counts[0].canvas_size)
        print("measured here:", ", ".join(f"{name}={value:.4g}" for name, value in measured.items()), "\n")
        inputs = replace(inputs, **measured)
    found = tables(arguments.recipe, inputs, counts)
    for title, rows in found.items():
        print(f"{title}\n\n{markdown(rows)}\n")
    if arguments.json:
        figures = {"inputs": asdict(inputs), "counts": [asdict(stage) for stage in counts], **found}
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


def given(texts: Sequence[str]) -> dict[str, float]:
    """Inputs from words NAME=VALUE; ends the program where one is no input."""
    values: dict[str, float] = {}
    for name, _, value in (text.partition("=") for text in texts):
        kind = type(getattr(Inputs, name, None))
        if kind not in (float, int, bool):
            raise SystemExit(f"{name} is no input; there are {', '.join(field.name for field in fields(Inputs))}")
        values[name] = kind(float(value))
    return values


if __name__ == "__main__":
    main()
