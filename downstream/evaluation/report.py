"""The report: one self-contained HTML file with curves, tables and pictures; nothing in it is loaded from elsewhere."""

from __future__ import annotations

import importlib.metadata
import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cluster.machine import num_cpus
from cluster.metrics import METRICS, read_rows
from data_pipeline.loader import eval_loader
from data_pipeline.views import center_images, normalize
from downstream.errors import TaskError
from downstream.evaluation.document import Block, Code, Document, Picture, Plot, Section, Table, Text, Tiles
from downstream.evaluation.pictures import grouped, pca_picture, png, rate_accuracy_figure, training_figure
from downstream.results import metric_titles, read_results, table
from pretrain.codec.feature_codec import FeatureCodec

PICTURE_SIZE = 192
NUM_PICTURES = 5
LEAD = (
    "A codec of features, pretrained without labels and frozen. Tasks read its bitstreams without rebuilding pixels. "
    "Rates are those of real streams."
)
PACKAGES = ("torch", "timm", "lightly", "compressai", "ray", "webdataset", "grad-cam", "fairscale")


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

    def document(self) -> Document:
        """The report as a document."""
        found = [self._accuracy(), self._guidance(), self._features(), self._training(), self._facts()]
        return Document(self.title, LEAD, [section for section in found if section is not None])

    def write(self, path: Path) -> None:
        """Write the HTML file, whole or not at all."""
        self.document().write_html(path)

    def _accuracy(self) -> Section | None:
        if not self.results:
            return None
        shown = [(row, table(row)) for rows in grouped(self.results).values() for row in rows]
        titles = list(dict.fromkeys(title for _, figures in shown for title in figures))
        rows = [[_label(row), *(figures.get(title, "-") for title in titles)] for row, figures in shown]
        headline = next(iter(metric_titles(self.results[0]).values()))
        return Section(
            "Accuracy over rate",
            [
                Plot(
                    rate_accuracy_figure(self.results, "bpp_payload"),
                    f"{headline} on what is decoded from the codec's streams, and on pixels decoded from other codecs, "
                    "over the bits of payloads: without headers, and for pixel codecs without what a file of one flat "
                    "colour has too. Numbers are qualities. Further left and higher is better." + _noise(self.results),
                    "accuracy",
                ),
                Plot(
                    rate_accuracy_figure(self.results, "bpp"),
                    "The same over whole files, with every byte. Files of small images are mostly headers: compare "
                    "codecs by the payload.",
                    "accuracy_files",
                ),
                Table(["input", *titles], rows),
            ],
        )

    def _guidance(self) -> Section | None:
        return None if self.pretraining is None else guidance_section(self.pretraining)

    def _features(self) -> Section | None:
        if not self.codecs or self.data is None:
            return None
        return Section(
            "What is kept",
            [feature_tiles(codec, self.data, self.split, f"features_{n}") for n, codec in enumerate(self.codecs)],
        )

    def _training(self) -> Section | None:
        rows = read_rows(self.pretraining / METRICS) if self.pretraining else []
        if not rows:
            return None
        captions = {
            "knn": ("kNN accuracy", "kNN accuracy of the frozen features after each stage."),
            "loss": ("loss", "Loss of each stage; stages minimise different things."),
            "bpp": ("estimated bpp", "Estimated rate: of y1 while the redundancy elimination learns, of y2 and z while "
                                     "the compression network does."),
        }  # fmt: skip
        return Section(
            "Pretraining",
            [
                Plot(training_figure(rows, key, label), caption, f"training_{key}")
                for key, (label, caption) in captions.items()
                if any(key in row for row in rows)
            ],
        )

    def _facts(self) -> Section:
        return facts_section(self.timings, self.commands)


def guidance_section(pretraining: Path) -> Section | None:
    """Pictures of heatmaps, boxes and crops of a pretraining, of its begin, middle and end."""
    pictures = sorted((pretraining / "samples").glob("guidance_*.png"))
    if not pictures:
        return None
    shown = dict.fromkeys([pictures[0], pictures[len(pictures) // 2], pictures[-1]])
    return Section(
        "Where crops were guided to",
        [
            Picture(
                path.read_bytes(),
                f"Step {int(path.stem.removeprefix('guidance_'))}. Above: images with the box (white) and the "
                "two crops that were drawn (green, magenta). Below: the momentum encoder's heatmap, in which red is "
                "most active, and the box in which crops are centred.",
                path.stem,
            )
            for path in shown
        ],
    )


def facts_section(timings: dict[str, float], commands: list[str]) -> Section:
    """Seconds by step, commands, and the machine with its packages."""
    blocks: list[Block] = []
    if timings:
        rows = [[name, f"{seconds:.0f} s"] for name, seconds in timings.items()]
        blocks.append(Table(["step", "time"], [*rows, ["in all", f"{sum(timings.values()):.0f} s"]]))
    if commands:
        blocks.append(Code("\n".join(commands)))
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    cores = num_cpus()
    blocks.append(Text(f"Python {platform.python_version()}, {versions}; {cores} CPU cores, {device}.", soft=True))
    return Section("How this was made", blocks)


@torch.inference_mode()
def feature_tiles(codec_folder: Path, data: str | Path, split: str, name: str) -> Tiles:
    """f1, f2 (where the codec has it) and f3 of a few images of a split as colours, beside image and stream's size."""
    codec = FeatureCodec.from_pretrained(codec_folder)
    size = codec.extra.get("image_size", 224)
    canvas_size = codec.extra.get("canvas_size", size)
    batch = next(iter(eval_loader(data, split, canvas_size=canvas_size, batch_size=NUM_PICTURES, limit=NUM_PICTURES)))
    images = center_images(batch.canvas, batch.aspect, size)
    streams = codec.encode_batch(images)
    f3 = codec.decode_batch(streams)
    output = codec(normalize(images.float().div(255)))
    tiles: list[tuple[bytes, str]] = []
    for i, stream in enumerate(streams):
        large = torch.nn.functional.interpolate(images[i : i + 1], size=(PICTURE_SIZE, PICTURE_SIZE), mode="nearest")[0]
        named = {"image": large, "f1": pca_picture(output.f1[i], PICTURE_SIZE)}
        if codec.redundancy is not None:
            named["f2"] = pca_picture(output.f2[i], PICTURE_SIZE)
        named[f"f3, {len(stream)} bytes"] = pca_picture(f3[i], PICTURE_SIZE)
        tiles += [(png(picture), words) for words, picture in named.items()]
    bpp = 8 * sum(map(len, streams)) / len(streams) / size**2
    eliminated = "" if codec.redundancy is None else "f2 after redundancy elimination, "
    caption = (
        f"{codec_folder.name}: f1 behind the backbone's head, {eliminated}f3 decoded from the bitstream "
        f"({bpp:.3f} bpp here). Colours are the three principal components of each."
    )
    return Tiles(tiles, 3 if codec.redundancy is None else 4, caption, name)


def document_of(folders: list[Path], pretraining: Path | None, against: str, ablations: list[str]) -> Document:
    """The report of runs, or of sweeps (TaskError: some of each, or a folder that is neither)."""
    from downstream.evaluation.sweep_report import is_sweep

    if pretraining is not None and not (pretraining / METRICS).is_file():
        raise TaskError(f"{pretraining}: not a run folder of `dicm pretrain` (no {METRICS})")
    sweeps = [folder for folder in folders if is_sweep(folder)]
    if not sweeps:
        return report_of_runs(folders, pretraining)
    if runs := [folder for folder in folders if folder not in sweeps]:
        raise TaskError(f"{runs[0]} is no sweep as {sweeps[0]} is; write a report for runs and one for sweeps")
    return report_of_sweeps(sweeps, pretraining, against, ablations)


def report_of_runs(runs: list[Path], pretraining: Path | None) -> Document:
    """The report of fine-tuned runs (TaskError where one has no results)."""
    results = [read_results(folder) for folder in runs]
    for folder, row in zip(runs, results, strict=True):
        if not metric_titles(row):
            raise TaskError(
                f"{folder}: a run of `{row['task']}` has no accuracy; `dicm evaluate` compares codecs of pixels with "
                "anchors=NAME:QUALITY"
            )
    tasks = list(dict.fromkeys(row["task"] for row in results))
    if len(tasks) > 1:
        raise TaskError(f"runs of {' and '.join(tasks)} have different metrics; write a report for each task")
    sets = list(dict.fromkeys(row["data"] for row in results))
    if len(sets) > 1:
        raise TaskError(f"runs on {' and '.join(sets)} cannot share a curve; write a report for each data set")
    named = dict.fromkeys(row["codec"] for row in results if row["input"] == "streams" and row["codec"])
    codecs = [Path(codec) for codec in named if Path(codec).is_dir()]
    split = results[0].get("val_split", "val")
    return Report("Rate and accuracy", results, pretraining, codecs, results[0]["data"], split=split).document()


def report_of_sweeps(
    folders: list[Path], pretraining: Path | None, against: str, ablations: list[str], commands: list[str] | None = None
) -> Document:
    """The report of sweeps (TaskError where one has no table)."""
    from downstream.evaluation.sweep_report import sweep_sections  # needs what only sweeps do

    sections = sweep_sections(folders, against, ablations)
    if pretraining is not None and (guided := guidance_section(pretraining)) is not None:
        sections.append(guided)
    return Document("Rate and accuracy", LEAD, [*sections, facts_section({}, commands or [])])


def _noise(results: list[dict[str, Any]]) -> str:
    """What chance does to fractions of correct images: their binomial standard error, in points."""
    if "top1" not in results[0]:
        return ""
    error = max((row["top1"] * (1 - row["top1"]) / row["images"]) ** 0.5 for row in results)
    return f" The standard error of an accuracy is up to {100 * error:.1f} points."


def _label(row: dict[str, Any]) -> str:
    name = row["anchor"] or "clean pixels"
    if row["input"] == "streams":
        latents = row.get("latents", "codec")
        name = "streams of " + (Path(row["codec"]).name if latents == "codec" else latents)
        if row.get("gate"):
            name += f", gate {row['gate']}, {row['transform']}"
    if row.get("train_head"):
        name += ", stem and layer1 trained"
    if row.get("rate") is not None:
        name += f", rate {row['rate']:g}"
    return f"{name}, linear probe" if row.get("probe") else name
