"""Sections of a report on sweeps: curves, BD tables, pictures at equal rates, channel choices.

In: folders of `dicm evaluate TASK`. Several of one task and data set are put together: codecs, seeds and ablations may
have been swept apart. Tables have the shape of the papers': BD-rate and BD-accuracy of every codec on every data set
(DICM, Tables I and II), bits, accuracy, time and multiply-adds of gates, and what they save against each other and
against pixels (Liu, Fig. 5, Tables 1 to 3).

Sources: DICM (Tang, Yi, Wang 2025); Liu, Sun, Katto 2022.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from downstream import finetune
from downstream.errors import TaskError
from downstream.evaluation.anchors import is_anchor
from downstream.evaluation.document import Block, Picture, Plot, Section, Table, Text, Tiles
from downstream.evaluation.pictures import INK, axes_of, png
from downstream.evaluation.points import data_of, point_name
from downstream.evaluation.rate_accuracy import Curve, Delta, check_seeds, curves_of, deltas, rate_at
from downstream.evaluation.sweep import OPTIONS, POINTS, TABLE
from downstream.latent_config import LatentConfig
from downstream.results import percent
from downstream.tasks import task_class

COLOURS = ("#2f7ed8", "#d9822b", "#59a14f", "#c23b6b", "#9467bd", "#17a2b8", "#8c6d31", "#7f7f7f")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
NUM_PICTURES = 2
MOST_COLUMNS = 5
PICTURE_SCORE = 0.5
NAMES = {"adapted": "task adapted to each codec", "frozen": "one task network, trained on clean pixels"}


def is_sweep(folder: Path) -> bool:
    """Whether `folder` is one of `dicm evaluate TASK`."""
    return (folder / OPTIONS).is_file()


def read_sweep(folder: Path) -> list[dict[str, Any]]:
    """The rows of a sweep, each with the folder of its fine-tune (TaskError: it has none yet)."""
    path = folder / TABLE[1]
    try:
        rows = list(json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        raise TaskError(f"{path}: cannot be read ({error}); finish the sweep with `dicm evaluate`") from error
    return [
        {**row, "folder": str(folder / POINTS / row["run"] / point_name(row["codec"], row["quality"], row["protocol"]))}
        for row in rows
    ]


def read_sweeps(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """The rows of several sweeps, those that two of them share once.

    Raises:
        TaskError: one codec's rows contradict, would be averaged as seeds and are none, or are of different data sets
            that have one name.
    """
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    data: dict[tuple[str, str], tuple[str, str]] = {}
    for folder in folders:
        for row in read_sweep(folder):
            if (content := data_of(row["folder"])) is not None:
                first_content, other = data.setdefault((row["task"], row["data"]), (content, row["folder"]))
                if content != first_content:
                    raise TaskError(
                        f"{other} and {row['folder']} are on different data sets, both called {row['data']}; report "
                        "each by itself"
                    )
            key = tuple(row[name] for name in ("task", "data", "run", "seed", "codec", "quality", "protocol"))
            first = found.setdefault(key, row)
            if any(first[name] != row[name] for name in ("value", "bpp", "bpp_payload")):
                name = " ".join(part for part in (row["codec"], row["quality"], row["protocol"]) if part)
                raise TaskError(
                    f"{first['folder']} and {row['folder']} both are {name} of run {row['run']} and differ; they would "
                    "be averaged as seeds: sweep one with another label=, or leave it out"
                )
    check_seeds(found.values())
    return list(found.values())


def sweep_sections(folders: Sequence[Path], against: str, ablations: Sequence[str] = ()) -> list[Section]:
    """Everything that is told of sweeps.

    Args:
        against: the anchor of BD tables.
        ablations: codecs that are the whole one without a part; they get a table of their own against the first
            codec that is neither an anchor nor one of them.
    """
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in read_sweeps(folders):
        groups[row["task"], row["data"]].append(row)
    codecs = list(dict.fromkeys(row["codec"] for rows in groups.values() for row in rows))
    for name in ablations:
        if name not in codecs:
            raise TaskError(f"--ablation {name}: no codec of these sweeps is called so; they have {', '.join(codecs)}")
    sections = [*bd_sections(groups, against, ablations)]
    for (task, data), rows in groups.items():
        if whole := [row for row in rows if row["codec"] not in ablations]:
            sections.append(curve_section(task, data, whole))
            sections.append(picture_section(task, data, whole))
    sections.append(choice_section(folders))
    return sections


def bd_sections(
    groups: dict[tuple[str, str], list[dict[str, Any]]], against: str, ablations: Sequence[str]
) -> list[Section]:
    """Tables I and II: a row for each codec, a column for each task and data set; and the ablations'."""
    columns = {f"{task}, {data}": curves_of(rows) for (task, data), rows in groups.items()}
    protocols = list(dict.fromkeys(curve.protocol for curves in columns.values() for curve in curves))
    blocks: list[Block] = []
    for protocol in protocols:
        found: dict[str, dict[str, Delta]] = defaultdict(dict)
        for title, curves in columns.items():
            for curve, gain in deltas([curve for curve in curves if curve.protocol == protocol], against):
                if curve.codec not in ablations:
                    found[curve.codec][title] = gain
        if found:
            blocks += _delta_tables(found, list(columns), f"{NAMES.get(protocol, protocol)}, against {against}")
    if not any(curve.codec == against for curves in columns.values() for curve in curves):
        blocks.append(Text(f"Nothing to compare with: no sweep has {against}.", soft=True))
    sections = [Section(f"What each codec saves against {against}", blocks)]
    if ablations:
        sections.append(ablation_section(columns, ablations))
    return sections


def _delta_tables(found: dict[str, dict[str, Delta]], titles: list[str], what: str) -> list[Block]:
    rate_rows, accuracy_rows, notes = [], [], dict[str, None]()
    for codec, gains in found.items():
        rate_rows.append([codec, *(gains[title].rate_text if title in gains else "-" for title in titles)])
        accuracy_rows.append([codec, *(gains[title].accuracy_text if title in gains else "-" for title in titles)])
        for title, gain in gains.items():
            notes.update(dict.fromkeys(f"{codec} on {title}: {warning}" for warning in gain.warnings))
    return [
        Table([f"BD-rate, {what}", *titles], rate_rows),
        Table([f"BD-accuracy, {what}", *titles], accuracy_rows),
        *(Text(note, soft=True) for note in notes),
    ]


def ablation_section(columns: dict[str, list[Curve]], ablations: Sequence[str]) -> Section:
    """BD-rate of the codec without a part, against the whole one: above zero is worse."""
    rows, notes = [], []
    for name in ablations:
        cells = []
        for title, curves in columns.items():
            whole = next((c.codec for c in curves if not is_anchor(c.codec) and c.codec not in ablations), None)
            pairs = deltas([curve for curve in curves if curve.codec in (whole, name)], whole or "")
            gains = [gain for curve, gain in pairs if curve.codec == name and curve.protocol == "adapted"]
            cells.append(gains[0].rate_text if gains else "-")
            notes += [f"{name} on {title}: {warning}" for gain in gains for warning in gain.warnings]
        rows.append([name, *cells])
    table = Table(["BD-rate against the whole codec", *columns], rows)
    return Section("Ablations", [table, *(Text(note, soft=True) for note in notes)])


def curve_section(task: str, data: str, rows: list[dict[str, Any]]) -> Section:
    """Curves of every protocol, and the table behind them."""
    blocks: list[Block] = []
    curves = curves_of(rows)
    metric = task_class(task).metrics[rows[0]["metric"]]
    seeds = len({row["seed"] for row in rows})
    for protocol in dict.fromkeys(curve.protocol for curve in curves):
        chosen = [curve for curve in curves if curve.protocol == protocol]
        caption = (
            f"{metric} of {task} on {data}, {NAMES.get(protocol, protocol)}; bits of payloads, on a logarithmic scale. "
            f"Means over up to {seeds} seed(s), bars are standard deviations. Hollow points are beaten by another one "
            "of the same codec and are left out of BD-rates."
        )
        blocks.append(Plot(curves_figure(chosen, metric), caption, f"{task}_{data}_{protocol}"))
    blocks.append(point_table(rows, metric))
    if issubclass(task_class(task).Config, LatentConfig):
        blocks.append(savings_table([curve for curve in curves if curve.protocol == "adapted"]))
    return Section(f"{task.replace('_', ' ').capitalize()}: {data}", blocks)


def curves_figure(curves: Sequence[Curve], metric: str) -> Any:
    """Accuracy over bits per pixel, a line for each codec along its best points."""
    figure, axes = axes_of("bits per pixel, payload", f"{metric}, %")
    for number, curve in enumerate(curves):
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        best = curve.frontier()
        axes.plot(
            [point.bpp for point in best], [100 * point.accuracy for point in best], color=colour, linewidth=1.8,
            label=curve.codec,
        )  # fmt: skip
        for point in curve.points:
            axes.errorbar(
                point.bpp, 100 * point.accuracy, yerr=100 * point.accuracy_spread or None, color=colour, marker=marker,
                markerfacecolor=colour if point in best else "none", capsize=2, linestyle="none",
            )  # fmt: skip
    axes.set_xscale("log")
    axes.legend(frameon=False, labelcolor=INK, fontsize=9)
    return figure


def point_table(rows: list[dict[str, Any]], metric: str) -> Table:
    """Every point: rates with and without headers, accuracy, times, multiply-adds."""
    payload, whole = curves_of(rows), {(c.codec, c.protocol): c for c in curves_of(rows, "bpp")}
    lines = []
    for curve in payload:
        totals = {point.quality: point.bpp for point in whole[curve.codec, curve.protocol].points}
        for point in curve.points:
            of_point = [
                row for row in rows
                if (row["codec"], row["protocol"], row["quality"]) == (curve.codec, curve.protocol, point.quality)
            ]  # fmt: skip
            spread = f" ± {100 * point.accuracy_spread:.1f}" if point.num_seeds > 1 else ""
            name = " ".join(part for part in (curve.codec, point.quality) if part)
            lines.append([
                name, curve.protocol, f"{totals[point.quality]:.4f}",
                f"{point.bpp:.4f}", percent(point.accuracy) + spread, str(point.num_seeds),
                *(_mean(of_point, key, digits) for key, digits in _COSTS),
            ])  # fmt: skip
    header = [
        "codec", "protocol", "bpp, whole files", "bpp, payload", metric, "seeds", "encoding, ms",
        "decoding and task, ms", "encoder, MAC/px", "decoder and task, MAC/px",
    ]  # fmt: skip
    return Table(header, lines)


_COSTS = (("encode_ms", 1), ("decode_ms", 1), ("encode_macs", 0), ("decode_macs", 0))


def _mean(rows: list[dict[str, Any]], key: str, digits: int) -> str:
    values = [row[key] for row in rows if row.get(key) is not None]
    return f"{sum(values) / len(values):.{digits}f}" if values else "-"


def picture_section(task: str, data: str, rows: list[dict[str, Any]]) -> Section:
    """A few images under each codec at about the same rate, with what the adapted task sees in them."""
    chosen = at_equal_rate([row for row in rows if row["protocol"] == "adapted"])
    columns = min(len(chosen) + 1, MOST_COLUMNS)
    tiles: list[tuple[bytes, str]] = []
    shown = chosen[: MOST_COLUMNS - 1]
    for pictures in zip(*(predicted(Path(row["folder"]), NUM_PICTURES) for row in shown), strict=True):
        tiles.append((png(pictures[0][0]), "image"))
        for row, (_, drawn, num_bytes) in zip(shown, pictures, strict=True):
            tiles.append((png(drawn), f"{row['codec']} {row['quality']}, {num_bytes} bytes"))
    if not tiles:
        return Section(f"Pictures: {data}", [])
    caption = (
        "The same images at about the same rate under each codec, with the prediction of the task adapted to it drawn "
        "on what the task reads: decoded pixels, or the features of the stream in false colours."
    )
    return Section(f"Pictures: {data}", [Tiles(tiles, columns, caption, f"pictures_{task}_{data}")])


def at_equal_rate(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row of each codec, those nearest to the rate that the codec with the highest least rate begins at."""
    by_codec: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        if row["bpp_payload"] > 0 and (Path(row["folder"]) / "config.yaml").is_file():
            by_codec[row["codec"]].append(row)
    if not by_codec:
        return []
    target = math.log(max(min(row["bpp_payload"] for row in found) for found in by_codec.values()))
    return [min(found, key=lambda row: abs(math.log(row["bpp_payload"]) - target)) for found in by_codec.values()]


@torch.no_grad()
def predicted(run: Path, count: int) -> list[tuple[Tensor, Tensor, int]]:
    """The first `count` validation images, a run's predictions drawn on what it reads, and the streams' bytes."""
    task = finetune.open_run(run).task
    task.model.eval()
    found = []
    for example in task.examples(count):
        image = example.cpu()
        stream = task.stream_of(image)
        received, height, width = task.receive_stream(stream)
        ground = task.picture(received, height, width)
        if task.config.input == "pixels":
            ground = image if task.config.anchor is None else task.source.decode_pixels(stream)
        drawn = task.draw(ground.cpu(), task.predict(received, height, width), PICTURE_SCORE)
        found.append((image, drawn, len(stream)))
    return found


def choice_section(folders: Sequence[Path]) -> Section:
    """The charts of channels that static gates took over."""
    charts = dict.fromkeys(path for folder in folders for path in sorted((folder / POINTS).glob("*/*static*.png")))
    return Section(
        "Which channels gates choose",
        [
            Picture(path.read_bytes(), f"{path.parent.name}: {path.stem}.", f"channels_{number}_{path.stem}")
            for number, path in enumerate(charts)
        ],
    )


def savings_table(curves: Sequence[Curve]) -> Table:
    """What each curve saves against each other one: the claims made of gates, which have few points for a BD-rate."""
    lines = []
    for ours in curves:
        cells = []
        for theirs in curves:
            saved = None if theirs is ours else savings_at(ours, theirs)
            cells.append("-" if saved is None else f"{100 * saved[1]:.1f} % (at {100 * saved[0]:.1f} %)")
        lines.append([ours.codec, *cells])
    return Table(
        ["bits saved, at the best accuracy that both reach, against", *(curve.codec for curve in curves)], lines
    )


def savings_at(ours: Curve, theirs: Curve) -> tuple[float, float] | None:
    """At the best accuracy that both reach: that accuracy, and the share of `theirs` bits that `ours` saves.

    Where `ours` is above it from its lowest rate on, it is counted with that rate, though fewer bits might do. None
    where all of `theirs` is above `ours`.
    """
    points = ours.frontier()
    accuracy = min(points[-1].accuracy, theirs.frontier()[-1].accuracy)
    rates = rate_at(ours, max(accuracy, points[0].accuracy)), rate_at(theirs, accuracy)
    if rates[0] is None or rates[1] is None:
        return None
    return accuracy, 1 - rates[0] / rates[1]
