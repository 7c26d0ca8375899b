"""NF4: 4 bits a weight in blocks of 64, byte for byte as bitsandbytes holds them.

Weights run row by row, blocks across rows; the even one of a pair is the high nibble. A block
holds indices into the 16 quantiles of a normal distribution, times its largest magnitude
(absmax). With double quantisation the absmax are 8-bit codes themselves, in blocks of 256.
Paper: QLoRA, arXiv 2305.14314.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from inlay.errors import StorageError
from inlay.kernels import native
from inlay.kernels.epilogue import Epilogue
from inlay.kernels.formats import FORMATS, Format
from inlay.kernels.gpu import runs_on
from inlay.storage.nf4_blocks import (
    BLOCK,
    NESTED_BLOCK,
    QUANTILES,
    block_scales,
    dequantized,
    nested,
    quantiles,
    quantized_blocks,
)
from inlay.storage.quantized import QuantizedLinear, checked_finite, checked_matrix

STATE = "weight.quant_state.bitsandbytes__nf4"
DTYPES = ("bfloat16", "float16", "float32", "float64")


class NF4Linear(QuantizedLinear):
    """A linear layer held in NF4: 4.5 bits a weight, 4.127 with double quantisation."""

    storage = "nf4"
    bytes_per_weight = 0.5
    tensor_names = (
        "weight",
        "weight.absmax",
        "weight.quant_map",
        "weight.nested_absmax",
        "weight.nested_quant_map",
        STATE,
    )
    absmax: Tensor
    nested_absmax: Tensor
    nested_quant_map: Tensor
    nested_offset: Tensor

    @property
    def double_quant(self) -> bool:
        return "nested_absmax" in self.held()

    @classmethod
    def quantized(
        cls,
        w: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype | None = None,
        *,
        double_quant: bool = True,
        **options: Any,
    ) -> Self:
        del options
        packed, absmax = quantized_blocks(checked_matrix(w, cls.storage))
        checked_finite(absmax, cls.storage)
        parts = nested(absmax) if double_quant else {"absmax": absmax}
        checked_finite(parts.get("nested_offset", absmax), cls.storage)
        rows, columns = w.shape
        return cls((rows, columns), dtype or w.dtype, bias, weight=packed, **parts)

    @classmethod
    def unfilled(
        cls,
        shape: tuple[int, int],
        dtype: torch.dtype,
        bias: Tensor | None,
        *,
        double_quant: bool = True,
        **options: Any,
    ) -> Self:
        del options
        size = shape[0] * shape[1]
        blocks = -(-size // BLOCK)
        packed = torch.empty((size + 1) // 2, 1, dtype=torch.uint8)
        if not double_quant:
            return cls(shape, dtype, bias, weight=packed, absmax=torch.empty(blocks))
        return cls(
            shape,
            dtype,
            bias,
            weight=packed,
            absmax=torch.empty(blocks, dtype=torch.uint8),
            nested_absmax=torch.empty(-(-blocks // NESTED_BLOCK)),
            nested_quant_map=torch.empty(256),
            nested_offset=torch.empty(()),
        )

    @classmethod
    def restored(cls, tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> Self:
        del dtype
        if STATE not in tensors:
            raise StorageError(
                f"there is no {STATE}, which says the shape of an NF4 weight; the checkpoint is "
                "not bitsandbytes NF4"
            )
        state = read_state(tensors[STATE])
        rows, columns = state["shape"]
        parts = {"absmax": tensors.get("weight.absmax")}
        nested_offset = state.get("nested_offset")
        if nested_offset is not None:
            parts["nested_absmax"] = tensors.get("weight.nested_absmax")
            parts["nested_quant_map"] = tensors.get("weight.nested_quant_map")
            parts["nested_offset"] = torch.tensor(
                float(nested_offset), device=tensors[STATE].device
            )
        packed = as_bytes(tensors["weight"])
        check_sizes(rows * columns, packed, parts, tensors.get("weight.quant_map"))
        whole = {name: part for name, part in parts.items() if part is not None}
        if (whole["absmax"].dtype == torch.uint8) != (nested_offset is not None):
            raise StorageError(
                f"the NF4 weight's absmax is {whole['absmax'].dtype}, but its state says that it "
                f"is {'' if nested_offset is not None else 'not '}quantised itself"
            )
        compute = getattr(torch, state["dtype"])
        return cls((rows, columns), compute, tensors.get("bias"), weight=packed, **whole)

    def serialized(self) -> dict[str, Tensor]:
        state: dict[str, object] = {
            "quant_type": "nf4",
            "blocksize": BLOCK,
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": self.shape,
        }
        tensors = {
            "weight": self.packed_weight.detach(),
            "weight.absmax": self.absmax,
            "weight.quant_map": quantiles(self.device).clone(),
        }
        if self.double_quant:
            tensors["weight.nested_absmax"] = self.nested_absmax
            tensors["weight.nested_quant_map"] = self.nested_quant_map
            state["nested_blocksize"] = NESTED_BLOCK
            state["nested_dtype"] = "float32"
            state["nested_offset"] = self.nested_offset.item()
        text = json.dumps(state).encode()
        return {**tensors, STATE: torch.tensor(list(text), dtype=torch.uint8)}

    def parts(self) -> list[Tensor]:
        if not self.double_quant:
            return [self.packed_weight, self.absmax]
        nested = [self.nested_absmax, self.nested_quant_map, self.nested_offset]
        return [self.packed_weight, self.absmax, *nested]

    def options(self) -> dict[str, Any]:
        return {"double_quant": self.double_quant}

    def bitsandbytes_options(self) -> dict[str, object]:
        return {
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": self.double_quant,
            "bnb_4bit_compute_dtype": str(self.dtype).removeprefix("torch."),
            "bnb_4bit_quant_storage": "uint8",
        }

    def dequantized_rows(self, rows: Tensor) -> Tensor:
        columns = torch.arange(self.in_features, device=self.device)
        places = rows[:, None] * self.in_features + columns
        pairs = self.packed_weight.reshape(-1)[places // 2]
        indices = torch.where(places % 2 == 0, pairs >> 4, pairs & 15)
        scales = block_scales(self.parts()[1:])[places // BLOCK]
        return (quantiles(self.device)[indices.long()] * scales).to(self.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, double_quant={self.double_quant}"


def as_bytes(packed: Tensor) -> Tensor:
    """Return a packed weight as uint8 (n, 1), whatever dtype it was stored as."""
    return packed.contiguous().view(-1).view(torch.uint8).unsqueeze(1)


def read_state(tensor: Tensor) -> dict[str, Any]:
    try:
        state = json.loads(bytes(tensor.cpu().tolist()))
        shape, dtype = state["shape"], state["dtype"]
        kind, block = state["quant_type"], state["blocksize"]
        nested_block = state.get("nested_blocksize", NESTED_BLOCK)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StorageError(f"{STATE} is damaged ({error}); fetch the checkpoint again") from error
    if (kind, block, nested_block) != ("nf4", BLOCK, NESTED_BLOCK):
        raise StorageError(
            f"the weight is {kind!r} in blocks of {block!r} and {nested_block!r}; the nf4 storage "
            f"reads 'nf4' in blocks of {BLOCK} and {NESTED_BLOCK}"
        )
    if not isinstance(shape, list) or len(shape) != 2 or dtype not in DTYPES:
        raise StorageError(f"the NF4 weight's shape {shape!r} or dtype {dtype!r} is not a matrix's")
    return state


def check_sizes(
    size: int, packed: Tensor, parts: Mapping[str, Tensor | None], quant_map: Tensor | None
) -> None:
    blocks = -(-size // BLOCK)
    expected = {
        "absmax": blocks,
        "nested_absmax": -(-blocks // NESTED_BLOCK),
        "nested_quant_map": 256,
        "nested_offset": 1,
    }
    found = {name: None if part is None else part.numel() for name, part in parts.items()}
    wrong = [name for name, count in found.items() if count != expected[name]]
    if packed.numel() != (size + 1) // 2 or wrong:
        raise StorageError(
            f"the NF4 tensors do not fit a weight of {size} elements: {packed.numel()} bytes, "
            + ", ".join(f"{name} {count}" for name, count in found.items())
        )
    if quant_map is not None and not torch.equal(quant_map.cpu(), torch.tensor(QUANTILES)):
        raise StorageError("the weight's quant_map is not NF4's sixteen values")


def product(
    x: Tensor,
    parts: Sequence[Tensor],
    width: int,
    transposed: bool,
    epilogue: Epilogue,
    dtype: torch.dtype,
) -> Tensor | None:
    """Return `x @ W.T`, or `x @ W`, in one pass; on a GPU None for `x @ W` and for many rows."""
    if not runs_on(x.device):
        return native.nf4_product(x, parts, width, transposed, epilogue, dtype)
    from inlay.kernels.gpu import nf4

    if not transposed or not nf4.multiplies(x):
        return None
    return epilogue.applied(nf4.matmul(x, parts, quantiles(x.device), width))


def int8_rows(
    parts: Sequence[Tensor], first: int, count: int, columns: int
) -> tuple[Tensor, Tensor] | None:
    """Return rows as int8 and their scales, straight from the codes, by C; None without it."""
    q = torch.empty(count, columns, dtype=torch.int8)
    scales = torch.empty(count)
    return (q, scales) if native.nf4_to_int8(parts, q, scales, first) else None


FORMATS[NF4Linear.storage] = Format(
    dequantized,
    product,
    product_on_cpu=lambda dtype, columns: columns % BLOCK == 0,
    int8_rows=int8_rows,
    fp8_values=quantiles,
)
