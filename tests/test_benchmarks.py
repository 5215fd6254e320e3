"""Every script in tests/benchmarks runs, as documents name it, and by what the packages promise alone."""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY

BENCHMARKS = REPOSITORY / "tests" / "benchmarks"
MODULES = {"evidence_plan", "scaling_costs", "scaling_counts", "smoke"}  # have no main: others import them
SCRIPTS = sorted({path.stem for path in BENCHMARKS.glob("*.py")} - MODULES)
PACKAGES = ("cluster", "data_pipeline", "pretrain", "downstream")
CLUSTER = {"recovery"}  # start a real Ray
SECONDS = 550  # a busy machine takes ten times as long as a quiet one

# Begins every script in a new process that holds nothing of ours, but the libraries, which take ten seconds to import.
STARTER = """
import json, os, runpy, sys, traceback
import compressai.zoo, cv2, lightly.transforms, omegaconf, pycocotools.mask, rich.table, safetensors, timm, torch
import torchmetrics, torchvision, webdataset

for line in sys.stdin:
    words, output = json.loads(line)
    child = os.fork()
    if child == 0:
        code = 1
        os.setsid()
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT), 1)
        os.dup2(1, 2)
        os.close(0)
        sys.argv, sys.path[0] = words, os.path.dirname(words[0])
        try:
            runpy.run_path(words[0], run_name="__main__")
            code = 0
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
            print("" if isinstance(ended.code, int | None) else ended.code)
        except BaseException:
            traceback.print_exc()
        os.sys.stdout.flush()
        sys.exit(code)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Starter:
    """The process that begins scripts, from the repository's root, in an environment that holds nothing of ours."""

    def __init__(self, home: Path) -> None:
        # Not inside `home`: Ray has sockets there, whose paths are 107 characters at most.
        self.temporary = Path(tempfile.mkdtemp(prefix="bench"))
        environment = {
            "PATH": os.environ["PATH"], "HOME": str(home), "TMPDIR": str(self.temporary), "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", STARTER],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY, env=environment,
        )  # fmt: skip

    def begin(self, script: str, output: Path, *options: str) -> int:
        """Begin a script that writes to the file `output`; returns the number of its process."""
        assert self.process.stdin is not None
        command = [str(BENCHMARKS / f"{script}.py"), *options]
        self.process.stdin.write(json.dumps([command, str(output)]) + "\n")
        self.process.stdin.flush()
        return int(self._line())

    def end(self, number: int, seconds: float) -> int:
        """Its exit code, once it has ended; it and all that it began are killed after so many seconds."""
        timer = threading.Timer(seconds, os.killpg, (number, signal.SIGKILL))
        timer.start()
        try:
            return int(self._line())
        finally:
            timer.cancel()

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()


@pytest.fixture(scope="module")
def starter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Starter]:
    running = Starter(tmp_path_factory.mktemp("home"))
    yield running
    running.process.communicate(timeout=60)
    shutil.rmtree(running.temporary)


@pytest.mark.slow
@pytest.mark.parametrize(
    "script", [pytest.param(name, marks=pytest.mark.cluster if name in CLUSTER else ()) for name in SCRIPTS]
)
def test_script__runs_on_inputs_of_its_own(script: str, starter: Starter, tmp_path: Path):
    if script == "scaling" and len(os.sched_getaffinity(0)) < 2:
        pytest.skip("measures two cores")
    output = tmp_path / "output"
    code = starter.end(starter.begin(script, output, "--smoke"), SECONDS)
    printed = output.read_text()
    assert code == 0, printed[-4000:]
    assert printed.strip()
    assert not list(starter.temporary.glob("smoke*"))  # nothing is left lying


@pytest.mark.slow
def test_checkpoint__ends_when_it_is_told(starter: Starter, tmp_path: Path):
    """Of its many runs not only the one that is at work."""
    number = starter.begin("checkpoint", tmp_path / "output", "--smoke", "--saves", "100")
    end = time.monotonic() + SECONDS
    while not any(path.stat().st_size for path in starter.temporary.glob("*/with0/metrics.jsonl")):
        assert time.monotonic() < end
        time.sleep(0.05)
    begin = time.monotonic()
    os.kill(number, signal.SIGTERM)
    assert starter.end(number, SECONDS) == 128 + signal.SIGTERM, (tmp_path / "output").read_text()
    assert time.monotonic() - begin < 20


def test_modules__that_have_no_main():
    for path in BENCHMARKS.glob("*.py"):
        assert ('if __name__ == "__main__":' in path.read_text()) == (path.stem not in MODULES), path


# What documents say


def pages() -> list[Path]:
    return [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]


def commands(text: str) -> list[list[str]]:
    """The words of all commands `python tests/benchmarks/...` of a page, in code blocks or between backquotes."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in re.sub(r"\\\n", " ", block).splitlines()]
    spans = re.findall(r"`(python tests/benchmarks/[^`]+)`", re.sub(r"^```\w*\n.*?^```", "", text, flags=re.M | re.S))
    found = [shlex.split(line, comments=True) for line in [*lines, *spans]]
    return [words for words in found if words[:1] == ["python"] and words[1].startswith("tests/benchmarks/")]


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_documents__name_scripts_and_options_that_exist(page: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    text = page.read_text()
    for name in re.findall(r"tests/benchmarks/(\w+)\.py", text):
        assert name in SCRIPTS, name
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for _, script, *words in commands(text):
        parser: argparse.ArgumentParser = runpy.run_path(str(REPOSITORY / script))["create_parser"]()
        code: Any = 0
        try:
            parser.parse_args(words)
        except SystemExit as ended:  # --help
            code = ended.code
        assert code == 0, (script, words, capsys.readouterr().err)


def test_commands__are_found_in_blocks_and_in_text():
    text = (
        "See `python tests/benchmarks/a.py X\n--all`.\n\n```bash\npython tests/benchmarks/b.py --y 'a b'  # why\n```\n"
    )
    assert sorted(commands(text)) == [
        ["python", "tests/benchmarks/a.py", "X", "--all"], ["python", "tests/benchmarks/b.py", "--y", "a b"],
    ]  # fmt: skip


# What they use


def is_private(name: object) -> bool:
    return isinstance(name, str) and re.fullmatch(r"_[a-zA-Z]\w*", name) is not None


def defined(tree: ast.AST) -> set[str]:
    """Private functions, classes, attributes and variables that a module defines."""
    names: set[Any] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return {name for name in names if is_private(name)}


def used(tree: ast.AST) -> set[str]:
    """Private names that a module imports, reads from anything, or has as a string."""
    names: set[Any] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {part for alias in node.names for part in alias.name.split(".")}
        elif isinstance(node, ast.ImportFrom):
            names |= {*(node.module or "").split("."), *(alias.name for alias in node.names)}
        elif isinstance(node, ast.Attribute):
            names.add(node.attr)
        elif isinstance(node, ast.Constant):
            names.add(node.value)
    return {name for name in names if is_private(name)}


@pytest.fixture(scope="module")
def private() -> set[str]:
    """All private names that the packages define."""
    files = [path for package in PACKAGES for path in (REPOSITORY / package).rglob("*.py")]
    return set().union(*(defined(ast.parse(path.read_text())) for path in files))


@pytest.mark.parametrize("path", sorted(BENCHMARKS.glob("*.py")), ids=lambda path: path.stem)
def test_script__uses_no_private_name_of_the_packages(path: Path, private: set[str]):
    tree = ast.parse(path.read_text())
    assert not (used(tree) - defined(tree)) & private


@pytest.mark.parametrize(
    "line", ["trainer._train_step(stage, batch)", "from pretrain.trainer import _name", "patch(Trainer, '_save')"]
)
def test_private_names__are_seen(line: str, private: set[str]):
    assert used(ast.parse(line)) & (private | {"_name"})
