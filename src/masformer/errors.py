"""Errors that are the user's to mend: one line that names the value and the remedy, and an exit code."""

from __future__ import annotations


class MasformerError(Exception):
    """The base of the errors below; the command line prints the message alone and exits with `exit_code`."""

    exit_code = 3


class InputError(MasformerError, ValueError):
    """A model, a document or a setting that cannot be used as it is (exit code 3)."""


class CorruptError(MasformerError):
    """A folder that is truncated, edited or not what it says it is (exit code 4)."""

    exit_code = 4


class ResourceError(MasformerError):
    """Not enough memory, disk or another resource (exit code 5)."""

    exit_code = 5
