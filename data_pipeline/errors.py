"""Errors of the data pipeline that a user can put right."""

from __future__ import annotations


class DataError(ValueError):
    """One line: which file, what is wrong with it, and what to do."""


class SampleError(DataError):
    """A sample that cannot be used, in a shard that is sound; training reads another one in its place."""


class StoreError(DataError):
    """A store that did not answer, or not whole, in all attempts; it may again later."""

    transient = True  # a run on a cluster goes on after it
