"""Errors of pretraining and of the codec that a user can put right."""

from __future__ import annotations


class ConfigError(ValueError):
    """An option with an impossible value: one line with its name, the value and valid ones."""


class CodecError(ValueError):
    """A codec, or an input to it, that cannot be used: one line with what, and what to do."""


class BitstreamError(CodecError):
    """A bitstream that is damaged, of another codec, or of a newer version."""
