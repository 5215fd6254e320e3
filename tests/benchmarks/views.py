"""Time of two augmented views an image: ours, in batches, beside lightly's MoCoV2Transform, image by image.

    python tests/benchmarks/views.py --data PHOTOS [--size 64] [--canvas SIZE] [--threads 1] [--json FILE]

PHOTOS is searched for images. Both sides start from the same bytes and end in two normalised tensors of the same
size with the same kinds of augmentation; decoding is measured apart, because ours decodes at reduced size. The
two sides take turns, and the shortest of all turns counts. With one thread the clock is that thread's CPU time,
which other programs on the machine disturb least; with more it is the clock on the wall.

Figures in --json, milliseconds an image: `ours_decode`, `ours_views`, `lightly_decode`, `lightly_views`; and
`speedup_views`, `speedup_total` (lightly's time over ours), with `size`, `canvas`, `threads`, `images`.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import PIL.Image
import smoke
import torch
from lightly.transforms import MoCoV2Transform

from data_pipeline.decoding import decode_canvas
from data_pipeline.folders import IMAGE_SUFFIXES
from data_pipeline.views import ViewConfig, two_views

PARTS = ("decode", "views")


def milliseconds(sides: dict[str, Callable[[], object]], count: int, repeat: int) -> dict[str, float]:
    """Shortest time of each function over `repeat` turns, per image of `count`."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    times = {name: float("inf") for name in sides}
    for _ in range(repeat):
        for name, function in sides.items():
            start = clock()
            function()
            times[name] = min(times[name], 1e3 * (clock() - start) / count)
    return times


def measure(contents: list[bytes], size: int, canvas_size: int, repeat: int) -> dict[str, float]:
    """The four times of `contents`, encoded images."""
    decoded = [decode_canvas(content, canvas_size) for content in contents]
    canvas = torch.stack([pixels for pixels, _ in decoded])
    aspect = torch.tensor([ratio for _, ratio in decoded], dtype=torch.float32)
    pictures = [PIL.Image.open(io.BytesIO(content)).convert("RGB") for content in contents]
    generator, config, transform = torch.Generator().manual_seed(0), ViewConfig(), MoCoV2Transform(input_size=size)
    sides: dict[str, Callable[[], object]] = {
        "ours_decode": lambda: [decode_canvas(content, canvas_size) for content in contents],
        "lightly_decode": lambda: [PIL.Image.open(io.BytesIO(content)).convert("RGB") for content in contents],
        "ours_views": lambda: two_views(canvas, aspect, size, config, generator),
        "lightly_views": lambda: [transform(picture) for picture in pictures],
    }
    return milliseconds(sides, len(contents), repeat)


def small(folder: Path) -> list[str]:
    """Options of a tiny run."""
    return ["--data", str(smoke.photos(folder)), "--size", "32", "--batch", "4", "--repeat", "1"]


def create_parser() -> argparse.ArgumentParser:
    """Its options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of images, searched through")
    parser.add_argument("--size", type=int, default=64, help="side of a view")
    parser.add_argument("--canvas", type=int, help="side of a canvas; by default the view's, and 256 from 224 up")
    parser.add_argument("--batch", type=int, default=128, help="number of images")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    smoke.add_option(parser)
    return parser


def main() -> None:
    """Measure, print a table, write the figures."""
    parser = create_parser()
    options = smoke.parse(parser, small)
    torch.set_num_threads(options.threads)
    cv2.setNumThreads(options.threads)

    files = sorted(path for path in options.data.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        parser.error(f"--data {options.data}: no images")
    chosen = itertools.islice(itertools.cycle(files[: options.batch]), options.batch)
    canvas_size = options.canvas or (max(256, options.size) if options.size >= 224 else options.size)
    times = measure([path.read_bytes() for path in chosen], options.size, canvas_size, options.repeat)
    totals = {side: sum(times[f"{side}_{part}"] for part in PARTS) for side in ("ours", "lightly")}
    figures = {
        **times,
        "speedup_views": times["lightly_views"] / times["ours_views"],
        "speedup_total": totals["lightly"] / totals["ours"],
        "size": options.size,
        "canvas": canvas_size,
        "threads": options.threads,
        "images": options.batch,
    }

    print(f"two views of {options.size} px, {options.batch} images, {options.threads} thread(s), ms an image")
    print(f"{'':>8} {'decode':>8} {'views':>8} {'total':>8}")
    for side, total in totals.items():
        columns = [*(times[f"{side}_{part}"] for part in PARTS), total]
        print(f"{side:>8}", *(f"{figure:8.2f}" for figure in columns))
    print(f"lightly's time over ours: views {figures['speedup_views']:.1f}, total {figures['speedup_total']:.1f}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
