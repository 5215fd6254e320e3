"""Errors of the tasks that a user can put right."""

from __future__ import annotations


class TaskError(ValueError):
    """A task that cannot run: one line with what, and what to do."""


class StoppedError(TaskError):
    """A run that was told to stop, and saved: nothing is wrong, but there are no results yet."""
