from __future__ import annotations

import pytest

from downstream.errors import TaskError
from downstream.finetune import resolve

NEEDED = ["codec=c", "data=d"]


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("input=jpeg", ("input=jpeg", "streams", "pixels")),
        ("launcher=slurm", ("launcher=slurm", "ray", "local")),
        ("epochs=0", ("epochs=0", "at least 1")),
        ("lr=0", ("lr=0", "positive")),
        ("label_smoothing=1.5", ("label_smoothing=1.5", "0..0.99")),
        ("scale_min=0", ("scale_min=0", "0.01..1")),
        ("image_size=8", ("image_size=8", "32")),
        ("image_size=20000", ("image_size=20000", "4096")),
        ("lr=nan", ("lr=nan", "finite")),
        ("weight_decay=.inf", ("weight_decay=inf", "finite")),
        ("seed=99999999999999999999999", ("seed=", "2^63")),
        ("anchor=jpeg:30", ("anchor=jpeg:30", "input=pixels")),
        ("micro_batch=1", ("micro_batch=1", "at least 2")),
    ],
)
def test_validate__impossible_value_is_named_with_its_remedy(option: str, words: tuple[str, ...]):
    with pytest.raises(TaskError) as caught:
        resolve("classification", [*NEEDED, option])
    assert all(word in str(caught.value) for word in words)


def test_validate__micro_batches_of_one_image_are_for_tasks_without_statistics_of_a_batch():
    with pytest.raises(TaskError, match=r"micro_batch=1 .* at least 2"):
        resolve("semantic_segmentation", [*NEEDED, "micro_batch=1"])
    assert resolve("detection", [*NEEDED, "micro_batch=1"]).micro_batch == 1


def test_validate__anchor_none_leaves_pixels_as_they_are():
    assert resolve("classification", [*NEEDED, "input=pixels", "anchor=none"]).anchor is None


def test_resolve__unknown_key_gets_the_nearest():
    with pytest.raises(ValueError, match=r"batchsize.*batch_size"):
        resolve("classification", [*NEEDED, "batchsize=3"])


def test_resolve__unknown_task_gets_the_nearest():
    with pytest.raises(ValueError, match=r"clasification.*classification"):
        resolve("clasification", NEEDED)


def test_resolve__codec_must_be_named():
    with pytest.raises(ValueError, match=r"codec is missing"):
        resolve("classification", ["data=d"])
