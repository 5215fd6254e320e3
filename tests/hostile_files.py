"""Files as someone hostile would write them: a good one with a value of another type, size or place; and a watch."""

from __future__ import annotations

import copy
import json
import os
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHANGES = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

_touched: list[str] | None = None  # an audit hook stays for good: it notes while this is a list


def values(victim: Path) -> list[Any]:
    """What a field may be replaced by; `victim` is a file that is none of the reader's business."""
    nested: Any = 0
    for _ in range(300):
        nested = [nested]
    return [
        str(victim), str(victim.with_suffix("")), f"../../{victim.name}", "~/.ssh/id_rsa", f"pipe:touch {victim}", "",
        "\0", "\ud800", "a" * 5000, "${oc.env:HOME}", "???", None, True, False, 0, 1, -1, 7, 1.5, 1e308, float("nan"), 2**31, 2**63,
        10**30, [], {}, [0, 512], {"name": str(victim)}, [str(victim)], nested,
    ]  # fmt: skip


def mutated(good: Any, seed: int, victim: Path) -> bytes:
    """JSON of `good` with one to three changes, which follow from `seed`."""
    chance, document = random.Random(seed), copy.deepcopy(good)
    for _ in range(chance.randint(1, 3)):
        places = list(_places(document))
        if not places:
            break
        holder, key = chance.choice(places)
        match chance.randrange(6):
            case 0:
                del holder[key]
            case 1 if isinstance(holder, dict):
                holder[chance.choice(["path", "__class__", str(victim)])] = holder.pop(key)
            case 2 if isinstance(holder, list):
                holder.insert(0, copy.deepcopy(holder[key]))
            case _:
                holder[key] = copy.deepcopy(chance.choice(values(victim)))
    text = json.dumps(document).encode()
    return text[: chance.randrange(len(text))] if seed % 50 == 0 else text


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Each (dict or list, key or index) inside `value`."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from _places(value[key])


@contextmanager
def touched_files() -> Iterator[list[str]]:
    """Paths that this process changes, or opens for writing, while the block lasts."""
    global _touched
    if _touched is None:
        sys.addaudithook(_note)
    _touched = noted = []
    try:
        yield noted
    finally:
        _touched = []


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if _touched is None or not (event in CHANGES or (event == "open" and _is_writing(arguments[2]))):
        return
    paths = arguments[:2] if event in ("os.rename", "os.link") else arguments[:1]
    _touched.extend(os.path.abspath(os.fsdecode(path)) for path in paths if not isinstance(path, int))


def _is_writing(flags: Any) -> bool:
    return isinstance(flags, int) and bool(flags & WRITING)
