"""A storage that does not always answer: a run on it ends in the same state as one on a storage that does.

    python tests/benchmarks/faults.py [--steps 300] [--every 1500] [--seed 0] [--json FILE]

Pretraining of a narrow codec in two stages (ssl, codec), plain torch, a checkpoint every fifth step. One in `--every` calls of its
process on the run folder and the shards fails with ESTALE or EIO (open, stat, read, write, fsync, rename, mkdir, unlink; a write
after a part of it), by a library in C that is loaded before libc (`tests/storage_faults.c`). A command that ends with exit
code 2 is given again. Then the same run on a disk that is full after a part of its checkpoints, and again on one that is not.

Figures in --json: `steps`, `faults` (by call), `lost` (workers that the runs lost to them), `commands`, `seconds` with and without faults,
`differing` (tensors of the last checkpoint that differ from those of the run without faults; 0 is the claim), `same_samples`
(whether every step read what it should) and `same_losses`; of the full disk `full_line` (what the command said), `full_lost` (checkpoints that
were complete and then missing; 0 is the claim) and `full_differing`. Exits with 1 where a claim does not hold, or a command
ended with a traceback.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import smoke
import torch
from conftest import NARROW
from recorded_run import sample_log, state_of
from storage_faults import Ended, Faults, build, run_command

from cluster.checkpoint import CheckpointStore
from cluster.metrics import read_rows
from data_pipeline.scenes import write_scenes

IMAGES, BATCH = 64, 8


def words(data: Path, run: Path, steps: int) -> list[str]:
    """The command of a run of so many steps, half of them in each stage."""
    epochs = steps // 2 * BATCH / IMAGES
    return [
        "pretrain", "small", f"data={data}", f"run={run}", *NARROW, "only=[ssl,codec]", "launcher=local", "workers=1",
        "codec.redundancy=false", f"stages.ssl.epochs={epochs}", f"stages.codec.epochs={epochs}",
        f"stages.ssl.batch_size={BATCH}", f"stages.codec.batch_size={BATCH}", "image_size=32", "canvas_size=32",
        "precision=fp32", "knn_samples=0", "log_every=1", "checkpoint_every=5", "picture_every=100000",
    ]  # fmt: skip


def losses(run: Path) -> dict[int, float]:
    """Step -> loss."""
    return {row["step"]: row["loss"] for row in read_rows(run / "metrics.jsonl") if "loss" in row}


def differing(run: Path, other: Path) -> int:
    """Tensors of the last checkpoints of two runs that are not equal bit for bit."""
    first, second = state_of(run), state_of(other)
    names = first.keys() | second.keys()
    return sum(name not in first or name not in second or not torch.equal(first[name], second[name]) for name in names)


def measure_faults(data: Path, folder: Path, library: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """A run without faults, and one with them."""
    seconds: list[float] = []
    ended: list[Ended] = []
    runs = {folder / "whole": 0, folder / "faults": arguments.every}
    for run, every in runs.items():
        begin = time.perf_counter()
        faults = Faults([run, data], every=every, seed=arguments.seed)
        ended.append(run_command(words(data, run, arguments.steps), library, faults))
        seconds.append(round(time.perf_counter() - begin, 1))
    whole, faulty = runs
    return {
        "steps": len(losses(whole)),
        "code": ended[1].code,
        "faults": dict(ended[1].faults),
        "lost": ended[1].lost,
        "commands": ended[1].commands,
        "lines": ended[1].lines,
        "seconds": {"without": seconds[0], "with": seconds[1]},
        "differing": differing(whole, faulty),
        "same_samples": sample_log(whole) == sample_log(faulty),
        "same_losses": losses(whole) == losses(faulty),
    }


def measure_full(data: Path, folder: Path, library: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """The run on a disk that has room for four checkpoints, then on one with room for all."""
    run, whole = folder / "full", folder / "whole"
    room = 4 * (next((whole / "checkpoints").glob("step_*")) / "state.pt").stat().st_size
    full = Faults([run], full=room, seed=arguments.seed)
    ended = run_command(words(data, run, arguments.steps), library, full, commands=1)
    before = CheckpointStore(run / "checkpoints").steps()
    newest = CheckpointStore(run / "checkpoints").newest()
    run_command(words(data, run, arguments.steps), library, Faults([run]), commands=1)
    return {
        "full_code": ended.code,
        "full_line": ended.lines[-1] if ended.lines else "",
        "full_lost": int(newest is None or newest != max(before)),
        "full_differing": differing(whole, run),
    }


def holds(figures: dict[str, Any]) -> bool:
    """Whether the claims hold."""
    same = figures["code"] == 0 and not figures["differing"] and figures["same_samples"] and figures["same_losses"]
    told = figures["full_code"] == 2 and "No space left" in figures["full_line"]
    return same and told and not figures["full_lost"] and not figures["full_differing"] and bool(figures["faults"])


def small(_: Path) -> list[str]:
    """Options for --smoke."""
    return ["--steps", "20", "--every", "1000"]


def create_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--every", type=int, default=1500, help="of so many calls one fails")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    smoke.add_option(parser)
    return parser


def main() -> int:
    """Measure, print and write."""
    arguments = smoke.parse(create_parser(), small)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if (library := build(folder)) is None:
            print("no C compiler: nothing was measured")
            return 0
        with smoke.light_processes():
            write_scenes(folder / "scenes", train=IMAGES, val=8, size=32, seed=0)
        figures = measure_faults(folder / "scenes", folder, library, arguments)
        figures |= measure_full(folder / "scenes", folder, library, arguments)
    for name, value in figures.items():
        print(f"{name:16s} {value}")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0 if holds(figures) else 1


if __name__ == "__main__":
    raise SystemExit(main())
