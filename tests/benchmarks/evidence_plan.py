"""What the script of the evidence does: studies, ablations, and the commands in their order.

Each command of `dicm` names what the ones before it made: the data, the codec, the task on clean pixels.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from downstream.tasks.anchor import weights_path

DONE = "done"  # in the folder of a sweep that has all its points
LATENTS = "latents of pixels"  # what tables call the latents of a study's pixel codec
PIXEL_CODEC_EPOCHS = 200
TRANSFORM_EPOCHS = 10  # of gate and transform by themselves, before a student of a sweep has its epochs
RATES = "rates=0,0.25,0.5,0.75,1"
# Both sizes where curves cross: below about 0.2 bpp a picture of half the sides is the better one.
HEVC = "hevc:51,hevc:47,hevc:42,hevc:51@0.5,hevc:47@0.5,hevc:42@0.5"
OTHERS = "jpeg:5,jpeg:20,webp:0,webp:20,avif:10,avif:30"
# Options of pretrainings without a part, or with one that the recipe leaves out. Those that change the codec stage alone
# start from the whole one's backbone, and the task from its network on clean pixels.
ABLATIONS: dict[str, list[str]] = {
    "without gated convolutions": ["codec.rgc_orders=[0,0,0]"],
    "without ViT hyperprior": ["codec.hyperprior=conv"],
    "without context model": ["codec.context=none"],
    "rates not balanced": ["stages.codec.balance=0"],
    "without the KLT to begin with": ["stages.codec.klt=false"],
    "fidelity at f3 alone": ["stages.codec.distortion=1", "stages.codec.features=[0,0,0]"],
    "with redundancy elimination": ["codec.redundancy=true"],
    "with all four stages": ["codec.redundancy=true", "only=[ssl,redundancy,joint,codec]"],
    "without guidance": ["ssl.heatmap.method=none"],
    "without contrastive stage": ["only=[codec]"],
}
OWN_BACKBONE = ("with all four stages", "without guidance", "without contrastive stage")
STAGES = {"with redundancy elimination": "redundancy,codec"}  # the stage joint would change the backbone


@dataclass(frozen=True)
class Study:
    """One data set and one task on it.

    Attributes:
        folder: below the data root; None draws scenes.
        layout: of `dicm data build`.
        recipe: of the fine-tune.
        pretrain, options, anchor_options: further options of pretraining, of the fine-tune on clean pixels (sweeps
            have them from there), and of a sweep's points on pixels; stream_options, of those on streams.
        epochs: of the stages of pretraining, at scale 1.
        task_epochs, adapt_epochs: at scale 1.
        anchors, others: of the sweep, and of one that comes behind what tells more.
        gates: of the sweep, for a task that reads latents.
        pixel_codec: MODEL:QUALITY of CompressAI's, to be trained on the study's images; the gates then choose channels of
            its latent, too, beside a network on what it decodes.
        ablate: whether ablations are measured here.
        codec_of: another study, whose codec this one reads.
    """

    name: str
    folder: str | None
    layout: str
    task: str
    recipe: str
    pretrain: list[str] = field(default_factory=list)
    epochs: dict[str, float] = field(default_factory=dict)
    options: list[str] = field(default_factory=list)
    anchor_options: list[str] = field(default_factory=list)
    stream_options: list[str] = field(default_factory=list)
    task_epochs: int = 10
    adapt_epochs: int = 5
    anchors: str = HEVC
    others: str = ""
    gates: str = ""
    pixel_codec: str = ""
    ablate: bool = False
    codec_of: str | None = None


# Boxes and masks are found at f3, classes told at layer4.
FINDING = ["stages.codec.distortion=3", "stages.codec.features=[1,0.3,0.2]", "stages.codec.rates=[24,8,2.5,0.8,0.25]"]
# Both sides see a new crop of each image in every epoch; networks on pixels learn all of theirs from labels.
CLASSIFICATION = {"task": "classification", "recipe": "classification", "anchor_options": ["train_head=true"]}  # fmt: skip
STUDIES = [
    Study("tiny_imagenet20", "tiny_imagenet20", "imagefolder", **CLASSIFICATION, task_epochs=20, adapt_epochs=5,
          epochs={"ssl": 40, "redundancy": 3, "joint": 3, "codec": 12}, others=OTHERS, ablate=True),
    Study("clothing", "clothing", "imagefolder", **CLASSIFICATION, task_epochs=20, adapt_epochs=5,
          pretrain=["image_size=128", "canvas_size=144"], epochs={"ssl": 40, "codec": 16}),
    Study("camvid", "camvid_as_cityscapes", "cityscapes", "semantic_segmentation", "semantic_segmentation_small",
          pretrain=["image_size=128", "canvas_size=192", "codec.context=none", "stages.ssl.batch_size=64"],
          epochs={"ssl": 200, "codec": 200}, task_epochs=60, adapt_epochs=30, gates="dynamic,static:32,static:16,variance:32,variance:16",
          stream_options=["transform=synthesis"],
          anchors="hevc:51,hevc:47,hevc:42,hevc:37,hevc:32", pixel_codec="bmshj2018-hyperprior:2"),
    Study("raccoon", "raccoon_voc", "voc", "detection", "detection_small",
          options=["val_split=test", "max_side=320", "voc07=true"],
          pretrain=["image_size=128", "canvas_size=144", *FINDING], epochs={"ssl": 120, "codec": 120}, task_epochs=24,
          adapt_epochs=12, anchors="hevc:51,hevc:47,hevc:42,hevc:37"),
    Study("scenes_boxes", None, "scenes", "detection", "detection_small",
          options=["anchors=[8,16,32,64,128]"], epochs={"ssl": 20, "codec": 20},
          pretrain=["image_size=96", "canvas_size=96", *FINDING], task_epochs=10, adapt_epochs=5,
          anchors="hevc:51,hevc:47,hevc:42,hevc:37"),
    Study("scenes_masks", None, "scenes", "instance_segmentation", "instance_segmentation_small",
          options=["anchors=[8,16,32,64,128]"], epochs={"ssl": 20, "codec": 20},
          pretrain=["image_size=96", "canvas_size=96", *FINDING], task_epochs=10, adapt_epochs=5, codec_of="scenes_boxes",
          anchors="hevc:51,hevc:47,hevc:42,hevc:37"),
]  # fmt: skip


@dataclass(frozen=True)
class Step:
    """A command of `dicm` and the file that says that it is done."""

    name: str
    command: list[str]
    result: Path

    @property
    def typed(self) -> str:
        """The command as a shell reads it."""
        return shlex.join(["dicm", *self.command])

    @property
    def work(self) -> str:
        """What of the command its result depends on."""
        return shlex.join(part for part in self.command if not part.startswith("parallel="))


def plan(studies: list[Study], arguments: argparse.Namespace) -> Iterator[Step]:
    """All steps, the most telling first."""
    for study in studies:
        yield data_step(study, arguments)
        yield from codec_steps(study, arguments, "whole", first_codec(studies, study, arguments, 0), 0)
        yield sweep_step(study, arguments, "whole", "dicm", 0)
    if not arguments.no_ablations:
        for study in studies:
            for label, options in ABLATIONS.items() if study.ablate else ():
                if label not in OWN_BACKBONE:
                    start = place_of(study, arguments, "whole", 0) / "codec"
                    stages = f"only=[{STAGES.get(label, 'codec')}]"
                    options = [*options, f"init={start}", "init_parts=[backbone]", stages]
                yield from codec_steps(study, arguments, label, options, 0)
                yield sweep_step(study, arguments, label, label, 0)
    for study in studies:
        if study.others:
            yield sweep_step(study, arguments, "whole", "dicm", 0, others=True)
        if study.pixel_codec:
            yield from pixel_codec_steps(study, arguments)
    for seed in range(1, arguments.seeds):
        for study in studies:
            yield from codec_steps(study, arguments, "whole", first_codec(studies, study, arguments, seed), seed)
            yield sweep_step(study, arguments, "whole", "dicm", seed)


def first_codec(studies: list[Study], study: Study, arguments: argparse.Namespace, seed: int) -> list[str]:
    """Options with which a later study's pretraining begins with the first one's codec, or with its backbone alone."""
    if study is studies[0]:
        return []
    codec = place_of(studies[0], arguments, "whole", seed) / "codec"
    parts = "backbone" if study.gates else "backbone,compression"  # a gated latent has no context model
    return [f"init={codec}", f"init_parts=[{parts}]", "only=[codec]"]


def shards_of(study: Study, arguments: argparse.Namespace) -> Path:
    return arguments.out / "data" / (study.folder or f"scenes{study.pretrain[0].partition('=')[2]}")


def data_step(study: Study, arguments: argparse.Namespace) -> Step:
    out = shards_of(study, arguments)
    if study.folder is None:
        size = study.pretrain[0].partition("=")[2]
        command = ["data", "scenes", str(out), "--train", "3000", "--val", "300", "--size", size]
    else:
        command = ["data", "build", study.layout, str(arguments.data / study.folder), str(out)]
    return Step(f"{study.name}: data", command, out / "dataset.json")


def codec_steps(
    study: Study, arguments: argparse.Namespace, variant: str, options: list[str], seed: int
) -> Iterator[Step]:
    """Pretraining, export, and the task on clean pixels."""
    place, data = place_of(study, arguments, variant, seed), shards_of(study, arguments)
    codec = (arguments.out / (study.codec_of or study.name) / place.name) / "codec"
    epochs = [f"stages.{name}.epochs={count * arguments.scale:g}" for name, count in study.epochs.items()]
    run_options = [f"data={data}", f"run={codec.parent / 'pretrain'}", "launcher=local", "workers=1", f"seed={seed}"]
    name = f"{study.name}: {variant}, seed {seed}"
    pretraining = ["pretrain", "evidence", *run_options, *study.pretrain, *epochs, *options]
    yield Step(f"{name}, pretraining", pretraining, codec.parent / "pretrain" / "summary.json")
    yield Step(f"{name}, export", ["export", str(codec.parent / "pretrain"), str(codec)], codec / "README.md")
    base = base_of(study, arguments, variant, seed)
    if variant in ABLATIONS and variant not in OWN_BACKBONE:
        return
    length = [f"epochs={max(1, round(study.task_epochs * arguments.scale))}"]
    if study.task == "semantic_segmentation":
        length += ["gate=none", f"transform_epochs={max(1, round(TRANSFORM_EPOCHS * arguments.scale))}"]
    yield Step(
        f"{name}, clean pixels",
        ["finetune", study.recipe, f"codec={codec}", f"data={data}", f"run={base}", "input=pixels", "launcher=local",
         f"seed={seed}", *length, *study.options],
        base / "results.json",
    )  # fmt: skip


def sweep_step(
    study: Study, arguments: argparse.Namespace, variant: str, label: str, seed: int, others: bool = False
) -> Step:
    """The sweep of one codec; anchors go with the whole one alone, `others` without the codec into the same folder."""
    out = place_of(study, arguments, variant, seed) / f"sweep_{study.task}"
    command = [
        "evaluate", study.task, f"runs={base_of(study, arguments, variant, seed)}", f"out={out}", f"label={label}", RATES,
        f"epochs={max(1, round(study.adapt_epochs * arguments.scale))}", f"parallel={arguments.parallel}",
    ]  # fmt: skip
    command += [f"stream_options=[{','.join(study.stream_options)}]"] if study.stream_options else []
    if variant == "whole":
        command += [f"anchors={study.others}", "streams=false"] if others else [f"anchors={study.anchors}"]
        command += [f"anchor_options=[{','.join(study.anchor_options)}]"] if study.anchor_options else []
    else:
        command += ["protocols=adapted"]
    if variant in ABLATIONS and variant not in OWN_BACKBONE:
        command += [f"codec={out.parent / 'codec'}"]
    if study.gates:
        command += [f"gates={study.gates}"]
    name = f"{study.name}: {variant}, seed {seed}, sweep{' of other codecs' if others else ''}"
    return Step(name, command, out / (f"{DONE}_others" if others else DONE))


def pixel_codec_steps(study: Study, arguments: argparse.Namespace) -> Iterator[Step]:
    """A model of CompressAI's trained on the study's images; gates over its latent beside what it decodes."""
    model, _, quality = study.pixel_codec.partition(":")
    run = arguments.out / study.name / "anchors" / f"{model}-{quality}"
    weights = weights_path(run)
    yield Step(
        f"{study.name}: {model}",
        ["anchors", "train", model, f"data={shards_of(study, arguments)}", f"run={run}", f"quality={quality}",
         "image_size=128", "canvas_size=160", "batch_size=8", "lr=5e-4", "launcher=local",
         f"epochs={max(1, round(PIXEL_CODEC_EPOCHS * arguments.scale))}"],
        weights,
    )  # fmt: skip
    out = place_of(study, arguments, "whole", 0) / "sweep_latents"  # its options are not those of the study's sweep
    latents = [f"latents={model}", f"latents_quality={quality}", f"latents_weights={weights}"]
    yield Step(
        f"{study.name}: latents of {model}, sweep",
        ["evaluate", study.task, f"runs={base_of(study, arguments, 'whole', 0)}", f"out={out}", f"label={LATENTS}",
         f"epochs={max(1, round(study.adapt_epochs * arguments.scale))}", f"parallel={arguments.parallel}",
         f"anchors={study.pixel_codec}", f"anchor_weights={run.parent}", f"gates={study.gates}",
         f"options=[{','.join(latents)}]"],
        out / DONE,
    )  # fmt: skip


def place_of(study: Study, arguments: argparse.Namespace, variant: str, seed: int) -> Path:
    return arguments.out / study.name / f"{variant.replace(' ', '_')}_{seed}"


def base_of(study: Study, arguments: argparse.Namespace, variant: str, seed: int) -> Path:
    """The task on clean pixels that a sweep starts from."""
    if variant in ABLATIONS and variant not in OWN_BACKBONE:
        variant = "whole"
    return place_of(study, arguments, variant, seed) / f"clean_{study.task}_{variant.replace(' ', '_')}_{seed}"
