"""Commands of the data pipeline: `dicm data scenes`, `build`, `inspect`, `verify`."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from data_pipeline.sources import Rejected

app = typer.Typer(no_args_is_help=True, help="Make, look at and check data sets.")
console = Console(highlight=False, markup=False, soft_wrap=True)
SPLIT_NAME = re.compile(r"[A-Za-z0-9_]+")


def _bar() -> Progress:
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True)


@app.command()
def scenes(
    out: Annotated[Path, typer.Argument(help="New folder for the data set.")],
    train: Annotated[int, typer.Option(help="Number of training scenes.")] = 2000,
    val: Annotated[int, typer.Option(help="Number of validation scenes.")] = 400,
    size: Annotated[int, typer.Option(help="Side of a scene in pixels.")] = 96,
    seed: Annotated[int, typer.Option(help="Of every random draw.")] = 0,
) -> None:
    """Make the embedded data set: procedural scenes with labels, boxes, masks and semantic classes.

    Example: dicm data scenes data/scenes --train 2000 --val 400
    """
    from data_pipeline.scenes import write_scenes

    with _bar() as bar:
        task = bar.add_task("drawing", total=train + val)
        manifest = write_scenes(out, train=train, val=val, size=size, seed=seed, progress=lambda: bar.advance(task))
    console.print(f"{train} + {val} scenes of {len(manifest.classes)} classes -> {out}")


@app.command()
def build(
    layout: Annotated[str, typer.Argument(help="Layout of the source: imagefolder, voc, coco or cityscapes.")],
    source: Annotated[Path, typer.Argument(help="Folder in that layout.")],
    out: Annotated[Path, typer.Argument(help="New folder for the data set.")],
    split: Annotated[
        list[str] | None,
        typer.Option(help="NEW=OLD: make split NEW of the source's split OLD; may be repeated. All if not given."),
    ] = None,
    val_fraction: Annotated[float, typer.Option(help="Share of train set aside if there is no val.")] = 0.0,
    shard_samples: Annotated[int, typer.Option(help="Greatest number of samples in a shard.")] = 1000,
    shard_mib: Annotated[int, typer.Option(help="Size at which a shard is closed, in MiB.")] = 256,
    processes: Annotated[int | None, typer.Option(help="Reading processes; one a usable core if not given.")] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Discard what an interrupted build left.")] = False,
) -> None:
    """Turn images and annotations into shards and a manifest; what cannot be used is left out and listed.

    After an interruption the same command goes on behind the last finished shard.

    Examples: dicm data build imagefolder photos data/photos --val-fraction 0.1;
    dicm data build coco coco2017 data/coco;
    dicm data build voc VOC2007 data/voc --split train=trainval --split val=test
    """
    from data_pipeline.build import REJECTED, build_dataset
    from data_pipeline.errors import DataError

    if processes is not None and processes < 1:
        raise DataError(f"processes={processes} must be at least 1")
    try:
        with _bar() as bar:
            task = bar.add_task("building", total=None)
            built = build_dataset(
                layout,
                source,
                out,
                splits=_splits(split) if split else None,
                val_fraction=val_fraction,
                shard_samples=shard_samples,
                shard_mib=shard_mib,
                num_processes=processes,
                restart=restart,
                on_total=lambda total: bar.update(task, total=total),
                progress=lambda count: bar.advance(task, count),
            )
    except KeyboardInterrupt:
        print("interrupted; the same command goes on behind the finished shards", file=sys.stderr)
        raise
    if built.num_kept_shards:
        console.print(f"went on behind {built.num_kept_shards} finished shard(s) of an interrupted build")
    counts = ", ".join(f"{of.num_samples} {name}" for name, of in built.manifest.splits.items())
    num_classes = len(built.manifest.classes)
    classes = f"of {num_classes} class{'' if num_classes == 1 else 'es'}" if num_classes else "without classes"
    left_out = f"{_rejections(built.rejected)}, see {out / REJECTED}" if built.rejected else "none left out"
    for item in built.rejected:
        if item.what in ("class", "crowd"):  # of these there are few, and they change what can be learned
            console.print(f"{item.file}: {item.reason}")
    console.print(f"{counts} images {classes} -> {out}; {left_out}")


def _splits(options: list[str]) -> dict[str, str]:
    """{new name: the source's name} of options NEW=OLD."""
    from data_pipeline.errors import DataError

    splits = {}
    for option in options:
        new, _, old = option.partition("=")
        if not SPLIT_NAME.fullmatch(new) or not old:
            raise DataError(f"split {option!r}: write NEW=OLD, as in train=trainval; NEW is letters, digits and _")
        if new in splits:
            raise DataError(f"split {new!r} is named twice; name each new split once")
        splits[new] = old
    return splits


def _rejections(rejected: Iterable[Rejected]) -> str:
    """Counts of what was rejected, by kind."""
    counts = Counter[str]()
    for item in rejected:
        counts[item.what] += item.count
    words = {
        "image": "left out",
        "box": "box(es) without area dropped",
        "clipped": "box(es) clipped",
        "masks": "image(s) without their masks",
        "annotation": "annotation(s) without an image",
        "class": "class(es) without an image",
        "file": "other file(s) not read",
        "crowd": "crowd(s) kept",
    }
    return ", ".join(f"{counts[what]} {text}" for what, text in words.items() if counts[what])


@app.command()
def inspect(
    root: Annotated[str, typer.Argument(help="Folder or URL (s3://, https://) of a data set.")],
    sheet: Annotated[
        Path | None, typer.Option(help="Contact sheet (PNG); contact_sheet.png in the folder, or here, if not given.")
    ] = None,
) -> None:
    """Print counts, classes and sizes of a data set; write a contact sheet of its first split.

    Example: dicm data inspect data/scenes --sheet sheet.png
    """
    from data_pipeline.manifest import Manifest

    manifest = Manifest.load(root)

    from data_pipeline.addresses import is_remote, local_folder
    from data_pipeline.contact_sheet import write_contact_sheet
    from data_pipeline.inspect import split_facts
    from data_pipeline.tables import tables

    usual = ("train", "val", "test")
    names = sorted(manifest.splits, key=lambda name: (usual.index(name) if name in usual else len(usual), name))
    with _bar() as bar:
        task = bar.add_task("reading", total=sum(split.num_samples for split in manifest.splits.values()))
        facts = {name: split_facts(root, manifest, name, lambda count: bar.advance(task, count)) for name in names}
    for table in tables(manifest, facts, console.options.ascii_only):
        console.print(table)
    path = sheet or (Path() if is_remote(root) else local_folder(root)) / "contact_sheet.png"
    if names:
        write_contact_sheet(root, manifest, names[0], path)
        console.print(f"contact sheet: {path}")


@app.command()
def verify(root: Annotated[str, typer.Argument(help="Folder or URL (s3://, https://) of a data set.")]) -> None:
    """Check every shard: checksum, index, that each image decodes, labels, boxes and masks in range.

    Example: dicm data verify data/scenes
    """
    from data_pipeline.errors import DataError
    from data_pipeline.manifest import Manifest

    manifest = Manifest.load(root)
    total = sum(split.num_samples for split in manifest.splits.values())

    from data_pipeline.verify import faults

    with _bar() as bar:
        task = bar.add_task("verifying", total=total)
        found = list(faults(root, progress=lambda samples: bar.advance(task, samples)))
    for fault in found:
        console.print(fault)
    if found:
        raise DataError(f"{root}: {len(found)} fault(s); build it again, or fetch the shards named above")
    num_shards = sum(len(split.shards) for split in manifest.splits.values())
    console.print(f"{root}: {total} samples in {num_shards} shards, nothing wrong")
