"""transformers' table of which families hold a mixture's experts as one parameter."""

from __future__ import annotations

from typing import Any

from transformers import conversion_mapping


def family_of_experts(config: Any) -> str | None:
    """Return the family whose conversion of experts a configuration's model type has, or None."""
    kind = getattr(config, "model_type", None)
    if not isinstance(kind, str):
        return None
    table: dict[str, str] = {
        **getattr(conversion_mapping, "_MODEL_TO_CONVERSION_PATTERN", {}),
        "mixtral": "mixtral",
    }
    converts: Any = getattr(conversion_mapping, "get_checkpoint_conversion_mapping", None)
    if converts is not None and converts(kind) is None:
        return None
    return table.get(kind)
