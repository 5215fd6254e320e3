from __future__ import annotations

import io
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from pictures import encoded, picture
from PIL import Image
from typer.testing import CliRunner, Result

from data_pipeline.cli import app
from data_pipeline.errors import DataError
from data_pipeline.manifest import Manifest, Split
from data_pipeline.shards import ShardReader, ShardWriter


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refusal(*arguments: str | Path) -> str:
    """The one line that `dicm` prints before it exits with code 2."""
    result = run(*arguments)
    assert isinstance(result.exception, DataError), result.output
    assert "\n" not in str(result.exception)
    return str(result.exception)


def photos(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (24, 18), "teal").save(root / name)
    return root


def test_scenes__closing_line_counts(tmp_path: Path):
    result = run("scenes", tmp_path / "out", "--train", 3, "--val", 2, "--size", 32, "--seed", 5)
    assert result.exit_code == 0
    assert result.stdout == f"3 + 2 scenes of 10 classes -> {tmp_path / 'out'}\n"
    assert "already" in refusal("scenes", tmp_path / "out", "--train", 3, "--val", 2)


def test_build__closing_line_counts_what_was_left_out(tmp_path: Path):
    source = photos(tmp_path / "[my] photos", "train/a/1.png", "train/b/2.png", "val/a/3.jpg")
    (source / "train" / "a" / "broken.jpg").write_text("no image")
    out = tmp_path / "out"
    result = run("build", "imagefolder", source, out, "--processes", 1)
    assert result.exit_code == 0
    expected = f"2 train, 1 val images of 2 classes -> {out}; 1 left out, see {out}/rejected.jsonl\n"
    assert result.stdout == expected
    assert "broken.jpg" in (out / "rejected.jsonl").read_text()


def test_build__images_without_classes(tmp_path: Path):
    result = run("build", "imagefolder", photos(tmp_path / "in", "1.png", "2.JPG"), tmp_path / "out")
    assert result.stdout == f"2 train images without classes -> {tmp_path / 'out'}; none left out\n"


@pytest.mark.parametrize(("name", "words"), [("absent", "no such folder"), ("empty", "no image in it")])
def test_build__bad_source(tmp_path: Path, name: str, words: str):
    (tmp_path / "empty").mkdir()
    line = refusal("build", "imagefolder", tmp_path / name, tmp_path / "out")
    assert name in line and words in line
    assert not (tmp_path / "out").exists()


def coco(root: Path) -> Path:
    """An image with three boxes: one reaches beyond it, one has no area."""
    photos(root, "train2017/1.jpg")
    boxes = ([0, 0, 5, 5], [20, 10, 40, 5], [2, 2, 0, 3])
    content = {
        "images": [{"id": 1, "file_name": "1.jpg", "width": 24, "height": 18}],
        "annotations": [{"id": n, "image_id": 1, "category_id": 3, "bbox": box} for n, box in enumerate(boxes)],
        "categories": [{"id": 3, "name": "kite"}],
    }
    (root / "annotations").mkdir()
    (root / "annotations" / "instances_train2017.json").write_text(json.dumps(content))
    return root


def test_build__closing_line_counts_boxes_that_were_cleaned(tmp_path: Path):
    out = tmp_path / "out"
    result = run("build", "coco", coco(tmp_path / "coco"), out, "--shard-samples", 5, "--shard-mib", 1)
    cleaned = "1 box(es) without area dropped, 1 box(es) clipped"
    assert result.stdout == f"1 train images of 1 class -> {out}; {cleaned}, see {out}/rejected.jsonl\n"
    assert run("verify", out).exit_code == 0
    inspected = run("inspect", out)
    assert inspected.exit_code == 0 and "kite" in inspected.stdout
    assert max(map(len, inspected.stdout.splitlines()[:-1])) <= 80


def test_build__splits_are_made_of_others(tmp_path: Path):
    out = tmp_path / "out"
    result = run("build", "coco", coco(tmp_path / "coco"), out, "--split", "a=train", "--split", "b=train")
    assert result.stdout.startswith("1 a, 1 b images of 1 class")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["train"], "write NEW=OLD"),
        (["=train"], "write NEW=OLD"),
        (["../x=train"], "write NEW=OLD"),
        (["a=train", "a=val"], "'a' is named twice"),
        (["a=test"], "no split 'test' to make 'a' of; it has train"),
    ],
)
def test_build__bad_splits(tmp_path: Path, options: list[str], words: str):
    arguments = [part for option in options for part in ("--split", option)]
    assert words in refusal("build", "coco", coco(tmp_path / "coco"), tmp_path / "out", *arguments)


def test_build__unknown_layout(tmp_path: Path):
    assert refusal("build", "parquet", tmp_path, tmp_path / "out").endswith("use imagefolder, voc, coco, cityscapes")


def test_inspect__prints_counts_and_writes_the_sheet(scenes: Path, tmp_path: Path):
    sheet = tmp_path / "sheet.png"
    result = run("inspect", scenes, "--sheet", sheet)
    assert result.exit_code == 0
    for word in ("train", "48", "val", "16", "33..64", "crescent", "10 classes", "11 semantic classes", str(sheet)):
        assert word in result.stdout
    assert Image.open(sheet).size[0] == 6 * 240 + 8


def test_verify__sound_and_damaged(scenes: Path, tmp_path: Path):
    root = shutil.copytree(scenes, tmp_path / "copy")
    result = run("verify", root)
    assert result.exit_code == 0
    assert result.stdout == f"{root}: 64 samples in 2 shards, nothing wrong\n"

    shard = root / "val-000000.tar"
    shard.write_bytes(shard.read_bytes()[:-512])
    result = run("verify", root)
    assert isinstance(result.exception, DataError)
    assert "1 fault" in str(result.exception)
    assert f"{shard}: has" in result.stdout


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_commands__not_a_data_set(tmp_path: Path, command: str):
    assert "no such folder" in refusal(command, tmp_path / "absent")
    assert "not a data set" in refusal(command, tmp_path)
    (tmp_path / "dataset.json").write_text("{")
    assert "damaged manifest" in refusal(command, tmp_path)


def test_inspect__a_terminal_that_is_not_utf8_gets_bars_of_ascii_and_the_sheet(scenes: Path, tmp_path: Path):
    sheet = tmp_path / "sheet.png"
    result = CliRunner(charset="ascii").invoke(app, ["inspect", str(scenes), "--sheet", str(sheet)])
    assert result.exit_code == 0, result.exception
    assert "crescent" in result.stdout and "####" in result.stdout
    assert sheet.is_file()


def test_inspect__a_damaged_mask_is_named(tmp_path: Path):
    with ShardWriter(tmp_path, "train") as writer:
        writer.write({"__key__": "one", "png": encoded(picture(), "PNG"), "json": {}, "mask.png": b"no mask"})
    Manifest("made", (), {"train": Split(tuple(writer.shards))}, semantic_classes=("a",)).save(tmp_path)
    assert "train-000000.tar, sample 0 (one): not a mask that can be decoded" in refusal("inspect", tmp_path)


def test_build__crowds_are_counted_and_told_where_all_objects_are(tmp_path: Path):
    source, out = coco(tmp_path / "coco"), tmp_path / "out"
    path = source / "annotations" / "instances_train2017.json"
    content = json.loads(path.read_text())
    for entry in content["annotations"]:
        entry["iscrowd"] = 1
    path.write_text(json.dumps(content))
    result = run("build", "coco", source, out)
    assert "instances_train2017.json: all objects are crowds (iscrowd 1)" in result.stdout
    assert "3 crowd(s) kept" in result.stdout


def test_build__a_class_without_an_image_is_told(tmp_path: Path):
    source = photos(tmp_path / "in", "ant/1.png", "bee/2.bmp", "cat/3.png")
    result = run("build", "imagefolder", source, tmp_path / "out", "--processes", 1)
    assert "bee: holds no image that is read" in result.stdout
    assert "2 train images of 3 classes" in result.stdout
    assert "1 class(es) without an image, 1 other file(s) not read" in result.stdout
    labels = [json.loads(ShardReader(tmp_path / "out", Manifest.load(tmp_path / "out").split("train")).read(index)["json"])
              ["label"] for index in range(2)]  # fmt: skip
    assert labels == [0, 2]


def test_commands__names_that_are_not_utf8_go_through_build_verify_and_inspect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import dicm

    folder, out = tmp_path / "in" / os.fsdecode(b"caf\xe9"), tmp_path / "out"
    photos(folder, "1.png")
    (folder / os.fsdecode(b"\xe9.jpg")).write_bytes(b"no image")
    for arguments in (["build", "imagefolder", str(folder.parent), str(out), "--processes", "1"], ["verify", str(out)],
                      ["inspect", str(out)]):  # fmt: skip
        terminal = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(terminal, "ascii"))
        monkeypatch.setattr(sys, "argv", ["dicm", "data", *arguments])
        with pytest.raises(SystemExit) as ended:
            dicm.main()
        sys.stdout.flush()
        assert not ended.value.code
    assert rb"caf\udce9" in terminal.getvalue()
