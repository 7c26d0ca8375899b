"""int8 per row: `W[i, j] = q[i, j] * absmax_i / 127`, in bitsandbytes' tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from inlay.errors import StorageError
from inlay.kernels import native
from inlay.kernels.formats import FORMATS, Format, dense
from inlay.storage.quantized import QuantizedLinear, checked_finite, checked_matrix, chunk_size

ROW_FORMAT = 0
"""bitsandbytes' `weight_format` for weights that lie row by row."""


class Int8Linear(QuantizedLinear):
    """A linear layer held in int8 with one absmax a row (`SCB`): 8 bits a weight."""

    storage = "int8"
    bytes_per_weight = 1.0
    tensor_names = ("weight", "SCB", "weight_format")
    SCB: Tensor

    @classmethod
    def quantized(
        cls, w: Tensor, bias: Tensor | None, dtype: torch.dtype | None = None, **options: Any
    ) -> Self:
        del options
        full = checked_matrix(w, cls.storage)
        rows, columns = full.shape
        q = torch.empty(rows, columns, dtype=torch.int8, device=w.device)
        absmax = torch.empty(rows, device=w.device)
        step = max(1, chunk_size(w.device) // columns)
        for part in (slice(start, start + step) for start in range(0, rows, step)):
            q[part], absmax[part] = native.int8_quantize(full[part])
        checked_finite(absmax * 127.0, cls.storage)  # the largest product in dequantising
        return cls((rows, columns), dtype or w.dtype, bias, weight=q, SCB=absmax)

    @classmethod
    def unfilled(
        cls, shape: tuple[int, int], dtype: torch.dtype, bias: Tensor | None, **options: Any
    ) -> Self:
        del options
        packed = torch.empty(*shape, dtype=torch.int8)
        return cls(shape, dtype, bias, weight=packed, SCB=torch.empty(shape[0]))

    @classmethod
    def restored(cls, tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> Self:
        weight, absmax = tensors["weight"], tensors.get("SCB")
        if weight.dtype != torch.int8 or weight.ndim != 2 or absmax is None:
            raise StorageError(
                f"the weight is {weight.dtype} of shape {tuple(weight.shape)}, "
                f"{'with' if absmax is not None else 'without'} SCB; the int8 storage reads an "
                "int8 matrix and its rows' absmax, SCB"
            )
        rows, columns = weight.shape
        layout = tensors.get("weight_format")
        if layout is not None and int(layout) != ROW_FORMAT:
            raise StorageError(
                f"the int8 weight lies in format {int(layout)}; only {ROW_FORMAT}, row by row, "
                "can be read"
            )
        if absmax.shape != (rows,):
            raise StorageError(f"SCB has shape {tuple(absmax.shape)}, the weight {rows} rows")
        compute = dtype or torch.float16
        return cls((rows, columns), compute, tensors.get("bias"), weight=weight, SCB=absmax.float())

    def serialized(self) -> dict[str, Tensor]:
        layout = torch.tensor(ROW_FORMAT, dtype=torch.uint8)
        return {"weight": self.packed_weight.detach(), "SCB": self.SCB, "weight_format": layout}

    def parts(self) -> list[Tensor]:
        return [self.packed_weight, self.SCB]

    def bitsandbytes_options(self) -> dict[str, object]:
        return {"load_in_4bit": False, "load_in_8bit": True}

    def dequantized_rows(self, rows: Tensor) -> Tensor:
        picked = [self.packed_weight[rows], self.SCB[rows]]
        return dense(picked, self.storage, rows.numel(), self.in_features, self.dtype)


def dequantized(parts: Sequence[Tensor], out: Tensor, first: int) -> None:
    """Write the dense matrix's rows from `first` on into `out`, each weight rounded once."""
    q, absmax = parts
    step = max(1, chunk_size(q.device) // out.shape[1])
    for start in range(0, out.shape[0], step):
        rows = slice(first + start, min(first + start + step, first + out.shape[0]))
        native.int8_dequantize(q[rows], absmax[rows], out[start : start + step])


def int8_rows(
    parts: Sequence[Tensor], first: int, count: int, columns: int
) -> tuple[Tensor, Tensor]:
    del columns
    rows = slice(first, first + count)
    return parts[0][rows], parts[1][rows] / 127


FORMATS[Int8Linear.storage] = Format(
    dequantized,
    lambda x, parts, width, transposed, epilogue, dtype: native.int8_product(
        x, parts[0], parts[1], transposed, epilogue, dtype
    ),
    product_on_cpu=lambda dtype, columns: columns % native.STRIP == 0,
    int8_rows=int8_rows,
)
