"""The trained tensors of one adapter at one place, and how they start."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inlay.storage.base import FrozenLinear


class Params(nn.Module):
    """The tensors of one adapter at one place: attribute access, floats stored in fp32 or wider.

    `fixed` tensors are saved but not trained; `derived` ones follow from the base and are neither.
    """

    def __init__(
        self,
        trained: Mapping[str, Tensor],
        fixed: Mapping[str, Tensor] | None = None,
        derived: Mapping[str, Tensor] | None = None,
    ):
        super().__init__()
        for name, value in trained.items():
            kept = value if isinstance(value, nn.Parameter) else nn.Parameter(value)
            self.register_parameter(name, kept)
        for name, value in (fixed or {}).items():
            self.register_buffer(name, value)
        for name, value in (derived or {}).items():
            self.register_buffer(name, value, persistent=False)

    def __getattr__(self, name: str) -> Tensor:
        return super().__getattr__(name)  # pyright: ignore[reportReturnType]

    @property
    def parts(self) -> Mapping[str, Params]:
        """The tensors for single parameters of the module, by the parameter's name."""
        return {name: part for name, part in self._modules.items() if isinstance(part, Params)}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the tensors; a cast of the model to halves leaves them in fp32."""
        return super()._apply(lambda t: not_narrowed(fn(t), t), recurse)

    def names(self) -> Iterator[str]:
        """Every stored tensor's name, trained ones first, without those of `parts`."""
        yield from self._parameters
        yield from (n for n in self._buffers if n not in self._non_persistent_buffers_set)


def not_narrowed(moved: Tensor, tensor: Tensor) -> Tensor:
    """Return the moved tensor, in fp32 where it was cast to halves."""
    if not tensor.is_floating_point() or moved.dtype.itemsize >= min(4, tensor.dtype.itemsize):
        return moved
    return tensor.to(moved.device, torch.float32)


def stored(base: FrozenLinear | Tensor, *shape: int) -> Tensor:
    """Return an empty tensor where `base` lies, in fp32 or wider: how adapters are stored."""
    dtype = torch.promote_types(base.dtype, torch.float32)
    return torch.empty(*shape, dtype=dtype, device=base.device)


def kaiming_uniform(
    base: FrozenLinear | Tensor, rows: int, columns: int, seed: torch.Generator
) -> Tensor:
    """Uniform in ±1/sqrt(columns), as nn.Linear and HF PEFT initialise A."""
    bound = columns**-0.5
    drawn = torch.empty(rows, columns).uniform_(-bound, bound, generator=seed)
    return stored(base, rows, columns).copy_(drawn)


def zeros(base: FrozenLinear | Tensor, *shape: int) -> Tensor:
    return stored(base, *shape).zero_()


def project(x: Tensor, a: Tensor, padding: int | None = None) -> Tensor:
    """`x @ a.T` in x's dtype; integer x are ids, which read columns of `a`; a: (r, in).

    The column of the id `padding` gets no gradient, as in nn.Embedding.
    """
    if x.is_floating_point():
        return F.linear(x, a.to(x.dtype))
    return F.embedding(x, a.T, padding)
