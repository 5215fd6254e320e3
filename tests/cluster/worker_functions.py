"""What workers do in tests: importable by name from any process."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from cluster.clocks import check_clocks
from cluster.errors import CheckpointError
from cluster.finite import FiniteCheck
from cluster.runtime import Notice, Runtime


@dataclass
class Options:
    """Where a worker writes, and what it should suffer."""

    folder: str
    rank: int = 1  # the one that suffers
    wait: bool = False


def listening() -> list[str]:
    """Local addresses, as /proc writes them, at which this process or its parent takes connections."""
    sockets = set()
    for process in (os.getpid(), os.getppid()):
        for descriptor in Path(f"/proc/{process}/fd").iterdir():
            with suppress(FileNotFoundError):  # closed meanwhile
                sockets.add(os.readlink(descriptor))
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path("/proc/net", name).read_text().splitlines()[1:]]
    return [row[1].partition(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in sockets]


def write_facts(runtime: Runtime, options: Options) -> None:
    """Everything a training function may ask of its runtime, as this rank sees it, to FOLDER/rank.json."""
    total = torch.tensor([runtime.rank + 1.0])
    if runtime.world > 1:
        dist.all_reduce(total)
    facts = {
        "rank": runtime.rank,
        "world": runtime.world,
        "local_rank": runtime.local_rank,
        "device": runtime.device.type,
        "threads": torch.get_num_threads(),
        "mean": runtime.mean({"loss": float(runtime.rank), "step": 2.0**40 + 1}),
        "sum": total.item(),
        "gathered": runtime.gather(
            torch.full((runtime.rank + 1, 2), float(runtime.rank), device=runtime.device)
        ).tolist(),
        "broadcast": runtime.broadcast({"step": 7, "from": runtime.rank}),
        "should_stop": runtime.should_stop,
        "directory": str(Path.cwd()),
        "ray": "ray" in sys.modules,
        "listening": listening(),
    }
    runtime.barrier()
    runtime.report_checkpoint(1)
    logging.getLogger("cluster.checkpoint").warning("checkpoint %s: damaged; passed over", options.folder)
    Path(options.folder, f"{runtime.rank}.json").write_text(json.dumps(facts))


def facts_of(folder: Path, world: int) -> list[dict]:
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]


def fail_with_our_error(runtime: Runtime, options: Options) -> None:
    if runtime.rank == options.rank:
        raise CheckpointError(f"{options.folder}: a line for the user")
    runtime.barrier()


def fail_with_a_bug(runtime: Runtime, options: Options) -> None:
    if runtime.rank == options.rank:
        return {}["no such key"]
    return runtime.barrier()


def die(runtime: Runtime, options: Options) -> None:
    """Killed in mid-run, while the others wait for it, or compute on."""
    runtime.barrier()
    if runtime.rank == options.rank:
        os.kill(os.getpid(), signal.SIGKILL)
    if options.wait:
        time.sleep(1000)
    runtime.barrier()


def step_until_told(runtime: Runtime, options: Options) -> None:
    """Steps until it should stop, then says at which step it did."""
    if runtime.rank == 0:
        Path(options.folder, "pids").write_text(f"{os.getpid()}")
    runtime.barrier()  # before any rank has begun
    for step in range(10_000):
        if runtime.should_stop:
            Path(options.folder, f"stopped_{runtime.rank}").write_text(str(step))
            return
        Path(options.folder, "begun").touch()
        time.sleep(0.02)


def clocks_apart(runtime: Runtime, options: Options) -> None:
    """The clock of one rank is five minutes behind; what rank 0 says of it goes to FOLDER/said."""
    now = time.time
    if runtime.rank == options.rank:
        time.time = lambda: now() - 300  # as the process sees it on such a node
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("cluster.clocks").addHandler(handler)
    check_clocks(runtime, lambda rank: f"worker {rank} on node far-{rank}")
    if runtime.rank == 0:
        Path(options.folder, "said").write_text("\n".join(said))


def die_once(runtime: Runtime, options: Options) -> None:
    """Killed in mid-run the first time; then every rank says that it has ended."""
    runtime.barrier()
    if runtime.rank == options.rank and not Path(options.folder, "died").exists():
        Path(options.folder, "died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    runtime.barrier()
    event = runtime.interruption.event if runtime.interruption else None
    Path(options.folder, f"ended_{runtime.rank}").write_text(json.dumps([runtime.world, event]))


def sleep_on_one_rank(runtime: Runtime, options: Options) -> None:
    """One rank hangs, as in a read from a store that does not answer; the others wait for it."""
    if runtime.rank == options.rank:
        time.sleep(60)
    runtime.barrier()


def told_at_the_third_step(runtime: Runtime, options: Options) -> None:
    """One rank is told to stop; says at which step it, and each other, heard of it."""
    step = 1
    if runtime.rank == options.rank:
        runtime._look_for_notice = lambda: Notice.STOP if step >= 3 else Notice.NONE  # type: ignore[method-assign]
    while not runtime.should_stop:
        step += 1
    Path(options.folder, f"stopped_{runtime.rank}").write_text(str(step))


def die_once_write_facts_and_step(runtime: Runtime, options: Options) -> None:
    """`die_once`, then `write_facts`, then `step_until_told`."""
    die_once(runtime, options)
    write_facts(runtime, options)
    step_until_told(runtime, options)


def bad_step_of_one_rank(runtime: Runtime, options: Options) -> None:
    """One rank's fifth step is not finite; what each rank hears of it."""
    check, good = FiniteCheck(runtime), torch.ones((), device=runtime.device)
    before = check.first_bad()
    check.note(5, good / 0 if runtime.rank == options.rank else good, good)
    # What is saved is rank 0's.
    answers = {"before": before, "first": check.first_bad(), "finite": check.is_finite(float(runtime.rank) or 1.0)}
    Path(options.folder, f"{runtime.rank}.json").write_text(json.dumps(answers))


def lose_a_worker(runtime: Runtime, options: Options) -> None:
    """FOLDER/faults has what the starts to come suffer, a word each; each start is a line of FOLDER/starts."""
    faults, starts = Path(options.folder, "faults"), Path(options.folder, "starts")
    runtime.barrier()  # all have come up
    if runtime.rank == options.rank:
        fault, *others = faults.read_text().split() or ["none"]
        with starts.open("a") as file:
            file.write(f"{runtime.interruption.reason if runtime.interruption else 'first'}\n")
        faults.write_text(" ".join(others))
        if fault == "saved-stale":
            runtime.report_checkpoint(len(others))
        if fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault != "none":
            raise OSError(errno.ESTALE, "Stale file handle", "/shared/train-000000.tar")
    runtime.barrier()
