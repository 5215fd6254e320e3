"""Commands of pretraining and of the codec: `dicm pretrain`, `export`, `encode`, `decode`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer()
console = Console(highlight=False, markup=False, soft_wrap=True)  # names stay as they are, to be copied
TILE_HELP = "Side in pixels of the squares that are coded one at a time, which bounds memory: a multiple of 64."
PRECISION_HELP = "Of the networks: fp32; or bf16, which halves time and memory where the processor has it."


@app.command()
def pretrain(
    recipe: Annotated[
        str, typer.Argument(help="Name of a recipe (demo, tiny_imagenet20, dicm_resnet50) or a YAML file.")
    ],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Options to change.")] = None,
) -> None:
    """Pretrain a codec without labels; the same command again resumes the run.

    Example: dicm pretrain tiny_imagenet20 data=data/tiny run=runs/tiny workers=2
    """
    from cluster.run_folder import how_it_stopped
    from pretrain.run import resolve, run

    config = resolve(recipe, overrides or [])
    folder = run(config)
    if (folder / "summary.json").is_file():
        console.print(f"complete: {folder}; next: dicm export {folder} codec")
    else:
        console.print(how_it_stopped(config, folder))


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Run folder of `dicm pretrain`.")],
    out: Annotated[Path, typer.Argument(help="Folder to write: model.safetensors, config.json, README.md.")],
    onnx: Annotated[bool, typer.Option("--onnx", help="Add encoder, hyper_decoder and decoder as ONNX files.")] = False,
) -> None:
    """Freeze a run's codec into a folder that FeatureCodec.from_pretrained reads.

    Example: dicm export runs/tiny codec --onnx
    """
    from pretrain.export import export as export_codec

    folder = export_codec(run, out, onnx=onnx)
    if onnx:
        from pretrain.graphs import ONNX_FILES, OPSET

        console.print(f"{', '.join(ONNX_FILES)}: opset {OPSET}")
    size = sum(path.stat().st_size for path in folder.iterdir()) / 2**20
    console.print(f"wrote {folder} ({size:.1f} MiB); next: dicm finetune classification codec={folder} data=...")


@app.command()
def encode(
    images: Annotated[list[Path], typer.Argument(help="Images, or folders of images.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the streams.")],
    codec: Annotated[str, typer.Option(help="Exported codec: folder or hub id.")] = "codec",
    rate: Annotated[float | None, typer.Option(help="Rate, from 0 (smallest streams) to 1.")] = None,
    max_bytes: Annotated[int | None, typer.Option(help="Most bytes that a stream may have.")] = None,
    tile: Annotated[int | None, typer.Option(help=TILE_HELP)] = None,
    precision: Annotated[str, typer.Option(help=PRECISION_HELP)] = "fp32",
    channels: Annotated[
        Path | None, typer.Option(help="JSON file of the channels that the base layer holds: `dicm select-channels`.")
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="With --channels: base leaves the other channels out; else rest follows.")
    ] = None,
) -> None:
    """Encode images to bitstreams, NAME.dicm; those that cannot be decoded are left out by name.

    Example: dicm encode photos/ -o streams --codec codec
    """
    from pretrain.coding import encode_files

    result = encode_files(codec, images, out, console, rate, max_bytes, tile, precision, channels, layers)
    for reason in result.rejected:
        console.print(f"left out: {reason}")
    rest = result.num_bytes - result.num_base_bytes
    console.print(
        f"{result.num_files} images -> {out}: {result.num_bytes} bytes, {result.bits_per_pixel:.4f} bpp, "
        f"{result.images_per_second:.2f} images/s"
        + (f"; base {result.num_base_bytes} bytes, rest {rest}" if rest else "")
        + (f", {len(result.rejected)} left out" if result.rejected else "")
    )


@app.command()
def decode(
    streams: Annotated[list[Path], typer.Argument(help="Bitstreams, or folders of them.")],
    out: Annotated[
        Path,
        typer.Option(
            "--out", "-o", help="Folder for the features; or, of one stream, a file: .npy, .safetensors or .png."
        ),
    ],
    codec: Annotated[str, typer.Option(help="Exported codec: folder or hub id.")] = "codec",
    format: Annotated[
        str | None,
        typer.Option(help="In a folder: npy (default) or safetensors, (C, H/4, W/4) float32; or png, a picture."),
    ] = None,
    layers: Annotated[str | None, typer.Option(help="Last layer to read, base or rest; default all.")] = None,
    tile: Annotated[int | None, typer.Option(help=TILE_HELP)] = None,
    precision: Annotated[str, typer.Option(help=PRECISION_HELP)] = "fp32",
) -> None:
    """Decode bitstreams to features f3.

    Example: dicm decode streams/ -o features --codec codec
    """
    from pretrain.coding import decode_files

    num_files = decode_files(codec, streams, out, console, format, layers, tile, precision)
    console.print(f"{num_files} streams -> {out}")
