from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from data_pipeline.files import Replacing, read_file
from data_pipeline.quarantine import FILE, BadSample, Quarantine
from data_pipeline.shards import ShardWriter


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


def test_replacing__two_writers_of_one_process_id(tmp_path: Path):
    """As in pods that share a folder: each has process 7. Here they are threads of one process."""
    path, contents = tmp_path / "file", [bytes([number]) * 10_000 for number in range(4)]

    def write(content: bytes) -> None:
        for _ in range(20):
            with Replacing(path) as file:
                file.write(content[:5000])
                file.write(content[5000:])
            assert path.read_bytes() in contents

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, contents))
    assert os.listdir(tmp_path) == ["file"]


def test_shard_writer__lists_its_own_bytes_though_another_writer_follows(tmp_path: Path):
    """Two runs fill one cache of streams; the second replaces what the first has just closed."""
    first, second = ShardWriter(tmp_path, "view0"), ShardWriter(tmp_path, "view0")
    for writer, letter in ((first, b"a"), (second, b"b")):
        writer.write({"__key__": "0", "jpg": letter * 100})
    second.finish()
    first.finish()
    second.finish()
    assert first.shards[0].sha256 != second.shards[0].sha256
    assert first.shards[0].bytes == second.shards[0].bytes == (tmp_path / "view0-000000.tar").stat().st_size


def test_quarantine__after_a_torn_line_is_a_line_of_its_own(tmp_path: Path):
    (tmp_path / FILE).write_text('{"rank": 0, "spl')
    Quarantine(tmp_path).add(BadSample(7, "seven", "train-000000.tar", "does not decode"))
    torn, line = (tmp_path / FILE).read_text().splitlines()
    assert torn == '{"rank": 0, "spl' and json.loads(line)["key"] == "seven"
