from __future__ import annotations

import multiprocessing
import os
import shutil
import sys
from pathlib import Path

import pytest
from conftest import FOUR_STAGES, NARROW, SHORT, Result, assert_refused, dicm, small_run

sys.path.insert(0, str(Path(__file__).parent))  # other processes import the functions by name

from run_functions import dicm_with_small_files

from cluster.checkpoint import CheckpointStore
from cluster.run_folder import held_run
from pretrain.run import run


def test_run__missing_data_folder(tmp_path: Path):
    result = dicm("pretrain", "small", f"data={tmp_path / 'nowhere'}", f"run={tmp_path / 'run'}", "launcher=local")
    assert_refused(result, str(tmp_path / "nowhere"))
    assert not (tmp_path / "run").exists()


def test_run__folder_that_is_no_data_set(tmp_path: Path):
    (tmp_path / "data").mkdir()
    assert_refused(dicm("pretrain", "small", f"data={tmp_path / 'data'}"), str(tmp_path / "data"), "dicm data build")


def test_run__unknown_recipe_key(scenes: Path):
    assert_refused(dicm("pretrain", "small", f"data={scenes}", "imagesize=64"), "imagesize", "image_size")


def test_run__unknown_recipe_lists_those_there_are(scenes: Path):
    assert_refused(dicm("pretrain", "smal", f"data={scenes}"), "smal", "small")


def test_run__batch_larger_than_the_data_set(scenes: Path, tmp_path: Path):
    result = dicm("pretrain", "small", f"data={scenes}", f"run={tmp_path / 'run'}", "stages.ssl.batch_size=64")
    assert_refused(result, "stages.ssl.batch_size=64", "48")
    assert not (tmp_path / "run").exists()


def test_run__other_options_in_the_same_folder(pretrained_run: Path, scenes: Path):
    with pytest.raises(ValueError, match=r"seed: 0 there, 1 here"):
        run(small_run(scenes, pretrained_run, "seed=1"))


def test_run__complete_run_is_left_alone(pretrained_run: Path, scenes: Path):
    before = (pretrained_run / "metrics.jsonl").read_bytes()
    run(small_run(scenes, pretrained_run))
    assert (pretrained_run / "metrics.jsonl").read_bytes() == before


def test_run__disk_full_while_a_checkpoint_is_written_keeps_earlier_ones(
    pretrained_run: Path, scenes: Path, tmp_path: Path
):
    """A file-size limit makes the kernel refuse the bytes in mid-write, as a full disk does."""
    folder = shutil.copytree(pretrained_run, tmp_path / "run")
    store = CheckpointStore(folder / "checkpoints")
    (folder / "summary.json").unlink()  # as if it had not come that far
    shutil.rmtree(folder / "checkpoints" / f"step_{store.newest():08d}")
    steps = store.steps()
    largest = max(path.stat().st_size for path in (folder / "checkpoints").rglob("*") if path.is_file())
    words = ["pretrain", "small", f"data={scenes}", f"run={folder}", "launcher=local", "workers=1", *FOUR_STAGES]
    said = tmp_path / "said"
    process = multiprocessing.get_context("forkserver").Process(
        target=dicm_with_small_files, args=(largest // 2, [*words, *NARROW, *SHORT], said)
    )
    process.start()
    process.join()
    result = Result(process.exitcode or 0, "", said.read_text())
    assert_refused(result, str(folder / "checkpoints"), "run the same command again")
    assert store.steps() == steps
    assert store.newest() == steps[-1]


@pytest.mark.parametrize(
    "place", ["/proc/none/run", "{tmp_path}/file/run", "{tmp_path}/file", "{tmp_path}/" + 300 * "x"]
)
def test_run__a_place_where_no_folder_can_be(scenes: Path, tmp_path: Path, place: str):
    (tmp_path / "file").touch()
    folder = place.format(tmp_path=tmp_path)
    options = [f"data={scenes}", f"run={folder}", "launcher=local", "workers=1", *NARROW, *SHORT]
    assert_refused(dicm("pretrain", "small", *options), f"run={folder}", "name a folder")


def test_run__in_a_folder_where_another_driver_is_at_work(scenes: Path, tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    options = [f"data={scenes}", f"run={tmp_path}", "launcher=local", "workers=1", *NARROW, *SHORT]
    with held_run(tmp_path):
        assert_refused(dicm("pretrain", "small", *options), f"run={tmp_path} is in use: process {os.getpid()} on ")
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_run__all_checkpoints_damaged_does_not_begin_anew(pretrained_run: Path, scenes: Path, tmp_path: Path):
    folder = shutil.copytree(pretrained_run, tmp_path / "run")
    options = [f"data={scenes}", f"run={folder}", "launcher=local", "workers=1", *FOUR_STAGES, *NARROW, *SHORT]
    (folder / "summary.json").unlink()  # as if it had not come that far
    before = (folder / "metrics.jsonl").read_bytes()
    for path in folder.rglob("state.pt"):
        os.truncate(path, 1000)
    assert_refused(dicm("pretrain", "small", *options), f"{folder}/checkpoints: none of the", "remove the folder")
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_run__stopped_before_a_checkpoint_does_not_promise_one(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The launcher returns without a step where it was told to stop while it waited for nodes."""
    monkeypatch.setattr("cluster.runtime.run", lambda *_, **__: None)
    options = [f"data={scenes}", f"run={tmp_path}/[b]", "launcher=local", "workers=1", *NARROW, *SHORT]
    result = dicm("pretrain", "small", *options)
    assert result.returncode == 0
    assert result.stdout == f"stopped in {tmp_path}/[b] before the first checkpoint; the same command begins again\n"


@pytest.mark.cluster
def test_run__two_workers_on_ray(scenes: Path, tmp_path: Path):
    """The default launcher: the same run folder, written by two Ray workers."""
    folder = run(small_run(scenes, tmp_path / "run", "launcher=ray", "workers=2", "only=[ssl]", "knn_samples=0"))
    assert (folder / "summary.json").is_file()
    assert '"world": 2' in (folder / "metrics.jsonl").read_text()
