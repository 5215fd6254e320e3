"""Errors of the data pipeline that a user can put right."""

from __future__ import annotations


class DataError(ValueError):
    """One line: which file, what is wrong with it, and what to do."""
