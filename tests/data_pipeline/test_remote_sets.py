"""Data sets at URLs: read whole over HTTP and S3, or the shard that cannot be is named."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import REPOSITORY, assert_refused, dicm
from http_store import HttpStore, serving
from noise_set import QUICK, SAMPLES, SHARDS, files, is_sample, reader_of, reads_all, write_noise

from data_pipeline.cache import ShardCache
from data_pipeline.errors import DataError, StoreError
from data_pipeline.manifest import Manifest, Shard, Split
from data_pipeline.shards import ShardReader
from data_pipeline.storage import Retries, read


def test_reader__reads_a_url_as_a_folder_and_fetches_each_shard_once(store: HttpStore, noise: Path, tmp_path: Path):
    local = ShardReader(noise, Manifest.load(noise).split("train"))
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


def test_reader__file_urls_are_folders_and_need_no_cache(noise: Path, tmp_path: Path):
    url = f"file://{noise}"
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
    (shard, *_) = write_noise(tmp_path / "set", shards=1).split("train").shards
    with serving(tmp_path / "set") as store:
        (tmp_path / "set" / shard.name).unlink()
        with pytest.raises(DataError, match=f"{shard.name}: is gone from the store; upload"):
            ShardCache(tmp_path / "cache", retries=QUICK).open(store.url, shard)
        assert store.requests[shard.name] == 1


def test_open__a_store_that_is_not_there(shards: tuple[Shard, ...], noise: Path, tmp_path: Path):
    with serving(noise) as store:
        url = store.url
    with pytest.raises(StoreError, match=r"cannot be fetched.*2 attempts.*network"):
        ShardCache(tmp_path, retries=Retries(2, 0.01, 5.0)).open(url, shards[0])


def test_open__an_unknown_protocol_is_refused(shards: tuple[Shard, ...], tmp_path: Path):
    with pytest.raises(DataError, match=r"ftpx://host/set.*cannot be opened.*https, s3"):
        ShardCache(tmp_path, retries=QUICK).open("ftpx://host/set", shards[0])


def test_reader__forked_processes_go_on_with_it(store: HttpStore, tmp_path: Path):
    reader = reader_of(store, ShardCache(tmp_path, retries=QUICK))
    assert is_sample(reader.read(0), 0)  # the children inherit the open file, the connection and its thread
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert all(pool.map(reads_all, [reader] * 4, chunksize=1))
    with multiprocessing.get_context("fork").Pool(1) as pool:  # and reading is not disturbed by them
        assert reads_all(reader) and pool.apply(reads_all, [reader])


def test_reader__every_damaged_shard_is_found_before_a_byte_of_it_is_used(tmp_path: Path):
    shards = write_noise(tmp_path / "set", shards=40, samples=1).split("train").shards
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


def test_load__a_manifest_at_a_url(store: HttpStore, noise: Path, tmp_path: Path):
    store.faults["dataset.json"] = ["busy", "cut"]
    assert Manifest.load(store.url) == Manifest.load(noise)
    with serving(tmp_path) as other:
        with pytest.raises(DataError, match=f"{other.url}: not a data set.*upload the folder"):
            Manifest.load(other.url)
        (tmp_path / "dataset.json").write_text("{")
        with pytest.raises(DataError, match=r"dataset\.json: damaged manifest"):
            Manifest.load(other.url)


def test_load__a_store_cannot_name_a_file_of_this_machine(store: HttpStore, tmp_path: Path):
    mine = tmp_path / "train-000000.tar"
    mine.write_bytes(b"mine")
    fields = json.loads((store.folder / "dataset.json").read_text())
    fields["splits"]["train"]["shards"][0]["sha256"] = str(mine.with_suffix(""))
    (tmp_path / "dataset.json").write_text(json.dumps(fields))
    store.folder = tmp_path
    with pytest.raises(DataError, match=r"sha256=.* is not 64 hexadecimal digits"):
        ShardReader(store.url, Manifest.load(store.url).split("train"), ShardCache(tmp_path / "cache")).read(0)
    assert mine.read_bytes() == b"mine"


def test_load__a_manifest_without_end_is_damaged(store: HttpStore, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("data_pipeline.storage.LARGEST_READ", 100)
    with pytest.raises(DataError, match=r"dataset\.json: damaged at the store \(more than 100 bytes came"):
        read(f"{store.url}/dataset.json", QUICK)


def test_verify__looks_at_the_store_and_not_at_what_is_cached(
    tmp_path: Path, scenes: Path, monkeypatch: pytest.MonkeyPatch
):
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
def bucket(noise: Path) -> Iterator[str]:
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
        s3.put(f"{noise}/", "bucket/deep/set/", recursive=True)
        yield "s3://bucket/deep/set"
    server.stop()


def test_s3__a_data_set_is_read_whole_over_the_protocol(bucket: str, noise: Path, tmp_path: Path):
    manifest = Manifest.load(bucket)
    assert manifest == Manifest.load(noise)
    cache = ShardCache(tmp_path, retries=QUICK)
    reader = ShardReader(bucket, manifest.split("train"), cache)
    assert reads_all(reader)
    assert cache.fetched_bytes == sum(shard.bytes for shard in reader.split.shards)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert all(
            pool.map(reads_all, [ShardReader(bucket, reader.split, ShardCache(tmp_path / "2", retries=QUICK))] * 2)
        )


def test_s3__what_is_not_there_is_named(bucket: str, shards: tuple[Shard, ...], tmp_path: Path):
    cache = ShardCache(tmp_path, retries=QUICK)
    with pytest.raises(DataError, match="s3://bucket/other: not a data set"):
        Manifest.load("s3://bucket/other")
    with pytest.raises(DataError, match="s3://nobody/set: not a data set"):
        Manifest.load("s3://nobody/set")
    with pytest.raises(DataError, match=f"s3://bucket/other/{shards[0].name}: is gone"):
        cache.open("s3://bucket/other", shards[0])


def test_s3__a_damaged_shard_is_named(bucket: str, shards: tuple[Shard, ...], tmp_path: Path):
    cache = ShardCache(tmp_path, retries=Retries(2, 0.01, 5.0))
    for shard in (replace(shards[0], sha256="0" * 64), replace(shards[0], bytes=shards[0].bytes - 512)):
        with pytest.raises(DataError, match=rf"{shard.name}: damaged at the store .*fetched 2 times"):
            cache.open(bucket, shard)


def test_shards__reading_a_folder_imports_no_fsspec(noise: Path):
    code = "ShardReader(url, Manifest.load(url).split('train')).read(0); print('fsspec' in sys.modules)"
    preamble = "import sys\nfrom data_pipeline.manifest import Manifest\nfrom data_pipeline.shards import ShardReader\nurl = sys.argv[1]\n"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    out = subprocess.run(
        [sys.executable, "-c", preamble + code, noise], env=environment, capture_output=True, text=True
    )
    assert json.loads(out.stdout.lower()) is False
