"""Shards of remote data sets: whole or reported by name, one download a node, within the limit, whatever dies."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import REPOSITORY, assert_refused, dicm
from http_store import HttpStore, serving

from data_pipeline.cache import DEFAULT_LIMIT, ShardCache, default_root
from data_pipeline.errors import DataError, StoreError
from data_pipeline.manifest import Manifest, Shard, Split
from data_pipeline.order import ElasticSampler, SampleOrder
from data_pipeline.shards import ShardReader, ShardWriter
from data_pipeline.storage import Retries

SHARDS, SAMPLES = 8, 3
QUICK = Retries(attempts=6, backoff=0.01, timeout=5.0)


def write(root: Path, shards: int = SHARDS, samples: int = SAMPLES, num_bytes: int = 4000) -> Manifest:
    """Shards of equal size; each image is its own random bytes."""
    root.mkdir()
    with ShardWriter(root, "train", max_samples=samples) as writer:
        for number in range(shards * samples):
            image = random.Random(number).randbytes(num_bytes)
            writer.write({"__key__": f"s{number:04d}", "jpg": image, "json": {"label": 0}})
    manifest = Manifest("noise", ("a",), {"train": Split(tuple(writer.shards))})
    manifest.save(root)
    return manifest


def is_sample(fields: dict, number: int) -> bool:
    return fields["__key__"] == f"s{number:04d}" and fields["jpg"] == random.Random(number).randbytes(4000)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("store") / "set"
    write(root)
    return root


@pytest.fixture
def store(folder: Path) -> Iterator[HttpStore]:
    with serving(folder) as running:
        yield running


@pytest.fixture(scope="module")
def shards(folder: Path) -> tuple[Shard, ...]:
    return Manifest.load(folder).split("train").shards


def reader_of(store: HttpStore, cache: ShardCache) -> ShardReader:
    return ShardReader(store.url, Manifest.load(store.url).split("train"), cache)


def files(cache: ShardCache, suffix: str = ".tar") -> list[str]:
    return sorted(path.stem for path in cache.folder.iterdir() if path.suffix == suffix)


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


def test_reader__reads_a_url_as_a_folder_and_fetches_each_shard_once(store: HttpStore, folder: Path, tmp_path: Path):
    local = ShardReader(folder, Manifest.load(folder).split("train"))
    cache = ShardCache(tmp_path, retries=QUICK)
    remote = reader_of(store, cache)
    for _ in range(2):
        for index in random.Random(0).sample(range(SHARDS * SAMPLES), SHARDS * SAMPLES):
            assert remote.read(index) == local.read(index)
    again = pickle.loads(pickle.dumps(remote))
    assert is_sample(again.read(5), 5)
    assert {name: count for name, count in store.requests.items() if name.endswith(".tar")} == {
        shard.name: 1 for shard in remote.split.shards
    }
    assert cache.fetched_bytes == sum(shard.bytes for shard in remote.split.shards)
    assert remote.read_bytes == local.read_bytes


def test_reader__file_urls_are_folders_and_need_no_cache(folder: Path, tmp_path: Path):
    url = f"file://{folder}"
    reader = ShardReader(url, Manifest.load(url).split("train"), ShardCache(tmp_path))
    assert is_sample(reader.read(4), 4)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "faults",
    [["cut"], ["busy", "busy"], ["flip"], ["short"], ["long"], ["slow"], ["cut", "flip", "busy", "short", "long"]],
    ids=" ".join,
)
def test_open__faults_that_pass_cost_further_attempts_alone(
    faults: list[str], store: HttpStore, shards: tuple[Shard, ...], tmp_path: Path
):
    store.faults[shards[1].name] = list(faults)
    reader = reader_of(store, ShardCache(tmp_path, retries=QUICK))
    assert is_sample(reader.read(SAMPLES), SAMPLES)
    assert store.requests[shards[1].name] == len(faults) + (faults != ["slow"])
    assert files(reader.cache, ".part") == []


def test_open__silence_ends_by_the_time_out(store: HttpStore, shards: tuple[Shard, ...], tmp_path: Path):
    store.faults[shards[0].name] = ["silent"]
    reader = reader_of(store, ShardCache(tmp_path, retries=Retries(attempts=6, backoff=0.01, timeout=1.0)))
    assert is_sample(reader.read(0), 0)
    assert store.requests[shards[0].name] >= 2


@pytest.mark.parametrize(
    ("fault", "kind", "words", "requests"),
    [
        ("flip", DataError, "damaged at the store .its sha256 .*fetched 3 times.; upload", 3),
        ("short", DataError, r"damaged at the store .\d+ bytes came instead of \d+", 3),
        ("long", DataError, "damaged at the store .more than", 3),
        ("cut", StoreError, "cannot be fetched .*3 attempts.*check the store", 3),
        ("busy", StoreError, "cannot be fetched .*503.*3 attempts", 3),
        ("forbidden", DataError, "the store refuses it.*403.*credentials", 1),
    ],
)
def test_open__faults_that_stay_end_in_one_line_with_the_name(
    fault: str, kind: type, words: str, requests: int, store: HttpStore, shards: tuple[Shard, ...], tmp_path: Path
):
    store.always[shards[2].name] = fault
    cache = ShardCache(tmp_path, retries=Retries(3, 0.01, 5.0))
    with pytest.raises(DataError, match=words) as caught:
        cache.open(store.url, shards[2])
    assert type(caught.value) is kind
    assert f"{store.url}/{shards[2].name}" in str(caught.value) and "\n" not in str(caught.value)
    assert store.requests[shards[2].name] == requests
    assert [path.name for path in cache.folder.iterdir()] == [".lock"]


def test_open__a_shard_that_is_gone_is_named_at_once(tmp_path: Path):
    (shard, *_) = write(tmp_path / "set", shards=1).split("train").shards
    with serving(tmp_path / "set") as store:
        (tmp_path / "set" / shard.name).unlink()
        with pytest.raises(DataError, match=f"{shard.name}: is gone from the store; upload"):
            ShardCache(tmp_path / "cache", retries=QUICK).open(store.url, shard)
        assert store.requests[shard.name] == 1


def test_open__a_store_that_is_not_there(shards: tuple[Shard, ...], folder: Path, tmp_path: Path):
    with serving(folder) as store:
        url = store.url
    with pytest.raises(StoreError, match=r"cannot be fetched.*2 attempts.*network"):
        ShardCache(tmp_path, retries=Retries(2, 0.01, 5.0)).open(url, shards[0])


def test_open__an_unknown_protocol_is_refused(shards: tuple[Shard, ...], tmp_path: Path):
    with pytest.raises(DataError, match=r"ftpx://host/set.*cannot be opened.*https, s3"):
        ShardCache(tmp_path, retries=QUICK).open("ftpx://host/set", shards[0])


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


def _reads(reader: ShardReader) -> bool:
    return all(is_sample(reader.read(number), number) for number in range(SHARDS * SAMPLES))


def test_reader__forked_processes_go_on_with_it(store: HttpStore, tmp_path: Path):
    reader = reader_of(store, ShardCache(tmp_path, retries=QUICK))
    assert is_sample(reader.read(0), 0)  # the children inherit the open file, the connection and its thread
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert all(pool.map(_reads, [reader] * 4, chunksize=1))
    with multiprocessing.get_context("fork").Pool(1) as pool:  # and reading is not disturbed by them
        assert _reads(reader) and pool.apply(_reads, [reader])


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


def test_cache__every_damaged_shard_is_found_before_a_byte_of_it_is_used(tmp_path: Path):
    shards = write(tmp_path / "set", shards=40, samples=1).split("train").shards
    chance = random.Random(0)
    for number, shard in enumerate(shards):
        path = tmp_path / "set" / shard.name
        content = bytearray(path.read_bytes())
        if number % 2:
            del content[chance.randrange(len(content)) :]
        else:
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        path.write_bytes(content)
    with serving(tmp_path / "set") as store:
        remote = ShardReader(store.url, Split(shards), ShardCache(tmp_path / "cache", retries=Retries(2, 0.01, 5.0)))
        for reader in (remote, ShardReader(tmp_path / "set", Split(shards))):
            for number, shard in enumerate(shards):
                with pytest.raises(DataError, match=shard.name):
                    reader.read(number)
            assert reader.read_bytes == 0


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


def test_load__a_manifest_at_a_url(store: HttpStore, folder: Path, tmp_path: Path):
    store.faults["dataset.json"] = ["busy", "cut"]
    assert Manifest.load(store.url) == Manifest.load(folder)
    with serving(tmp_path) as other:
        with pytest.raises(DataError, match=f"{other.url}: not a data set.*upload the folder"):
            Manifest.load(other.url)
        (tmp_path / "dataset.json").write_text("{")
        with pytest.raises(DataError, match=r"dataset\.json: damaged manifest"):
            Manifest.load(other.url)


def test_cache__a_rank_of_eight_fetches_an_eighth_of_equal_shards(tmp_path: Path):
    # Equal ones alone: then lanes and pools of shards end at the same places. The benchmark has the others.
    manifest = write(tmp_path / "set", shards=256, samples=8, num_bytes=10)
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


def test_verify__looks_at_the_store_and_not_at_what_is_cached(
    tmp_path: Path, scenes: Path, monkeypatch: pytest.MonkeyPatch
):
    import shutil

    root = shutil.copytree(scenes, tmp_path / "set")
    monkeypatch.setenv("DICM_CACHE", str(tmp_path / "cache"))
    with serving(root) as store:
        result = dicm("data", "verify", store.url)
        assert result.returncode == 0, result.stderr
        assert "nothing wrong" in result.stdout and store.url in result.stdout
        ShardReader(store.url, Manifest.load(store.url).split("val")).read(0)
        (root / "val-000000.tar").unlink()
        result = dicm("data", "verify", store.url)
        assert_refused(result, "1 fault(s)", store.url)
        assert f"{store.url}/val-000000.tar: is gone" in result.stdout


def test_inspect__reads_a_url(tmp_path: Path, scenes: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DICM_CACHE", str(tmp_path / "cache"))
    with serving(scenes) as store:
        result = dicm("data", "inspect", store.url, "--sheet", tmp_path / "sheet.png")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "sheet.png").is_file()


@pytest.fixture(scope="module")
def bucket(folder: Path) -> Iterator[str]:
    """The data set in a bucket of an S3 server on this machine."""
    import fsspec
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "testing")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        s3 = fsspec.filesystem("s3", skip_instance_cache=True)
        s3.mkdir("bucket")
        s3.put(f"{folder}/", "bucket/deep/set/", recursive=True)
        yield "s3://bucket/deep/set"
    server.stop()


def test_s3__a_data_set_is_read_whole_over_the_protocol(bucket: str, folder: Path, tmp_path: Path):
    manifest = Manifest.load(bucket)
    assert manifest == Manifest.load(folder)
    cache = ShardCache(tmp_path, retries=QUICK)
    reader = ShardReader(bucket, manifest.split("train"), cache)
    assert _reads(reader)
    assert cache.fetched_bytes == sum(shard.bytes for shard in reader.split.shards)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert all(pool.map(_reads, [ShardReader(bucket, reader.split, ShardCache(tmp_path / "2", retries=QUICK))] * 2))


def test_s3__what_is_not_there_is_named(bucket: str, shards: tuple[Shard, ...], tmp_path: Path):
    cache = ShardCache(tmp_path, retries=QUICK)
    with pytest.raises(DataError, match="s3://bucket/other: not a data set"):
        Manifest.load("s3://bucket/other")
    with pytest.raises(DataError, match="s3://nobody/set: not a data set"):
        Manifest.load("s3://nobody/set")
    with pytest.raises(DataError, match=f"s3://bucket/other/{shards[0].name}: is gone"):
        cache.open("s3://bucket/other", shards[0])


def test_s3__a_damaged_shard_is_named(bucket: str, shards: tuple[Shard, ...], tmp_path: Path):
    from dataclasses import replace

    cache = ShardCache(tmp_path, retries=Retries(2, 0.01, 5.0))
    for shard in (replace(shards[0], sha256="0" * 64), replace(shards[0], bytes=512)):
        with pytest.raises(DataError, match=rf"{shard.name}: damaged at the store .*fetched 2 times"):
            cache.open(bucket, shard)


def test_shards__reading_a_folder_imports_no_fsspec(folder: Path):
    code = "ShardReader(url, Manifest.load(url).split('train')).read(0); print('fsspec' in sys.modules)"
    preamble = "import sys\nfrom data_pipeline.manifest import Manifest\nfrom data_pipeline.shards import ShardReader\nurl = sys.argv[1]\n"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    out = subprocess.run(
        [sys.executable, "-c", preamble + code, folder], env=environment, capture_output=True, text=True
    )
    assert json.loads(out.stdout.lower()) is False
