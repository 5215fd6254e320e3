from __future__ import annotations

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


@pytest.mark.parametrize("command", COMMANDS)
def test_help__every_command_has_an_example(command: str):
    result = dicm(*command.split(), "--help")
    assert result.returncode == 0
    assert f"dicm {command}" in result.stdout.split("Example", 1)[1]


def test_main__unknown_command_exits_with_2():
    assert dicm("pretrian").returncode == 2
