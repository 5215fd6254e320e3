"""Figures for reports: features as colours, curves of accuracy over rate, training curves."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor
from torchvision.io import encode_png

from downstream.results import metric_titles
from pretrain.feature_picture import feature_picture

INK = "#808890"  # readable on light and on dark ground
SERIES = {
    "codec": "#2f7ed8",
    "jpeg": "#d9822b",
    "webp": "#9467bd",
    "avif": "#c23b6b",
    "hevc": "#17a2b8",
    "clean pixels": "#59a14f",
}
OTHERS = ("#6b8e23", "#8c6d31", "#e15759", "#7f7f7f")  # for codecs of other names
MARKERS = {"codec": "o", "jpeg": "s", "webp": "^", "avif": "D", "hevc": "v"}


def pca_picture(features: Tensor, size: int) -> Tensor:
    """(3, size, size) uint8: the first three principal components of features (C, h, w) as red, green and blue."""
    return F.interpolate(feature_picture(features, scale=1)[None], size=(size, size), mode="nearest")[0]


def png(image: Tensor) -> bytes:
    """PNG file of (3, H, W) uint8."""
    return encode_png(image.contiguous()).numpy().tobytes()


def rate_accuracy_figure(results: list[dict[str, Any]], rate_key: str) -> Figure:
    """Accuracy over bits per pixel, a line for each codec; clean pixels as a level line.

    Args:
        rate_key: `bpp_payload`, or `bpp` with every byte of a file.
    """
    metric, title = next(iter(metric_titles(results[0]).items()))
    counted = {"bpp": "whole files", "bpp_payload": "payload"}[rate_key]
    figure, axes = axes_of(f"bits per pixel of the validation images, {counted}", f"{title}, %")
    others = iter(OTHERS)
    for name, rows in grouped(results).items():
        colour = SERIES.get(name) or next(others, INK)
        accuracies = [100 * (row[metric] or 0.0) for row in rows]
        if name == "clean pixels":
            axes.axhline(accuracies[0], color=colour, linestyle="--", linewidth=1.4)
            axes.annotate("clean pixels", (1, accuracies[0]), xycoords=("axes fraction", "data"),
                          xytext=(-4, 4), textcoords="offset points", ha="right", color=colour)  # fmt: skip
            continue
        rows = sorted(rows, key=lambda row: row[rate_key])
        accuracies = [100 * (row[metric] or 0.0) for row in rows]
        rates = [row[rate_key] for row in rows]
        axes.plot(rates, accuracies, color=colour, marker=MARKERS.get(name, "o"), linewidth=1.8, label=name)
        for rate, accuracy, row in zip(rates, accuracies, rows, strict=True):
            if row["anchor"]:  # its quality
                axes.annotate(row["anchor"].partition(":")[2], (rate, accuracy), xytext=(5, -12), color=colour,
                              fontsize=9, textcoords="offset points")  # fmt: skip
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=max(0.0, 10 * (axes.dataLim.ymin // 10)), top=axes.dataLim.ymax + 4)
    axes.legend(frameon=False, labelcolor=INK)
    return figure


def training_figure(rows: list[dict[str, Any]], key: str, label: str) -> Figure:
    """A metric of a run over its steps, one colour a stage; accuracies from zero."""
    figure, axes = axes_of("step", label, height=2.4)
    stages = list(dict.fromkeys(row["stage"] for row in rows if key in row and "stage" in row))
    for stage, colour in zip(stages, [*SERIES.values()] * 2, strict=False):
        chosen = [row for row in rows if row.get("stage") == stage and row.get(key) is not None]
        steps, values = [row["step"] for row in chosen], [row[key] for row in chosen]
        axes.plot(steps, values, color=colour, marker="o" if len(values) < 12 else None, markersize=4, label=stage)
    if key == "knn":
        _from_zero(axes)
    axes.legend(frameon=False, labelcolor=INK, ncols=4, fontsize=9)
    return figure


def _from_zero(axes: Any) -> None:
    """Let the vertical axis begin at zero and end clear of markers and texts."""
    axes.set_ylim(0, 1.15 * axes.dataLim.ymax or 1.0)


def grouped(results: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Results by codec, each in order of rate."""
    groups: dict[str, list[dict[str, Any]]] = {}
    several = len({row["codec"] for row in results if row["input"] == "streams"}) > 1
    for row in sorted(results, key=lambda row: row["bpp"]):
        groups.setdefault(series_of(row, several), []).append(row)
    return groups


def series_of(row: dict[str, Any], several: bool = False) -> str:
    """The codec of a result, or a model's latents, with its gate; jpeg, ...; or clean pixels.

    Args:
        several: codecs are called by their folders.
    """
    if row["input"] == "streams":
        gate = f", {row['gate']} gate, {row['transform']}" if row.get("gate") else ""
        latents = row.get("latents", "codec") if gate else "codec"
        return (row["codec"] if several and latents == "codec" else latents) + gate
    own = ", stem and layer1 trained" if row.get("train_head") else ""
    return (row["anchor"].partition(":")[0] if row["anchor"] else "clean pixels") + own


def axes_of(x_label: str, y_label: str, height: float = 3.4) -> tuple[Figure, Any]:
    """A figure and its axes, readable on a light and on a dark ground."""
    figure = Figure(figsize=(5.8, height), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    axes.set_xlabel(x_label, color=INK)
    axes.set_ylabel(y_label, color=INK)
    axes.tick_params(colors=INK)
    axes.grid(alpha=0.25)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(INK)
    return figure, axes
