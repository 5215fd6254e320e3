from __future__ import annotations

import os
from pathlib import Path

import pytest

from data_pipeline.errors import DataError
from data_pipeline.sources import Listing
from data_pipeline.sources.imagefolder import ImageJob, list_source


def tree(root: Path, *paths: str) -> Path:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()
    return root


def found(listing: Listing, root: Path) -> dict[str, list[tuple[str, int | None]]]:
    return {
        split: [(str(job.file.relative_to(root)), job.label) for job in jobs if isinstance(job, ImageJob)]
        for split, jobs in listing.splits.items()
    }


def test_list_source__splits_and_classes(tmp_path: Path):
    tree(tmp_path, "train/b/2.JPEG", "train/a/1.png", "train/a/0.webp", "val/b/3.jpg", "train/a/notes.txt")
    images = list_source(tmp_path)
    assert images.classes == ("a", "b")
    assert found(images, tmp_path) == {
        "train": [("train/a/0.webp", 0), ("train/a/1.png", 0), ("train/b/2.JPEG", 1)],
        "val": [("val/b/3.jpg", 1)],
    }


def test_list_source__classes_without_splits_are_train(tmp_path: Path):
    images = list_source(tree(tmp_path, "cat/1.jpg", "ant/deeper/2.JPG"))
    assert images.classes == ("ant", "cat")
    assert found(images, tmp_path) == {"train": [("ant/deeper/2.JPG", 0), ("cat/1.jpg", 1)]}


def test_list_source__loose_images_are_unlabelled(tmp_path: Path):
    images = list_source(tree(tmp_path, "2.jpg", "1.png"))
    assert images.classes == ()
    assert found(images, tmp_path) == {"train": [("1.png", None), ("2.jpg", None)]}


def test_list_source__a_split_without_class_folders_is_unlabelled(tmp_path: Path):
    images = list_source(tree(tmp_path, "train/a/1.jpg", "test/2.jpg"))
    assert found(images, tmp_path) == {"train": [("train/a/1.jpg", 0)], "test": [("test/2.jpg", None)]}


def test_list_source__images_beside_class_folders_are_strays(tmp_path: Path):
    images = list_source(tree(tmp_path, "train/a/1.jpg", "train/thumb.jpg", "cover.jpg"))
    assert sorted(item.file for item in images.rejected) == ["cover.jpg", "train/thumb.jpg"]
    assert found(images, tmp_path) == {"train": [("train/a/1.jpg", 0)]}


def test_list_source__hidden_names_are_not_looked_at(tmp_path: Path):
    images = list_source(tree(tmp_path, "a/1.jpg", "a/._1.jpg", "a/.cache/2.jpg", ".ipynb_checkpoints/3.jpg"))
    assert images.classes == ("a",)
    assert found(images, tmp_path) == {"train": [("a/1.jpg", 0)]}


def test_list_source__classes_json_names_classes_for_people(tmp_path: Path):
    tree(tmp_path, "n02/1.jpg", "n01/2.jpg")
    (tmp_path / "classes.json").write_text('{"n02": "goldfish", "n99": "unused"}')
    assert list_source(tmp_path).classes == ("n01", "goldfish")


def test_list_source__damaged_classes_json(tmp_path: Path):
    tree(tmp_path, "a/1.jpg")
    (tmp_path / "classes.json").write_text("[1")
    with pytest.raises(DataError, match=r"classes\.json: not a JSON object"):
        list_source(tmp_path)


def test_list_source__classes_of_val_must_be_those_of_train(tmp_path: Path):
    with pytest.raises(DataError, match=r"val: class folders dog are not in .*train"):
        list_source(tree(tmp_path, "train/cat/1.jpg", "val/dog/2.jpg"))


def test_list_source__splits_beside_other_folders_are_refused(tmp_path: Path):
    """A class called "train" must not make the other classes vanish."""
    with pytest.raises(DataError, match=r"train beside other folders of images \(bus, car\)"):
        list_source(tree(tmp_path, "train/1.jpg", "bus/2.jpg", "car/3.jpg"))


@pytest.mark.parametrize("paths", [(), ("notes.txt",), ("a/readme.md", "train/b/x.gif")])
def test_list_source__no_image(tmp_path: Path, paths: tuple[str, ...]):
    with pytest.raises(DataError, match=r"no image in it; images end in \.jpg"):
        list_source(tree(tmp_path, *paths))


def test_list_source__splits_on_request(tmp_path: Path):
    tree(tmp_path, "train/a/1.jpg", "val/a/2.jpg")
    assert found(list_source(tmp_path, {"test": "val"}), tmp_path) == {"test": [("val/a/2.jpg", 0)]}
    with pytest.raises(DataError, match="no split 'x' to make 'train' of; it has train, val"):
        list_source(tmp_path, {"train": "x"})


def listed(listing: Listing) -> list[tuple[str, str, int]]:
    return sorted((item.file, item.what, item.count) for item in listing.rejected)


def test_list_source__what_is_not_read_is_counted_and_its_class_keeps_its_number(tmp_path: Path):
    tree(tmp_path, "ant/0", "ant/1", "bee/0.JPG", "cat/0.jfif", "dog/0.bmp", "dog/deep/1.bmp", "owl/0.tif", "owl/1.jpg")
    (tmp_path / "empty").mkdir()
    images = list_source(tmp_path)
    assert images.classes == ("ant", "bee", "cat", "dog", "empty", "owl")
    assert found(images, tmp_path) == {"train": [("bee/0.JPG", 1), ("cat/0.jfif", 2), ("owl/1.jpg", 5)]}
    assert listed(images) == [
        ("ant", "class", 1), ("ant", "file", 2), ("dog", "class", 1), ("dog", "file", 2), ("empty", "class", 1),
        ("owl", "file", 1),
    ]  # fmt: skip
    assert "end in .bmp: not read" in {item.reason for item in images.rejected}


def test_list_source__files_beside_splits_are_listed(tmp_path: Path):
    tree(tmp_path, "train/a/1.jpg", "docs/a.md", "labels.csv")
    assert listed(list_source(tmp_path)) == [(".", "file", 1), ("docs", "file", 1)]


def test_list_source__links_are_followed_or_listed(tmp_path: Path):
    root, elsewhere = tmp_path / "in", tmp_path / "elsewhere"
    tree(root, "train/cat/0.jpg", "train/dog/0.jpg")
    tree(elsewhere, "m0.jpg", "m1.jpg")
    for place, target in {"bird": elsewhere, "cat/more": elsewhere, "cat/loop": root, "fish": root / "absent",
                          "dog/gone.jpg": root / "absent"}.items():  # fmt: skip
        (root / "train" / place).symlink_to(target)
    images = list_source(root)
    assert images.classes == ("bird", "cat", "dog")
    assert found(images, root)["train"] == [
        ("train/bird/m0.jpg", 0), ("train/bird/m1.jpg", 0), ("train/cat/0.jpg", 1), ("train/cat/more/m0.jpg", 1),
        ("train/cat/more/m1.jpg", 1), ("train/dog/0.jpg", 2),
    ]  # fmt: skip
    assert {item.file: item.reason for item in images.rejected} == {
        "train/fish": "a link to nothing",
        "train/dog/gone.jpg": "a link to nothing",
        "train/cat/loop": "a link to a folder that it lies in",
    }


def test_list_source__classes_json_with_a_byte_order_mark(tmp_path: Path):
    tree(tmp_path, "n01/1.jpg")
    (tmp_path / "classes.json").write_text('{"n01": "tench"}', "utf-8-sig")
    assert list_source(tmp_path).classes == ("tench",)


def test_list_source__names_that_are_not_utf8_are_read(tmp_path: Path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / os.fsdecode(b"caf\xe9.jpg")).touch()
    assert found(list_source(tmp_path), tmp_path) == {"train": [(os.fsdecode(b"a/caf\xe9.jpg"), 0)]}


def test_list_source__class_names_that_are_no_text_are_refused(tmp_path: Path):
    tree(tmp_path, "a/1.jpg")
    (tmp_path / "classes.json").write_text('{"a": ["tench"]}')
    with pytest.raises(DataError, match=r"classes\.json: the name of 'a' is \['tench'\], no text; mend it"):
        list_source(tmp_path)
