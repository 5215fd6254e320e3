from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipeline.errors import DataError
from data_pipeline.sources.layouts import LAYOUTS, list_source


def test_list_source__unknown_layout(tmp_path: Path):
    with pytest.raises(DataError, match="layout 'parquet' is unknown; use imagefolder, voc, coco, cityscapes"):
        list_source("parquet", tmp_path)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_list_source__missing_folder_and_file(tmp_path: Path, layout: str):
    with pytest.raises(DataError, match="absent: no such folder"):
        list_source(layout, tmp_path / "absent")
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="file: no such folder"):
        list_source(layout, tmp_path / "file")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_list_source__an_empty_folder_is_told_what_the_layout_needs(tmp_path: Path, layout: str):
    with pytest.raises(DataError, match=r"no (image|JPEGImages|annotations|leftImg8bit)") as error:
        list_source(layout, tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_list_source__a_file_where_a_folder_should_be(tmp_path: Path, layout: str):
    for name in ("train", "JPEGImages", "annotations", "leftImg8bit", "gtFine", "ImageSets"):
        (tmp_path / name).touch()
    with pytest.raises(DataError) as error:
        list_source(layout, tmp_path)
    assert "\n" not in str(error.value)


FOLDERS = {
    "imagefolder": ("train/cat/1.jpg", ("train", "train/cat")),
    "voc": ("JPEGImages/a.jpg", ("JPEGImages", "Annotations", "SegmentationClass")),
    "coco": ("train2017/a.jpg", ("annotations", "train2017")),
    "cityscapes": ("leftImg8bit/train/ulm/a_leftImg8bit.png", ("leftImg8bit/train/ulm", "gtFine/train/ulm")),
}


@pytest.mark.parametrize(
    ("layout", "name"), [(layout, name) for layout, (_, names) in FOLDERS.items() for name in names]
)
def test_list_source__a_folder_that_cannot_be_listed_is_named(
    tmp_path: Path, layout: str, name: str, unreadable: Callable[[Path], None]
):
    for folder in FOLDERS[layout][1]:
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    (tmp_path / FOLDERS[layout][0]).touch()
    (tmp_path / "ImageSets" / "Main").mkdir(parents=True)
    if layout == "voc":
        (tmp_path / "ImageSets" / "Main" / "train.txt").write_text("a")
    if layout == "coco" and name != "annotations":
        (tmp_path / "annotations" / "instances_train2017.json").write_text(
            '{"images": [], "annotations": [], "categories": []}'
        )
    if layout == "imagefolder":
        (tmp_path / "ImageSets" / "Main").rmdir()
    unreadable(tmp_path / name)
    with pytest.raises(DataError) as error:
        list_source(layout, tmp_path)
    assert str(error.value) == f"{tmp_path / name}: cannot be read (Permission denied); mend its permissions"
