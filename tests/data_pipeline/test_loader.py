"""From shards to canvases: what is decoded, in which order it comes, and what is refused."""

from __future__ import annotations

import itertools
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from http_store import serving
from pictures import encoded, picture

from data_pipeline.cache import ShardCache
from data_pipeline.errors import DataError, SampleError
from data_pipeline.loader import (
    CanvasBatch,
    CanvasDataset,
    CanvasLoader,
    eval_loader,
    train_loader,
)
from data_pipeline.manifest import Manifest, Split
from data_pipeline.objects import ObjectDataset, survey_objects
from data_pipeline.order import ElasticSampler, SampleOrder
from data_pipeline.prefetch import Prefetcher
from data_pipeline.quarantine import BadSample, Quarantine
from data_pipeline.samples import once
from data_pipeline.shards import ShardReader, ShardWriter
from data_pipeline.storage import Retries

CANVAS = 24


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


BROKEN = b"\xff\xd8\xff broken"


def with_bad(root: Path, bad: dict[int, bytes], count: int = 30) -> Path:
    """Like `dataset`, but the images `bad` are these bytes."""
    return write_dataset(root, [bad.get(n, encoded(picture(30 + n, 40, n))) for n in range(count)])


def quarantined(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "quarantine.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_train_loader__a_bad_image_gives_its_place_to_the_next_of_its_lane(
    dataset: Path, tmp_path: Path, num_workers: int
) -> None:
    options = {"canvas_size": CANVAS, "batch_size": 8, "world": 2, "num_lanes": 6}
    root = with_bad(tmp_path / "pictures", {11: BROKEN, 20: b""})
    order = SampleOrder([7, 7, 7, 7, 2], num_lanes=6)
    epochs = order.take(0, 4 * 30).tolist()
    met = set()
    for rank in range(2):
        sound = first(train_loader(dataset, rank=rank, **options), 7)
        loader = train_loader(root, rank=rank, num_workers=num_workers, quarantine=tmp_path / "run", **options)
        for number, (batch, other) in enumerate(zip(sound, first(loader, 7), strict=True)):
            positions = ElasticSampler(order, 8, rank, 2).positions(number).tolist()
            for place, (position, index) in enumerate(zip(positions, batch.index.tolist(), strict=True)):
                wanted = index
                while wanted in (11, 20):  # the same lane, one item on, or the lane's first of the next epoch
                    met.add(wanted)
                    within = position % 30
                    position += 6 if within + 6 < 30 else 30 - within + within % 6
                    wanted = epochs[position]
                assert other.index[place] == wanted
                assert other.label[place] == wanted % 5
                assert other.aspect[place] == pytest.approx((30 + wanted) / 40)
                assert other.canvas[place].any()
                if wanted == index:
                    assert torch.equal(other.canvas[place], batch.canvas[place])
    assert met == {11, 20}
    lines = quarantined(tmp_path / "run")
    assert {line["index"] for line in lines} == {11, 20}
    assert {line["key"] for line in lines} == {"image011", "image020"}
    assert {line["shard"] for line in lines} == {"train-000001.tar", "train-000002.tar"}
    assert all("not an image" in line["reason"] and line["split"] == "train" for line in lines)


def test_train_loader__a_resumed_run_replaces_the_same_samples_by_the_same(tmp_path: Path) -> None:
    root = with_bad(tmp_path / "pictures", {3: BROKEN, 17: BROKEN, 18: BROKEN})
    options = {"canvas_size": CANVAS, "batch_size": 7, "num_lanes": 4}
    whole = first(train_loader(root, **options), 12)
    resumed = first(train_loader(root, samples_seen=5 * 7, num_workers=1, **options), 7)
    assert_equal(resumed, whole[5:])
    assert not {3, 17, 18} & set(torch.cat([batch.index for batch in whole]).tolist())


def test_train_loader__a_few_bad_images_in_a_small_data_set_never_end_the_run(tmp_path: Path) -> None:
    root = with_bad(tmp_path / "pictures", dict.fromkeys(range(10), BROKEN))
    loader = train_loader(root, canvas_size=8, batch_size=30, quarantine=tmp_path)
    assert len(first(loader, 15)) == 15
    assert len(quarantined(tmp_path)) == 10  # each once, in fifteen epochs


@pytest.mark.parametrize("num_workers", [0, 1])
def test_train_loader__too_many_bad_images_end_the_run_with_the_list(tmp_path: Path, num_workers: int) -> None:
    root = with_bad(tmp_path / "pictures", dict.fromkeys(range(0, 22, 2), BROKEN))
    loader = train_loader(root, canvas_size=8, batch_size=30, quarantine=tmp_path, num_workers=num_workers, num_lanes=1)
    with pytest.raises(DataError, match=r"11 of \d+ samples read of train by rank 0 cannot be used: ") as error:
        first(loader, 9)
    assert all(f"image{number:03d} (train-" in str(error.value) for number in range(0, 22, 2))
    assert str(tmp_path / "quarantine.jsonl") in str(error.value) and "\n" not in str(error.value)
    assert len(quarantined(tmp_path)) == 11


def test_quarantine__more_than_a_thousandth_of_what_was_read_is_too_much(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path, "train", 3)
    quarantine.read(50_000)
    for index in range(50):
        quarantine.add(BadSample(index, f"k{index}", "train-000000.tar", "broken"))
    with pytest.raises(DataError, match=r"51 of 50000 .* rank 3 .*k0 \(train-000000\.tar\), .* and 31 more"):
        quarantine.add(BadSample(50, "k50", "train-000000.tar", "broken"))


def test_train_loader__only_bad_images_end_the_run_at_once(tmp_path: Path) -> None:
    root = with_bad(tmp_path / "pictures", dict.fromkeys(range(4), BROKEN), count=4)
    with pytest.raises(DataError, match=r"10 samples in a row cannot be used, from image00\d"):
        first(train_loader(root, canvas_size=8, batch_size=4), 1)


def test_train_loader__a_sample_without_image_or_with_damaged_json_is_bad(tmp_path: Path) -> None:
    root = tmp_path / "set"
    root.mkdir()
    good = encoded(picture())
    with ShardWriter(root, "train") as writer:
        for number, fields in enumerate([{"jpg": good}, {}, {"jpg": good, "json": b"{"}, {"jpg": good, "json": b"[]"}]):
            writer.write({"__key__": f"s{number}", "json": b"{}", **fields})
    Manifest("odd", (), {"train": Split(tuple(writer.shards))}).save(root)
    batch = first(train_loader(root, canvas_size=8, batch_size=4, quarantine=tmp_path), 1)[0]
    assert batch.index.tolist() == [0] * 4
    assert sorted(line["key"] for line in quarantined(tmp_path)) == ["s1", "s2", "s3"]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_eval_loader__leaves_bad_images_out_and_names_them(tmp_path: Path, num_workers: int) -> None:
    root = with_bad(tmp_path / "pictures", {4: BROKEN, 5: BROKEN, 6: BROKEN, 7: BROKEN, 17: BROKEN})
    loader = eval_loader(
        root, "train", canvas_size=8, batch_size=4, num_workers=num_workers, quarantine=tmp_path
    )  # one batch of bad images alone
    seen = [batch.index.tolist() for batch in loader]
    assert list(itertools.chain(*seen)) == [n for n in range(30) if n not in (4, 5, 6, 7, 17)]
    assert all(seen)
    assert len(quarantined(tmp_path)) == 5


def test_eval_loader__without_any_good_image_says_so(tmp_path: Path) -> None:
    root = with_bad(tmp_path / "pictures", dict.fromkeys(range(3), BROKEN), count=3)
    with pytest.raises(DataError, match="no sample can be used, the first, image000"):
        list(eval_loader(root, "train", canvas_size=8, batch_size=2))


def test_dataset__a_bad_image_is_named_by_its_key_in_one_line(tmp_path: Path) -> None:
    data = CanvasDataset(with_bad(tmp_path / "pictures", {1: BROKEN}), "train", 8)
    with pytest.raises(SampleError, match=r"pictures: sample image001: not an image") as error:
        data[1]
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_train_loader__reads_a_url_as_a_folder(dataset: Path, tmp_path: Path, num_workers: int) -> None:
    options = {"canvas_size": CANVAS, "batch_size": 8, "rank": 1, "world": 2}
    with serving(dataset) as store:
        cache = ShardCache(tmp_path, retries=Retries(6, 0.01, 5.0))
        loader = train_loader(store.url, **options, num_workers=num_workers, cache=cache)
        assert_equal(first(loader, 9), first(train_loader(dataset, **options), 9))
        assert {count for name, count in store.requests.items() if name.endswith(".tar")} == {1}
        sizes = {shard.bytes for shard in Manifest.load(dataset).split("train").shards}
        assert loader.fetched_bytes <= sum(shard.bytes for shard in Manifest.load(dataset).split("train").shards)
        assert loader.fetched_bytes >= min(sizes) and loader.read_bytes > 0
        validation = eval_loader(store.url, "train", canvas_size=CANVAS, batch_size=9, cache=cache)
        assert torch.cat([batch.index for batch in validation]).tolist() == list(range(30))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_train_loader__a_shard_that_is_gone_from_the_store_ends_the_run_by_name(
    tmp_path: Path, num_workers: int
) -> None:
    root = write_dataset(tmp_path / "pictures", [encoded(picture())] * 14)
    (root / "train-000001.tar").unlink()
    with serving(root) as store:
        cache = ShardCache(tmp_path / "cache", retries=Retries(2, 0.01, 5.0))
        with pytest.raises(DataError, match=r"train-000001\.tar: is gone from the store") as error:
            first(train_loader(store.url, canvas_size=8, batch_size=4, num_workers=num_workers, cache=cache), 9)
    assert "\n" not in str(error.value)


def test_prefetcher__fetches_what_comes_within_its_share_of_the_cache(tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "pictures", [encoded(picture())] * 70)  # ten shards
    split = Manifest.load(root).split("train")
    size = split.shards[0].bytes
    with serving(root) as store:
        cache = ShardCache(tmp_path / "cache", 10 * size, Retries(2, 0.01, 5.0))
        reader = ShardReader(store.url, split, cache)
        prefetcher = Prefetcher(reader, [[7 * n] for n in range(10)], samples_ahead=100, share=0.4)
        fetched = 0
        for used in range(1, 11):
            fetched += prefetcher.advance()
            ahead = min(used + 3, 10)
            while len(list(cache.folder.glob("*.tar"))) < ahead:
                time.sleep(0.01)
            assert store.requests.total() == ahead  # the batch in use and three more, as four fit
        while fetched < 10 * size:
            fetched += prefetcher.advance()
            time.sleep(0.01)
        prefetcher.close()
        assert fetched == 10 * size


def test_prefetcher__an_error_is_not_lost_but_a_store_that_pauses_is_forgiven(tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "pictures", [encoded(picture())] * 21)
    split = Manifest.load(root).split("train")
    with serving(root) as store:
        reader = ShardReader(store.url, split, ShardCache(tmp_path / "cache", retries=Retries(1, 0.01, 5.0)))
        store.faults[split.shards[0].name] = ["busy"]
        store.faults[split.shards[1].name] = ["flip"]
        prefetcher = Prefetcher(reader, [[0], [7], [14]], samples_ahead=100, share=0.5)

        def advance_until_it_fails() -> None:
            while True:
                prefetcher.advance()
                time.sleep(0.01)

        with pytest.raises(DataError, match=rf"{split.shards[1].name}: damaged at the store"):
            advance_until_it_fails()
        prefetcher.close()
        assert reader.read(0)["__key__"] == "image000"


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


@pytest.mark.parametrize("kind", ["canvases", "samples"])
def test_loaders__a_worker_that_dies_names_what_it_had_in_hand(
    scenes: Path, monkeypatch: pytest.MonkeyPatch, kind: str
):
    def crash(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGSEGV)

    monkeypatch.setattr("data_pipeline.loader.decode_canvas", crash)
    monkeypatch.setattr("data_pipeline.samples.decode_image", crash)
    if kind == "canvases":
        batches: Iterator[object] = iter(eval_loader(scenes, canvas_size=16, batch_size=4, num_workers=1))
    else:
        usable = survey_objects(scenes, "val", 10, masks=False).usable
        batches = once(ObjectDataset(scenes, "val", usable, 10, masks=False), num_workers=1)
    with pytest.raises(DataError, match=r"ended from outside while it read sample 0 of \S+val-000000\.tar") as error:
        next(batches)
    assert "num_workers" in str(error.value) and "\n" not in str(error.value)
