"""What is done to the sums of a product before they are rounded."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from inlay.kernels.scratch import cast


@dataclass(frozen=True, slots=True)
class Epilogue:
    """`y + scale * left @ right + bias`, then rounded to `dtype`; y: (n, width), a product."""

    dtype: torch.dtype
    left: Tensor | None = None
    """(n, r), in the dtype of the product."""
    right: Tensor | None = None
    """(r, width), in the dtype of the product."""
    scale: float = 1.0
    bias: Tensor | None = None
    """(width,)."""

    def applied(self, y: Tensor) -> Tensor:
        """Return what becomes of y, which is overwritten."""
        if self.left is not None and self.right is not None:
            y.addmm_(self.left, self.right, alpha=self.scale)
        if self.bias is not None:
            y = cast(y, torch.promote_types(y.dtype, self.dtype))
            y += self.bias
        return cast(y, self.dtype)
