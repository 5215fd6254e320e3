"""Every `dicm` command in README and docs is one that there is, with options that it takes and values that are valid."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from conftest import REPOSITORY

import dicm
from downstream import finetune
from downstream.evaluation import points
from pretrain import run as pretraining

PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
# What checks the `key=value` options of a command, none of which reads a file.
RESOLVERS: dict[str, Callable[[str, list[str]], Any]] = {
    "pretrain": pretraining.resolve,
    "finetune": finetune.resolve,
    "evaluate": points.resolve,
}
PATTERN = re.compile(r"^\[|\||^[A-Z]+$|=\.\.\.")  # a form of commands, not one to be typed


def commands(text: str) -> list[list[str]]:
    """The words behind `dicm` of all commands in code blocks."""
    blocks = re.findall(r"^```(?:bash)?\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in re.sub(r"\\\n", " ", block).splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("dicm ")]


def check(words: list[str]) -> None:
    """Parse a command as the console does, without running it (typer's UsageError, our errors)."""
    command, name = typer.main.get_command(dicm.app), "dicm"
    while hasattr(command, "commands"):
        name, *words = words
        command = command.commands[name]
    given = command.make_context(name, list(words)).params
    if name == "submit":
        check(given["words"])
    elif name in RESOLVERS and not any(PATTERN.search(word) for word in words):
        recipe = given.get("recipe") or given.get("task") or given["what"]
        RESOLVERS[name](recipe, given["overrides"] or [])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages__commands_are_ones_that_there_are(page: Path):
    for words in commands(page.read_text()):
        check(words)


def test_pages__have_commands():
    assert sum(len(commands(page.read_text())) for page in PAGES) > 40


@pytest.mark.parametrize(
    "line", ["data built imagefolder a b", "export run codec --graphs", "pretrain small run=a data=b colour=red",
             "cluster submit -- finetune detection codec=c data=d run=r anchor_size=[1]"],
)  # fmt: skip
def test_check__finds_what_there_is_not(line: str):
    with pytest.raises(Exception, match=r"built|--graphs|colour|anchor_size"):
        check(line.split())
