"""Every command in the README runs, in its order, on small data; what needs many machines is checked for its options."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import NARROW, REPOSITORY, SHORT, dicm
from small_objects import SMALL_CROPS
from torchvision.io import write_jpeg

from data_pipeline.scenes import write_scenes

SMALL = {"semantic_segmentation_small": SMALL_CROPS}
README = (REPOSITORY / "README.md").read_text()
NEEDS_A_CLUSTER = ("RAY_ADDRESS", "torchrun")


def commands() -> list[list[str]]:
    """The shell commands of the README's code blocks."""
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line.strip()]
    return [shlex.split(line, comments=True) for line in lines]


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with photos/train and photos/val of two classes, a photo.jpg, and sets with boxes and masks."""
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 20), ("val", 4)):
        for name in ("cat", "dog"):
            (tmp_path / "photos" / split / name).mkdir(parents=True)
            for number in range(count):
                image = torch.randint(0, 256, (3, 40, 50), dtype=torch.uint8, generator=generator)
                write_jpeg(image, str(tmp_path / "photos" / split / name / f"{split}{name}{number}.jpg"))
    write_jpeg(image, "photo.jpg")
    write_scenes(tmp_path / "data" / "voc", train=16, val=4, size=64, seed=0)
    for name in ("coco", "cityscapes"):
        (tmp_path / "data" / name).symlink_to("voc")
    return tmp_path


@pytest.mark.slow
def test_readme__every_command_runs(photos: Path):
    run = 0
    for command in commands():
        if command[0] == "make" or command[0] in NEEDS_A_CLUSTER or "=" in command[0] or command[0] == "torchrun":
            continue
        assert command[0] == "dicm", command
        arguments = command[1:]
        if arguments[0] == "pretrain":
            given = {argument.partition("=")[0] for argument in arguments}
            small = [option for option in (*NARROW, *SHORT) if option.partition("=")[0] not in given]
            arguments += [*small, "launcher=local", *([] if "workers" in given else ["workers=1"])]
            arguments = [argument for argument in arguments if argument != "workers=2"] + ["workers=1"]
        if arguments[0] == "finetune":
            arguments += ["launcher=local", "epochs=1", "batch_size=16", *SMALL.get(arguments[1], [])]
        result = dicm(*arguments)
        assert result.returncode == 0, (command, result.stderr)
        run += 1
    assert run >= 13

    python = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert python
    subprocess.run(
        [sys.executable, "-c", python.group(1)], check=True, timeout=200, env={"PYTHONPATH": str(REPOSITORY)}
    )


def test_readme__commands_for_clusters_name_options_that_exist():
    from pretrain.run import resolve

    for command in commands():
        if "pretrain" in command and "dicm_resnet50" in command:
            options = command[command.index("dicm_resnet50") + 1 :]
            assert resolve("dicm_resnet50", [word.replace("=...", "=somewhere") for word in options]).workers > 1


def test_readme__make_targets_exist():
    makefile = (REPOSITORY / "Makefile").read_text()
    for command in commands():
        if command[0] == "make":
            assert re.search(rf"^{command[1]}:", makefile, re.MULTILINE)
