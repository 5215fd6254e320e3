from __future__ import annotations

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
