"""Files to streams and streams to features, for the commands `dicm encode` and `dicm decode`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image

from pretrain.codec.feature_codec import FeatureCodec
from pretrain.errors import CodecError

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
STREAM_SUFFIX = ".dicm"


@dataclass
class Encoded:
    """What `encode_files` wrote: counts, and the files that could not be read, each with its reason."""

    num_files: int = 0
    num_bytes: int = 0
    num_pixels: int = 0
    rejected: list[str] = field(default_factory=list)

    @property
    def bits_per_pixel(self) -> float:
        """Mean rate over all pixels."""
        return 8 * self.num_bytes / max(self.num_pixels, 1)


def read_image(path: Path) -> Tensor:
    """An image file as (3, H, W) uint8 RGB, upright; CodecError where it does not decode."""
    try:
        return decode_image(str(path), mode=ImageReadMode.RGB, apply_exif_orientation=True)
    except (RuntimeError, OSError) as error:
        raise CodecError(f"{path}: not an image that can be decoded ({str(error).splitlines()[0]})") from error


def encode_files(codec: str, sources: list[Path], out: Path, console: Console) -> Encoded:
    """Encode every image of `sources` to `out`/NAME.dicm; of several images, those that fail are left out by name.

    Raises:
        CodecError: no image found, two images of one name, or the only image does not decode.
    """
    files = _targets(sources, IMAGE_SUFFIXES, out, STREAM_SUFFIX)
    model = FeatureCodec.from_pretrained(codec)
    out.mkdir(parents=True, exist_ok=True)
    result = Encoded()
    with Progress(console=console, transient=True) as progress:
        for source, target in progress.track(files.items(), description="encoding"):
            try:
                image = read_image(source)
                stream = model.encode(image)
            except CodecError as error:
                if len(files) == 1:
                    raise
                result.rejected.append(str(error))
                continue
            target.write_bytes(stream)
            result.num_files += 1
            result.num_bytes += len(stream)
            result.num_pixels += image.shape[-1] * image.shape[-2]
    return result


def decode_files(codec: str, sources: list[Path], out: Path, console: Console) -> int:
    """Decode every stream of `sources` to `out`/NAME.npy, (C, ceil(H/4), ceil(W/4)) float32; returns their number.

    Raises:
        CodecError, BitstreamError: no stream found, or one that is damaged or of another codec, by name.
    """
    files = _targets(sources, {STREAM_SUFFIX}, out, ".npy")
    model = FeatureCodec.from_pretrained(codec)
    out.mkdir(parents=True, exist_ok=True)
    with Progress(console=console, transient=True) as progress:
        for source, target in progress.track(files.items(), description="decoding"):
            try:
                features = model.decode(source.read_bytes())
            except CodecError as error:
                raise type(error)(f"{source}: {error}") from error
            np.save(target, features[0].numpy())
    return len(files)


def _targets(sources: list[Path], suffixes: set[str], out: Path, suffix: str) -> dict[Path, Path]:
    files = [file for source in sources for file in _files(source, suffixes)]
    if not files:
        raise CodecError(f"{', '.join(map(str, sources))}: no file that ends in {', '.join(sorted(suffixes))}")
    targets: dict[Path, Path] = {}
    for file in files:
        target = out / (file.stem + suffix)
        if target in targets.values():
            first = next(source for source, other in targets.items() if other == target)
            raise CodecError(f"{first} and {file} would both be written to {target}; use two output folders")
        targets[file] = target
    return targets


def _files(source: Path, suffixes: set[str]) -> Iterator[Path]:
    if not source.exists():
        raise CodecError(f"{source}: no such file or folder")
    if source.is_file():
        yield source
    else:
        yield from sorted(path for path in source.rglob("*") if path.suffix.lower() in suffixes)
