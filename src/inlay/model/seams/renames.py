"""transformers' own table of names that a family's weights had before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import PreTrainedModel, conversion_mapping


def renaming(model: nn.Module) -> Callable[[str], str] | None:
    """Return what brings an earlier name to the one that the model has; None where nothing does."""
    table: Any = getattr(conversion_mapping, "get_model_conversion_mapping", None)
    if not isinstance(model, PreTrainedModel) or table is None:
        return None
    renames = [c for c in table(model) if type(c).__name__ == "WeightRenaming"]

    def renamed(name: str) -> str:
        for each in renames:
            name = each.rename_source_key(name)[0]
        return name

    return renamed if renames else None
