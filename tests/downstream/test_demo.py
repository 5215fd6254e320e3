from __future__ import annotations

import io
import os
import re
import signal
from pathlib import Path

import pytest
from conftest import NARROW, SHORT
from rich.console import Console

from downstream.demo import Timings, run_demo
from downstream.errors import TaskError

SMALL = {
    "train": 48,
    "val": 16,
    "pretraining": ["launcher=local", "workers=1", *NARROW, *SHORT],
    "classification": ["batch_size=16"],
}


def demo(out: Path) -> str:
    console = Console(file=io.StringIO(), width=200)
    run_demo(out, console, **SMALL)
    return console.file.getvalue()


@pytest.mark.slow
def test_run_demo__ends_with_a_report_and_goes_on_where_it_was(tmp_path: Path):
    out = tmp_path / "demo"
    said = demo(out)
    first = said.splitlines()[0]
    assert re.search(r"about \d+ minutes", first) and str(out / "report.html") in first
    page = (out / "report.html").read_text()
    for words in (
        "rate 1",
        "jpeg:20",
        "avif:20",
        "hevc:42",
        "clean pixels",
        "payload",
        "draw scenes",
        "dicm pretrain demo",
    ):
        assert words in page

    pretrained = (out / "codec" / "model.safetensors").read_bytes()
    (out / "report.html").unlink()
    (out / "runs" / "jpeg_20" / "results.json").unlink()
    said = demo(out)
    assert "classify, jpeg_20" in said and "pretrain" not in said and "draw scenes" not in said
    assert (out / "report.html").is_file()
    assert (out / "codec" / "model.safetensors").read_bytes() == pretrained


def test_step__interrupted_work_is_timed_and_done_again(tmp_path: Path):
    timings = Timings(tmp_path / "out" / "timings.json", Console(file=io.StringIO()))

    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        timings.step("work", tmp_path / "result", interrupted)
    assert "work" in Timings(timings.path, timings.console).seconds
    timings.step("work", tmp_path / "result", (tmp_path / "result").touch)
    timings.step("work", tmp_path / "result", interrupted)  # there already: not run


def test_step__work_that_was_told_to_stop_does_not_go_on_to_the_next(tmp_path: Path):
    timings = Timings(tmp_path / "timings.json", Console(file=io.StringIO()))

    def told_when_all_is_done() -> None:
        (tmp_path / "done").touch()
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(TaskError, match="stopped after work"):
        timings.step("work", tmp_path / "done", told_when_all_is_done)
    with pytest.raises(TaskError, match="work was stopped"):
        timings.step("work", tmp_path / "result", lambda: None)
