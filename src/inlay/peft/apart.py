"""Two adapters at once: each must have its tensors to itself."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from inlay.methods.tokens import tokens_of
from inlay.model.adapters.places import module_at
from inlay.model.adapters.registry import adapter_places
from inlay.peft.errors import AdapterError


def check_apart(model: nn.Module, names: Sequence[str]) -> None:
    """Raise when two adapters have copies of one parameter, or rows of one token.

    Only one of them could act.

    Raises:
        AdapterError: they have.
    """
    owners: dict[tuple[str, str], str] = {}
    for name in names:
        for place, params in adapter_places(model, name):
            module, parameter = module_at(model, place)
            own = {} if parameter else module._parameters
            copied = set(params._parameters) & set(own)
            rows = {f"token {token}" for token in tokens_of(params, "token_rows")}
            for what in sorted(copied | rows):
                other = owners.setdefault((place, what), name)
                if other != name:
                    kind = "TrainableTokensWrapper" if what in rows else "ModulesToSaveWrapper"
                    raise AdapterError(
                        f"Only one adapter can be set at a time for {kind}: {other!r} and "
                        f"{name!r} each train {what} of {place}; name one of them"
                    )
