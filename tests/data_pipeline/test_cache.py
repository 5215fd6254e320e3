"""Shards of remote data sets on a node's disk: one download a node, within the limit, whatever dies."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import REPOSITORY
from http_store import HttpStore, serving
from noise_set import QUICK, SAMPLES, SHARDS, files, is_sample, reader_of, write_noise

from data_pipeline.cache import DEFAULT_LIMIT, ShardCache, default_root
from data_pipeline.errors import DataError
from data_pipeline.manifest import Shard
from data_pipeline.order import ElasticSampler, SampleOrder
from data_pipeline.shards import ShardReader


def names(*shards: Shard) -> list[str]:
    return sorted(shard.sha256 for shard in shards)


def python(code: str, *arguments: object, **options: object) -> subprocess.Popen[str]:
    """A process of its own that runs `code`; `reader(url, cache folder, GiB...)` is there."""
    preamble = """
import os, random, resource, signal, sys, threading, time
from pathlib import Path
from data_pipeline.cache import ShardCache
from data_pipeline.manifest import Manifest
from data_pipeline.shards import ShardReader
from data_pipeline.storage import Retries
def reader(url, root, limit=2**30):
    cache = ShardCache(root, limit, Retries(attempts=6, backoff=0.01, timeout=60))
    return ShardReader(url, Manifest.load(url).split("train"), cache)
def check(fields, number):
    assert fields["__key__"] == f"s{number:04d}" and fields["jpg"] == random.Random(number).randbytes(4000)
url, root = sys.argv[1:3]
"""
    return subprocess.Popen(
        [sys.executable, "-c", preamble + code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        text=True,
        **options,  # type: ignore[call-overload]
    )


def test_cache__several_processes_download_each_shard_once(store: HttpStore, shards: tuple[Shard, ...], tmp_path: Path):
    store.faults |= {shard.name: ["slow"] for shard in shards}
    code = f"""
order = list(range({SHARDS * SAMPLES}))
random.Random(int(sys.argv[3])).shuffle(order)
reading = reader(url, root)
for number in order:
    check(reading.read(number), number)
"""
    running = [python(code, store.url, tmp_path, seed) for seed in range(3)]
    assert [process.wait() for process in running] == [0, 0, 0]
    assert {shard.name: store.requests[shard.name] for shard in shards} == {shard.name: 1 for shard in shards}


def wait_for(condition: object, process: subprocess.Popen[str]) -> None:
    while not condition():  # type: ignore[operator]
        assert process.poll() is None
        time.sleep(0.02)


def test_cache__a_killed_download_leaves_nothing_that_stops_the_next(
    store: HttpStore, shards: tuple[Shard, ...], tmp_path: Path
):
    for name in (shards[0].name, shards[1].name):
        store.faults[name] = ["silent"]
        process = python("reader(url, root).read(int(sys.argv[3]))", store.url, tmp_path, shards.index(
            next(shard for shard in shards if shard.name == name)) * SAMPLES)  # fmt: skip
        wait_for(lambda name=name: store.requests[name], process)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    cache = ShardCache(tmp_path, retries=QUICK)
    assert len(files(cache, ".part")) >= 1
    assert is_sample(reader_of(store, cache).read(0), 0)
    assert files(cache) == names(shards[0])
    assert files(cache, ".part") == []  # the one fetched anew, the other removed


def test_cache__a_lock_dies_with_its_process_although_a_forked_child_lives(
    store: HttpStore, shards: tuple[Shard, ...], tmp_path: Path
):
    store.faults[shards[0].name] = ["silent"]
    code = """
reading = reader(url, root)
threading.Thread(target=reading.cache.fetch, args=(url, reading.split.shards[0])).start()
while not list(Path(root, "shards").glob("*.part")) or sys.stdin.read(1) != "x":
    time.sleep(0.02)
child = os.fork()
if child == 0:
    sys.stdout.close()
    time.sleep(600)
print(child, flush=True)
time.sleep(600)
"""
    process = python(code, store.url, tmp_path, stdin=subprocess.PIPE)
    wait_for(lambda: store.requests[shards[0].name], process)
    process.stdin.write("x")
    process.stdin.flush()
    child = int(process.stdout.readline())
    process.kill()
    process.wait()
    try:
        os.kill(child, 0)  # alive
        reader = reader_of(store, ShardCache(tmp_path, retries=QUICK))
        assert is_sample(reader.read(0), 0)
        assert files(reader.cache, ".part") == []
    finally:
        os.kill(child, signal.SIGKILL)


def test_cache__removes_what_was_used_longest_ago(store: HttpStore, shards: tuple[Shard, ...], tmp_path: Path):
    size = shards[0].bytes
    assert {shard.bytes for shard in shards} == {size}
    cache = ShardCache(tmp_path, 3 * size, QUICK)
    for number in (0, 1, 2, 0, 3):
        cache.open(store.url, shards[number]).close()
    assert files(cache) == names(shards[0], shards[2], shards[3])
    for number in (2, 4):
        cache.open(store.url, shards[number]).close()
    assert files(cache) == names(shards[2], shards[3], shards[4])
    assert cache.fetched_shards == 5


def test_cache__a_shard_in_use_stays_and_the_limit_is_exceeded_by_one_shard_at_most(
    store: HttpStore, shards: tuple[Shard, ...], tmp_path: Path
):
    cache = ShardCache(tmp_path, shards[0].bytes, QUICK)
    held = cache.open(store.url, shards[0])
    for number in (1, 2, 3):
        cache.open(store.url, shards[number]).close()
        assert files(cache) == names(shards[0], shards[number])
    held.release()
    cache.open(store.url, shards[4]).close()
    assert files(cache) == names(shards[4])
    assert not held.hold()  # and whoever has it open sees that it is gone
    assert os.fstat(held.fileno()).st_size == 0  # its space is free all the same


def test_cache__a_limit_below_one_shard_still_reads(store: HttpStore, tmp_path: Path):
    reader = reader_of(store, ShardCache(tmp_path, 1, QUICK))
    for number in (0, 3, 1, 4):
        assert is_sample(reader.read(number), number)
        assert len(files(reader.cache)) == 1


def test_cache__processes_that_fight_for_room_stay_within_it(
    store: HttpStore, shards: tuple[Shard, ...], tmp_path: Path
):
    size = shards[0].bytes
    code = f"""
choose = random.Random(int(sys.argv[3]))
reading = reader(url, root, 2 * {size})
for _ in range(60):
    number = choose.randrange({SHARDS * SAMPLES})
    check(reading.read(number), number)
"""
    cache = ShardCache(tmp_path, 2 * size)
    running = [python(code, store.url, tmp_path, seed) for seed in range(3)]
    most = 0
    while any(process.poll() is None for process in running):
        if cache.folder.is_dir():
            with cache._room_lock():
                taken = [path for path in cache.folder.iterdir() if path.suffix in (".tar", ".part")]
                most = max(most, size * len(taken))
        time.sleep(0.005)
    assert [process.returncode for process in running] == [0, 0, 0]
    assert 2 * size <= most <= 3 * size


def test_cache__a_bit_that_flips_on_the_disk_is_found_and_the_shard_fetched_again(
    store: HttpStore, shards: tuple[Shard, ...], tmp_path: Path
):
    ShardCache(tmp_path, retries=QUICK).fetch(store.url, shards[0])
    path = tmp_path / "shards" / f"{shards[0].sha256}.tar"
    content = bytearray(path.read_bytes())
    content[7] ^= 16
    for damaged in (content, content[:1000], b""):
        path.write_bytes(damaged)
        assert is_sample(reader_of(store, ShardCache(tmp_path, retries=QUICK)).read(1), 1)
    assert store.requests[shards[0].name] == 4


def test_cache__a_full_disk_is_told_in_one_line(store: HttpStore, shards: tuple[Shard, ...], tmp_path: Path):
    code = f"""
resource.setrlimit(resource.RLIMIT_FSIZE, ({shards[0].bytes // 2},) * 2)
try:
    reader(url, root).read(0)
except ValueError as error:
    print(error)
"""
    process = python(code, store.url, tmp_path)
    (line,) = process.communicate()[0].splitlines()
    assert f"{tmp_path / 'shards'}: the disk is full" in line and "lower shard_cache_limit" in line
    assert files(ShardCache(tmp_path), ".part") == []
    assert store.requests[shards[0].name] == 1
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_cache__a_folder_that_cannot_be_made_is_named(store: HttpStore, shards: tuple[Shard, ...], tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"file/shards.*: the cache cannot be used .*\$DICM_CACHE"):
        ShardCache(tmp_path / "file", retries=QUICK).open(store.url, shards[0])
    with pytest.raises(DataError, match="0 bytes is impossible"):
        ShardCache(tmp_path, 0)


def test_cache__is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("DICM_CACHE", raising=False)
    assert default_root() == tmp_path / "dicm"
    monkeypatch.setenv("DICM_CACHE", str(tmp_path / "mine"))
    assert ShardCache().root == tmp_path / "mine"
    assert ShardCache().limit == DEFAULT_LIMIT


def test_cache__a_rank_of_eight_fetches_an_eighth_of_equal_shards(tmp_path: Path):
    # Equal ones alone: then lanes and pools of shards end at the same places. The benchmark has the others.
    manifest = write_noise(tmp_path / "set", shards=256, samples=8, num_bytes=10)
    split = manifest.split("train")
    order, total = SampleOrder(split.shard_sizes), sum(shard.bytes for shard in split.shards)
    with serving(tmp_path / "set") as store:
        for rank in (0, 5):
            cache = ShardCache(tmp_path / f"cache{rank}", retries=QUICK)
            reader, batches = ShardReader(store.url, split, cache), iter(ElasticSampler(order, 256, rank, 8))
            for _ in range(order.num_samples // 256):
                for index in next(batches):
                    reader.read(index)
            assert cache.fetched_bytes <= 1.1 * total / 8
