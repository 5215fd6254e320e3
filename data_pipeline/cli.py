"""Commands of the data pipeline: `dicm data scenes`, `build`, `inspect`, `verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

app = typer.Typer(no_args_is_help=True, help="Make, look at and check data sets.")
console = Console(highlight=False, markup=False, soft_wrap=True)
SHOWN_CLASSES = 30


def _bar() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
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
    layout: Annotated[str, typer.Argument(help="Layout of the source: imagefolder.")],
    source: Annotated[Path, typer.Argument(help="Folder of images, with or without train/, val/, classes.")],
    out: Annotated[Path, typer.Argument(help="New folder for the data set.")],
    val_fraction: Annotated[float, typer.Option(help="Share set aside for validation if val/ is missing.")] = 0.0,
    processes: Annotated[int | None, typer.Option(help="Decoding processes; one a core if not given.")] = None,
) -> None:
    """Turn a folder of images into shards and a manifest; what does not decode is left out and listed.

    Example: dicm data build imagefolder photos data/photos --val-fraction 0.1
    """
    from data_pipeline.build import REJECTED, build_imagefolder
    from data_pipeline.errors import DataError

    if layout != "imagefolder":
        raise DataError(f"layout {layout!r} is unknown; use imagefolder")
    if processes is not None and processes < 1:
        raise DataError(f"processes={processes} must be at least 1")
    with _bar() as bar:
        task = bar.add_task("building", total=None)
        manifest, rejected = build_imagefolder(
            source,
            out,
            val_fraction=val_fraction,
            num_processes=processes,
            on_total=lambda total: bar.update(task, total=total),
            progress=lambda: bar.advance(task),
        )
    counts = ", ".join(f"{split.num_samples} {name}" for name, split in manifest.splits.items())
    classes = f"of {len(manifest.classes)} classes" if manifest.classes else "without classes"
    left_out = f"{len(rejected)} left out, see {out / REJECTED}" if rejected else "none left out"
    console.print(f"{counts} images {classes} -> {out}; {left_out}")


@app.command()
def inspect(
    root: Annotated[Path, typer.Argument(help="Folder of a data set.")],
    sheet: Annotated[
        Path | None, typer.Option(help="Contact sheet (PNG); ROOT/contact_sheet.png if not given.")
    ] = None,
) -> None:
    """Print counts, sizes and classes of a data set; write a contact sheet.

    Example: dicm data inspect data/scenes --sheet sheet.png
    """
    from data_pipeline.shards import Manifest

    manifest = Manifest.load(root)

    from data_pipeline.inspect import split_facts, write_contact_sheet

    with _bar() as bar:
        task = bar.add_task("reading", total=sum(split.num_samples for split in manifest.splits.values()))
        facts = {name: split_facts(root, manifest, name, lambda: bar.advance(task)) for name in manifest.splits}
    noted = [kind for kind in ("boxes", "masks", "semantic") if any(getattr(of, kind) for of in facts.values())]
    table = Table("split", "samples", "shards", "MiB", "width", "height", *noted, title=manifest.name)
    for name, of in facts.items():
        sizes = ("{}..{}".format(*of.widths), "{}..{}".format(*of.heights))
        counts = (str(getattr(of, kind)) for kind in noted)
        table.add_row(name, str(of.samples), str(of.shards), f"{of.bytes / 2**20:.1f}", *sizes, *counts)
    console.print(table)
    if manifest.classes:
        table = Table("", "class", *facts, title=f"{len(manifest.classes)} classes")
        for label, name in enumerate(manifest.classes[:SHOWN_CLASSES]):
            table.add_row(str(label), name, *(str(of.labels[label]) for of in facts.values()))
        console.print(table)
    if (more := len(manifest.classes) - SHOWN_CLASSES) > 0:
        console.print(f"and {more} more classes")
    path = sheet or root / "contact_sheet.png"
    if manifest.splits:
        write_contact_sheet(root, manifest, next(iter(manifest.splits)), path)
        console.print(f"contact sheet: {path}")


@app.command()
def verify(root: Annotated[str, typer.Argument(help="Folder or URL (s3://, https://) of a data set.")]) -> None:
    """Check every shard: checksum, index, that each image decodes, labels in range.

    Example: dicm data verify data/scenes
    """
    from data_pipeline.errors import DataError
    from data_pipeline.shards import Manifest

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
