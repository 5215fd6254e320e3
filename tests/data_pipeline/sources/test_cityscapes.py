from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.errors import DataError
from data_pipeline.sources import UnusableError
from data_pipeline.sources.cityscapes import CLASSES, LABEL_IDS, TRAIN_IDS, list_source, read_sample

SIZE = (16, 8)


def street(root: Path, split: str, city: str, number: int, ids: np.ndarray | int | None = 7) -> None:
    """An image and its mask of label ids: a value, an array, or None for no mask."""
    name = f"{city}_{number:06d}_000019"
    image = root / "leftImg8bit" / split / city / f"{name}_leftImg8bit.png"
    image.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", SIZE, "grey").save(image)
    if ids is not None:
        mask = root / "gtFine" / split / city / f"{name}_gtFine_labelIds.png"
        mask.parent.mkdir(parents=True, exist_ok=True)
        values = np.full(SIZE[::-1], ids, np.uint8) if isinstance(ids, int) else ids
        Image.fromarray(values).save(mask)
        Image.new("RGB", SIZE).save(mask.with_name(f"{name}_gtFine_color.png"))


def mask_of(root: Path) -> np.ndarray:
    job = list_source(root).splits["train"][0]
    return np.asarray(Image.open(io.BytesIO(read_sample(job).semantic or b"")))


def test_classes__are_the_nineteen_of_the_benchmark_in_its_order():
    assert len(CLASSES) == 19
    assert (CLASSES[0], CLASSES[10], CLASSES[13], CLASSES[18]) == ("road", "sky", "car", "bicycle")
    assert (TRAIN_IDS != 255).sum() == 19
    assert sorted(LABEL_IDS.values()) == list(LABEL_IDS.values())


def test_list_source__images_of_all_cities_by_split(tmp_path: Path):
    street(tmp_path, "train", "ulm", 1)
    street(tmp_path, "train", "aachen", 2)
    street(tmp_path, "val", "lindau", 3)
    listing = list_source(tmp_path)
    assert listing.classes == listing.semantic_classes == CLASSES
    names = {split: [job.file.name[:6] for job in jobs] for split, jobs in listing.splits.items()}
    assert names == {"train": ["aachen", "ulm_00"], "val": ["lindau"]}
    assert listing.rejected == ()


def test_list_source__a_split_without_masks_is_unlabelled(tmp_path: Path):
    street(tmp_path, "train", "ulm", 1)
    street(tmp_path, "test", "bonn", 2, ids=None)
    sample = read_sample(list_source(tmp_path).splits["test"][0])
    assert sample.semantic is None and sample.image_id == "bonn_000002_000019"


def test_list_source__images_alone_have_no_classes(tmp_path: Path):
    street(tmp_path, "train", "ulm", 1, ids=None)
    listing = list_source(tmp_path)
    assert listing.classes == listing.semantic_classes == ()


def test_list_source__what_has_no_counterpart_is_left_out_and_listed(tmp_path: Path):
    for number in (1, 2, 3):
        street(tmp_path, "train", "ulm", number)
    (tmp_path / "gtFine/train/ulm/ulm_000001_000019_gtFine_labelIds.png").unlink()
    (tmp_path / "leftImg8bit/train/ulm/ulm_000002_000019_leftImg8bit.png").unlink()
    listing = list_source(tmp_path)
    assert [job.file.name[:10] for job in listing.splits["train"]] == ["ulm_000003"]
    assert [(item.file.split("/")[0], item.what) for item in listing.rejected] == [
        ("leftImg8bit", "image"),
        ("gtFine", "annotation"),
    ]


def test_list_source__masks_of_another_kind_are_refused(tmp_path: Path):
    street(tmp_path, "train", "ulm", 1)
    mask = tmp_path / "gtFine/train/ulm/ulm_000001_000019_gtFine_labelIds.png"
    mask.rename(mask.with_name("ulm_000001_000019_gtFine_labelTrainIds.png"))
    with pytest.raises(DataError, match=r"gtFine/train: no CITY/\*_gtFine_labelIds\.png"):
        list_source(tmp_path)


def test_list_source__not_a_cityscapes_folder(tmp_path: Path):
    with pytest.raises(DataError, match="no leftImg8bit/train/CITY"):
        list_source(tmp_path)


def test_read_sample__label_ids_become_train_ids_and_all_others_255(tmp_path: Path):
    ids = np.full(SIZE[::-1], 255, np.uint8)
    ids.flat[:34] = np.arange(34)
    street(tmp_path, "train", "ulm", 1, ids)
    mask = mask_of(tmp_path)
    expected = {number: train_id for train_id, number in enumerate(LABEL_IDS.values())}
    assert mask.flat[:34].tolist() == [expected.get(number, 255) for number in range(34)]
    assert (mask.flat[34:] == 255).all()


def test_read_sample__a_value_that_is_no_label_id_is_refused(tmp_path: Path):
    street(tmp_path, "train", "ulm", 1, ids=34)
    with pytest.raises(DataError, match=r"labelIds\.png: value 34 is no label id") as error:
        mask_of(tmp_path)
    assert not isinstance(error.value, UnusableError)


def test_read_sample__mask_of_another_size_leaves_the_image_out(tmp_path: Path):
    street(tmp_path, "train", "ulm", 1, np.zeros((9, 16), np.uint8))
    with pytest.raises(UnusableError, match="mask of 16 x 9, image of 16 x 8"):
        mask_of(tmp_path)


def test_list_source__suffixes_in_capitals_are_read_and_other_files_listed(tmp_path: Path):
    street(tmp_path, "train", "ulm", 1)
    for path in [*(tmp_path / "leftImg8bit").rglob("*.png"), *(tmp_path / "gtFine").rglob("*labelIds.png")]:
        path.rename(path.with_suffix(".PNG"))
    (tmp_path / "leftImg8bit" / "train" / "ulm" / "ulm_000002_000019_leftImg8bit.jpg").touch()
    (tmp_path / "leftImg8bit" / "train" / "bonn").mkdir()
    listing = list_source(tmp_path)
    assert [read_sample(job).image_id for job in listing.splits["train"]] == ["ulm_000001_000019"]
    assert [(item.file, item.what, item.count) for item in listing.rejected] == [("leftImg8bit/train/ulm", "file", 1)]


def test_read_sample__a_mask_of_half_a_turned_image_is_left_out(tmp_path: Path):
    street(tmp_path, "train", "ulm", 1)
    exif = Image.Exif()
    exif[0x0112] = 3
    (path,) = (tmp_path / "leftImg8bit").rglob("*.png")
    Image.new("RGB", SIZE).save(path, exif=exif)
    with pytest.raises(UnusableError, match="its EXIF orientation 3 turns it"):
        read_sample(list_source(tmp_path).splits["train"][0])
