from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import NARROW, REPOSITORY, SHORT, assert_refused, dicm, small_run

from cluster.checkpoint import CheckpointStore
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


def test_run__disk_full_while_a_checkpoint_is_written_keeps_earlier_ones(scenes: Path, tmp_path: Path):
    """A file-size limit makes the kernel refuse the bytes in mid-write, as a full disk does."""
    options = [f"data={scenes}", f"run={tmp_path / 'run'}", "launcher=local", *NARROW, *SHORT, "knn_samples=0"]
    config = small_run(scenes, tmp_path / "run", "knn_samples=0", "checkpoint_every=1")
    config.stages = config.stages[:1]
    run(config)
    store = CheckpointStore(tmp_path / "run" / "checkpoints")
    steps = store.steps()
    largest = max(path.stat().st_size for path in (tmp_path / "run" / "checkpoints").rglob("*") if path.is_file())
    program = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({largest // 2}, {largest // 2})); "
        "sys.argv = ['dicm', *sys.argv[1:]]; import dicm; dicm.main()"
    )
    (tmp_path / "run" / "summary.json").unlink()
    (tmp_path / "run" / "config.yaml").unlink()
    result = subprocess.run(
        [sys.executable, "-c", program, "pretrain", "small", *options, "workers=1"],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert_refused(result, str(tmp_path / "run" / "checkpoints"), "run the same command again")
    assert store.steps() == steps
    assert store.newest() == steps[-1]


@pytest.mark.cluster
def test_run__two_workers_on_ray(scenes: Path, tmp_path: Path):
    """The default launcher: the same run folder, written by two Ray workers."""
    config = small_run(scenes, tmp_path / "run", "launcher=ray", "workers=2")
    config.stages = [config.stages[0], config.stages[-1]]
    folder = run(config)
    assert (folder / "summary.json").is_file()
    assert '"world": 2' in (folder / "metrics.jsonl").read_text()


def test_run__local_launcher_never_imports_ray(scenes: Path, tmp_path: Path):
    """Ray is hidden: an import of it anywhere would end the run."""
    program = (
        "import sys\n"
        "class Hidden:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] == 'ray': raise ImportError('ray is hidden')\n"
        "sys.meta_path.insert(0, Hidden())\n"
        "sys.argv = ['dicm', *sys.argv[1:]]\n"
        "import dicm; dicm.main()"
    )
    options = [f"data={scenes}", f"run={tmp_path / 'run'}", "launcher=local", "workers=1", *NARROW, *SHORT]
    subprocess.run(
        [sys.executable, "-c", program, "pretrain", "small", *options],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, capture_output=True, check=True, timeout=280,
    )  # fmt: skip
    assert (tmp_path / "run" / "summary.json").is_file()
