from __future__ import annotations

import os
import subprocess
import sys

import pytest
from conftest import REPOSITORY, dicm

COMMANDS = ["data scenes", "data build", "data inspect", "data verify", "pretrain", "export", "encode", "decode",
            "finetune", "evaluate", "report", "demo"]  # fmt: skip


def test_import__nothing_heavy():
    """`dicm --help` answers at once because these are imported inside commands alone."""
    heavy = ("torch", "ray", "numpy", "timm", "lightly", "compressai")
    program = f"import sys, dicm; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_import__fewer_cores_than_the_affinity_have_as_few_threads():
    program = "import os, dicm; print(os.environ.get('OMP_NUM_THREADS'))"
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    threads = [
        subprocess.run(
            [sys.executable, "-c", program], cwd=REPOSITORY, env=environment | {"DICM_CPUS": cpus},
            capture_output=True, text=True, check=True,
        ).stdout.strip()
        for cpus in ("1", "1000")
    ]  # fmt: skip
    assert threads == ["1" if len(os.sched_getaffinity(0)) > 1 else "None", "None"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help__every_command_has_an_example(command: str):
    result = dicm(*command.split(), "--help")
    assert result.returncode == 0
    assert f"dicm {command}" in result.stdout.split("Example", 1)[1]


def test_main__unknown_command_exits_with_2():
    assert dicm("pretrian").returncode == 2
