"""Tasks on features of the frozen codec, one module each; `task_class` finds them by name."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from downstream.errors import TaskError

if TYPE_CHECKING:
    from downstream.tasks.task import Task

# Loaded when asked for: a classification need not wait for the detectors.
TASKS = {
    "classification": "Classification",
    "detection": "Detection",
    "instance_segmentation": "InstanceSegmentation",
    "semantic_segmentation": "SemanticSegmentation",
    "anchor": "Anchor",  # a pixel codec of CompressAI's, trained by the same launcher
}


def task_class(name: str) -> type[Task[Any, Any]]:
    """The task of a name (TaskError where there is none)."""
    if name not in TASKS:
        raise TaskError(f"task={name} is unknown; use one of {', '.join(TASKS)}")
    return getattr(importlib.import_module(f"downstream.tasks.{name}"), TASKS[name])
