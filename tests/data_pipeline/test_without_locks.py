"""Folders that processes share on a file system without locks."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import REPOSITORY
from http_store import HttpStore
from noise_set import QUICK, SAMPLES, SHARDS, files, is_sample, reader_of, reads_all

from data_pipeline.cache import ABANDONED_SECONDS, ShardCache
from data_pipeline.manifest import Shard
from data_pipeline.quarantine import BadSample, Quarantine
from data_pipeline.unfinished import UnfinishedBuild


@pytest.fixture(autouse=True)
def _no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernel answers where the file system knows no locks."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(fcntl, "lockf", refuse)


def test_cache__reads_and_stays_small(store: HttpStore, shards: tuple[Shard, ...], tmp_path: Path):
    cache = ShardCache(tmp_path, 3 * shards[0].bytes, QUICK)
    reader = reader_of(store, cache)
    assert reads_all(reader) and reads_all(reader)
    assert len(files(cache)) <= 4 and files(cache, ".part") == []


def test_cache__a_copy_that_others_remove_is_read_on(store: HttpStore, shards: tuple[Shard, ...], tmp_path: Path):
    cache, other = (ShardCache(tmp_path, shards[0].bytes, QUICK) for _ in range(2))
    copy = cache.open(store.url, shards[0])
    other.open(store.url, shards[1]).close()
    other.open(store.url, shards[2]).close()
    assert shards[0].sha256 not in files(cache)
    assert len(os.pread(copy.fileno(), shards[0].bytes, 0)) == shards[0].bytes
    copy.close()


def test_cache__processes_download_side_by_side(store: HttpStore, tmp_path: Path):
    program = f"""
import errno, fcntl, sys
def refuse(*_): raise OSError(errno.ENOLCK, "no locks")
fcntl.flock = refuse
sys.path.insert(0, {str(REPOSITORY / "tests")!r})
from data_pipeline.cache import ShardCache
from data_pipeline.manifest import Manifest
from data_pipeline.shards import ShardReader
from noise_set import QUICK, reads_all
assert reads_all(ShardReader(sys.argv[1], Manifest.load(sys.argv[1]).split("train"), ShardCache(sys.argv[2], retries=QUICK)))
"""
    running = [subprocess.Popen([sys.executable, "-c", program, store.url, tmp_path], cwd=REPOSITORY) for _ in range(2)]
    assert [process.wait() for process in running] == [0, 0]
    cache = ShardCache(tmp_path, retries=QUICK)
    assert len(files(cache)) == SHARDS and files(cache, ".part") == []


def test_cache__what_a_killed_download_left_goes_once_it_is_old(
    store: HttpStore, shards: tuple[Shard, ...], tmp_path: Path
):
    cache = ShardCache(tmp_path, retries=QUICK)
    cache.folder.mkdir(parents=True)
    young, old = (cache.folder / f"{shards[7].sha256}.{shards[7].bytes}.{name}.part" for name in ("aa", "bb"))
    for path in (young, old):
        path.touch()
    past = time.time() - ABANDONED_SECONDS - 1
    os.utime(old, (past, past))
    assert is_sample(reader_of(store, cache).read(0), 0)
    assert young.exists() and not old.exists()
    assert is_sample(reader_of(store, cache).read(7 * SAMPLES), 7 * SAMPLES)


def test_quarantine__each_process_names_its_bad_samples_in_a_file_of_its_own(tmp_path: Path):
    for rank in range(2):
        quarantine = Quarantine(tmp_path, "train", rank)
        for index in range(2):
            quarantine.add(BadSample(index, f"key{index}", "train-000000.tar", "broken"))
    written = sorted(tmp_path.glob("quarantine_*.jsonl"))
    rows = [[json.loads(line) for line in path.read_text().splitlines()] for path in written]
    assert sorted((row["rank"], row["index"]) for part in rows for row in part) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [len({row["rank"] for row in part}) for part in rows] == [1, 1]


def test_unfinished_build__goes_on_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with pytest.raises(KeyboardInterrupt), UnfinishedBuild(tmp_path / "out", {"source": "here"}):
        raise KeyboardInterrupt
    assert "has no locks" in caplog.text
