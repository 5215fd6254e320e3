"""Runs on a storage that does not always answer; `tests/benchmarks/faults.py` measures longer ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import FOUR_STAGES, NARROW, SHORT
from recorded_run import state_of
from storage_faults import Faults, build, run_command

from cluster.metrics import read_rows


@pytest.mark.slow
def test_run__faults_of_its_storage_change_no_loss_and_no_weight(pretrained_run: Path, scenes: Path, tmp_path: Path):
    """ESTALE and EIO, torn rows and torn checkpoints, at random calls on the run folder and the shards."""
    library, run = build(tmp_path), tmp_path / "run"
    if library is None:
        pytest.skip("no C compiler")
    words = ["pretrain", "small", f"data={scenes}", f"run={run}", "launcher=local", *FOUR_STAGES, *NARROW, *SHORT]
    faults = Faults([run, scenes], every=1000, seed=1)
    ended = run_command([*words, "workers=1", "checkpoint_every=1", "keep_checkpoints=9"], library, faults)
    assert ended.code == 0, ended.lines
    assert all(line.startswith("error: ") for line in ended.lines)  # of commands that were given again
    assert ended.faults.total() > 0

    def losses(folder: Path) -> dict[int, float]:
        return {row["step"]: row["loss"] for row in read_rows(folder / "metrics.jsonl") if "loss" in row}

    assert losses(run) == losses(pretrained_run)
    state, expected = state_of(run), state_of(pretrained_run)
    assert state.keys() == expected.keys()
    assert [name for name in state if not torch.equal(state[name], expected[name])] == []
