from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import pytest

from data_pipeline.errors import DataError
from data_pipeline.shards import ShardWriter
from data_pipeline.sources import Rejected
from data_pipeline.unfinished import Step, UnfinishedBuild

PLAN = {"source": "here", "shard-samples": 1}


def write_shard(build: UnfinishedBuild, next_job: int = 1) -> Step:
    """Write one more shard of `train` and record it."""
    finished = [step.shard for step in build.of_split("train") if step.shard]
    with ShardWriter(build.dataset, "train", finished=finished) as writer:
        writer.write({"__key__": f"train-{next_job}", "jpg": b"x" * next_job})
    step = Step("train", next_job, writer.shards[-1], (Rejected("a.jpg", "image", "broken"),))
    build.record(step)
    return step


def begin(out: Path, count: int) -> list[Step]:
    """A build that is interrupted after `count` steps."""
    steps: list[Step] = []
    with pytest.raises(KeyboardInterrupt), UnfinishedBuild(out, PLAN, num_processes=1) as build:  # noqa: PT012
        steps += (write_shard(build, number + 1) for number in range(count))
        raise KeyboardInterrupt
    return steps


def reopened(out: Path) -> list[Step]:
    with pytest.raises(KeyboardInterrupt), UnfinishedBuild(out, PLAN, num_processes=1) as build:  # noqa: PT012
        steps = list(build.steps)
        raise KeyboardInterrupt
    return steps


def test_unfinished_build__steps_come_back_as_they_were(tmp_path: Path):
    steps = begin(tmp_path / "out", 3)
    assert reopened(tmp_path / "out") == steps
    assert reopened(tmp_path / "out") == steps


def test_unfinished_build__appears_by_one_rename_and_leaves_nothing(tmp_path: Path):
    begin(tmp_path / "deep" / "out", 1)
    with UnfinishedBuild(tmp_path / "deep" / "out", PLAN) as build:
        assert not (tmp_path / "deep" / "out").exists()
        build.publish()
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]
    assert [path.name for path in (tmp_path / "deep" / "out").iterdir()] == ["train-000000.tar"]


def test_unfinished_build__an_error_before_the_first_step_leaves_nothing(tmp_path: Path):
    begin(tmp_path / "out", 0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("tail", ['{"split": "tra', '{"split": "train"}\n', "\n", '[]\n{"a": 1}\n'])
def test_unfinished_build__a_line_cut_off_while_it_was_written_does_not_count(tmp_path: Path, tail: str):
    steps = begin(tmp_path / "out", 2)
    journal = tmp_path / ".out.unfinished" / "steps.jsonl"
    journal.write_text(journal.read_text() + tail)
    assert reopened(tmp_path / "out") == steps
    assert len(journal.read_text().splitlines()) == 2


def test_unfinished_build__goes_on_before_the_first_shard_that_is_not_whole(tmp_path: Path):
    steps = begin(tmp_path / "out", 4)
    folder = tmp_path / ".out.unfinished" / "dataset"
    (folder / "train-000002.tar").unlink()
    (folder / ".train-000004.tar.123").touch()
    assert reopened(tmp_path / "out") == steps[:2]
    assert sorted(path.name for path in folder.iterdir()) == ["train-000000.tar", "train-000001.tar"]


def test_unfinished_build__a_plan_cut_off_while_it_was_written_is_no_plan(tmp_path: Path):
    begin(tmp_path / "out", 1)
    (tmp_path / ".out.unfinished" / "plan.json").write_text('{"source"')
    assert reopened(tmp_path / "out") == []


def test_unfinished_build__another_plan_is_refused_and_loses_nothing(tmp_path: Path):
    steps = begin(tmp_path / "out", 2)
    with (
        pytest.raises(DataError, match=r"source=here there, there here"),
        UnfinishedBuild(tmp_path / "out", {**PLAN, "source": "there"}),
    ):
        pytest.fail("entered")
    assert reopened(tmp_path / "out") == steps


def test_unfinished_build__out_must_be_new(tmp_path: Path):
    (tmp_path / "mine").touch()
    with pytest.raises(DataError, match="is there already"), UnfinishedBuild(tmp_path, PLAN):
        pytest.fail("entered")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def _try(out: Path, results: multiprocessing.SimpleQueue) -> None:
    try:
        with UnfinishedBuild(out, PLAN):
            results.put("entered")
    except DataError as error:
        results.put(str(error))


def test_unfinished_build__two_processes_do_not_build_the_same(tmp_path: Path):
    results = multiprocessing.SimpleQueue()
    with pytest.raises(KeyboardInterrupt), UnfinishedBuild(tmp_path / "out", PLAN):  # noqa: PT012
        process = multiprocessing.get_context("fork").Process(target=_try, args=(tmp_path / "out", results))
        process.start()
        process.join()
        raise KeyboardInterrupt
    assert "is being built by another process" in results.get()


def test_unfinished_build__a_full_disk_is_told_in_one_line_and_what_is_done_stays(tmp_path: Path):
    with pytest.raises(DataError, match=r"No space left.*goes on from here") as error:  # noqa: PT012, SIM117
        with UnfinishedBuild(tmp_path / "out", PLAN) as build:
            write_shard(build)
            raise OSError(28, "No space left on device")
    assert "\n" not in str(error.value)
    assert len(reopened(tmp_path / "out")) == 1


def test_unfinished_build__the_journal_is_plain_json(tmp_path: Path):
    begin(tmp_path / "out", 1)
    (line,) = (tmp_path / ".out.unfinished" / "steps.jsonl").read_text().splitlines()
    assert set(json.loads(line)) == {"split", "next_job", "shard", "rejected"}
