"""The report: one self-contained HTML file with curves, tables and pictures; nothing in it is loaded from elsewhere."""

from __future__ import annotations

import base64
import html
import importlib.metadata
import os
import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cluster.files import write_whole
from cluster.metrics import METRICS, read_rows
from data_pipeline.loader import eval_loader
from data_pipeline.views import center_images, normalize
from downstream.errors import TaskError
from downstream.evaluation.pictures import grouped, pca_picture, png, rate_accuracy_svg, training_svg
from downstream.results import metric_titles, read_results, table
from pretrain.codec.feature_codec import FeatureCodec

PICTURE_SIZE = 192
NUM_PICTURES = 5
PACKAGES = ("torch", "timm", "lightly", "compressai", "ray", "webdataset", "grad-cam", "fairscale")

STYLE = """
:root { color-scheme: light dark;
  --ink: #1d2126; --soft: #5c6670; --ground: #fbfbfa; --card: #ffffff; --line: #e2e4e7; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8eaed; --soft: #9aa4ae; --ground: #15181b; --card: #1d2125; --line: #32383e; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .4rem; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .6rem; }
p { margin: .5rem 0; max-width: 46rem; } .soft, figcaption { color: var(--soft); font-size: .9rem; }
figure { margin: 1rem 0; padding: 1rem; background: var(--card); border: 1px solid var(--line); border-radius: .6rem; }
figure svg, figure > img { width: 100%; height: auto; display: block; }
figcaption { margin-top: .6rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .4rem .7rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } th { color: var(--soft); font-weight: 600; font-size: .85rem; }
.tiles { display: grid; grid-template-columns: repeat(4, 1fr); gap: .4rem; }
.tiles img { width: 100%; display: block; border-radius: .25rem; image-rendering: pixelated; }
.tiles div { font-size: .8rem; color: var(--soft); }
pre { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .9rem;
  overflow-x: auto; font-size: .85rem; }
"""


@dataclass
class Report:
    """What a report shows; parts that are empty are left out.

    Attributes:
        results: of fine-tunes, as in their results.json.
        pretraining: run folder whose curves and pictures are shown.
        codecs: exported codecs whose features are shown, on images of `split` of `data`.
        timings: seconds by step.
        commands: that were run.
    """

    title: str
    results: list[dict[str, Any]]
    pretraining: Path | None = None
    codecs: list[Path] = field(default_factory=list)
    data: str | Path | None = None
    timings: dict[str, float] = field(default_factory=dict)
    commands: list[str] = field(default_factory=list)
    split: str = "val"

    def write(self, path: Path) -> None:
        """Write the HTML file, whole or not at all."""
        parts = [self._head(), self._accuracy(), self._guidance(), self._features(), self._training(), self._facts()]
        page = (
            f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
            f'content="width=device-width, initial-scale=1"><title>{html.escape(self.title)}</title>'
            f"<style>{STYLE}</style></head><body><main>{''.join(parts)}</main></body></html>\n"
        )
        try:
            write_whole(path, page)
        except OSError as error:
            raise TaskError(f"{path}: cannot be written ({error.strerror}); name another file with -o") from error

    def _head(self) -> str:
        return (
            f"<h1>{html.escape(self.title)}</h1><p class='soft'>A codec of features, pretrained without labels and "
            "frozen. Tasks read its bitstreams without rebuilding pixels. Rates are those of real streams.</p>"
        )

    def _accuracy(self) -> str:
        if not self.results:
            return ""
        shown = [(row, table(row)) for rows in grouped(self.results).values() for row in rows]
        titles = list(dict.fromkeys(title for _, figures in shown for title in figures))
        rows = [_cells("td", [_label(row), *(figures.get(title, "-") for title in titles)]) for row, figures in shown]
        headline = next(iter(metric_titles(self.results[0]).values()))
        return (
            "<h2>Accuracy over rate</h2>"
            + _figure(
                rate_accuracy_svg(self.results),
                f"{headline} on what is decoded from the codec's streams, and on pixels decoded from other codecs. "
                "Further left and higher is better.",
            )
            + f"<div class='scroll'><table>{_cells('th', ['input', *titles])}"
            f"{''.join(rows)}</table></div><p class='soft'>Whole files "
            "count every byte. Payload leaves out headers, and for pixel codecs what a file of one flat colour "
            "has too.</p>"
        )

    def _guidance(self) -> str:
        pictures = sorted((self.pretraining / "samples").glob("guidance_*.png")) if self.pretraining else []
        if not pictures:
            return ""
        shown = dict.fromkeys([pictures[0], pictures[len(pictures) // 2], pictures[-1]])
        figures = [
            _figure(
                _image(path.read_bytes()),
                f"Step {int(path.stem.removeprefix('guidance_'))}. Above: images with the box (white) and the "
                "two crops that were drawn (green, magenta). Below: the momentum encoder's heatmap, in which red is "
                "most active, and the box in which crops are centred.",
            )
            for path in shown
        ]
        return "<h2>Where crops were guided to</h2>" + "".join(figures)

    def _features(self) -> str:
        if not self.codecs or self.data is None:
            return ""
        return "<h2>What is kept</h2>" + "".join(feature_figure(codec, self.data, self.split) for codec in self.codecs)

    def _training(self) -> str:
        rows = read_rows(self.pretraining / METRICS) if self.pretraining else []
        if not rows:
            return ""
        parts = ["<h2>Pretraining</h2>"]
        if any("knn" in row for row in rows):
            parts.append(
                _figure(
                    training_svg(rows, "knn", "kNN accuracy"), "kNN accuracy of the frozen features after each stage."
                )
            )
        parts.append(
            _figure(training_svg(rows, "loss", "loss"), "Loss of each stage; stages minimise different things.")
        )
        parts.append(_figure(training_svg(rows, "bpp", "estimated bpp"), "Estimated rate: of y1 while the redundancy "
                             "elimination learns, of y2 and z while the compression network does."))  # fmt: skip
        return "".join(parts)

    def _facts(self) -> str:
        parts = ["<h2>How this was made</h2>"]
        if self.timings:
            rows = "".join(
                f"<tr><td>{html.escape(name)}</td><td>{seconds:.0f} s</td></tr>"
                for name, seconds in self.timings.items()
            )
            total = f"<tr><td>in all</td><td>{sum(self.timings.values()):.0f} s</td></tr>"
            parts.append(f"<div class='scroll'><table><tr><th>step</th><th>time</th></tr>{rows}{total}</table></div>")
        if self.commands:
            parts.append(f"<pre>{html.escape(chr(10).join(self.commands))}</pre>")
        versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
        parts.append(
            f"<p class='soft'>Python {platform.python_version()}, {versions}; "
            f"{len(os.sched_getaffinity(0))} CPU cores, {device}.</p>"
        )
        return "".join(parts)


@torch.inference_mode()
def feature_figure(codec_folder: Path, data: str | Path, split: str) -> str:
    """f1, f2 and f3 of a few images of a split as colours, beside the image and its stream's size."""
    codec = FeatureCodec.from_pretrained(codec_folder)
    size = codec.extra.get("image_size", 224)
    canvas_size = codec.extra.get("canvas_size", size)
    batch = next(iter(eval_loader(data, split, canvas_size=canvas_size, batch_size=NUM_PICTURES, limit=NUM_PICTURES)))
    images = center_images(batch.canvas, batch.aspect, size)
    streams = codec.encode_batch(images)
    f3 = codec.decode_batch(streams)
    output = codec(normalize(images.float().div(255)))
    tiles = []
    for i, stream in enumerate(streams):
        large = torch.nn.functional.interpolate(images[i : i + 1], size=(PICTURE_SIZE, PICTURE_SIZE), mode="nearest")[0]
        named = {
            "image": large,
            "f1": pca_picture(output.f1[i], PICTURE_SIZE),
            "f2": pca_picture(output.f2[i], PICTURE_SIZE),
            f"f3, {len(stream)} bytes": pca_picture(f3[i], PICTURE_SIZE),
        }
        tiles += [f"<div>{_image(png(picture))}{html.escape(name)}</div>" for name, picture in named.items()]
    bpp = 8 * sum(map(len, streams)) / len(streams) / size**2
    return (
        f"<figure><div class='tiles'>{''.join(tiles)}</div><figcaption>{html.escape(codec_folder.name)}: f1 behind the "
        f"backbone's head, f2 after redundancy elimination, f3 decoded from the bitstream ({bpp:.3f} bpp here). "
        "Colours are the three principal components of each.</figcaption></figure>"
    )


def report_of_runs(runs: list[Path], out: Path, pretraining: Path | None) -> None:
    """Write the report of fine-tuned runs (TaskError where one has no results)."""
    results = [read_results(folder) for folder in runs]
    tasks = list(dict.fromkeys(row["task"] for row in results))
    if len(tasks) > 1:
        raise TaskError(f"runs of {' and '.join(tasks)} have different metrics; write a report for each task")
    if pretraining is not None and not (pretraining / METRICS).is_file():
        raise TaskError(f"{pretraining}: not a run folder of `dicm pretrain` (no {METRICS})")
    named = dict.fromkeys(row["codec"] for row in results if row["input"] == "streams" and row["codec"])
    codecs = [Path(codec) for codec in named if Path(codec).is_dir()]
    split = results[0].get("val_split", "val")
    Report("Rate and accuracy", results, pretraining, codecs, results[0]["data"], split=split).write(out)


def _label(row: dict[str, Any]) -> str:
    name = row["anchor"] or "clean pixels"
    if row["input"] == "streams":
        latents = row.get("latents", "codec")
        name = "streams of " + (Path(row["codec"]).name if latents == "codec" else latents)
        if row.get("gate"):
            name += f", gate {row['gate']}, {row['transform']}"
    if row.get("rate") is not None:
        name += f", rate {row['rate']:g}"
    return f"{name}, linear probe" if row.get("probe") else name


def _cells(tag: str, texts: list[str]) -> str:
    return f"<tr>{''.join(f'<{tag}>{html.escape(text)}</{tag}>' for text in texts)}</tr>"


def _figure(content: str, caption: str) -> str:
    return f"<figure>{content}<figcaption>{html.escape(caption)}</figcaption></figure>"


def _image(data: bytes) -> str:
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(data).decode()}">'
