from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.build import Built, build_dataset
from data_pipeline.errors import DataError
from data_pipeline.manifest import Manifest
from data_pipeline.shards import ShardReader

REPOSITORY = Path(__file__).parents[2]


def build(source: Path, out: Path, **options) -> Built:
    return build_dataset("imagefolder", source, out, **{"num_processes": 1, **options})


def contents(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in root.iterdir()}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Six images of two classes in three formats, and two files that are no images."""
    root = tmp_path / "photos"
    random = np.random.default_rng(0)
    for number, suffix in enumerate(("jpg", "png", "webp", "JPEG", "PNG", "jpg")):
        path = root / "ab"[number % 2] / f"{number}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 255, (20 + number, 30, 3), np.uint8)).save(path)
    (root / "a" / "cut.png").write_bytes((root / "b" / "1.png").read_bytes()[:300])
    (root / "b" / "text.jpg").write_text("no image")
    return root


def test_build_dataset__stores_bytes_as_they_came(photos: Path, tmp_path: Path):
    manifest = build(photos, tmp_path / "out").manifest
    assert manifest.name == "photos" and manifest.classes == ("a", "b")
    reader = ShardReader(tmp_path / "out", Manifest.load(tmp_path / "out").split("train"))
    expected = ["a/0.jpg", "a/2.webp", "a/4.PNG", "b/1.png", "b/3.JPEG", "b/5.jpg"]
    for index, name in enumerate(expected):
        sample = reader.read(index)
        extension = {"JPEG": "jpg", "PNG": "png"}.get(name.split(".")[1], name.split(".")[1])
        assert sample[extension] == (photos / name).read_bytes()
        number = int(name[2])
        facts = {"width": 30, "height": 20 + number, "label": number % 2, "image_id": str(number)}
        assert json.loads(sample["json"]) == facts


def test_build_dataset__lists_what_does_not_decode(photos: Path, tmp_path: Path):
    built = build(photos, tmp_path / "out")
    assert built.manifest.split("train").num_samples == 6
    lines = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert [(line["file"], line["what"]) for line in lines] == [("a/cut.png", "image"), ("b/text.jpg", "image")]
    assert all(line["reason"] for line in lines) and len(built.rejected) == 2


def test_build_dataset__bytes_do_not_depend_on_processes(photos: Path, tmp_path: Path):
    for number in (1, 2, 3):
        build(photos, tmp_path / str(number), num_processes=number, shard_samples=2)
    assert contents(tmp_path / "1") == contents(tmp_path / "2") == contents(tmp_path / "3")


def test_build_dataset__bytes_do_not_depend_on_how_the_source_is_named(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    build(photos, tmp_path / "one")
    monkeypatch.chdir(tmp_path)
    build(Path("photos"), Path("two"))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_build_dataset__shard_samples_and_shard_mib_bound_the_shards(photos: Path, tmp_path: Path):
    assert build(photos, tmp_path / "one", shard_samples=4).manifest.split("train").shard_sizes == [4, 2]
    noise = np.random.default_rng(0).integers(0, 255, (400, 400, 3), np.uint8)
    for number in range(6):
        Image.fromarray(noise).save(photos / "a" / f"large{number}.png")
    manifest = build(photos, tmp_path / "two", shard_mib=1).manifest
    assert len(manifest.split("train").shards) == 3
    assert all(shard.bytes < 2 * 2**20 for shard in manifest.split("train").shards)


@pytest.mark.parametrize("options", [{"shard_samples": 0}, {"shard_mib": -1}])
def test_build_dataset__impossible_shards(photos: Path, tmp_path: Path, options: dict[str, int]):
    with pytest.raises(DataError, match=r"shard-(samples|mib)=\S+ must be at least 1"):
        build(photos, tmp_path / "out", **options)


def test_build_dataset__val_fraction_takes_its_share_of_each_class(photos: Path, tmp_path: Path):
    (photos / "a" / "cut.png").unlink()
    (photos / "b" / "text.jpg").unlink()
    built = build(photos, tmp_path / "out", val_fraction=0.34)
    assert built.rejected == () and not (tmp_path / "out" / "rejected.jsonl").exists()
    assert {name: split.num_samples for name, split in built.manifest.splits.items()} == {"train": 4, "val": 2}
    reader = ShardReader(tmp_path / "out", built.manifest.split("val"))
    assert {json.loads(reader.read(index)["json"])["label"] for index in range(2)} == {0, 1}


@pytest.mark.parametrize("fraction", [-0.1, 1.0])
def test_build_dataset__impossible_val_fraction(photos: Path, tmp_path: Path, fraction: float):
    with pytest.raises(DataError, match="val-fraction="):
        build(photos, tmp_path / "out", val_fraction=fraction)


def test_build_dataset__no_image_decodes(tmp_path: Path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "x.jpg").write_text("no image")
    with pytest.raises(DataError, match=r"none of its 1 images can be used \(x\.jpg: "):
        build(tmp_path / "source", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_build_dataset__refuses_a_folder_in_use(photos: Path, tmp_path: Path):
    with pytest.raises(DataError, match="is there already"):
        build(photos, photos)
    assert (photos / "a" / "0.jpg").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos"]


def test_build_dataset__reports_progress(photos: Path, tmp_path: Path):
    seen: list[int] = []
    build(photos, tmp_path / "out", on_total=seen.append, progress=seen.append)
    assert seen == [8, 0] + [1] * 8


def test_build_dataset__a_contradicting_source_leaves_nothing_behind(tmp_path: Path):
    """Label ids are looked at by the processes, after the listing."""
    name = "leftImg8bit/train/ulm/ulm_000000_000019_leftImg8bit.png"
    for path in (name, name.replace("leftImg8bit.png", "gtFine_labelIds.png").replace("leftImg8bit/", "gtFine/")):
        (tmp_path / "city" / path).parent.mkdir(parents=True)
        Image.new("L", (8, 8), 99).save(tmp_path / "city" / path)
    with pytest.raises(DataError, match="value 99 is no label id"):
        build_dataset("cityscapes", tmp_path / "city", tmp_path / "out", num_processes=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["city"]


def interrupt(source: Path, out: Path, num_images: int, **options) -> None:
    """Stop a build in this process after so many images."""
    left = iter(range(num_images))

    def progress(count: int) -> None:
        if count and next(left, None) is None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(source, out, progress=progress, **options)
    assert not out.exists()


def test_build_dataset__goes_on_after_an_interruption_and_gives_the_same_bytes(photos: Path, tmp_path: Path):
    options = {"shard_samples": 1, "val_fraction": 0.3}
    build(photos, tmp_path / "whole", **options)
    expected = contents(tmp_path / "whole")
    for num_images in range(1, 8):
        out = tmp_path / f"out{num_images}"
        interrupt(photos, out, num_images, **options)
        assert contents(tmp_path / "whole") == expected
        built = build(photos, out, **options)
        assert contents(out) == expected
        assert built.num_kept_shards <= num_images
    assert built.num_kept_shards >= 4
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_build_dataset__finished_shards_are_not_written_again(photos: Path, tmp_path: Path):
    interrupt(photos, tmp_path / "out", 5, shard_samples=1)
    folder = tmp_path / ".out.unfinished" / "dataset"
    before = {path.name: path.stat().st_ino for path in folder.glob("*.tar")}
    assert len(before) >= 3
    built = build(photos, tmp_path / "out", shard_samples=1)
    after = {path.name: path.stat().st_ino for path in (tmp_path / "out").glob("*.tar")}
    assert before.items() <= after.items() and built.num_kept_shards == len(before)


def test_build_dataset__a_finished_shard_that_was_damaged_is_written_again(photos: Path, tmp_path: Path):
    build(photos, tmp_path / "whole", shard_samples=1)
    interrupt(photos, tmp_path / "out", 6, shard_samples=1)
    shard = tmp_path / ".out.unfinished" / "dataset" / "train-000001.tar"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert build(photos, tmp_path / "out", shard_samples=1).num_kept_shards == 1
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_build_dataset__another_source_or_option_does_not_go_on(photos: Path, tmp_path: Path):
    interrupt(photos, tmp_path / "out", 5, shard_samples=1)
    with pytest.raises(DataError, match=r"unfinished build .*shard-samples=1 there, 2 here.*--restart"):
        build(photos, tmp_path / "out", shard_samples=2)
    other = shutil.copytree(photos, tmp_path / "other")
    with pytest.raises(DataError, match=r"source=\S+photos there, \S+other here"):
        build(other, tmp_path / "out", shard_samples=1)
    Image.new("RGB", (9, 9)).save(photos / "a" / "0.jpg")
    with pytest.raises(DataError, match="its source has changed since"):
        build(photos, tmp_path / "out", shard_samples=1)
    built = build(photos, tmp_path / "out", shard_samples=1, restart=True)
    assert built.num_kept_shards == 0
    build(photos, tmp_path / "whole", shard_samples=1)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_build_dataset__a_killed_build_goes_on(tmp_path: Path):
    """SIGKILL, in a process of its own: nothing is tidied up, and its workers end with it."""
    source = tmp_path / "photos"
    source.mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (300, 300, 3), np.uint8)
    for number in range(60):
        Image.fromarray(noise).save(source / f"{number:02d}.png", compress_level=1)
    command = [sys.executable, "dicm.py", "data", "build", "imagefolder", str(source), str(tmp_path / "out")]
    command += ["--shard-samples", "2", "--processes", "2"]
    process = subprocess.Popen(command, cwd=REPOSITORY, start_new_session=True)
    steps = tmp_path / ".out.unfinished" / "steps.jsonl"
    while process.poll() is None and not (steps.is_file() and steps.read_text().count("\n") >= 2):
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "it ended before it could be killed"
    assert not (tmp_path / "out").exists()
    while group_lives(process.pid):
        time.sleep(0.01)

    built = build(source, tmp_path / "out", shard_samples=2)
    assert built.num_kept_shards >= 2
    build(source, tmp_path / "whole", shard_samples=2)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def group_lives(group: int) -> bool:
    """Whether a process of the group still runs; those that ended but were not waited for do not count."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, its_group = stat.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(its_group) == group and state != "Z":
            return True
    return False


def test_build_dataset__images_that_all_fail_are_each_named(tmp_path: Path):
    source = tmp_path / "in"
    source.mkdir()
    for name in ("a.jpg", "b.png"):
        (source / name).write_bytes(b"no image")
    (source / "animation.jpg").write_bytes(b"GIF89a")
    with pytest.raises(DataError) as error:
        build(source, tmp_path / "out")
    for words in (
        "none of its 3 images",
        "a.jpg: not an image",
        "b.png: not an image",
        "animation.jpg: is GIF, neither",
    ):
        assert words in str(error.value)
