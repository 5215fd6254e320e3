"""Errors of the ground floor that a user can put right."""

from __future__ import annotations


class RunError(ValueError):
    """A run that cannot start or go on: one line with what, and what to do."""


class RecipeError(RunError):
    """A recipe or an override that is wrong: one line with key, value and the nearest valid one."""


class CheckpointError(RunError):
    """A checkpoint that cannot be written or read: one line with the folder and the remedy."""
