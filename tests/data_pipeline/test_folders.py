from __future__ import annotations

import os
from pathlib import Path

import pytest

from data_pipeline.folders import entries, files_below, is_image


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def test_files_below__gives_every_file_once_in_order(tmp_path: Path):
    touch(tmp_path, "b/2.jpg", "b/deep/1.png", "a.txt", ".hidden/3.jpg", "b/.4.jpg")
    found = files_below(tmp_path)
    assert [str(path.relative_to(tmp_path)) for path in found.paths] == ["a.txt", "b/2.jpg", "b/deep/1.png"]
    assert found.others == {}


def test_files_below__follows_links_and_names_those_that_lead_nowhere(tmp_path: Path):
    root, elsewhere = touch(tmp_path / "root", "a/1.jpg"), touch(tmp_path / "elsewhere", "2.jpg")
    (root / "b").symlink_to(elsewhere)
    (root / "3.jpg").symlink_to(elsewhere / "2.jpg")
    (root / "gone.jpg").symlink_to("nowhere")
    (root / "a" / "loop").symlink_to(root)
    os.mkfifo(root / "pipe.jpg")
    found = files_below(root)
    assert [str(path.relative_to(root)) for path in found.paths] == ["3.jpg", "a/1.jpg", "b/2.jpg"]
    assert {str(path.relative_to(root)): reason for path, reason in found.others.items()} == {
        "a/loop": "a link to a folder that it lies in",
        "gone.jpg": "a link to nothing",
        "pipe.jpg": "neither a file nor a folder",
    }


def test_files_below__names_that_are_not_utf8_keep_their_bytes(tmp_path: Path):
    (Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jpg"))).touch()
    assert [os.fsencode(path.name) for path in files_below(tmp_path).paths] == [b"caf\xe9.jpg"]


def test_entries__of_a_folder_that_is_not_there(tmp_path: Path):
    assert entries(tmp_path / "absent") == []


@pytest.mark.parametrize(
    ("name", "said"), [("a.JPG", True), ("a.jfif", True), ("a.WebP", True), ("a.bmp", False), ("jpg", False)]
)
def test_is_image__goes_by_the_suffix_in_any_case(name: str, said: bool):
    assert is_image(Path(name)) == said
