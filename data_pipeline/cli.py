"""Commands of the data pipeline: `dicm data scenes`, `build`, `inspect`, `verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

app = typer.Typer(no_args_is_help=True, help="Make, look at and check data sets.")
console = Console()


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
        manifest = write_scenes(
            out, train=train, val=val, size=size, seed=seed, progress=lambda: bar.advance(task)
        )
    console.print(f"{train} + {val} scenes of {len(manifest.classes)} classes -> {out}")


@app.command()
def build(
    kind: Annotated[str, typer.Argument(help="Layout of the source: imagefolder.")],
    source: Annotated[Path, typer.Argument(help="Folder of images, with or without train/, val/ and class folders.")],
    out: Annotated[Path, typer.Argument(help="New folder for the data set.")],
    val_fraction: Annotated[float, typer.Option(help="Share to set aside for validation where there is no val/.")] = 0.0,
    processes: Annotated[int, typer.Option(help="Decoding processes.")] = 2,
) -> None:
    """Turn a folder of images into shards and a manifest; what does not decode is left out and listed.

    Example: dicm data build imagefolder photos data/photos --val-fraction 0.1
    """
    from data_pipeline.build import REJECTED, build_imagefolder
    from data_pipeline.errors import DataError

    if kind != "imagefolder":
        raise DataError(f"source {kind!r} is unknown; use imagefolder")
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
    left_out = f"; {len(rejected)} left out, see {out / REJECTED}" if rejected else "; none left out"
    console.print(f"{counts} images of {len(manifest.classes)} classes -> {out}{left_out}", highlight=False)


@app.command()
def inspect(
    root: Annotated[Path, typer.Argument(help="Folder of a data set.")],
    sheet: Annotated[Path | None, typer.Option(help="Where to write a contact sheet (PNG).")] = None,
) -> None:
    """Print counts, sizes and classes of a data set; draw a contact sheet.

    Example: dicm data inspect data/scenes --sheet sheet.png
    """
    from data_pipeline.inspect import contact_sheet, split_facts
    from data_pipeline.shards import Manifest

    manifest = Manifest.load(root)
    table = Table("split", "samples", "shards", "MiB", "width", "height", "boxes", "masks", title=manifest.name)
    for name in manifest.splits:
        facts = split_facts(root, manifest, name)
        table.add_row(
            name, str(facts.samples), str(facts.shards), f"{facts.bytes / 2**20:.1f}",
            "{}..{}".format(*facts.widths), "{}..{}".format(*facts.heights), str(facts.boxes), str(facts.masks),
        )  # fmt: skip
        if facts.classes:
            shown = ", ".join(f"{label} {count}" for label, count in list(facts.classes.items())[:20])
            table.caption = f"{len(manifest.classes)} classes; {name}: {shown}"
    console.print(table)
    path = sheet or root / "contact_sheet.png"
    first = next(iter(manifest.splits.values()))
    contact_sheet(root, manifest, first).save(path)
    console.print(f"contact sheet: {path}")


@app.command()
def verify(root: Annotated[Path, typer.Argument(help="Folder of a data set.")]) -> None:
    """Check every shard: checksum, index, that each image decodes, labels in range.

    Example: dicm data verify data/scenes
    """
    from data_pipeline.build import verify as faults_of
    from data_pipeline.errors import DataError
    from data_pipeline.shards import Manifest

    total = sum(len(split.shards) for split in Manifest.load(root).splits.values())
    with _bar() as bar:
        task = bar.add_task("verifying", total=total)
        faults = list(faults_of(root, lambda: bar.advance(task)))
    for fault in faults:
        console.print(fault, highlight=False, soft_wrap=True)
    if faults:
        raise DataError(f"{root}: {len(faults)} fault(s); build it again or fetch the shards named above")
    console.print(f"{root}: {total} shards, nothing wrong")
