"""Commands that may become jobs, checked on the machine that submits them, before anything is sent.

A job's working directory is a copy of the code on one node, which is thrown away: what it reads must be packed with it
or lie on shared storage, and what it writes must not be relative.
"""

from __future__ import annotations

import posixpath
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import RunError
from cluster.packing import holds
from cluster.recipes import refuse_credentials

COMMANDS = ("pretrain", "finetune", "export")
# Options of any recipe that name files or folders: what a job reads, what it leaves behind, what its nodes keep.
READ = ("data", "codec", "init", "teacher", "channels", "anchor_weights", "latents_weights")
WRITTEN = ("checkpoints", "cache_folder")
KEPT_ON_A_NODE = ("shard_cache",)
ZOO = "zoo"  # weights that the libraries fetch: no path
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(?:@\w[\w./-]*)?")

Resolver = Callable[[str, list[str]], Any]


@dataclass(frozen=True)
class Command:
    """A dicm command that is to run as a job.

    Attributes:
        words: the command and its arguments.
        run: the folder that it writes (pretrain, finetune) or reads (export).
    """

    words: tuple[str, ...]
    run: str


def check_command(words: list[str], tree: Path, files: list[Path], resolver: Resolver | None = None) -> Command:
    """The command `words`, if a job can run it; nothing is sent.

    Args:
        tree, files: what the job takes along, see `list_files`.
        resolver: makes a config of a recipe's name and its overrides, and raises where they are wrong.

    Raises:
        RunError: no command for jobs, or a path that would be lost with the job or is not there for it.
    """
    refuse_credentials(words)
    if not words or words[0] not in COMMANDS:
        given = f"{words[0]!r} is no command for a job" if words else "no command"
        raise RunError(f"{given}; submit one of {', '.join(COMMANDS)}, for example: pretrain small data=... run=...")
    name, arguments = words[0], words[1:]
    if name == "export":
        folders = [word for word in arguments if not word.startswith("-")]
        if len(folders) != 2:
            raise RunError(f"export takes two folders, RUN and DIR, this is {shlex.join(arguments) or 'nothing'}")
        for key, folder in zip(("RUN", "DIR"), folders, strict=True):
            _check_shared(key, folder)
        return Command(tuple(words), normal(folders[0]))
    if not arguments:
        raise RunError(f"{name} of what? for example: {name} small data=... run=...")
    recipe = _packed_recipe(arguments[0], tree, files)
    values = _values(arguments[0], arguments[1:], resolver)
    _check_shared("run", values.get("run"))
    for key in WRITTEN:
        if values.get(key) and not (key == "checkpoints" and "://" in str(values[key])):
            _check_shared(key, values[key])
    for key in KEPT_ON_A_NODE:
        if (value := values.get(key)) and not str(value).startswith("/"):
            raise RunError(
                f"{key}={value}: a job works in a copy of the code that is thrown away; name a folder that each node "
                f"keeps, {key}=/..."
            )
    for key in READ:
        _check_there(key, values.get(key), files)
    return Command((name, recipe, *arguments[1:]), normal(str(values["run"])))


def normal(path: str) -> str:
    """A path without what does not change it: one run has one name."""
    return re.sub(
        "^//+", "/", posixpath.normpath(path)
    )  # POSIX leaves two slashes a meaning, which Linux does not give


def _values(recipe: str, overrides: list[str], resolver: Resolver | None) -> dict[str, Any]:
    if resolver is not None:
        return dict(vars(resolver(recipe, overrides)))
    return {key: value for key, _, value in (override.partition("=") for override in overrides)}


def _packed_recipe(recipe: str, tree: Path, files: list[Path]) -> str:
    """The recipe as the job finds it: a name, or a path in the package."""
    path = Path(recipe)
    if path.suffix not in (".yaml", ".yml"):
        return recipe
    full = path if path.is_absolute() else tree / path
    if full.resolve().is_relative_to(tree.resolve()):
        inside = full.resolve().relative_to(tree.resolve())
        if holds(files, inside.as_posix()):
            return inside.as_posix()
    raise RunError(
        f"recipe {recipe}: not among the files that the job takes along; put it into {tree.resolve()}, where git does "
        "not ignore it"
    )


def _check_shared(key: str, value: Any) -> None:
    if value is None or not str(value).startswith("/"):
        shown = f"{key}={value}" if value else key
        raise RunError(
            f"{shown}: a job works in a copy of the code that is thrown away; name a folder on storage that all nodes "
            f"share, {key}=/shared/..."
        )


def _check_there(key: str, value: Any, files: list[Path]) -> None:
    """RunError for a relative path that is not packed; a hub id is no path."""
    if not isinstance(value, str) or value.startswith("/") or "://" in value or holds(files, normal(value)):
        return  # in a recipe of pretraining `codec` is no path
    if key in ("codec", "init") and HUB_ID.fullmatch(value) and not Path(value).exists():
        return
    if value == ZOO:
        return
    raise RunError(
        f"{key}={value}: not among the files that the job takes along; name a folder on storage that all nodes share, "
        f"{key}=/shared/...{', or a URL' if key == 'data' else ''}"
    )
