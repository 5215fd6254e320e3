"""Files to streams and streams to features, for the commands `dicm encode` and `dicm decode`.

    images -> read ahead in processes -> FeatureCodec.encode -> NAME.dicm
    NAME.dicm -> FeatureCodec.decode -> NAME.npy | NAME.safetensors | NAME.png

On a CPU the network takes nearly all of the time, and all cores; reading, the one part whose time depends on
disks, is overlapped with it. Every file appears under its name whole or not at all.
"""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import save
from torch import Tensor
from torchvision.io import encode_png

from cluster.files import write_whole
from data_pipeline.decoding import try_decode
from data_pipeline.errors import SampleError
from data_pipeline.files import read_file
from data_pipeline.folders import IMAGE_SUFFIXES, OTHER_IMAGE_SUFFIXES, files_below
from data_pipeline.parallel import ordered_map
from pretrain.codec.backbone import HEAD_STRIDE
from pretrain.codec.bitstream import LAYER_NAMES, StreamInfo
from pretrain.codec.config import PRECISIONS
from pretrain.codec.feature_codec import FeatureCodec
from pretrain.codec.memory import keep_freed_memory
from pretrain.codec.tiles import TILE_STEP
from pretrain.errors import CodecError, ConfigError
from pretrain.feature_picture import feature_picture

STREAM_SUFFIX = ".dicm"
FORMATS = ("npy", "safetensors", "png")
READERS = 2  # processes; at most four images of each are read or being read while one is encoded

R = TypeVar("R")


@dataclass
class Encoded:
    """What `encode_files` wrote: counts, its time, and the files that could not be encoded, each with its reason."""

    num_files: int = 0
    num_bytes: int = 0
    num_base_bytes: int = 0  # headers and base layers: what a receiver of the base alone reads
    num_pixels: int = 0
    seconds: float = 0.0
    rejected: list[str] = field(default_factory=list)

    @property
    def bits_per_pixel(self) -> float:
        """Mean rate over all pixels."""
        return 8 * self.num_bytes / max(self.num_pixels, 1)

    @property
    def images_per_second(self) -> float:
        """Over reading, coding and writing, the codec's loading aside."""
        return self.num_files / max(self.seconds, 1e-9)


def read_image(path: Path) -> Tensor:
    """An image file as (3, H, W) uint8 RGB, upright, as `data_pipeline.decoding` does for every command.

    Raises:
        CodecError: it cannot be read, or is no image that can be decoded.
    """
    return _image(try_decode(path))


def read_channels(path: Path) -> list[int]:
    """Channels of y2 that a JSON file names: {"channels": [...]}, as `dicm select-channels` writes it, or a list.

    Raises:
        ConfigError: no such file, or none that names channels.
    """
    try:
        found = json.loads(path.read_bytes())  # of bytes, it passes over a byte order mark
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not a file of channels ({error}); `dicm select-channels` writes one") from error
    channels = found.get("channels") if isinstance(found, dict) else found
    if not isinstance(channels, list) or not channels or not all(type(channel) is int for channel in channels):
        raise ConfigError(
            f'{path}: names no channels; write {{"channels": [0, 3, ...]}}, as `dicm select-channels` does'
        )
    if len(set(channels)) < len(channels) or min(channels) < 0:
        raise ConfigError(f"{path}: channels must be numbers from 0, each once")
    return sorted(channels)


def encode_files(
    codec: str,
    sources: list[Path],
    out: Path,
    console: Console,
    rate: float | None = None,
    max_bytes: int | None = None,
    tile: int | None = None,
    precision: str = "fp32",
    channels: Path | None = None,
    last_layer: str | None = None,
) -> Encoded:
    """Encode every image of `sources` to `out`/NAME.dicm; of several images, those that fail are left out by name.

    Args:
        codec: exported folder or hub id.
        sources: images, or folders of images.
        out: folder, made where it is missing.
        console: for the progress bar.
        rate, max_bytes, tile: passed on to `FeatureCodec.encode` where given.
        precision: of the networks, fp32 or bf16.
        channels: file that names the channels of the `base` layer (`read_channels`); the codec's own where None.
        last_layer: with `channels`, `base` leaves the other channels out.

    Raises:
        ConfigError: `rate`, `max_bytes`, `tile` or `precision` out of range; a file that names no channels; a layer
            that there is not, or that cannot be left out.
        CodecError: no image found, two images of one name, all images fail, `out` cannot be written.
    """
    limits = _limits(rate, max_bytes, tile)
    _check_layer(last_layer)
    if last_layer == LAYER_NAMES[0] and channels is None:
        raise ConfigError(f"--layers={last_layer}: needs --channels FILE, which says what the base layer holds")
    if channels is not None:
        limits |= {"channels": read_channels(channels), "rest": last_layer != LAYER_NAMES[0]}
    _check_precision(precision)
    files = targets_of(sources, IMAGE_SUFFIXES, out, STREAM_SUFFIX)
    _check_writable(out)
    keep_freed_memory()
    model = FeatureCodec.from_pretrained(codec, precision)
    result, start = Encoded(rejected=unread_images(sources)), time.perf_counter()
    with _progress(console) as progress:
        task = progress.add_task("encoding", total=len(files), figures="")
        for (source, target), pixels in zip(files.items(), _read_ahead(list(files)), strict=True):
            try:
                image = _image(pixels)
                stream = _named(source, model.encode, image, **limits)
            except CodecError as error:
                result.rejected.append(str(error))
                progress.advance(task)
                continue
            write_file(target, stream)
            result.num_files += 1
            result.num_bytes += len(stream)
            result.num_base_bytes += model.describe(stream).base_bytes
            result.num_pixels += image.shape[-1] * image.shape[-2]
            result.seconds = time.perf_counter() - start
            figures = f"{result.images_per_second:.2f} images/s, {result.bits_per_pixel:.4f} bpp"
            progress.update(task, advance=1, figures=figures)
    if not result.num_files:
        raise CodecError(none_left(result.rejected))
    return result


def none_left(rejected: list[str]) -> str:
    """One line that names all files, where none could be used: each reason begins with its file."""
    return rejected[0] if len(rejected) == 1 else f"none of {len(rejected)} files can be used: {'; '.join(rejected)}"


def decode_files(
    codec: str,
    sources: list[Path],
    out: Path,
    console: Console,
    format: str | None = None,
    last_layer: str | None = None,
    tile: int | None = None,
    precision: str = "fp32",
) -> int:
    """Decode every stream of `sources` to f3, (C, ceil(H/4), ceil(W/4)) float32; returns their number.

    Args:
        codec: exported folder or hub id.
        sources: streams, or folders of streams.
        out: folder for NAME.npy; or, for one stream, a file whose name ends in one of `FORMATS`.
        console: for the progress bar.
        format: one of `FORMATS`, for a folder. npy holds f3; safetensors f3 with the metadata height, width and
            fingerprint of its codec; png the `feature_picture` of f3, as large as the image.
        last_layer: the last layer of a stream that is read; all where None.
        tile: side of the squares that are decoded one at a time, which bounds memory.
        precision: of the networks, fp32 or bf16.

    Raises:
        ConfigError: no such format, layer or precision, an impossible tile, a format that contradicts `out`'s name.
        CodecError, BitstreamError: no stream found, one that is damaged or of another codec, by name, several for
            one file, `out` cannot be written.
    """
    _check_layer(last_layer)
    if format is not None and format not in FORMATS:
        raise ConfigError(f"--format={format}: no such format; choose one of {', '.join(FORMATS)}")
    _check_precision(precision)
    _limits(tile=tile)
    named = _format_of_file(out, format)
    files = targets_of(sources, {STREAM_SUFFIX}, out, f".{format or FORMATS[0]}")
    if named and len(files) > 1:
        raise CodecError(f"{out}: one file for {len(files)} streams; name a folder and add --format {named}")
    if named:
        files = dict.fromkeys(files, out)
    _check_writable(out.parent if named else out)
    keep_freed_memory()
    model = FeatureCodec.from_pretrained(codec, precision)
    with _progress(console) as progress:
        task = progress.add_task("decoding", total=len(files), figures="")
        for source, target in files.items():
            stream = _read_stream(source)
            features = _named(source, model.decode, stream, last_layer, tile)[0].cpu()
            fingerprint = model.fingerprint.hex()
            write_file(target, _file_of(features, target.suffix[1:].lower(), model.describe(stream), fingerprint))
            progress.advance(task)
    return len(files)


def _check_layer(last_layer: str | None) -> None:
    if last_layer is not None and last_layer not in LAYER_NAMES:
        raise ConfigError(f"--layers={last_layer}: no such layer; choose one of {', '.join(LAYER_NAMES)}")


def _check_precision(precision: str) -> None:
    if precision not in PRECISIONS:
        raise ConfigError(f"--precision={precision}: unknown; choose one of {', '.join(PRECISIONS)}")


def _limits(rate: float | None = None, max_bytes: int | None = None, tile: int | None = None) -> dict[str, Any]:
    """The options of `FeatureCodec.encode` that were given."""
    if rate is not None and not 0 <= rate <= 1:
        raise ConfigError(f"--rate={rate}: out of range; choose a number in 0..1")
    if max_bytes is not None and max_bytes < 1:
        raise ConfigError(f"--max-bytes={max_bytes}: out of range; choose a whole number from 1")
    if tile is not None and (tile < 1 or tile % TILE_STEP):
        raise ConfigError(f"--tile={tile}: impossible; choose a multiple of {TILE_STEP} pixels, such as 512")
    given = {"rate": rate, "max_bytes": max_bytes, "tile": tile}
    return {name: value for name, value in given.items() if value is not None}


def _format_of_file(out: Path, format: str | None) -> str | None:
    """The format that the name `out` asks for where it is one file's, None where it is a folder's."""
    suffix = out.suffix[1:].lower()
    if out.is_dir() or not suffix:
        return None
    if suffix not in FORMATS:
        endings = ", ".join(f".{name}" for name in FORMATS)
        raise ConfigError(
            f"--out={out}: a file cannot end in {out.suffix}; choose one of {endings}, or a folder "
            "(make it first where its name has a dot)"
        )
    if format not in (None, suffix):
        raise ConfigError(f"--format={format}: contradicts --out={out}; leave one of them out")
    return suffix


def _read_ahead(files: list[Path]) -> Iterator[np.ndarray | SampleError]:
    """Every image in order, or why it cannot be read, the next few read by other processes meanwhile.

    Not by threads: a decoder that dies on a damaged file would take this process and the file's name with it.
    """
    if len(files) == 1:
        return iter([try_decode(files[0])])
    return ordered_map(try_decode, files, READERS, chunk=1, preload=["data_pipeline.decoding"])


def _image(pixels: np.ndarray | SampleError) -> Tensor:
    """(3, H, W) uint8 of pixels (H, W, 3); what came in their place is raised as CodecError."""
    if isinstance(pixels, SampleError):
        raise CodecError(str(pixels)) from pixels
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def _read_stream(path: Path) -> bytes:
    try:
        return read_file(path)
    except OSError as error:
        raise CodecError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error


def _named(source: Path, function: Callable[..., R], *arguments: Any, **options: Any) -> R:
    """`function` of the contents of `source`, whose name goes before what it finds wrong with them."""
    try:
        return function(*arguments, **options)
    except CodecError as error:
        raise type(error)(f"{source}: {error}") from error


def _file_of(features: Tensor, format: str, info: StreamInfo, fingerprint: str) -> bytes:
    """The file of features (C, h, w) in one of `FORMATS`."""
    if format == "png":
        picture = feature_picture(features, HEAD_STRIDE)[:, : info.height, : info.width]
        return encode_png(picture.contiguous()).numpy().tobytes()
    if format == "safetensors":
        metadata = {"height": str(info.height), "width": str(info.width), "fingerprint": fingerprint}
        return save({"f3": features.contiguous()}, metadata)
    buffer = io.BytesIO()
    np.save(buffer, features.numpy())
    return buffer.getvalue()


def _check_writable(folder: Path) -> None:
    """Raise CodecError where files cannot be put into `folder`, which may have to be made, before work is lost."""
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise CodecError(f"{folder}: {nearest} is a file; name another folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise CodecError(f"{folder}: {nearest} cannot be written; change its permissions or name another folder")


def write_file(path: Path, data: bytes) -> None:
    """Write a file whole or not at all (CodecError where the disk refuses)."""
    try:
        write_whole(path, data)
    except OSError as error:
        raise CodecError(f"{path}: cannot be written ({error.strerror}); free space or name another place") from error


def _progress(console: Console) -> Progress:
    """A bar with room for a task's `figures`."""
    figures = TextColumn("{task.fields[figures]}")
    text = TextColumn("{task.description}", markup=False)
    columns = (text, BarColumn(), MofNCompleteColumn(), figures, TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True)


def targets_of(sources: list[Path], suffixes: Collection[str], out: Path, suffix: str) -> dict[Path, Path]:
    """Files of `sources`, and in folders of them those that end in `suffixes`, each with its target OUT/NAME`suffix`.

    Raises:
        CodecError: no such file or folder, one that cannot be listed, none that ends so, two files of one name.
    """
    files = [file for source in sources for file in _files(source, suffixes)]
    if not files:
        raise CodecError(f"{', '.join(map(str, sources))}: no file that ends in {', '.join(sorted(suffixes))}")
    firsts: dict[Path, Path] = {}
    for file in files:
        target = out / (file.stem + suffix)
        first = firsts.setdefault(target, file)
        if first is not file:
            raise CodecError(f"{first} and {file} would both be written to {target}; use two output folders")
    return {file: target for target, file in firsts.items()}


def unread_images(sources: list[Path]) -> list[str]:
    """A line for each image in folders of `sources` that is of another format by its suffix, so not looked at."""
    folders = (source for source in sources if source.is_dir())
    found = (path for folder in folders for path in _files(folder, OTHER_IMAGE_SUFFIXES))
    return [f"{path}: {path.suffix} is not read; convert it to JPEG, PNG or WebP" for path in found]


def _files(source: Path, suffixes: Collection[str]) -> list[Path]:
    try:
        if not source.exists():
            raise CodecError(f"{source}: no such file or folder")
        if source.is_file():
            return [source]
        found = files_below(source)
        dangling = (path for path in found.others if path.is_symlink())  # named when they cannot be read
        return sorted(path for path in (*found.paths, *dangling) if path.suffix.lower() in suffixes)
    except OSError as error:
        raise CodecError(
            f"{error.filename or source}: cannot be read ({error.strerror}); check its permissions"
        ) from error
