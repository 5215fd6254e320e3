"""The points of a sweep: every codec at every rate under every protocol, from every base run."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import MISSING
from torch import nn

from cluster.recipes import load_config
from downstream.compressai_models import MODELS
from downstream.errors import TaskError
from downstream.evaluation.anchors import AnchorSpec, check_anchor, is_anchor
from downstream.inputs import read_inputs
from downstream.latent_config import LatentConfig
from downstream.results import read_results
from downstream.runs import load_run
from downstream.tasks import task_class
from downstream.tasks.semantic_segmentation import TEACHER
from pretrain.codec.feature_codec import FeatureCodec

PROTOCOLS = ("frozen", "adapted")
DEFAULT_RATES = (0.0, 0.25, 0.5, 0.75, 1.0)
LABEL = re.compile(r"[A-Za-z0-9][\w .+-]*", re.ASCII)  # also names folders
# What a point sets itself, or what must be the same under both protocols; and what must be so for all codecs.
OWN_OPTIONS = {
    "task", "data", "codec", "run", "input", "anchor", "anchor_weights", "rate", "init", "epochs", "checkpoints",
    "gate", "num_channels", "channels", "seed", "val_split", "classes", "cache_folder",
}  # fmt: skip
COMMON_OPTIONS = {
    "train_split", "image_size", "canvas_size", "short_side", "max_side", "height", "width", "scale_min", "scale_max",
    "flip",
}  # fmt: skip


@dataclass
class SweepConfig:
    """What a sweep covers."""

    task: str = MISSING
    runs: list[str] = field(default_factory=list)  # complete fine-tunes on clean pixels, one for each seed
    out: str = "runs/sweep"  # running again with the same one goes on
    anchors: list[str] = field(default_factory=list)  # names, or NAME:QUALITY[@SCALE]
    qualities: list[str] = field(default_factory=list)  # for anchors that were given without one: 37, 42@0.5
    anchor_weights: str = "zoo"  # of models of CompressAI's; or a folder with NAME-QUALITY.safetensors
    streams: bool = True  # the runs' own codecs too
    codec: str | None = None  # exported codec of the same backbone, in place of the runs' own
    label: str = "dicm"  # what tables call these codecs
    rates: list[float] = field(default_factory=list)  # of a codec with a range of them; five by default
    gates: list[str] = field(default_factory=list)  # of tasks that read latents: dynamic, none, static:N, variance:N
    protocols: list[str] = field(default_factory=lambda: list(PROTOCOLS))
    epochs: int = 5  # protocol adapted
    options: list[str] = field(default_factory=list)  # further options of every adapted run: lr=0.01
    anchor_options: list[str] = field(default_factory=list)  # and of those on pixels: train_head=true,cache=bitstreams
    stream_options: list[str] = field(default_factory=list)  # and of those on streams: transform=synthesis
    against: str = "hevc"  # the anchor that BD-rates are relative to
    parallel: int = 1  # points at a time; they share the cores, or the GPU

    def validate(self) -> None:
        """Refuse what cannot work, before any work starts (TaskError)."""
        if not task_class(self.task).metrics:
            raise TaskError(f"task={self.task} has no accuracy to measure; sweep one of the vision tasks")
        if not self.runs:
            raise TaskError("runs is empty; name complete runs of `dicm finetune ... input=pixels`: runs=a,b")
        for protocol in self.protocols:
            if protocol not in PROTOCOLS:
                raise TaskError(f"protocols={protocol} is unknown; use one of {', '.join(PROTOCOLS)}")
        name = self.label.split(" ")[0]
        if not LABEL.fullmatch(self.label) or is_anchor(name):
            raise TaskError(
                f"label={self.label} is impossible; use letters, digits, spaces and ._+-, and not the name of an anchor"
            )
        for key in ("options", "anchor_options", "stream_options"):
            for option in getattr(self, key):
                if (name := option.partition("=")[0]) in OWN_OPTIONS:
                    raise TaskError(f"{key}={option} is impossible; a sweep or its runs say what it is, leave it out")
                if name in COMMON_OPTIONS and key != "options":
                    raise TaskError(f"{key}={option} is impossible; it must be the same for all codecs, use options=")
        for key in ("epochs", "parallel"):
            if getattr(self, key) < 1:
                raise TaskError(f"{key}={getattr(self, key)} is impossible; it must be at least 1")
        for text in self.specs():
            check_anchor(text)
        for rate in self.rates:
            if not 0 <= rate <= 1:
                raise TaskError(f"rates={rate:g} is impossible; rates lie in 0..1")
        for text in self.gates:
            gate_options(text)
        if self.gates and not issubclass(task_class(self.task).Config, LatentConfig):
            raise TaskError(f"gates={self.gates} with task={self.task}: it reads no latents; leave them out")
        if not self.specs() and not self.streams:
            raise TaskError("streams=false without anchors leaves nothing to measure; name anchors=jpeg:10,jpeg:30")

    def specs(self) -> list[str]:
        """Every anchor with every quality."""
        bare = [name for name in self.anchors if ":" not in name]
        if bare and not self.qualities:
            raise TaskError(f"anchors={bare[0]} has no quality; give qualities=40,47 or anchors={bare[0]}:40")
        pairs = [f"{name}:{quality}" for name in bare for quality in self.qualities]
        return [*(name for name in self.anchors if ":" in name), *pairs]


@dataclass(frozen=True)
class Point:
    """A network on what one codec leaves of an image, at one rate.

    Attributes:
        run: base run.
        codec, quality: as tables name them: "hevc" and "42@0.5"; "dicm" or "dicm static 32" and a rate, if any.
        options: of the fine-tune, over those of the base run.
        waits_for: name of the point whose gate chooses this one's channels.
    """

    run: str
    codec: str
    quality: str
    protocol: str
    options: tuple[str, ...]
    waits_for: str | None = None

    @property
    def name(self) -> str:
        """Of its folder, in that of its base run."""
        return point_name(self.codec, self.quality, self.protocol)


def run_name(run: str) -> str:
    """The last part of a path, also of one that is written as "." or "a/.."."""
    return Path(os.path.abspath(run)).name  # `resolve` would follow links to other names


def point_name(codec: str, quality: str, protocol: str) -> str:
    """Of a point's folder, by the columns of its row."""
    return "-".join([codec.replace(" ", "_"), *([quality] if quality else []), protocol])


def resolve(task: str, overrides: list[str]) -> SweepConfig:
    """The options of `dicm evaluate TASK key=value ...`, checked (RecipeError, TaskError)."""
    return load_config(SweepConfig, None, [f"task={task}", *overrides], Path())


def points_of(config: SweepConfig) -> list[Point]:
    """The points of a sweep, each once.

    Raises:
        TaskError: a base run is missing, incomplete or not on clean pixels; two would be averaged that are not seeds.
    """
    names = [run_name(run) for run in config.runs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise TaskError(f"runs has two folders called {twice[0]}; points are filed under these names, rename one")
    bases = {run: _base(config.task, Path(run)) for run in config.runs}
    _check_alike(bases)
    points: list[Point] = []
    for run, base in bases.items():
        points += [
            point for point in (*_anchor_points(config, run), *_own_points(config, run, base))
            if point.protocol in config.protocols
        ]  # fmt: skip
    if not points:
        raise TaskError(
            f"protocols={','.join(config.protocols)} leaves no point; gated latents have no head in common with "
            "others, use protocols=adapted or name anchors"
        )
    return list({(point.run, point.name): point for point in points}.values())


def _check_alike(bases: dict[str, Any]) -> None:
    """Refuse (TaskError) runs of one seed, of different data or seen otherwise: tables average runs as seeds."""
    seeds: dict[int, str] = {}
    first = next(iter(bases))
    for run, base in bases.items():
        other = seeds.setdefault(base.seed, run)
        if other != run:
            raise TaskError(
                f"runs={other} and {run} have one seed, and would be averaged as if they were two; fine-tune with "
                "seeds of their own (seed=1), or sweep each by itself, with a label= of its own"
            )
        if data_of(run) != data_of(first):
            raise TaskError(
                f"runs={first} and {run} were trained on different data ({bases[first].data}, {base.data}); sweep "
                "each by itself, with an out= of its own"
            )
        for key in sorted({"val_split", *COMMON_OPTIONS}):
            values = [getattr(each, key, None) for each in (bases[first], base)]
            if values[0] != values[1]:
                raise TaskError(
                    f"runs={first} and {run} differ in {key} ({values[0]}, {values[1]}) and would be averaged as "
                    "seeds; sweep each by itself, with an out= of its own"
                )


def data_of(run: Path | str) -> str | None:
    """The data of a run by content."""
    return read_inputs(Path(run)).get("data")


def _base(task: str, run: Path) -> Any:
    """The options of a base run."""
    base = load_run(run)
    if base.task != task:
        raise TaskError(f"runs={run} is a run of {base.task}, not of {task}")
    if base.input != "pixels" or base.anchor is not None:
        raise TaskError(
            f"runs={run} reads {base.anchor or base.input}; a sweep starts from runs with input=pixels alone"
        )
    read_results(run)
    return base


def _anchor_points(config: SweepConfig, run: str) -> Iterator[Point]:
    for text in config.specs():
        spec = check_anchor(text)
        options = ["input=pixels", f"anchor={spec}"]
        if config.anchor_weights != "zoo" and spec.name in MODELS:
            options.append(f"anchor_weights={_weights_file(config, spec)}")
        quality = str(spec).partition(":")[2]
        for protocol in PROTOCOLS:
            yield Point(run, spec.name, quality, protocol, tuple(options))


def _weights_file(config: SweepConfig, spec: AnchorSpec) -> Path:
    path = Path(config.anchor_weights) / f"{spec.name}-{spec.quality}.safetensors"
    if not path.is_file():
        raise TaskError(
            f"anchor_weights={config.anchor_weights} has no {path.name}; train it with `dicm anchors train {spec.name} "
            f"quality={spec.quality} run={path.with_suffix('')} data=...`"
        )
    return path


def _own_points(config: SweepConfig, run: str, base: Any) -> Iterator[Point]:
    """Those of the run's own codec: its features, or gated latents."""
    if not config.streams:
        return
    rates: list[float | None] = [None]
    codec = config.codec or base.codec
    loaded = None if codec is None else FeatureCodec.from_pretrained(codec)
    if loaded is not None and config.codec is not None and base.codec is not None:
        _check_head(run, config.codec, loaded, FeatureCodec.from_pretrained(base.codec))
    # Another model's latents have one rate, whatever the codec beside it has.
    latents = getattr(base, "latents", "codec")
    for option in (*config.options, *config.stream_options):
        if option.startswith("latents="):
            latents = option.removeprefix("latents=")
    if loaded is not None and loaded.config.rate_points > 1 and latents == "codec":
        rates = [*(config.rates or DEFAULT_RATES)]
    elif config.rates:
        what = f"codec {codec}" if latents == "codec" else f"model {latents}"
        raise TaskError(f"rates={config.rates}: the {what} has one rate; leave them out")
    gates = config.gates or (["dynamic"] if config.task == "semantic_segmentation" else [])
    if any(text.startswith("static") for text in gates) and "dynamic" not in gates:
        gates = ["dynamic", *gates]  # whose choices a static gate takes over
    # Of detectors behind a gate the codec's own stem and layer1 are the teacher.
    teacher = [f"teacher={Path(run) / TEACHER}"] if config.task == "semantic_segmentation" else []
    for rate in rates:
        named = [f"codec={codec}"] if codec is not None else []
        rated = ["input=streams", *named, f"rate={'null' if rate is None else f'{rate:g}'}"]
        quality = "" if rate is None else f"{rate:g}"
        if not gates:
            for protocol in PROTOCOLS:
                yield Point(run, config.label, quality, protocol, tuple(rated))
        for text in gates:
            options = (*rated, *gate_options(text), *teacher)
            made = Point(run, f"{config.label} {text.replace(':', ' ')}", quality, "adapted", options)
            if text.startswith("static"):
                made = replace(made, waits_for=replace(made, codec=f"{config.label} dynamic").name)
            yield made


def _check_head(run: str, name: str, codec: FeatureCodec, own: FeatureCodec) -> None:
    """Refuse (TaskError) a codec whose f1 is not what the base run's network was trained to read."""
    ours, theirs = (nn.Sequential(each.backbone.stem, each.backbone.layer1).state_dict() for each in (codec, own))
    if ours.keys() != theirs.keys() or not all(torch.equal(ours[key], theirs[key]) for key in ours):
        raise TaskError(
            f"codec={name} has another stem and layer1 than the codec of runs={run}; "
            "sweep it from a run that was fine-tuned with it"
        )


def gate_options(text: str) -> list[str]:
    """Options of a gate: "dynamic", "none", "static:32" or "variance:32" (TaskError: another)."""
    name, _, count = text.partition(":")
    counted = name in ("static", "variance")
    if name not in ("dynamic", "none", "static", "variance") or counted != (count.isdecimal() and int(count) > 0):
        raise TaskError(f"gates={text} is unknown; use dynamic, none, static:N or variance:N, N channels")
    return [f"gate={name}", *([f"num_channels={count}"] if counted else [])]
