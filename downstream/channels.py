"""Which channels a task wants, counted over a training set: `dicm select-channels`.

A trained dynamic gate is asked about every training image; the N channels that it chose most often are the static
choice (Liu, Sun, Katto 2022, section 2.2.3). A gate that has made up its mind chooses many channels of every image:
among equal counts its mean probability decides. They are written as JSON, which `gate=static channels=FILE` and
`dicm encode --channels FILE` read, and drawn as a bar chart.

    {"channels": [3, 17, ...], "counts": [120, 0, ...], "probabilities": [0.8, 0.1, ...], "images": 500,
     "latents": "bmshj2018-hyperprior"}
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from data_pipeline.samples import once
from downstream.errors import TaskError
from downstream.files import write_file
from downstream.gate import DynamicGate
from downstream.latents import LatentCodec


class Counts(NamedTuple):
    """What a gate chose over a number of images."""

    counts: list[int]  # of images that chose each channel
    probabilities: list[float]  # the mean over the images
    images: int


@torch.no_grad()
def count_choices(gate: DynamicGate, latents: LatentCodec, images: Iterable[Tensor]) -> Counts:
    """How often each channel of images (3, H, W) uint8 is chosen (TaskError: no image)."""
    gate.eval()
    device = next(gate.parameters()).device
    counts, total = torch.zeros(gate.channels, dtype=torch.int64), torch.zeros(gate.channels, dtype=torch.float64)
    number = 0
    for image in images:
        y_hat = latents.latents(image[None]).to(device)
        counts[gate.choice(y_hat[0])] += 1
        total += gate.probabilities(y_hat)[0].double().cpu()
        number += 1
    if not number:
        raise TaskError("channels are counted over images, and there is none")
    return Counts(counts.tolist(), (total / number).tolist(), number)


def ranking(found: Counts) -> list[int]:
    """All channels, most often chosen first; of equally often chosen ones the likelier, then the lower number."""
    keys = [(-count, -likely) for count, likely in zip(found.counts, found.probabilities, strict=True)]
    return sorted(range(len(keys)), key=lambda channel: (keys[channel], channel))


def most_chosen(found: Counts, num: int) -> list[int]:
    """The first `num` channels of the ranking, ascending (TaskError: more than there are)."""
    if not 1 <= num <= len(found.counts):
        raise TaskError(f"num={num} must lie in 1..{len(found.counts)}, the channels of the latent")
    return sorted(ranking(found)[:num])


@torch.no_grad()
def most_varied(latents: LatentCodec, images: Iterable[Tensor], num: int) -> list[int]:
    """The `num` channels of y_hat of largest variance over all places of all images: the rule of Wang et al. 2022.

    Raises:
        TaskError: more channels than the latent has.
    """
    sums = torch.zeros(3, latents.channels, dtype=torch.float64)
    for image in images:
        y_hat = latents.latents(image[None])[0].flatten(1).double().cpu()
        sums += torch.stack([y_hat.sum(1), y_hat.square().sum(1), torch.full((len(y_hat),), float(y_hat.shape[1]))])
    total, squares, places = sums
    variance = squares / places - (total / places).square()
    if not 1 <= num <= len(variance):
        raise TaskError(f"num_channels={num} must lie in 1..{len(variance)}, the channels of the latent")
    return sorted(variance.argsort(descending=True, stable=True)[:num].tolist())


def write_choice(path: Path, channels: Sequence[int], found: Counts, latents: str) -> None:
    """Write the choice as JSON, whole or not at all (TaskError where that fails)."""
    facts = {"channels": list(channels), **found._asdict(), "latents": latents}
    write_file(path, json.dumps(facts) + "\n", "name another file")


def draw_choice(path: Path, channels: Sequence[int], found: Counts) -> None:
    """A bar chart of how often each channel was chosen, most often first; the selected ones stand out."""
    from matplotlib.figure import Figure

    ranked, counts = ranking(found), found.counts
    colours = ["tab:blue" if channel in set(channels) else "lightgrey" for channel in ranked]
    figure = Figure(figsize=(max(8.0, 0.06 * len(counts)), 3.5), layout="constrained")
    axes = figure.add_subplot()
    axes.bar(range(len(ranked)), [100 * counts[channel] / found.images for channel in ranked], 0.8, color=colours)
    axes.set_xlim(-1, len(ranked))
    axes.set_xlabel("channels of the latent, most often chosen first")
    axes.set_ylabel("images that chose it (%)")
    axes.set_title(f"{len(channels)} of {len(counts)} channels selected (blue), over {found.images} training images")
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise TaskError(f"{path}: cannot be written ({error.strerror}); name another file") from error


def select_channels(run: Path, num: int, out: Path | None = None, chart: Path | None = None) -> tuple[Path, Path]:
    """Count the choices of a run's dynamic gate over its training set, and write the `num` most frequent.

    Args:
        run: folder of a trained run with gate=dynamic.
        out: JSON file; RUN/channels_NUM.json where None. chart: PNG file; beside `out` where None.

    Returns:
        The two files.

    Raises:
        TaskError: not such a run, or more channels than the latent has.
    """
    from downstream.finetune import open_run
    from downstream.runs import load_run

    out = out or run / f"channels_{num}.json"
    chart = chart or out.with_suffix(".png") if out.name else out
    for path in (out, chart):
        if not path.name or path.is_dir():
            raise TaskError(f"{path}: is a folder; name a file")
    if out == chart:
        raise TaskError(f"{out}: both the list and its chart would be written there; name the list .json")
    if chart.suffix not in (".png", ".svg", ".pdf"):
        raise TaskError(f"{chart}: a chart ends in .png, .svg or .pdf")

    kind = getattr(load_run(run), "gate", None)
    if kind != "dynamic":
        raise TaskError(f"{run}: trained with gate={kind}; channels are chosen by a run with gate=dynamic")
    tuner = open_run(run)
    task: Any = tuner.task
    gate = next(module for module in task.model.modules() if isinstance(module, DynamicGate))
    if not 1 <= num <= gate.channels:  # before the work is done
        raise TaskError(f"--num={num} must lie in 1..{gate.channels}, the channels of the latent")
    found = count_choices(gate, task.source, (sample.image for sample in once(task.dataset(task.config.train_split))))
    channels = most_chosen(found, num)
    write_choice(out, channels, found, task.config.codec if task.config.latents == "codec" else task.config.latents)
    draw_choice(chart, channels, found)
    return out, chart
