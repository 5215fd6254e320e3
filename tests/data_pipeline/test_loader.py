"""From shards to canvases: what is decoded, in which order it comes, and what is refused."""

from __future__ import annotations

import io
import itertools
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from data_pipeline.decoding import decode_canvas, decode_image
from data_pipeline.errors import DataError
from data_pipeline.loader import (
    CanvasBatch,
    CanvasDataset,
    CanvasLoader,
    eval_loader,
    train_loader,
)
from data_pipeline.order import SampleOrder
from data_pipeline.shards import Manifest, ShardWriter, Split

CANVAS = 24


def picture(width: int = 60, height: int = 45, seed: int = 0) -> Image.Image:
    """Smooth colours, different in every corner."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC))


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def write_dataset(root: Path, images: list[bytes], extension: str = "jpg", labels: bool = True) -> Path:
    """Split `train` in shards of seven, labelled by position in 0..4."""
    root.mkdir()
    with ShardWriter(root, "train", max_samples=7) as writer:
        for number, data in enumerate(images):
            fields = {"label": number % 5} if labels else {}
            writer.write({"__key__": f"image{number:03d}", extension: data, "json": fields})
    Manifest("pictures", tuple("abcde"), {"train": Split(tuple(writer.shards))}).save(root)
    return root


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 JPEGs of different proportions."""
    images = [encoded(picture(30 + number, 40, number)) for number in range(30)]
    return write_dataset(tmp_path_factory.mktemp("data") / "pictures", images)


def first(loader: CanvasLoader, count: int) -> list[CanvasBatch]:
    return list(itertools.islice(loader, count))


def assert_equal(ours: list[CanvasBatch], theirs: list[CanvasBatch]) -> None:
    assert len(ours) == len(theirs)
    for batch, other in zip(ours, theirs, strict=True):
        assert all(torch.equal(*pair) for pair in zip(batch, other, strict=True))


@pytest.mark.parametrize(("kind", "options"), [("JPEG", {}), ("PNG", {}), ("WEBP", {"lossless": True})])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_decode_image__is_upright_by_exif_in_every_format(kind: str, options: dict, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(picture(), kind, exif=exif, **options)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert np.array_equal(decode_image(data), np.asarray(upright))
    assert decode_canvas(data, CANVAS)[1] == upright.width / upright.height


@pytest.mark.parametrize(
    ("mode", "kind", "tolerance"),
    [("L", "JPEG", 0), ("CMYK", "JPEG", 1), ("L", "PNG", 0), ("P", "PNG", 0), ("RGBA", "PNG", 0), ("1", "PNG", 0)],
)
def test_decode_image__other_colour_modes_become_rgb_as_pillow_makes_it(mode: str, kind: str, tolerance: int) -> None:
    data = encoded(picture().convert(mode), kind)
    wanted = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    assert np.abs(decode_image(data) - wanted).max() <= tolerance


def test_decode_image__sixteen_bits_become_eight() -> None:
    grey = np.asarray(picture().convert("L"))
    data = cv2.imencode(".png", grey.astype(np.uint16) * 257)[1].tobytes()
    assert np.array_equal(decode_image(data), np.repeat(grey[:, :, None], 3, axis=2))


def test_decode_image__bytes_after_the_end_of_a_jpeg_do_not_matter() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(picture(), exif=exif)
    assert np.array_equal(decode_image(data + b"appended by a camera"), decode_image(data))


def test_decode_image__a_damaged_exif_block_leaves_the_picture_readable() -> None:
    data = encoded(picture(), exif=b"Exif\x00\x00II*\x00\xff\xff\xff\x7f")
    assert decode_image(data).shape == (45, 60, 3)


@pytest.mark.parametrize(
    "data",
    [b"", b"hello", b"\xff\xd8\xff", encoded(picture())[:-300], encoded(picture(), "PNG")[:-300],
     encoded(picture(), "WEBP")[:-300]],
    ids=["empty", "text", "jpeg-start", "cut-jpeg", "cut-png", "cut-webp"],
)  # fmt: skip
def test_decode_image__refuses_what_is_damaged_in_one_line(data: bytes) -> None:
    with pytest.raises(DataError, match="not an image that can be decoded") as error:
        decode_image(data)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_decode_canvas__an_image_of_the_canvas_size_is_unchanged(kind: str) -> None:
    data = encoded(picture(CANVAS, CANVAS), kind)
    pixels, aspect = decode_canvas(data, CANVAS)
    assert np.array_equal(pixels.permute(1, 2, 0), np.asarray(Image.open(io.BytesIO(data))))
    assert aspect == 1


@pytest.mark.parametrize("size", [(501, 333), (60, 45), (10, 200), (200, 10), (12, 9)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_decode_canvas__squashes_any_shape_as_an_antialiased_resize(size: tuple[int, int], kind: str) -> None:
    data = encoded(picture(*size), kind)
    pixels, aspect = decode_canvas(data, CANVAS)
    wanted = np.asarray(Image.open(io.BytesIO(data)).resize((CANVAS, CANVAS), Image.Resampling.BILINEAR))
    assert pixels.shape == (3, CANVAS, CANVAS) and pixels.dtype == torch.uint8
    difference = np.abs(pixels.permute(1, 2, 0).numpy().astype(int) - wanted)
    # A JPEG may come reduced by libjpeg, which is another filter.
    assert difference.max() <= 1 if kind == "PNG" else difference.mean() < 4
    assert aspect == size[0] / size[1]  # of the image itself, not of a reduced decode


def test_train_loader__gives_canvases_labels_and_aspects_in_the_order_of_the_seed(dataset: Path) -> None:
    order = SampleOrder([7, 7, 7, 7, 2], seed=4)
    start = 0
    for batch in first(train_loader(dataset, canvas_size=CANVAS, batch_size=8, seed=4), 5):
        assert batch.canvas.shape == (8, 3, CANVAS, CANVAS) and batch.canvas.dtype == torch.uint8
        assert batch.canvas.is_contiguous()
        assert batch.aspect.dtype == torch.float32 and batch.label.dtype == batch.index.dtype == torch.int64
        assert sorted(batch.index.tolist()) == sorted(order.take(start, start + 8).tolist())
        assert batch.label.tolist() == (batch.index % 5).tolist()
        assert batch.aspect.tolist() == pytest.approx(((batch.index + 30) / 40).tolist())
        start += 8


def test_train_loader__worker_processes_change_nothing(dataset: Path) -> None:
    options = {"canvas_size": CANVAS, "batch_size": 8, "rank": 1, "world": 2, "samples_seen": 24}
    alone = first(train_loader(dataset, **options), 7)
    loader = train_loader(dataset, **options, num_workers=2)
    assert_equal(first(loader, 7), alone)
    assert_equal(first(loader, 3), alone[:3])  # the same workers, from the start again


def test_train_loader__resumes_with_the_very_next_batches(dataset: Path) -> None:
    whole = first(train_loader(dataset, canvas_size=CANVAS, batch_size=8), 9)
    resumed = train_loader(dataset, canvas_size=CANVAS, batch_size=8, samples_seen=5 * 8)
    assert_equal(first(resumed, 4), whole[5:])


def test_train_loader__without_labels_gives_minus_one(tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "pictures", [encoded(picture())] * 3, labels=False)
    assert first(train_loader(root, canvas_size=CANVAS, batch_size=3), 1)[0].label.tolist() == [-1] * 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 31}, "batch_size=31.*30 samples"),
        ({"batch_size": 3, "world": 4}, "batch_size=3.*4 workers"),
        ({"batch_size": 8, "split": "test"}, "'test'.*train"),
        ({"batch_size": 8, "canvas_size": 0}, "canvas_size=0"),
        ({"batch_size": 8, "num_workers": -1}, "num_workers=-1"),
    ],
)
def test_train_loader__refuses_what_cannot_work_before_reading(dataset: Path, options: dict, words: str) -> None:
    with pytest.raises(DataError, match=words):
        train_loader(dataset, **{"canvas_size": CANVAS, **options})


@pytest.mark.parametrize("num_workers", [0, 1])
def test_train_loader__a_bad_image_is_named_by_its_key_in_one_line(tmp_path: Path, num_workers: int) -> None:
    root = write_dataset(tmp_path / "pictures", [encoded(picture()), b"\xff\xd8\xff broken"])
    with pytest.raises(DataError, match="image001") as error:
        first(train_loader(root, canvas_size=CANVAS, batch_size=2, num_workers=num_workers), 1)
    assert str(root) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_train_loader__a_damaged_shard_is_named_before_a_byte_is_used(tmp_path: Path, num_workers: int) -> None:
    root = write_dataset(tmp_path / "pictures", [encoded(picture(), "PNG")] * 3, "png")
    shard = root / "train-000000.tar"
    content = bytearray(shard.read_bytes())
    content[1500] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DataError, match=r"train-000000\.tar") as error:
        first(train_loader(root, canvas_size=CANVAS, batch_size=2, num_workers=num_workers), 1)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_eval_loader__ranks_see_each_sample_once_in_order(dataset: Path, num_workers: int) -> None:
    seen = []
    for rank in range(3):
        loader = eval_loader(
            dataset, "train", canvas_size=CANVAS, batch_size=4, rank=rank, world=3, num_workers=num_workers
        )
        indexes = torch.cat([batch.index for batch in loader]).tolist()
        assert len(loader) == 3
        assert indexes == list(range(rank, 30, 3))
        seen += indexes
    assert sorted(seen) == list(range(30))


def test_eval_loader__limit_is_spread_over_the_split(dataset: Path) -> None:
    loader = eval_loader(dataset, "train", canvas_size=CANVAS, batch_size=4, limit=6)
    assert torch.cat([batch.index for batch in loader]).tolist() == [0, 5, 10, 15, 20, 25]
    assert sum(len(b.index) for b in eval_loader(dataset, "train", canvas_size=8, batch_size=7, limit=99)) == 30


def test_eval_loader__more_ranks_than_samples_leaves_some_without_a_batch(dataset: Path) -> None:
    assert list(eval_loader(dataset, "train", canvas_size=8, batch_size=4, rank=2, world=3, limit=2)) == []


def test_dataset__reads_single_samples(dataset: Path) -> None:
    data = CanvasDataset(dataset, "train", CANVAS)
    assert len(data) == 30
    assert (data[11].label, data[11].index, data[11].pixels.shape) == (1, 11, (3, CANVAS, CANVAS))
