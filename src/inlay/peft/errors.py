"""Inlay's errors for HF PEFT's scripts: each is also the error that HF PEFT raises."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from inlay import errors
from inlay.peft.seam import NoMatchingPeftModuleError


class AdapterError(errors.AdapterError, ValueError):
    """An adapter's name, configuration or state does not fit."""


class TargetError(errors.TargetError, NoMatchingPeftModuleError):
    """A target matched nothing, or something that the method cannot adapt."""


class KindError(AdapterError, TypeError):
    """A question that this kind of adapter does not answer; also HF PEFT's `TypeError`."""


class NotForPromptsError(AdapterError, AttributeError):
    """A verb of layers, asked of a prompt, for which HF PEFT has no such attribute."""


class StateError(AdapterError, RuntimeError):
    """A state without a model's own keys; also the `RuntimeError` that torch raises."""


class MergeError(errors.MergeError, ValueError):
    """Merging would lose the update, or is not possible."""


@contextmanager
def as_peft_raises() -> Generator[None]:
    """Turn errors of the layers below into the `ValueError` that HF PEFT raises."""
    try:
        yield
    except errors.TargetError as error:
        raise TargetError(str(error)) from None
    except errors.CheckpointError:
        raise
    except errors.AdapterError as error:
        raise AdapterError(str(error)) from None


def refuse(options: dict[str, Any]) -> None:
    """Raise for the first option that asks for what Inlay does not have."""
    for option, given in options.items():
        if given:
            raise AdapterError(
                f"inlay.peft does not have {option}; leave it out, or use HF PEFT itself for it"
            )
