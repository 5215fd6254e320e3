"""Command lines as people read them, in docs and manifests, held against the commands that there are."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import typer


def commands_in(document: Path) -> list[list[str]]:
    """The shell commands of a document's code blocks, each as its words."""
    blocks = re.findall(r"```bash\n(.*?)```", document.read_text(), re.DOTALL)
    return [shlex.split(line, comments=True) for block in blocks for line in block.splitlines() if line.strip()]


def without_assignments(words: list[str]) -> list[str]:
    """`A=1 B=2 ray start` -> `ray start`."""
    while words and re.fullmatch(r"\w+=.*", words[0]):
        words = words[1:]
    return words


def check_command_line(words: list[str]) -> None:
    """Fail unless `dicm` or `ray`, the first of `words`, takes the others; recipes and options are resolved too."""
    if words[0] == "ray":
        from ray.scripts.scripts import cli

        _parse(cli, words[1:])
        return
    import dicm

    assert words[0] == "dicm", words
    name, values = _parse(typer.main.get_command(dicm.app), words[1:])
    if name == "submit":
        check_command_line(["dicm", *values["words"]])
    elif name == "pretrain":
        from pretrain.run import resolve

        resolve(values["recipe"], list(values["overrides"]))
    elif name == "finetune":
        from downstream.finetune import resolve as resolve_task

        resolve_task(values["task"], list(values["overrides"]))


def _parse(command: Any, words: list[str]) -> tuple[str, dict[str, Any]]:
    """Name and values of the command at the end of a path of groups; raises what the parser raises."""
    name = ""
    while hasattr(command, "commands"):
        name, *words = words
        command = command.commands[name]
    return name, command.make_context(name, words).params
