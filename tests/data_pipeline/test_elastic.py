"""The promise of a run that grows and shrinks: same samples, same bytes, each once an epoch, whoever reads them."""

from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from data_pipeline.loader import train_loader
from data_pipeline.manifest import Manifest, Split
from data_pipeline.order import SampleOrder
from data_pipeline.shards import ShardWriter

SIZES = (37, 5, 23, 1, 30)  # 96 samples in shards of odd sizes
BATCH = 24  # divides by every world
STEPS = 9  # 216 samples: more than two epochs
OPTIONS = {"canvas_size": 16, "batch_size": BATCH, "shuffle_shards": 2, "num_lanes": 7, "seed": 3}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, shards, number = tmp_path_factory.mktemp("elastic"), [], 0
    rng = np.random.default_rng(0)
    for part, size in enumerate(SIZES):
        with ShardWriter(root, f"part{part}") as writer:
            for _ in range(size):
                image = cv2.imencode(".jpg", rng.integers(0, 256, (20, 24, 3), dtype=np.uint8))[1].tobytes()
                facts = json.dumps({"label": number}).encode()
                writer.write({"__key__": f"{number:03d}", "jpg": image, "json": facts})
                number += 1
        shards += writer.shards
    Manifest("elastic", tuple(map(str, range(number))), {"train": Split(tuple(shards))}).save(root)
    return root


def read(root: Path, world: int, num_workers: int, start: int, steps: int) -> list[list[tuple[int, str]]]:
    """For each step, index and digest of every sample that any rank reads, in the order of their indexes."""
    ranks = []
    for rank in range(world):
        loader = train_loader(
            root, rank=rank, world=world, num_workers=num_workers, samples_seen=start * BATCH, **OPTIONS
        )
        batches = []
        for batch in itertools.islice(loader, steps):
            assert batch.label.tolist() == batch.index.tolist()
            digests = [hashlib.sha256(canvas.numpy().tobytes()).hexdigest() for canvas in batch.canvas]
            batches.append(list(zip(batch.index.tolist(), digests, strict=True)))
        ranks.append(batches)
    return [sorted(itertools.chain(*step)) for step in zip(*ranks, strict=True)]


@pytest.fixture(scope="module")
def alone(dataset: Path) -> list[list[tuple[int, str]]]:
    return read(dataset, 1, 0, 0, STEPS)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(("world", "num_workers"), [(1, 4), (2, 2), (3, 1), (4, 0), (6, 2), (8, 0), (8, 1)])
def test_train_loader__any_world_and_workers_read_the_same_bytes(
    dataset: Path, alone: list[list[tuple[int, str]]], world: int, num_workers: int
) -> None:
    assert read(dataset, world, num_workers, 0, STEPS) == alone


def test_train_loader__a_world_that_changes_in_mid_epoch_reads_on(
    dataset: Path, alone: list[list[tuple[int, str]]]
) -> None:
    steps, position = [], 0
    for world, num_workers, count in ((3, 0, 2), (8, 1, 3), (1, 2, 1), (6, 0, 3)):
        steps += read(dataset, world, num_workers, position, count)
        position += count
    assert steps == alone


def test_train_loader__each_epoch_holds_each_sample_once(alone: list[list[tuple[int, str]]]) -> None:
    order = SampleOrder(SIZES, seed=3, shuffle_shards=2, num_lanes=7)
    read_in_order = [index for step in alone for index, _ in step]
    assert sorted(read_in_order[:96]) == sorted(read_in_order[96:192]) == list(range(96))
    assert read_in_order[:BATCH] == sorted(order.take(0, BATCH).tolist())
