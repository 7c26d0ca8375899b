"""Every error a user can meet.

InlayError
├── UsageError            the command line or the run file is wrong
├── DataError             the data file is wrong
├── ModelError            the model cannot be found, loaded or used so
│   └── StorageError      the frozen weight cannot be held or read so
├── TargetError           a target matched nothing, or something that cannot be adapted
├── AdapterError          an adapter name, method or state does not fit the model
│   └── CheckpointError   an adapter's files are missing, corrupt or made for another base
├── MergeError            merging would lose the update, or the merged model differs
└── TrainingError         training stopped: not finite, exploding, or nothing learns

A message is one sentence or two: what was found, what was expected, where, what to do.
"""

import difflib
from collections.abc import Iterable

__all__ = [
    "AdapterError",
    "CheckpointError",
    "DataError",
    "InlayError",
    "MergeError",
    "ModelError",
    "StorageError",
    "TargetError",
    "TrainingError",
    "UsageError",
    "did_you_mean",
]


class InlayError(Exception):
    """Base of every error that is the user's to see; the command exits with 2 on it."""


class UsageError(InlayError):
    """The command line or the run file is wrong."""


class DataError(InlayError):
    """The data file is wrong; the message names file and line."""


class ModelError(InlayError):
    """The model cannot be found, loaded or used in this way."""


class StorageError(ModelError):
    """A frozen weight cannot be held or read in the storage asked for."""


class TargetError(InlayError):
    """A target matched nothing, or something that this method cannot adapt."""


class AdapterError(InlayError):
    """An adapter's name, method or state does not fit the model."""


class CheckpointError(AdapterError):
    """An adapter's files are missing, corrupt, or made for another base."""


class MergeError(InlayError):
    """Merging would lose the update, or the merged model is not the adapted one."""


class TrainingError(InlayError):
    """Training stopped: the loss is not finite, explodes, or nothing learns."""


def first_line(error: object) -> str:
    """Return the first line of an error's message, or its class's name where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `" Did you mean 'rank'?"` for the nearest known word, or an empty string."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean {near[0]!r}?" if near else ""
