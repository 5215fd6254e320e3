from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle

from data_pipeline.errors import DataError
from data_pipeline.sources import Listing, Sample, UnusableError
from data_pipeline.sources.coco import list_source, read_sample

WIDTH, HEIGHT = 40, 30
CATEGORIES = [{"id": 7, "name": "boat"}, {"id": 1, "name": "person"}, {"id": 90, "name": "toothbrush"}]
SQUARE = [[10, 5, 20, 5, 20, 15, 10, 15]]


def image(number: int, **fields: Any) -> dict[str, Any]:
    return {"id": number, "file_name": f"{number:012d}.jpg", "width": WIDTH, "height": HEIGHT, **fields}


def annotation(number: int = 1, image_id: int = 9, **fields: Any) -> dict[str, Any]:
    facts = {"bbox": [10, 5, 10, 10], "segmentation": SQUARE, "area": 100.0, "iscrowd": 0, "category_id": 7}
    return {"id": number, "image_id": image_id, **facts, **fields}


def write(
    root: Path,
    *annotations: dict[str, Any],
    images: list[dict[str, Any]] | None = None,
    split: str = "train",
    **parts: Any,
) -> Path:
    """A split of COCO 2017; each image listed is also written."""
    images = [image(9)] if images is None else images
    folder = root / f"{split}2017"
    folder.mkdir(parents=True, exist_ok=True)
    for entry in images:
        Image.new("RGB", (WIDTH, HEIGHT), "navy").save(folder / f"{entry['id']:012d}.jpg")
    (root / "annotations").mkdir(exist_ok=True)
    content = {"images": images, "annotations": annotations, "categories": CATEGORIES, **parts}
    (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))
    return root


def only(root: Path) -> Sample:
    (job,) = list_source(root).splits["train"]
    return read_sample(job)


def test_list_source__classes_are_categories_by_id_and_splits_lose_their_year(tmp_path: Path):
    write(tmp_path, split="val", images=[image(3)])
    write(tmp_path, annotation(), images=[image(12), image(9)])
    listing = list_source(tmp_path)
    assert listing.classes == ("person", "boat", "toothbrush") and listing.semantic_classes == ()
    numbers = {split: [read_sample(job).image_id for job in jobs] for split, jobs in listing.splits.items()}
    assert numbers == {"train": [9, 12], "val": [3]}


def test_list_source__only_the_splits_asked_for_are_read(tmp_path: Path):
    write(tmp_path, split="val")
    write(tmp_path)
    (tmp_path / "annotations" / "instances_train2017.json").write_text("{")
    assert list(list_source(tmp_path, {"test": "val"}).splits) == ["test"]


def test_list_source__annotations_of_what_is_not_there_are_listed(tmp_path: Path):
    write(tmp_path, annotation(), annotation(2, image_id=77), annotation(3, image_id=77), images=[image(9), image(10)])
    (tmp_path / "train2017" / f"{10:012d}.jpg").unlink()
    (tmp_path / "annotations" / "instances_val2017.json").write_text("{}")
    listing = list_source(tmp_path)
    assert [job.file.name for job in listing.splits["train"]] == [f"{9:012d}.jpg"]
    assert [(item.file, item.what, item.count) for item in listing.rejected] == [
        ("annotations/instances_val2017.json", "annotation", 1),
        ("train2017/000000000010.jpg", "image", 1),
        ("annotations/instances_train2017.json", "annotation", 2),
    ]
    assert "its folder val2017 is not there" in listing.rejected[0].reason
    assert "of image 77" in listing.rejected[2].reason


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"category_id": 2}, "annotation 1: category_id 2 is not one of its 3 categories"),
        ({"category_id": "boat"}, "annotation 1"),
        ({"bbox": [1, 2, 3]}, "bbox has 3 numbers instead of 4"),
        ({"bbox": None}, "annotation 1"),
        ({"area": math.nan}, "area nan"),
        ({"segmentation": "polygon"}, "neither polygons nor an RLE"),
        ({"segmentation": [["a", "b"]]}, "annotation 1"),
        ({"image_id": None}, "annotation 1"),
    ],
)
def test_list_source__bad_annotation_is_refused_with_file_value_and_remedy(tmp_path: Path, fields: dict, words: str):
    write(tmp_path, annotation(**fields))
    with pytest.raises(DataError, match=r"instances_train2017\.json: .*mend") as error:
        list_source(tmp_path)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"images": [', "broken JSON"),
        ("\xff", "broken JSON"),
        ("[" * 100_000, "broken JSON"),
        ("[]", "not a JSON object"),
        ('{"images": [], "annotations": []}', "no list 'categories'"),
        ('{"images": [1], "annotations": [], "categories": []}', "no list 'images'"),
        ('{"images": [], "annotations": [], "categories": [{"id": 1}]}', "a category without 'name'"),
        ('{"images": [{"id": 1}], "annotations": [], "categories": []}', "image 1"),
    ],
)
def test_list_source__damaged_file_is_named_in_one_line(tmp_path: Path, text: str, words: str):
    write(tmp_path)
    (tmp_path / "annotations" / "instances_train2017.json").write_text(text, encoding="latin-1")
    with pytest.raises(DataError, match=r"instances_train2017\.json") as error:
        list_source(tmp_path)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["../secret.jpg", "/etc/passwd", "sub/1.jpg"])
def test_list_source__file_names_stay_inside_their_folder(tmp_path: Path, name: str):
    write(tmp_path, images=[image(9, file_name=name)])
    with pytest.raises(DataError, match="is no plain file name"):
        list_source(tmp_path)


@pytest.mark.parametrize("part", ["images", "categories"])
def test_list_source__ids_that_are_not_unique_are_refused(tmp_path: Path, part: str):
    entries = {"images": [image(9), image(9)], "categories": [CATEGORIES[0], CATEGORIES[0]]}
    write(tmp_path)
    path = tmp_path / "annotations" / "instances_train2017.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), part: entries[part]}))
    with pytest.raises(DataError, match=r"have (one id|the id 9); give each its own"):
        list_source(tmp_path)
    (tmp_path / "train2017" / f"{9:012d}.jpg").unlink()
    with pytest.raises(DataError, match=r"have (one id|the id 9); give each its own"):
        list_source(tmp_path)


def test_list_source__text_is_read_as_the_number_that_it_says(tmp_path: Path):
    strings = {"image_id": "9", "category_id": "7", "area": "100", "bbox": ["10", "5", "10", "10"]}
    write(tmp_path, annotation(**strings, iscrowd="0", segmentation=[[str(value) for value in SQUARE[0]]]))
    write(tmp_path, annotation(), split="val")
    listing = list_source(tmp_path)
    read = [read_sample(listing.splits[split][0]).fields("x")["json"] for split in ("train", "val")]
    assert read[0] == read[1]


@pytest.mark.parametrize(
    ("value", "crowd"), [(0, 0), (1, 1), (True, 1), (False, 0), ("0", 0), ("1", 1), ("true", 1), ("False", 0)]
)
def test_list_source__iscrowd_is_read_from_what_says_yes_or_no(tmp_path: Path, value: Any, crowd: int):
    assert only(write(tmp_path, annotation(iscrowd=value))).iscrowd == [crowd]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"iscrowd": "no"}, "annotation 1: iscrowd: 'no' is neither 0 nor 1"),
        ({"iscrowd": 2}, "annotation 1: iscrowd: 2 is neither"),
        ({"iscrowd": None}, "annotation 1: iscrowd: None is neither"),
        ({"image_id": 9.5}, "annotation 1: image_id: 9.5 is no whole number"),
        ({"category_id": True}, "annotation 1: category_id: True is no whole number"),
        ({"bbox": [True, 5, 10, 10]}, "annotation 1: bbox: True is no number"),
        ({"bbox": "10 5 10 10"}, "annotation 1: bbox '10 5 10 10' is no list"),
        ({"area": "large"}, "annotation 1: area: 'large' is no number"),
        ({"segmentation": [[True] * 6]}, "annotation 1: a polygon: True is no number"),
        ({"segmentation": {"size": [30, "wide"], "counts": [1200]}}, "annotation 1: size: 'wide' is no whole number"),
    ],
)
def test_list_source__values_that_say_nothing_certain_are_refused(tmp_path: Path, fields: dict[str, Any], words: str):
    with pytest.raises(DataError) as error:
        list_source(write(tmp_path, annotation(**fields)))
    assert "instances_train2017.json: " + words in str(error.value) and "mend the entry" in str(error.value)


@pytest.mark.parametrize(
    ("fields", "words"),
    [({"width": 40.5}, "width: 40.5 is no whole number"), ({"file_name": None}, "file_name: None is no text"),
     ({"height": None}, "height: None is no whole number")],
)  # fmt: skip
def test_list_source__images_that_say_nothing_certain_are_refused(tmp_path: Path, fields: dict, words: str):
    with pytest.raises(DataError, match=f"image 9: {words}"):
        list_source(write(tmp_path, images=[image(9, **fields)]))


def test_list_source__crowds_are_counted(tmp_path: Path):
    write(tmp_path, annotation(1, iscrowd=1), annotation(2, iscrowd=1))
    write(tmp_path, annotation(1, iscrowd=1), annotation(2), split="val")
    crowds = [(item.what, item.count, item.reason[:15]) for item in list_source(tmp_path).rejected]
    assert crowds == [("crowd", 2, "all objects are"), ("crowd", 1, "1 of 2 objects ")]


def test_list_source__what_no_annotation_file_lists_is_listed(tmp_path: Path):
    write(tmp_path, annotation())
    Image.new("RGB", (9, 9)).save(tmp_path / "train2017" / "extra.JPG")
    for name in ("instances-train.json", "captions_train2017.json"):
        (tmp_path / "annotations" / name).write_text("{}")
    found = [(item.file, item.what, item.count) for item in list_source(tmp_path).rejected]
    assert found == [("annotations/instances-train.json", "file", 1), ("train2017", "image", 1)]


@pytest.mark.parametrize(
    ("orientation", "size", "used"), [(6, (30, 40), True), (6, (40, 30), False), (3, (40, 30), False)]
)
def test_read_sample__boxes_on_a_turned_photograph_are_used_where_they_fit_it_upright(
    tmp_path: Path, orientation: int, size: tuple[int, int], used: bool
):
    exif = Image.Exif()
    exif[0x0112] = orientation
    write(tmp_path, annotation(bbox=[1, 2, 3, 4]), images=[image(9, width=size[0], height=size[1])])
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "train2017" / f"{9:012d}.jpg", exif=exif)
    if used:
        assert only(tmp_path).boxes == [[1, 2, 4, 6]]
    else:
        with pytest.raises(UnusableError, match=f"EXIF orientation {orientation} turns it"):
            only(tmp_path)


def test_list_source__splits_of_other_categories_are_refused(tmp_path: Path):
    write(tmp_path)
    write(tmp_path, split="val", categories=CATEGORIES[:2])
    with pytest.raises(DataError, match=r"val2017\.json: its categories are not those of the other splits"):
        list_source(tmp_path)


def test_list_source__not_a_coco_folder(tmp_path: Path):
    with pytest.raises(DataError, match=r"no annotations/instances_train2017\.json"):
        list_source(tmp_path)


def test_list_source__two_years_of_one_split_are_refused(tmp_path: Path):
    write(tmp_path)
    (tmp_path / "train2014").mkdir()
    (tmp_path / "annotations" / "instances_train2014.json").write_text("{}")
    with pytest.raises(DataError, match=r"instances_train2014\.json and instances_train2017\.json are both of train"):
        list_source(tmp_path)


def test_read_sample__keeps_boxes_classes_crowds_areas_and_the_image_id(tmp_path: Path):
    runs = {"size": [HEIGHT, WIDTH], "counts": [0, HEIGHT, (WIDTH - 1) * HEIGHT]}
    crowd = annotation(2, iscrowd=1, segmentation=runs, bbox=[0, 0, 1, 30], area=30, category_id=1)
    write(tmp_path, annotation(area=99.5), crowd)
    sample = only(tmp_path)
    assert (sample.image_id, sample.width, sample.height, sample.label) == (9, WIDTH, HEIGHT, None)
    assert sample.boxes == [[10, 5, 20, 15], [0, 0, 1, 30]]
    assert sample.labels == [1, 0] and sample.iscrowd == [0, 1] and sample.areas == [99.5, 30]
    square, column = (rle.decode(mask) for mask in sample.masks or [])
    assert square.shape == (HEIGHT, WIDTH) and square.sum() == 100 and square[5:15, 10:20].all()
    assert column.sum() == HEIGHT and column[:, 0].all()
    assert json.loads(sample.fields("k")["json"])["masks"] == sample.masks


def test_read_sample__an_image_without_annotations_has_empty_lists(tmp_path: Path):
    sample = only(write(tmp_path))
    assert sample.boxes == sample.labels == sample.iscrowd == [] and sample.masks is None
    assert json.loads(sample.fields("k")["json"])["boxes"] == []


def test_read_sample__compressed_runs_and_many_polygons(tmp_path: Path):
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[2:9, 3:33] = 1
    code = rle.encode(np.asfortranarray(mask))
    outline = {"size": [HEIGHT, WIDTH], "counts": code["counts"].decode()}
    two = [*SQUARE, [30, 20, 36, 20, 36, 26, 30, 26], [1, 2, 3, 4]]  # the last is no polygon
    masks = only(write(tmp_path, annotation(segmentation=outline), annotation(2, segmentation=two))).masks or []
    assert np.array_equal(rle.decode(masks[0]), mask)
    assert rle.area(masks[1]) == 136


def test_read_sample__dropped_boxes_take_their_class_and_mask_along(tmp_path: Path):
    gone = annotation(1, bbox=[50, 5, 10, 10], category_id=1)
    flat = annotation(2, bbox=[5, 5, 0, 10])
    wide = annotation(3, bbox=[30, 5, 30, 10], category_id=90)
    sample = only(write(tmp_path, gone, flat, annotation(4, bbox=[math.nan, 0, 5, 5]), wide))
    assert sample.boxes == [[30, 5, WIDTH, 15]] and sample.labels == [2]
    assert len(sample.masks or []) == len(sample.areas or []) == len(sample.iscrowd or []) == 1
    assert [item.what for item in sample.remarks] == ["box", "box", "box", "clipped"]
    assert "50 5 10 10 has no area inside 40 x 30" in sample.remarks[0].reason
    assert sample.remarks[0].file == "train2017/000000000009.jpg"


def test_read_sample__rounding_at_the_edge_is_no_clipping_to_speak_of(tmp_path: Path):
    sample = only(write(tmp_path, annotation(bbox=[10, 5, 30.02, 10.1])))
    assert sample.boxes == [[10, 5, WIDTH, 15.1]] and sample.remarks == []


def test_read_sample__mask_of_another_size_leaves_the_image_out(tmp_path: Path):
    runs = {"size": [WIDTH, HEIGHT], "counts": [WIDTH * HEIGHT]}
    with pytest.raises(UnusableError, match="mask of 30 x 40, the image is 40 x 30"):
        only(write(tmp_path, annotation(segmentation=runs)))


def test_read_sample__image_of_another_size_than_noted_is_left_out(tmp_path: Path):
    with pytest.raises(UnusableError, match="of an image of 30 x 40, it is 40 x 30"):
        only(write(tmp_path, annotation(), images=[image(9, width=HEIGHT, height=WIDTH)]))


@pytest.mark.parametrize(
    "outline",
    [[], [[1, 2, 3, 4]], {"size": [HEIGHT, WIDTH], "counts": [5]}, {"size": [HEIGHT, WIDTH], "counts": "zzzz"},
     {"size": [HEIGHT, WIDTH], "counts": [-5, 1205]}],
    ids=["none", "two-points", "short", "garbage", "negative"],
)  # fmt: skip
def test_read_sample__without_a_usable_outline_boxes_stay_and_masks_go(tmp_path: Path, outline: Any):
    sample = only(write(tmp_path, annotation(), annotation(2, segmentation=outline)))
    assert len(sample.boxes or []) == 2 and sample.masks is None
    (remark,) = sample.remarks
    assert remark.what == "masks"


def test_read_sample__a_set_of_boxes_alone_has_no_masks(tmp_path: Path):
    bare = {name: value for name, value in annotation().items() if name not in ("segmentation", "area", "iscrowd")}
    sample = only(write(tmp_path, bare))
    assert sample.masks is None and sample.areas is None and sample.remarks == [] and sample.iscrowd == [0]


def test_listing__jobs_are_small_and_travel_to_other_processes(tmp_path: Path):
    import pickle

    listing: Listing = list_source(write(tmp_path, annotation()))
    job = pickle.loads(pickle.dumps(listing.splits["train"][0]))
    assert listing.read(job).boxes == [[10, 5, 20, 15]]
    assert len(pickle.dumps(job)) < 1000
