"""The last steps of a product: terms that are added to its sums before they are rounded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from inlay.kernels.scratch import cast


class LowRank(NamedTuple):
    """`scale * left @ right`; left: (n, r), right: (r, width)."""

    left: Tensor
    right: Tensor
    scale: float


@dataclass(frozen=True, slots=True)
class Epilogue:
    """`y + term + bias`, then rounded to `dtype`; y: (n, width), a product."""

    dtype: torch.dtype
    term: LowRank | None = None
    bias: Tensor | None = None
    """(width,)."""

    @property
    def without_bias(self) -> Epilogue:
        return self if self.bias is None else Epilogue(self.dtype, self.term)

    def bias_in(self, dtype: torch.dtype) -> Tensor | None:
        return None if self.bias is None else cast(self.bias, dtype)

    def applied(self, y: Tensor) -> Tensor:
        """Apply the epilogue to y, which is overwritten."""
        if self.term is not None:
            left, right = cast(self.term.left, y.dtype), cast(self.term.right, y.dtype)
            y.addmm_(left, right, alpha=self.term.scale)
        if self.bias is not None:
            y = cast(y, torch.promote_types(y.dtype, self.dtype))
            y += self.bias
        return cast(y, self.dtype)
