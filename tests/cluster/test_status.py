from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from conftest import dicm
from rich.console import Console

from cluster.checkpoint import CheckpointStore
from cluster.status import newest_checkpoint, seconds_left, show, status_table

ROW = {
    "step": 40, "time": 1000.0, "total_steps": 100, "stage": "ssl", "epoch": 1.5, "loss": 2.25, "bpp": 0.125, "lr": 0.03,
    "world": 4, "images_per_second": 512.0, "images_per_second_per_worker": 128.0, "step_seconds": 0.5,
    "data_wait": 0.034, "gpu_memory": 3 * 2**30,
}  # fmt: skip
RECOVERED = {
    "step": 30,
    "time": 940.0,
    "event": "recovered",
    "reason": "worker 1 was lost",
    "world": 3,
    "seconds": 21.5,
}


def cells(rows: list[dict[str, Any]], **options: Any) -> dict[str, str]:
    """The table as it is read: name -> value; lines without a name continue the one above."""
    text = io.StringIO()
    Console(file=text, width=200).print(status_table(rows, now=1060.0, **options))
    shown: dict[str, str] = {}
    for line in text.getvalue().splitlines():
        if line.startswith("│"):
            name, value = (part.strip() for part in line.strip("│").split("│"))
            if name:
                shown[name] = value
            else:
                shown[list(shown)[-1]] += f"\n{value}"
    return shown


def test_status_table__shows_the_newest_row():
    shown = cells([{**ROW, "step": 30, "loss": 3.0, "time": 995.0}, ROW], checkpoint=30)
    assert shown == {
        "stage": "ssl", "step": "40 / 100", "epoch": "1.50", "loss": "2.2500", "bpp": "0.1250", "lr": "3.00e-02",
        "workers": "4", "images/s": "512.0", "images/s a worker": "128.0", "step time": "0.500 s",
        "waiting for data": "3.4%", "GPU memory": "3.0 GiB", "time left": "30 s", "last row": "1 min 00 s ago",
        "newest checkpoint": "step 30, 1 min 05 s ago", "recoveries": "0",
    }  # fmt: skip


def test_status_table__what_the_rows_lack_is_a_dash():
    shown = cells([{"step": 3, "loss": None}])
    assert shown["step"] == "3 / -"
    assert shown["newest checkpoint"] == "none"
    missing = (
        "stage",
        "epoch",
        "loss",
        "bpp",
        "lr",
        "workers",
        "images/s",
        "step time",
        "GPU memory",
        "time left",
        "last row",
    )
    assert {shown[name] for name in missing} == {"-"}
    assert cells([])["step"] == "0 / -"


def test_status_table__tells_of_recoveries():
    resized = {**RECOVERED, "step": 35, "event": "resized", "reason": "workers came", "world": 4}
    shown = cells([*[{**RECOVERED, "step": step} for step in (10, 20, 30)], resized, ROW])
    assert shown["recoveries"].splitlines() == [
        "4",  # of which the last three are told
        "recovered at step 20, 2 min 00 s ago: worker 1 was lost; 3 workers, 21.5 s",
        "recovered at step 30, 2 min 00 s ago: worker 1 was lost; 3 workers, 21.5 s",
        "resized at step 35, 2 min 00 s ago: workers came; 4 workers, 21.5 s",
    ]


def test_seconds_left__is_not_slowed_by_a_recovery():
    slow = {**ROW, "step": 20, "time": 100.0}
    assert seconds_left([slow, RECOVERED, {**ROW, "step": 35, "time": 990.0}, ROW]) == 60 * 2.0
    assert seconds_left([slow, RECOVERED, ROW]) == 60 * 0.5  # one row tells no speed, but knows its step's time
    assert seconds_left([slow, RECOVERED]) is None


def test_newest_checkpoint__of_the_complete_ones_wherever_they_lie(tmp_path: Path):
    assert newest_checkpoint(tmp_path) is None
    for place in ("checkpoints", "elsewhere"):
        for step, whole in ((200, True), (400, place == "elsewhere"), (600, False)):
            if whole:
                CheckpointStore(tmp_path / place, keep=9).save(step, {"step": step})
            else:
                (tmp_path / place / f"step_{step:08d}").mkdir(parents=True)
    assert newest_checkpoint(tmp_path) == 200
    (tmp_path / "config.yaml").write_text(f"checkpoints: file://{tmp_path}/elsewhere\n")
    assert newest_checkpoint(tmp_path) == 400


def test_show__once_where_the_output_is_no_terminal(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps(ROW) + "\n")
    text = io.StringIO()
    show(tmp_path, Console(file=text, width=200), every=0.1)
    assert text.getvalue().count("40 / 100") == 1
    result = dicm("cluster", "status", tmp_path, "--watch")
    assert result.returncode == 0 and "40 / 100" in result.stdout


def test_show__a_run_that_has_no_metrics_yet(tmp_path: Path):
    (tmp_path / "config.yaml").write_text("data: d\n")
    result = dicm("cluster", "status", tmp_path)
    assert result.returncode == 0 and result.stdout == f"{tmp_path}: the run has begun, there are no metrics yet\n"


def test_show__names_and_reasons_as_they_are(tmp_path: Path):
    run = tmp_path / "[red]"
    run.mkdir()
    lost = {**RECOVERED, "reason": "failed in [/tmp/x]"}
    (run / "metrics.jsonl").write_text(json.dumps(lost) + "\n" + json.dumps({**ROW, "stage": "[b]"}) + "\n")
    text = io.StringIO()
    show(run, Console(file=text, width=200))
    assert str(run) in text.getvalue() and "failed in [/tmp/x]" in text.getvalue() and "[b]" in text.getvalue()


def test_show__a_store_that_cannot_be_opened_is_not_called_empty(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps(ROW) + "\n")
    (tmp_path / "config.yaml").write_text("checkpoints: ftps3://bucket/run\n")
    text = io.StringIO()
    show(tmp_path, Console(file=text, width=300))
    assert "not known: checkpoints=ftps3://bucket/run cannot be opened" in text.getvalue()
