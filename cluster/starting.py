"""How processes are started: with a variable in their environment, and faster.

A worker imports Ray, torch and our packages, some hundred thousand objects that all stay. The collector of garbage
looks through them again and again while they come, which is a seventh of the time that a lost worker keeps the others
waiting.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager


def setup_hook() -> Callable[[], None]:
    """What every process of a job runs as it starts: no collection of garbage until `resume_collection`, or for 30 s.

    A function of a function, because such ones are sent as code: a node where our packages are missing shall say so
    when it looks for them, not fail to start processes at all.
    """

    def pause_collection() -> None:
        import gc
        import threading

        gc.disable()
        timer = threading.Timer(30.0, gc.enable)
        timer.daemon = True
        timer.start()

    return pause_collection


def resume_collection() -> None:
    """Collect again, but for what was imported until now."""
    gc.freeze()
    gc.enable()


@contextmanager
def environment(name: str, value: str) -> Iterator[None]:
    """A variable of the environment has `value` while the block lasts."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
