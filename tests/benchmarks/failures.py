"""Failures in a row: a run that is killed again and again ends in the same state as one that never was.

    python tests/benchmarks/failures.py [--failures 200] [--json FILE]

Each life of the run is a forked process that goes on from the newest checkpoint and gets SIGKILL up to 0.3 s after its first to
seventh step, one in ten before any; often while a checkpoint is written: one is, every third step. After so many failures the run is left alone. Figures
in --json: `failures`, `steps`, `repeated` (steps that were done more than once), `saves_hit` (kills that left a checkpoint half
written), `differing` (tensors of the last checkpoint that differ from those of the uninterrupted run; 0 is the claim),
`order` (whether every step read the samples that it should).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import smoke
import torch
from recorded_run import expected_log, options, read_trace, recorded_pretrain, sample_log, state_of

from cluster.runtime import LocalRuntime
from data_pipeline.scenes import write_scenes
from pretrain.config import PretrainConfig


def live(config: PretrainConfig, steps: int | None = None, delay: float = 0.0) -> bool:
    """One life of a run, until `delay` seconds after so many steps; to its end where it has no such number.

    Returns:
        Whether it came to its end.
    """
    child = os.fork()
    if child == 0:
        code = 1
        try:
            recorded_pretrain(LocalRuntime(), config)
            code = 0
        finally:
            os._exit(code)
    if steps is not None:
        trace = Path(config.run, "trace", f"{child}_0.jsonl")
        while steps and not (trace.exists() and trace.read_bytes().count(b"\n") >= steps):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                return _came_to_its_end(status)
            time.sleep(0.002)
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    return _came_to_its_end(os.waitpid(child, 0)[1])


def _came_to_its_end(status: int) -> bool:
    code = os.waitstatus_to_exitcode(status)
    if code not in (0, -signal.SIGKILL):
        raise SystemExit(f"a process ended with exit code {code}")
    return code == 0


def measure(failures: int, folder: Path) -> dict[str, Any]:
    """Both runs, and what differs."""
    random.seed(0)
    torch.set_num_threads(1)
    data = folder / "scenes"
    with smoke.light_processes():
        write_scenes(data, train=96, val=8, size=32, seed=0)
    small = ["workers=1", "stages.ssl.batch_size=8", f"stages.ssl.epochs={failures // 3 + 5}", "checkpoint_every=3"]
    broken, whole = (options(data, folder / name, *small) for name in ("broken", "whole"))
    start = time.perf_counter()
    live(whole)
    print(f"uninterrupted: {time.perf_counter() - start:.0f} s", flush=True)
    half: set[str] = set()  # their names hold the process that wrote them
    for failure in range(failures):
        early = random.random() < 0.1
        steps, delay = (0, random.uniform(0.1, 1.5)) if early else (random.randint(1, 7), random.uniform(0.0, 0.3))
        if live(broken, steps, delay):
            raise SystemExit(f"the run was complete after {failure} failures; make it longer")
        half |= {path.name for path in (folder / "broken" / "checkpoints").glob(".step_*")}
        if failure % 20 == 19:
            rows = read_trace(folder / "broken")
            print(f"{failure + 1} failures, step {rows[-1]['step']}, {len(half)} during a save", flush=True)
    live(broken)
    first, second = state_of(folder / "broken"), state_of(folder / "whole")
    rows, log = read_trace(folder / "broken"), sample_log(folder / "broken")
    return {
        "failures": failures,
        "steps": len(log),
        "repeated": len(rows) - len(log),
        "saves_hit": len(half),
        "differing": sum(not torch.equal(first[name], second[name]) for name in second)
        + len(first.keys() ^ second.keys()),
        "order": log == expected_log(broken, dict.fromkeys(log, 1)) == sample_log(folder / "whole"),
    }


def small(folder: Path) -> list[str]:
    """Options of a tiny run."""
    return ["--failures", "2"]


def create_parser() -> argparse.ArgumentParser:
    """Its options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--failures", type=int, default=200)
    parser.add_argument("--json", type=Path)
    smoke.add_option(parser)
    return parser


def main() -> int:
    """Measure, print and write; 1 where anything differs."""
    arguments = smoke.parse(create_parser(), small)
    with tempfile.TemporaryDirectory() as scratch:
        figures = measure(arguments.failures, Path(scratch))
    for name, value in figures.items():
        print(f"{name:10s} {value}")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
    return int(figures["differing"] > 0 or not figures["order"])


if __name__ == "__main__":
    raise SystemExit(main())
