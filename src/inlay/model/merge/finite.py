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
    """Raise when an adapter holds a NaN or an infinity; the sentence names the tensors."""
    for name in names:
        bad = list(not_finite(model, name))
        if bad:
            more = f" and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
            raise raised(
                f"adapter {name!r} holds NaN or infinite values in {', '.join(bad[:SHOWN])}{more}; "
                "training diverged: take the last good checkpoint. Nothing was changed"
            )


def not_finite(model: nn.Module, name: str) -> Iterator[str]:
    """Yield the tensors of an adapter that are not finite, by the modules they are on."""
    for place, params in adapter_places(model, name):
        for tensor in params.names():
            if not bool(torch.isfinite(getattr(params, tensor)).all()):
                yield f"{place}.{tensor}" if place else tensor


def check_merged_finite(name: str, base: Tensor, wanted: Tensor, got: Tensor) -> None:
    """Raise when a merged weight is not finite: as the base already is, or by overflow."""
    if bool(torch.isfinite(got).all()):
        return
    if not bool(torch.isfinite(base).all()):
        raise MergeError(
            f"the base's own {name} holds NaN or infinite values, so that nothing can be merged "
            "into it; load a whole checkpoint"
        )
    dtype = str(got.dtype).removeprefix("torch.")
    most = float(torch.finfo(got.dtype).max)
    finite = wanted[torch.isfinite(wanted)].abs()
    reached = float(finite.max()) if finite.numel() else float("inf")
    raise MergeError(
        f"base and update together overflow {dtype} in {name}: a value of {reached:,.0f}, and "
        f"{dtype} holds {most:,.0f} at most. Load the model with dtype='bfloat16' or 'float32' and "
        "merge there, or keep the adapter apart; the model was left adapted"
    )
