"""A faster start of worker processes.

A worker imports Ray, torch and our packages, some 300,000 objects that all stay. The collector of garbage looks through
them again and again while they come, which is a seventh of the time that a lost worker keeps the others waiting.
"""

from __future__ import annotations

import gc
import threading

PAUSE_SECONDS = 30.0


def pause_collection() -> None:
    """No collection of garbage while a process starts: until `resume_collection`, or for half a minute."""
    gc.disable()
    timer = threading.Timer(PAUSE_SECONDS, gc.enable)
    timer.daemon = True
    timer.start()


def resume_collection() -> None:
    """Collect again, but for what was imported until now."""
    gc.freeze()
    gc.enable()
