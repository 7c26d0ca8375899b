"""Values that are not finite, found before they go into a weight or a file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from inlay.errors import InlayError, MergeError
from inlay.model.adapters.registry import adapter_places

SHOWN = 3


def check_adapters_finite(
    model: nn.Module, names: Sequence[str], raised: type[InlayError] = MergeError
) -> None:
    for name in names:
        bad = list(not_finite(model, name))
        if bad:
            more = f" and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
            raise raised(
                f"adapter {name!r} holds NaN or infinite values in {', '.join(bad[:SHOWN])}{more}; "
                "training diverged: take the last good checkpoint. Nothing was changed"
            )


def not_finite(model: nn.Module, name: str) -> Iterator[str]:
    for place, params in adapter_places(model, name):
        for tensor in params.names():
            if not bool(torch.isfinite(getattr(params, tensor)).all()):
                yield f"{place}.{tensor}" if place else tensor


def check_merged_finite(name: str, base: Tensor, exact: Tensor, rounded: Tensor) -> None:
    if bool(torch.isfinite(rounded).all()):
        return
    if not bool(torch.isfinite(base).all()):
        raise MergeError(
            f"the base's own {name} holds NaN or infinite values, so that nothing can be merged "
            "into it; load a whole checkpoint"
        )
    dtype = str(rounded.dtype).removeprefix("torch.")
    most = float(torch.finfo(rounded.dtype).max)
    finite = exact[torch.isfinite(exact)].abs()
    reached = float(finite.max()) if finite.numel() else float("inf")
    raise MergeError(
        f"base and update together overflow {dtype} in {name}: a value of {reached:,.0f}, and "
        f"{dtype} holds {most:,.0f} at most. Load the model with dtype='bfloat16' or 'float32' and "
        "merge there, or keep the adapter unmerged; the model was left adapted"
    )
