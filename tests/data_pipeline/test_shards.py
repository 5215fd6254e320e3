from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
import pickle
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import webdataset

from data_pipeline.errors import DataError, StoreError
from data_pipeline.manifest import Manifest, Shard, Split
from data_pipeline.shards import ShardReader, ShardWriter, facts_of, new_dataset, parse_sample


def write(root: Path, count: int = 7, max_samples: int = 3, **options: int) -> Manifest:
    root.mkdir(exist_ok=True)
    with ShardWriter(root, "train", max_samples=max_samples, **options) as writer:
        for number in range(count):
            facts = json.dumps({"label": number % 2}).encode()
            writer.write({"__key__": f"train-{number:03d}", "jpg": bytes([number]) * (100 + number), "json": facts})
    manifest = Manifest("letters", ("a", "b"), {"train": Split(tuple(writer.shards))})
    manifest.save(root)
    return manifest


def reader_of(root: Path) -> ShardReader:
    return ShardReader(root, Manifest.load(root).split("train"))


def damage(root: Path, **fields: object) -> None:
    """Change fields of the first shard's entry in the manifest."""
    path = root / "dataset.json"
    content = json.loads(path.read_text())
    content["splits"]["train"]["shards"][0].update(fields)
    path.write_text(json.dumps(content))


def test_shard_reader__reads_any_sample_in_any_order(tmp_path: Path):
    assert write(tmp_path).split("train").shard_sizes == [3, 3, 1]
    reader = reader_of(tmp_path)
    assert len(reader) == 7
    for number in (6, 0, 3, 2, 5):
        sample = reader.read(number)
        assert sample["__key__"] == f"train-{number:03d}"
        assert sample["jpg"] == bytes([number]) * (100 + number)
        assert json.loads(sample["json"]) == {"label": number % 2}
    with pytest.raises(IndexError):
        reader.read(7)


def test_shard_writer__stock_webdataset_reads_the_shards(tmp_path: Path):
    manifest = write(tmp_path)
    urls = [str(tmp_path / shard.name) for shard in manifest.split("train").shards]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))
    assert [sample["__key__"] for sample in samples] == [f"train-{number:03d}" for number in range(7)]
    assert samples[4]["jpg"] == bytes([4]) * 104
    assert json.loads(samples[4]["json"]) == {"label": 0}


def test_shard_writer__equal_input_gives_equal_bytes(tmp_path: Path):
    first, second = write(tmp_path / "a"), write(tmp_path / "b")
    assert first == second
    assert first.hash == second.hash
    assert first.hash != write(tmp_path / "c", count=6).hash


def test_shard_writer__starts_a_new_shard_at_max_bytes(tmp_path: Path):
    sizes = write(tmp_path, max_samples=100, max_bytes=4096).split("train").shard_sizes
    assert len(sizes) > 1 and sum(sizes) == 7


@pytest.mark.parametrize("field", ["pyd", "pkl", "pickle", "pth"])
def test_shard_writer__refuses_pickled_fields_by_name(tmp_path: Path, field: str):
    with pytest.raises(DataError, match=f"s0.*'{field}' is a pickle"), ShardWriter(tmp_path, "train") as writer:
        writer.write({"__key__": "s0", "jpg": b"x", field: b"y"})
    assert list(tmp_path.iterdir()) == []


def test_shard_writer__leaves_no_shard_behind_on_an_error(tmp_path: Path):
    with pytest.raises(RuntimeError), ShardWriter(tmp_path, "train") as writer:  # noqa: PT012
        writer.write({"__key__": "s0", "jpg": b"x"})
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_shard_reader__refuses_a_pickle_inside_a_shard(tmp_path: Path):
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("s0.pyd"), io.BytesIO())
    content = data.getvalue()
    (tmp_path / "train-0.tar").write_bytes(content)
    shard = Shard("train-0.tar", hashlib.sha256(content).hexdigest(), len(content), 1, (0,))
    with pytest.raises(DataError, match="'pyd' is a pickle"):
        ShardReader(tmp_path, Split((shard,))).read(0)


def member_of(name: str, content: bytes = b"", **header: object) -> bytes:
    """A member of a tar whose header says what its content does not."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for key, value in header.items():
        setattr(member, key, value)
    return member.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % 512)


def sparse(num_bytes: int) -> bytes:
    """A GNU sparse member that stands for so many zeros."""
    header = bytearray(member_of("s0.jpg", type=tarfile.GNUTYPE_SPARSE))
    header[386:410] = b"%011o\0%011o\0" % (num_bytes - 1, 0)
    header[483:495] = b"%011o\0" % num_bytes
    header[148:156] = b"%06o\0 " % (sum(header) - sum(header[148:156]) + 8 * ord(" "))
    return bytes(header)


HOSTILE = {
    "sparse": (sparse(2**31), "s0.jpg' is not a regular file"),
    "symbolic link": (member_of("s0.jpg", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "is not a regular file"),
    "hard link": (member_of("s0.jpg", type=tarfile.LNKTYPE, linkname="gone"), "is not a regular file"),
    "device": (member_of("s0.jpg", type=tarfile.CHRTYPE), "is not a regular file"),
    "long name": (member_of("s0.jpg", b"x" * 600, type=tarfile.GNUTYPE_LONGNAME), "is not a regular file"),
    "beyond its end": (member_of("s0.jpg", size=2**33), "leaves its sample"),
    "before its start": (member_of("s0.jpg", size=-1024), "leaves its sample"),
    "no header": (b"x" * 512, "damaged"),
    "cut header": (member_of("s0.jpg")[:200], "damaged"),
    "empty": (bytes(1024), "the index in dataset.json is off"),
    "two keys": (member_of("s0.jpg", b"a") + member_of("s1.json", b"{}"), "the index in dataset.json is off"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_parse_sample__takes_regular_files_inside_the_sample_alone(kind: str):
    data, words = HOSTILE[kind]
    with pytest.raises(DataError, match=f"here: .*{words}"):
        parse_sample(data, "here")


def test_facts_of__brackets_without_end_are_damage():
    with pytest.raises(DataError, match="its JSON is damaged"):
        facts_of({"json": b"[" * 100_000})


def test_shard_reader__a_fifo_in_the_place_of_a_shard_is_named(tmp_path: Path):
    write(tmp_path)
    (tmp_path / "train-000000.tar").unlink()
    os.mkfifo(tmp_path / "train-000000.tar")
    with pytest.raises(DataError, match=r"train-000000\.tar: cannot be read \(it is a FIFO"):
        reader_of(tmp_path).read(0)


def test_shard_reader__names_a_truncated_shard(tmp_path: Path):
    write(tmp_path)
    path = tmp_path / "train-000001.tar"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    reader = reader_of(tmp_path)
    assert reader.read(0)["__key__"] == "train-000"
    with pytest.raises(DataError, match=r"train-000001\.tar: has \d+ bytes instead of \d+; fetch"):
        reader.read(3)


def test_shard_reader__names_a_shard_with_one_flipped_bit(tmp_path: Path):
    write(tmp_path)
    path = tmp_path / "train-000000.tar"
    content = bytearray(path.read_bytes())
    content[600] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"train-000000\.tar: damaged.*sha256"):
        reader_of(tmp_path).read(2)


def test_shard_reader__names_a_missing_shard(tmp_path: Path):
    write(tmp_path)
    (tmp_path / "train-000002.tar").unlink()
    with pytest.raises(DataError, match=r"train-000002\.tar: cannot be read"):
        reader_of(tmp_path).read(6)


def test_shard_reader__keeps_few_files_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ShardReader, "MAX_OPEN", 2)
    write(tmp_path, count=9, max_samples=1)
    reader = reader_of(tmp_path)
    for _ in range(2):
        for number in range(9):
            assert reader.read(number)["__key__"] == f"train-{number:03d}"
            assert len(reader._open) <= 2


def test_shard_reader__travels_to_other_processes(tmp_path: Path):
    write(tmp_path)
    reader = reader_of(tmp_path)
    reader.read(0)
    copy = pickle.loads(pickle.dumps(reader))
    assert copy.read(5) == reader.read(5)


def _keys(reader: ShardReader, count: int) -> bool:
    return all(reader.read(n % 7)["__key__"] == f"train-{n % 7:03d}" for n in range(count))


def test_shard_reader__forked_processes_do_not_disturb_each_other(tmp_path: Path):
    write(tmp_path, max_samples=7)
    reader = reader_of(tmp_path)
    reader.read(0)  # opens the file that the children share
    with multiprocessing.get_context("fork").Pool(3) as pool:
        assert all(pool.starmap(_keys, [(reader, 300)] * 3)) and _keys(reader, 300)


def test_load__round_trip(tmp_path: Path):
    manifest = write(tmp_path)
    assert Manifest.load(tmp_path) == manifest
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_load__semantic_classes_come_back(tmp_path: Path):
    manifest = replace(write(tmp_path), semantic_classes=("road", "sky"))
    manifest.save(tmp_path)
    loaded = Manifest.load(tmp_path)
    assert loaded == manifest and loaded.mask_names == ("road", "sky")
    assert loaded.hash == manifest.hash != replace(manifest, semantic_classes=()).hash


def test_load__a_manifest_older_than_semantic_classes_keeps_its_hash_and_has_a_background(tmp_path: Path):
    content = json.loads((write(tmp_path) and tmp_path / "dataset.json").read_text())
    assert set(content) == {"name", "classes", "splits", "schema_version"}
    text = json.dumps(content, separators=(",", ":"), sort_keys=True)
    loaded = Manifest.load(tmp_path)
    assert loaded.hash == hashlib.sha256(text.encode()).hexdigest()
    assert loaded.semantic_classes == () and loaded.mask_names == ("background", "a", "b")


def test_shard_writer__goes_on_behind_finished_shards(tmp_path: Path):
    write(tmp_path / "whole")
    with ShardWriter(tmp_path / "whole", "more", max_samples=1) as first:
        first.write({"__key__": "a", "jpg": b"x"})
    with ShardWriter(tmp_path / "whole", "more", max_samples=1, finished=first.shards) as second:
        second.write({"__key__": "b", "jpg": b"y"})
    assert [shard.name for shard in second.shards] == ["more-000000.tar", "more-000001.tar"]


def test_load__missing_folder(tmp_path: Path):
    with pytest.raises(DataError, match="absent: no such folder"):
        Manifest.load(tmp_path / "absent")


def test_load__a_folder_of_images_is_told_the_command(tmp_path: Path):
    with pytest.raises(DataError, match=r"not a data set.*dicm data build imagefolder"):
        Manifest.load(tmp_path)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"schema_version": "x"}', "\udcff", "[" * 100_000, '{"schema_version": ' + "9" * 5000 + "}"],
    ids=["empty", "cut", "list", "no_fields", "text_version", "no_utf8", "nested", "long_number"],
)
def test_load__damaged_manifest(tmp_path: Path, text: str):
    (tmp_path / "dataset.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(DataError, match=r"dataset\.json: damaged manifest.*build the data set again"):
        Manifest.load(tmp_path)


@pytest.mark.parametrize(
    "fields",
    [
        {"name": "../train.tar"}, {"name": 5}, {"name": "a" * 300 + ".tar"}, {"sha256": "/home/me/train-000000"},
        {"sha256": "../" + "0" * 61}, {"sha256": "A" * 64}, {"sha256": 7}, {"offsets": [0]}, {"offsets": [0, 1, 2]},
        {"offsets": [0, 2048, 1024]}, {"offsets": [False, 2048, 4096]}, {"offsets": [0, 2048.0, 4096]}, {"offsets": 3},
        {"bytes": 512}, {"bytes": True}, {"bytes": 10240.0}, {"bytes": 2**62}, {"samples": 3.0}, {"samples": -3},
        {"colour": "red"},
    ],
)  # fmt: skip
def test_load__names_the_field_of_a_damaged_shard(tmp_path: Path, fields: dict):
    write(tmp_path)
    damage(tmp_path, **fields)
    with pytest.raises(DataError, match=rf"dataset\.json: damaged manifest \(.*{next(iter(fields))}") as refusal:
        Manifest.load(tmp_path)
    assert len(str(refusal.value)) < 400


@pytest.mark.parametrize(
    "fields",
    [
        {"schema_version": True}, {"schema_version": "1"}, {"schema_version": 0}, {"name": ["x"]}, {"classes": "ab"},
        {"classes": [1]}, {"semantic_classes": {"a": 1}}, {"semantic_classes": ["c"] * 256}, {"splits": []},
        {"splits": {"train": []}}, {"splits": {"train": {"shards": "train-000000.tar"}}},
    ],
)  # fmt: skip
def test_load__names_a_field_of_another_type(tmp_path: Path, fields: dict):
    write(tmp_path)
    path = tmp_path / "dataset.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    with pytest.raises(DataError, match=rf"damaged manifest \(.*{next(iter(fields))}"):
        Manifest.load(tmp_path)


def test_load__newer_schema(tmp_path: Path):
    write(tmp_path)
    path = tmp_path / "dataset.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema_version": 2}))
    with pytest.raises(DataError, match=r"schema version 2 is newer.*update dicm"):
        Manifest.load(tmp_path)


def test_load__refuses_pipe_addresses(tmp_path: Path):
    write(tmp_path)
    damage(tmp_path, name="pipe:touch pwned.tar")
    with pytest.raises(DataError, match="pipe: address"):
        Manifest.load(tmp_path)
    with pytest.raises(DataError, match="pipe: addresses run commands"):
        Manifest.load("pipe:cat data")


def test_load__credentials_in_an_address_are_refused_unseen():
    with pytest.raises(DataError, match=r"^s3://\.\.\.: the address holds credentials.*AWS_PROFILE") as refusal:
        Manifest.load("s3://KEY:hunter2@bucket/set")
    assert "hunter2" not in str(refusal.value)


def test_split__names_the_splits_there_are(tmp_path: Path):
    with pytest.raises(DataError, match="no split 'val'; it has train"):
        write(tmp_path).split("val")


def test_new_dataset__appears_whole_or_not_at_all(tmp_path: Path):
    out = tmp_path / "deep" / "out"
    with pytest.raises(RuntimeError), new_dataset(out) as folder:  # noqa: PT012
        (folder / "file").touch()
        raise RuntimeError
    assert list((tmp_path / "deep").iterdir()) == []
    with new_dataset(out) as folder:
        (folder / "file").touch()
        assert not out.exists()
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert (out / "file").is_file()


def test_new_dataset__refuses_to_overwrite(tmp_path: Path):
    (tmp_path / "mine").touch()
    with pytest.raises(DataError, match="is there already"), new_dataset(tmp_path):
        pytest.fail("entered")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_new_dataset__a_full_disk_is_told_in_one_line(tmp_path: Path):
    with pytest.raises(DataError, match=r"No space left.*free space"), new_dataset(tmp_path / "out"):
        raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_read__storage_that_does_not_answer_now_is_read_later(tmp_path: Path):
    manifest = write(tmp_path)
    reader = ShardReader(tmp_path, manifest.split("train"))
    before = reader.read(1)
    reader._open[0] = io.FileIO("/proc/self/mem")  # its first bytes are an I/O error, as a failing server's
    with pytest.raises(StoreError, match=r"train-000000.tar: cannot be read \(Input/output error\)"):
        reader.read(1)
    assert reader.read(1) == before
