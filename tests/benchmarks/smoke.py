"""`--smoke` of the benchmarks: the same measurement of tiny inputs, made on the spot, to see that a script runs.

A script hands `parse` its parser and a function that makes inputs in a folder and returns the options that name them.
"""

from __future__ import annotations

import argparse
import atexit
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

REPOSITORY = Path(__file__).parent.parent.parent
# Helpers of the tests; the repository comes first, for the tests of a package lie in a folder of its name.
sys.path.insert(0, str(REPOSITORY))
sys.path.append(str(REPOSITORY / "tests"))

BACKBONE = "test_resnet"  # timm's own for tests: one block a layer, 0.4 M parameters
# Options of pretraining: narrow networks.
NARROW = [
    f"codec.backbone={BACKBONE}",
    "codec.re_channels=16", "codec.re_latent=16", "codec.re_depths=[1,1,1]", "codec.transform_channels=16",
    "codec.latent_channels=16", "codec.hyper_dim=24", "codec.hyper_heads=2", "codec.hyper_head_dim=12",
    "codec.z_channels=8", "ssl.queue=64", "ssl.hidden_dim=32", "ssl.dim=16",
]  # fmt: skip
SIZE = 64  # pixels of a scene, and of what the codec was made for


def parse(
    parser: argparse.ArgumentParser, small: Callable[[Path], list[str]], words: Sequence[str] | None = None
) -> argparse.Namespace:
    """The options of a script; with --smoke those of `small` come first, and what else is given holds before them."""
    words = sys.argv[1:] if words is None else words
    return parser.parse_args([*small(scratch()), *words] if "--smoke" in words else words)


def add_option(parser: argparse.ArgumentParser) -> None:
    """Let the parser know of --smoke."""
    parser.add_argument("--smoke", action="store_true", help="tiny inputs, made on the spot: to see that this runs")


def scratch() -> Path:
    """A new folder, which goes when the process ends."""
    folder = Path(tempfile.mkdtemp(prefix="smoke"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """SIGTERM ends the process while the block lasts, also where one run of several only would end with it."""
    from cluster.runtime import on_sigterm

    def leave() -> None:
        raise SystemExit(143)

    with on_sigterm(leave):
        yield


@contextmanager
def light_processes() -> Iterator[None]:
    """Processes that begin in the block do not import the script, which would take each of them ten seconds."""
    with patch.object(sys.modules["__main__"], "__file__", None, create=True):
        yield


def photos(folder: Path, count: int = 2, height: int = 96, width: int = 144) -> Path:
    """A folder of JPEGs."""
    from pictures import encoded, picture

    (folder / "photos").mkdir()
    for seed in range(count):
        (folder / "photos" / f"{seed}.jpg").write_bytes(encoded(picture(width, height, seed)))
    return folder / "photos"


def scenes(folder: Path, train: int = 16, val: int = 4) -> Path:
    """A data set with labels, boxes and masks."""
    from data_pipeline.scenes import write_scenes

    with light_processes():
        write_scenes(folder / "scenes", train=train, val=val, size=SIZE, num_processes=1)
    return folder / "scenes"


def codec(folder: Path) -> Path:
    """An exported codec of random weights."""
    from small_codecs import create_codec

    create_codec(backbone=BACKBONE).save_pretrained(folder / "codec", {"image_size": SIZE, "canvas_size": SIZE})
    return folder / "codec"


def classification(run: Path, codec: Path, data: Path, *options: str) -> Path:
    """A complete fine-tune in the folder `run`."""
    from downstream import finetune

    places = [f"codec={codec}", f"data={data}", f"run={run}", "launcher=local"]
    finetune.run(finetune.resolve("classification", [*places, "epochs=1", "batch_size=8", "log_every=1", *options]))
    return run
