"""The errors that users of the package can catch.

Each one also derives from the built-in error that a caller would expect, so ``except ValueError`` keeps working.
"""

from __future__ import annotations


class Mamba2HFError(Exception):
    """Base of every error that this package raises on purpose."""


class ArgumentError(Mamba2HFError, ValueError):
    """A tensor or a number handed to a function breaks its contract (shape, dtype, device or range)."""


class ConfigurationError(Mamba2HFError, ValueError):
    """A configuration field holds a value no model can be built from."""


class BackendError(Mamba2HFError, RuntimeError):
    """A backend was asked for by name and cannot serve the call."""


class CacheError(Mamba2HFError, ValueError):
    """A generation cache does not belong to this model, batch or call."""


class LogitsError(Mamba2HFError, AttributeError, KeyError):
    """Logits are read from an output that was made without them. ``hasattr`` and ``getattr`` with a default work."""

    __str__ = Exception.__str__  # a KeyError's would put the message in quotes


class ProcessError(Mamba2HFError, RuntimeError):
    """A process that others work with failed, or did not answer in time."""


class CheckpointError(Mamba2HFError, ValueError):
    """A checkpoint on disk is missing something, broken, or not of a format that can be read."""
