"""`dicm pretrain` whose storage does not always answer: processes with `storage_faults.c` between Python and libc.

    with a library built by `build`:  run_command(words, faults) -> Ended

The command trains with `recorded_run.recorded_pretrain`, whose trace lies outside of the faults: it says which samples
every step saw. A command that ends with exit code 2 is given again, as its line asks for.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent
# What `dicm` is, but for the function that its workers run, and the seconds that it gives a storage to come back.
PROGRAM = """
import cluster.local_workers, dicm, pretrain.run, torch
from recorded_run import recorded_pretrain

torch.set_num_threads(1)
cluster.local_workers.RESTART_SECONDS = (0.1,)
pretrain.run.pretrain = recorded_pretrain
dicm.main()
"""
LOST = re.compile("a worker was lost")
MOST_COMMANDS = 30


@dataclass
class Faults:
    """What the storage does.

    Attributes:
        folders: where.
        every: of so many calls one fails, with ESTALE or EIO; 0: none.
        full: bytes that fit, then ENOSPC.
        seed: of the draws.
    """

    folders: list[Path]
    every: int = 0
    full: int | None = None
    seed: int = 0

    def environment(self, library: Path, log: Path) -> dict[str, str]:
        """The variables that the library reads."""
        full = {} if self.full is None else {"FAULTS_FULL": str(self.full)}
        return {
            "LD_PRELOAD": str(library),
            "FAULTS_FOLDERS": ":".join(str(folder.resolve()) for folder in self.folders),
            "FAULTS_EXCEPT": "/trace/",
            "FAULTS_EVERY": str(self.every),
            "FAULTS_SEED": str(self.seed),
            "FAULTS_LOG": str(log),
            **full,
        }


@dataclass
class Ended:
    """How a run ended.

    Attributes:
        code: of the last command.
        commands: how many there were.
        lines: the last line of each that did not end with 0.
        lost: workers, which the commands said that they had lost.
        faults: calls that failed, by name.
    """

    code: int = 0
    commands: int = 0
    lines: list[str] = field(default_factory=list)
    lost: int = 0
    faults: Counter[str] = field(default_factory=Counter)


def build(folder: Path) -> Path | None:
    """Compile the library into a folder; None where this machine has no compiler, or no glibc."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or not sys.platform.startswith("linux"):
        return None
    library = folder / "storage_faults.so"
    command = [compiler, "-shared", "-fPIC", "-O1", "-o", library, HERE / "storage_faults.c", "-ldl", "-lpthread"]
    return library if subprocess.run(command, capture_output=True, check=False).returncode == 0 else None


def run_command(words: list[str], library: Path, faults: Faults, *, commands: int = MOST_COMMANDS) -> Ended:
    """`dicm WORDS`, at most `commands` times, until it ends with another code than 2."""
    ended, log = Ended(), library.with_name(f"faults{faults.seed}.log")
    log.unlink(missing_ok=True)
    path = os.pathsep.join([str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")])
    for number in range(commands):
        again = Faults(faults.folders, faults.every, faults.full, faults.seed + 1000 * number)
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **again.environment(library, log)}
        process = subprocess.run(
            [sys.executable, "-c", PROGRAM, *words], env=environment, capture_output=True, text=True, check=False
        )
        ended.code, ended.commands = process.returncode, number + 1
        ended.lost += len(LOST.findall(process.stderr))
        if process.returncode:
            ended.lines.append(process.stderr.strip().splitlines()[-1])
        if process.returncode != 2:
            break
    if log.is_file():
        ended.faults = Counter(line.partition(" ")[0] for line in log.read_text().splitlines())
    return ended
