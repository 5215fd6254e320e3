from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data_pipeline.errors import DataError
from data_pipeline.sources import Sample, UnusableError
from data_pipeline.sources.voc import CLASSES, VocJob, VocObject, list_source, read_sample

WIDTH, HEIGHT = 40, 30


def thing(name: str, *corners: float, difficult: int = 0) -> str:
    tags = zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True)
    box = "".join(f"<{tag}>{value}</{tag}>" for tag, value in tags)
    return f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>{box}</bndbox></object>"


def annotate(root: Path, name: str, *things: str, size: tuple[int, int] = (WIDTH, HEIGHT)) -> None:
    (root / "Annotations").mkdir(parents=True, exist_ok=True)
    sizes = f"<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>"
    text = f"<annotation><filename>{name}.jpg</filename>{sizes}{''.join(things)}</annotation>"
    (root / "Annotations" / f"{name}.xml").write_text(text)


def photograph(root: Path, *names: str) -> None:
    (root / "JPEGImages").mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.new("RGB", (WIDTH, HEIGHT), "olive").save(root / "JPEGImages" / f"{name}.jpg")


def enlist(root: Path, **lists: str) -> None:
    for split, names in lists.items():
        path = root / "ImageSets" / ("Segmentation" if split.startswith("seg_") else "Main")
        path.mkdir(parents=True, exist_ok=True)
        (path / f"{split.removeprefix('seg_')}.txt").write_text("\n".join(names.split()) + "\n")


def paint(root: Path, name: str, value: int = 1, size: tuple[int, int] = (WIDTH, HEIGHT)) -> None:
    (root / "SegmentationClass").mkdir(parents=True, exist_ok=True)
    values = np.zeros(size[::-1], np.uint8)
    values[:5], values[5] = value, 255
    mask = Image.fromarray(values, "P")
    mask.putpalette([channel for index in range(256) for channel in (index, 255 - index, 7)])
    mask.save(root / "SegmentationClass" / f"{name}.png")


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    """Two images for training, one for validation; one semantic mask."""
    root = tmp_path / "VOC2012"
    photograph(root, "a", "b", "c")
    annotate(root, "a", thing("person", 1, 1, 10, 20), thing("dog", 5, 6, 40, 30, difficult=1))
    annotate(root, "b")
    annotate(root, "c", thing("aeroplane", 2, 3, 4, 5))
    enlist(root, train="a b", val="c", trainval="a b c", seg_train="a", seg_val="")
    paint(root, "a", value=15)
    return root


def read(root: Path, split: str = "train", index: int = 0) -> Sample:
    return read_sample(list_source(root).splits[split][index])


def test_list_source__main_lists_are_the_splits_and_trainval_is_not_made_twice(voc: Path):
    listing = list_source(voc)
    assert {split: [job.file.stem for job in jobs] for split, jobs in listing.splits.items()} == {
        "train": ["a", "b"],
        "val": ["c"],
    }
    assert listing.classes == CLASSES and len(CLASSES) == 20
    assert listing.rejected == ()


def test_list_source__trainval_is_train_where_there_is_no_train(voc: Path):
    for split in ("train", "val"):
        (voc / "ImageSets" / "Main" / f"{split}.txt").unlink()
    enlist(voc, test="c")
    assert {split: len(jobs) for split, jobs in list_source(voc).splits.items()} == {"train": 3, "test": 1}


def test_list_source__splits_on_request(voc: Path):
    listing = list_source(voc, {"train": "trainval", "val": "Segmentation/train"})
    assert [len(jobs) for jobs in listing.splits.values()] == [3, 1]
    with pytest.raises(DataError, match=r"no split 'test' to make 'val' of; it has train, val, trainval, Seg"):
        list_source(voc, {"val": "test"})


def test_list_source__a_devkit_with_one_set(voc: Path):
    assert list_source(voc.parent).root == voc
    (voc.parent / "VOC2007" / "JPEGImages").mkdir(parents=True)
    with pytest.raises(DataError, match=r"several sets \(VOC2007, VOC2012\); name one"):
        list_source(voc.parent)


def test_list_source__a_set_for_segmentation_alone(tmp_path: Path):
    photograph(tmp_path, "a", "b")
    paint(tmp_path, "a")
    enlist(tmp_path, seg_train="a b", seg_trainval="a b")
    listing = list_source(tmp_path)
    assert [job.file.stem for job in listing.splits["train"]] == ["a"]
    assert [(item.file, item.reason) for item in listing.rejected] == [
        ("JPEGImages/b.jpg", "SegmentationClass/b.png is missing")
    ]
    assert "boxes" not in read_sample(listing.splits["train"][0]).fields("a")["json"].decode()


def test_list_source__own_classes_are_those_of_train_in_alphabetical_order(voc: Path):
    annotate(voc, "a", thing("raccoon", 1, 1, 10, 20), thing("badger", 1, 1, 10, 20))
    annotate(voc, "c")
    assert list_source(voc).classes == ("badger", "raccoon")


def test_list_source__classes_txt_decides(voc: Path):
    paint(voc, "a", value=2)
    (voc / "classes.txt").write_text("dog\nperson\naeroplane\n\n")
    assert list_source(voc).classes == ("dog", "person", "aeroplane")
    assert read(voc).labels == [1, 0]


def test_list_source__unknown_class_is_refused_with_file_value_and_remedy(voc: Path):
    annotate(voc, "c", thing("persn", 1, 1, 2, 2))
    with pytest.raises(DataError, match=r"c\.xml: class 'persn' is not one of the 20 classes.*classes\.txt"):
        list_source(voc)


def test_list_source__missing_files_are_left_out_and_listed(voc: Path):
    (voc / "Annotations" / "b.xml").unlink()
    (voc / "JPEGImages" / "c.jpg").unlink()
    listing = list_source(voc)
    assert [len(jobs) for jobs in listing.splits.values()] == [1, 0]
    assert [(item.file, item.what, item.reason) for item in listing.rejected] == [
        ("JPEGImages/b.jpg", "image", "Annotations/b.xml is missing"),
        ("JPEGImages/c.jpg", "image", "is listed in ImageSets/Main/val.txt, but not there"),
    ]


def test_list_source__a_split_without_any_annotation_is_unlabelled(voc: Path):
    photograph(voc, "x")
    enlist(voc, test="x")
    sample = read(voc, "test")
    assert sample.boxes is None and sample.labels is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("<annotation><object>", "broken XML"),
        ("", "broken XML"),
        ("<annotation><object><name>dog</name></object></annotation>", "without <bndbox><xmin>"),
        (f"<annotation>{thing('', 1, 2, 3, 4)}</annotation>", "without <name>"),
        (f"<annotation>{thing('dog', 1, 2, 3, 4)}</annotation>".replace(">3<", ">wide<"), "wide"),
        ('<?xml version="1.0" encoding="no-such"?><annotation/>', "broken XML"),
    ],
)
def test_list_source__damaged_annotation_is_named_in_one_line(voc: Path, text: str, words: str):
    (voc / "Annotations" / "c.xml").write_text(text)
    with pytest.raises(DataError, match=r"c\.xml: .*mend it") as error:
        list_source(voc)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_list_source__not_a_voc_folder(tmp_path: Path):
    with pytest.raises(DataError, match="no JPEGImages in it"):
        list_source(tmp_path)
    (tmp_path / "JPEGImages").mkdir()
    with pytest.raises(DataError, match=r"no ImageSets/Main/train\.txt"):
        list_source(tmp_path)


def test_read_sample__boxes_become_zero_based_and_half_open(voc: Path):
    sample = read(voc)
    assert sample.boxes == [[0, 0, 10, 20], [4, 5, 40, 30]]
    assert sample.labels == [CLASSES.index("person"), CLASSES.index("dog")]
    assert sample.difficult == [False, True]
    assert (sample.image_id, sample.width, sample.height) == ("a", WIDTH, HEIGHT)
    assert sample.image == (voc / "JPEGImages" / "a.jpg").read_bytes()


def test_read_sample__an_image_without_objects_has_an_empty_list(voc: Path):
    sample = read(voc, index=1)
    assert sample.boxes == sample.labels == [] and sample.remarks == []


def test_read_sample__masks_keep_palette_indexes(voc: Path):
    listing = list_source(voc)
    assert listing.semantic_classes == ("background", *CLASSES)
    mask = Image.open(io.BytesIO(read(voc).semantic or b""))
    assert mask.mode == "L"
    values = np.asarray(mask)
    assert (values[:5] == 15).all() and (values[5] == 255).all() and (values[6:] == 0).all()
    assert listing.semantic_classes[15] == "person"


def test_read_sample__boxes_are_clipped_and_those_without_area_dropped(voc: Path):
    annotate(voc, "a", thing("dog", -5, 1, 60, 20), thing("cat", 50, 1, 60, 20), thing("cow", 9, 9, 8, 8))
    sample = read(voc)
    assert sample.boxes == [[0, 0, WIDTH, 20]] and sample.labels == [CLASSES.index("dog")]
    assert len(sample.difficult or []) == 1
    assert [(item.what, item.count) for item in sample.remarks] == [("box", 1), ("box", 1), ("clipped", 1)]
    assert "cat at 50 1 60 20 has no area inside 40 x 30" in sample.remarks[0].reason


def test_read_sample__mask_of_another_size_leaves_the_image_out(voc: Path):
    paint(voc, "a", size=(WIDTH, HEIGHT + 1))
    with pytest.raises(UnusableError, match=r"a\.png: mask of 40 x 31, image of 40 x 30"):
        read(voc)


def test_read_sample__mask_of_colours_leaves_the_image_out(voc: Path):
    Image.new("RGB", (WIDTH, HEIGHT)).save(voc / "SegmentationClass" / "a.png")
    with pytest.raises(UnusableError, match="mode RGB; one of indexes"):
        read(voc)


def test_read_sample__unknown_mask_value_is_refused(voc: Path):
    paint(voc, "a", value=21)
    with pytest.raises(DataError, match=r"a\.png: value 21 is no class.*classes\.txt") as error:
        read(voc)
    assert not isinstance(error.value, UnusableError)


def test_read_sample__annotation_of_another_size_leaves_the_image_out(voc: Path):
    annotate(voc, "a", thing("dog", 1, 1, 9, 9), size=(HEIGHT, WIDTH))
    with pytest.raises(UnusableError, match="of an image of 30 x 40, it is 40 x 30"):
        read(voc)
    annotate(voc, "a", thing("dog", 1, 1, 9, 9), size=(0, 0))  # as some tools write what they do not know
    assert read(voc).boxes == [[0, 0, 9, 9]]


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One image."""
    root = tmp_path_factory.mktemp("voc")
    photograph(root, "a")
    return root


WITHIN = st.tuples(st.integers(1, WIDTH), st.integers(1, HEIGHT))


@given(things=st.lists(st.tuples(st.sampled_from(CLASSES), WITHIN, WITHIN), max_size=5))
def test_read_sample__a_box_inside_the_image_covers_its_pixels_and_no_others(bare: Path, things: list):
    objects = tuple(
        VocObject(name, (min(x, u), min(y, v), max(x, u), max(y, v)), False) for name, (x, y), (u, v) in things
    )
    sample = read_sample(VocJob(bare / "JPEGImages" / "a.jpg", bare, objects, None, None, CLASSES))
    assert sample.remarks == []
    for (left, top, right, bottom), item in zip(sample.boxes or [], objects, strict=True):
        xmin, ymin, xmax, ymax = item.corners
        assert (right - left, bottom - top) == (xmax - xmin + 1, ymax - ymin + 1)
        assert left >= 0 and right <= WIDTH and top >= 0 and bottom <= HEIGHT


@pytest.mark.parametrize("orientation", [3, 6])
def test_read_sample__annotations_of_a_turned_photograph(voc: Path, orientation: int):
    """By half a turn nothing tells; by a quarter the size does."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = (WIDTH, HEIGHT) if orientation == 3 else (HEIGHT, WIDTH)
    Image.new("RGB", stored).save(voc / "JPEGImages" / "a.jpg", exif=exif)
    if orientation == 6:
        assert len(read(voc).boxes or []) == 2
        Image.new("RGB", (WIDTH, HEIGHT)).save(voc / "JPEGImages" / "a.jpg", exif=exif)
    with pytest.raises(UnusableError, match=f"its EXIF orientation {orientation} turns it"):
        read(voc)
    assert read(voc, index=1).boxes == []


def test_list_source__an_xml_of_another_kind_leaves_its_image_out_by_name(voc: Path):
    (voc / "Annotations" / "a.xml").write_text("<annotations><image name='a.jpg'/></annotations>")
    listing = list_source(voc)
    assert [job.file.stem for job in listing.splits["train"]] == ["b"]
    (item,) = listing.rejected
    assert item.file == "JPEGImages/a.jpg" and "its root is <annotations>, not <annotation>" in item.reason


def test_list_source__namespaces_of_xml_do_not_matter(voc: Path):
    path = voc / "Annotations" / "a.xml"
    plain = read(voc).boxes
    path.write_text(path.read_text().replace("<annotation>", '<annotation xmlns="http://example.org/voc">'))
    assert plain and read(voc).boxes == plain


def test_list_source__suffixes_in_capitals_are_read(voc: Path):
    for name in ("JPEGImages/a.jpg", "Annotations/a.xml", "SegmentationClass/a.png"):
        path = voc / name
        path.rename(path.with_suffix(path.suffix.upper()))
    sample = read(voc)
    assert len(sample.boxes or []) == 2 and sample.semantic is not None


def test_list_source__of_two_images_of_a_name_the_annotated_one_is_read(voc: Path):
    Image.new("RGB", (WIDTH, HEIGHT)).save(voc / "JPEGImages" / "a.png")
    listing = list_source(voc)
    assert [job.file.name for job in listing.splits["train"]] == ["a.jpg", "b.jpg"]
    assert [item.file for item in listing.rejected] == ["JPEGImages/a.png"]
    path = voc / "Annotations" / "a.xml"
    path.write_text(path.read_text().replace("a.jpg", "x.jpg"))
    with pytest.raises(DataError, match=r"a\.jpg and .*a\.png are both images of a; say in <filename>"):
        list_source(voc)


def test_list_source__two_annotations_of_a_name_are_refused(voc: Path):
    (voc / "Annotations" / "a.XML").write_text((voc / "Annotations" / "a.xml").read_text())
    with pytest.raises(DataError, match=r"a\.XML and .*a\.xml are both of a; move one away"):
        list_source(voc)


def test_list_source__a_listed_image_of_another_format_is_named(voc: Path):
    (voc / "JPEGImages" / "b.jpg").rename(voc / "JPEGImages" / "b.bmp")
    (item,) = list_source(voc).rejected
    assert item.file == "JPEGImages/b.bmp" and "ends in .bmp, which is not read" in item.reason


def test_list_source__lists_with_a_byte_order_mark(voc: Path):
    path = voc / "ImageSets" / "Main" / "train.txt"
    path.write_text(path.read_text(), "utf-8-sig")
    assert [job.file.stem for job in list_source(voc).splits["train"]] == ["a", "b"]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [("<difficult>0<", "<difficult>2<", "<difficult> '2' is neither 0 nor 1"),
     ("<difficult>0<", "<difficult>no<", "<difficult> 'no' is neither 0 nor 1"),
     (f"<width>{WIDTH}<", "<width>40.5<", "<size><width> 40.5 is no whole number")],
)  # fmt: skip
def test_list_source__values_that_say_nothing_certain_are_refused(voc: Path, old: str, new: str, words: str):
    path = voc / "Annotations" / "a.xml"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(DataError) as error:
        list_source(voc)
    assert str(error.value) == f"{path}: {words}; mend it, or take its image off the list"


def test_list_source__difficult_may_be_a_word(voc: Path):
    path = voc / "Annotations" / "a.xml"
    path.write_text(path.read_text().replace("<difficult>0<", "<difficult>True<"))
    assert read(voc).difficult == [True, True]
