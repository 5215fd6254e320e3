from __future__ import annotations

import os
from pathlib import Path

import pytest

from data_pipeline.files import read_file


def test_read_file__gives_the_bytes_of_a_file_and_of_a_link_to_one(tmp_path: Path):
    (tmp_path / "a.jpg").write_bytes(b"abc")
    (tmp_path / "link.jpg").symlink_to(tmp_path / "a.jpg")
    assert read_file(tmp_path / "a.jpg", limit=3) == read_file(tmp_path / "link.jpg") == b"abc"


def test_read_file__neither_waits_nor_fills_memory(tmp_path: Path):
    os.mkfifo(tmp_path / "fifo.jpg")
    (tmp_path / "device.jpg").symlink_to("/dev/zero")
    (tmp_path / "folder.jpg").mkdir()
    for name, kind in (("fifo", "a FIFO"), ("device", "a device"), ("folder", "a folder")):
        with pytest.raises(OSError, match=f"{kind}, not a regular file") as refusal:
            read_file(tmp_path / f"{name}.jpg")
        assert refusal.value.filename == str(tmp_path / f"{name}.jpg")
    with (tmp_path / "large.jpg").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(OSError, match="1099511627776 bytes, more than 1073741824"):
        read_file(tmp_path / "large.jpg")
