from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from data_pipeline.files import Replacing
from data_pipeline.quarantine import FILE, BadSample, Quarantine
from data_pipeline.shards import ShardWriter


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
