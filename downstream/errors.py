"""Errors of the tasks that a user can put right."""

from __future__ import annotations


class TaskError(ValueError):
    """A task that cannot run: one line with what, and what to do."""
