from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cluster.metrics import MetricsLogger, ProgressFollower, read_rows

REPOSITORY = Path(__file__).parents[2]


def log(run: Path, steps: range, start: int = 0, **values: object) -> None:
    logger = MetricsLogger(run, step=start)
    for step in steps:
        logger.log(step, {"loss": 1.0 / step, "stage": "ssl", **values})
    logger.close()


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def scalars(run: Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def wait_for(condition, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_log__a_row_is_on_disk_as_soon_as_it_is_logged(tmp_path: Path):
    logger = MetricsLogger(tmp_path / "run")
    logger.log(10, {"loss": 0.5, "stage": "ssl", "world": 2})
    (row,) = rows(tmp_path / "run")
    assert (row["step"], row["loss"], row["stage"], row["world"]) == (10, 0.5, "ssl", 2)
    assert abs(row["time"] - time.time()) < 60
    logger.close()


def test_log__tensorboard_holds_the_numbers(tmp_path: Path):
    log(tmp_path, range(1, 4))
    steps, values = zip(*scalars(tmp_path, "loss"), strict=True)
    assert steps == (1, 2, 3)
    assert values == pytest.approx((1.0, 0.5, 1 / 3))


def test_log__nan_and_infinity_are_null_so_that_every_line_is_json(tmp_path: Path):
    logger = MetricsLogger(tmp_path)
    logger.log(1, {"loss": math.nan, "rate": -math.inf, "bpp": 0.5})
    logger.close()

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert (row["loss"], row["rate"], row["bpp"]) == (None, None, 0.5)


def test_image__arrives_in_tensorboard(tmp_path: Path):
    logger = MetricsLogger(tmp_path)
    logger.image("guidance", 7, torch.zeros(3, 4, 5, dtype=torch.uint8))
    logger.close()
    (image,) = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Images("guidance")
    assert (image.step, image.width, image.height) == (7, 5, 4)


def test_logger__other_ranks_write_nothing(tmp_path: Path):
    logger = MetricsLogger(tmp_path / "run", rank=1)
    logger.log(1, {"loss": 1.0})
    logger.image("guidance", 1, torch.zeros(3, 4, 4, dtype=torch.uint8))
    logger.close()
    assert not (tmp_path / "run").exists()


def test_logger__resumed_run_leaves_one_clean_record(tmp_path: Path):
    """Killed in mid-line at step 6, resumed from the checkpoint of step 3."""
    log(tmp_path, range(1, 7), world=2)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')
    log(tmp_path, range(4, 9), start=3, world=1)
    assert [(row["step"], row["world"]) for row in rows(tmp_path)] == [
        (1, 2), (2, 2), (3, 2), (4, 1), (5, 1), (6, 1), (7, 1), (8, 1)
    ]  # fmt: skip
    assert [step for step, _ in scalars(tmp_path, "loss")] == list(range(1, 9))


def test_logger__full_disk_is_one_clear_line(tmp_path: Path):
    program = (
        "import resource, signal, sys\n"
        "from cluster.metrics import MetricsLogger\n"
        "logger = MetricsLogger(sys.argv[1])\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try:\n"
        "    for step in range(100): logger.log(step, {'loss': 1.0})\n"
        "except Exception as error: print(type(error).__name__, error)\n"
        "import os; sys.stdout.flush(); os._exit(0)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    result = subprocess.run(
        [sys.executable, "-c", program, tmp_path], env=environment, capture_output=True, text=True, check=True
    )
    assert result.stdout.startswith(f"RunError {tmp_path}: metrics cannot be written"), result.stdout + result.stderr
    assert "free some space" in result.stdout
    assert 0 < len(read_rows(tmp_path / "metrics.jsonl")) < 100


@pytest.mark.parametrize("terminal", [True, False])
def test_follower__shows_where_the_run_stands(tmp_path: Path, terminal: bool):
    output = io.StringIO()
    console = Console(file=output, force_terminal=terminal, width=120)
    with ProgressFollower(tmp_path, 900, console) as follower:
        log(tmp_path, range(1, 41), images_per_second=97.4, bpp=0.125)
        wait_for(lambda: follower._last.get("step") == 40)
    text = output.getvalue()
    for part in ("40/900", "ssl", "loss 0.025", "0.125 bpp", "97 images/s"):
        assert part in text


def test_follower__first_line_comes_at_once_where_there_is_no_terminal(tmp_path: Path):
    output = io.StringIO()
    with ProgressFollower(tmp_path, 9, Console(file=output)):
        log(tmp_path, range(1, 3))
        wait_for(lambda: "step " in output.getvalue())


def test_follower__rewritten_file_of_a_resumed_run_is_read_from_its_start(tmp_path: Path):
    """The new file is soon longer than the old one was, and must not be read from the middle of a line."""
    log(tmp_path, range(1, 4))
    output = io.StringIO()
    with ProgressFollower(tmp_path, 90, Console(file=output)) as follower:
        assert follower._last == {}
        log(tmp_path, range(2, 60), start=1)
        wait_for(lambda: follower._last.get("step") == 59)
    assert "step 59/90" in output.getvalue()


def test_follower__rows_that_are_no_training_steps_and_torn_lines_do_no_harm(tmp_path: Path):
    output = io.StringIO()
    with ProgressFollower(tmp_path, 9, Console(file=output)) as follower:
        lines = b'{"step": 3, "loss": 1.0}\nnonsense\n[1]\n{"step": 4, "knn": 0.5}\n\xff\xfe\n{"step": 5, "lo'
        (tmp_path / "metrics.jsonl").write_bytes(lines)
        wait_for(lambda: follower._last.get("step") == 3)
    assert "step 3/9" in output.getvalue()


def test_follower__leaves_at_once_when_nothing_came(tmp_path: Path):
    output = io.StringIO()
    begun = time.monotonic()
    with pytest.raises(KeyError), ProgressFollower(tmp_path, 9, Console(file=output)):
        raise KeyError
    assert time.monotonic() - begun < 2
    assert output.getvalue() == ""
