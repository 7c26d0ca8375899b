"""The base of the packed storages: products by opaque operators, moves that never cast bytes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn

from inlay.errors import StorageError
from inlay.kernels.formats import dense
from inlay.kernels.frozen import biased_linear, frozen_linear, frozen_linear_t
from inlay.storage.base import FrozenLinear, Packed
from inlay.storage.reads import as_value, asked_by_tool

CHUNK = 1 << 20
"""Weights taken at once on CPU, so that what lies between stays small and in the cache."""
CHUNK_ELSEWHERE = 1 << 26


class QuantizedLinear(nn.Module, FrozenLinear):
    """A linear layer whose frozen weight is held in packed parts.

    A subclass names its `storage`, its `bytes_per_weight` and its `tensor_names`, implements
    `quantized`, `unfilled`, `restored`, `serialized`, `parts` and `dequantized_rows`, and puts a
    `Format` under the storage's name in `kernels.formats.FORMATS`. Its file in this folder is
    enough for users to name the storage.
    """

    formats: ClassVar[dict[str, type[QuantizedLinear]]] = {}
    bytes_per_weight: ClassVar[float]
    """About the bytes of one weight, for reserving device memory."""
    tensor_names: ClassVar[tuple[str, ...]]
    """Every name that `serialized` may use; `weight` is the first."""
    saved_dense: bool = False
    """Whether a model's checkpoint holds the weight dequantised, as it is multiplied."""

    def __init_subclass__(cls, named: bool = True) -> None:
        super().__init_subclass__()
        if named and "storage" in vars(cls):
            QuantizedLinear.formats[cls.storage] = cls

    def __init__(
        self, shape: tuple[int, int], dtype: torch.dtype, bias: Tensor | None, **parts: Tensor
    ) -> None:
        """Hold `parts`, of which `weight` is a frozen parameter and the others are buffers.

        They are saved and loaded under the names of `serialized`, not under the buffers' own.
        """
        super().__init__()
        self.out_features, self.in_features = shape
        self.compute_dtype = dtype
        self._parameters["bias"] = None if bias is None else frozen_parameter(bias)
        self.hold(parts)

    @classmethod
    @abstractmethod
    def quantized(
        cls, w: Tensor, bias: Tensor | None, dtype: torch.dtype | None = None, **options: Any
    ) -> Self:
        """Return a new layer that holds `w` (out, in); products run in `dtype`, or `w`'s own."""

    @classmethod
    @abstractmethod
    def unfilled(
        cls, shape: tuple[int, int], dtype: torch.dtype, bias: Tensor | None, **options: Any
    ) -> Self:
        """Return a layer whose packed parts have a weight's sizes, and no values yet."""

    @classmethod
    @abstractmethod
    def restored(cls, tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> Self:
        """Return the layer that was serialised as these tensors; the inverse of `serialized`."""

    @abstractmethod
    def serialized(self) -> dict[str, Tensor]:
        """Return the layer's tensors under the names that bitsandbytes gives them."""

    @abstractmethod
    def parts(self) -> list[Tensor]:
        """Return the packed parts, as the registered dequantisation takes them."""

    @abstractmethod
    def dequantized_rows(self, rows: Tensor) -> Tensor:
        """Return those rows of the dense matrix in `dtype`; rows: (n,) integers."""

    def options(self) -> dict[str, Any]:
        return {}

    def bitsandbytes_options(self) -> dict[str, object]:
        """Return bitsandbytes' description of such layers in a model's configuration."""
        return {}

    def held(self) -> dict[str, Tensor]:
        own = {n: p for n, p in self._parameters.items() if n != "bias" and p is not None}
        return {**own, **cast(dict[str, Tensor], self._buffers)}

    def hold(self, parts: Mapping[str, Tensor]) -> None:
        self._buffers.clear()
        for name, part in parts.items():
            if name == "weight":
                self._parameters["weight"] = frozen_parameter(part)
            else:
                self.register_buffer(name, part)

    def hold_as_parameters(self, at_least: int) -> None:
        """Hold packed parts of at least that many bytes as frozen parameters, as FSDP asks for."""
        for name, part in list(cast(dict[str, Tensor], self._buffers).items()):
            if part.ndim and part.nbytes >= at_least:
                del self._buffers[name]
                self.register_parameter(name, frozen_parameter(part))

    @property
    def weight(self) -> Tensor:
        """The packed weight for code that handles parameters; the dense one for other code."""
        if "weight" in self._parameters and asked_by_tool():
            return self.packed_weight
        return as_value(self.turned(self.dequantize()), f"the {self.storage} weight of a layer")

    @property
    def packed_weight(self) -> nn.Parameter:
        packed = self._parameters["weight"]
        assert packed is not None
        return packed

    @property
    def shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    @property
    def dtype(self) -> torch.dtype:
        return self.compute_dtype

    @property
    def device(self) -> torch.device:
        return self.packed_weight.device

    @property
    def bias(self) -> Tensor | None:
        return self._parameters["bias"]

    def linear(self, x: Tensor) -> Tensor:
        if self.bias is None:
            return self.matmul(x)
        self.check_input(x, self.in_features)
        return biased_linear(x, self.bias, *self.packed())

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)

    def matmul(self, x: Tensor) -> Tensor:
        self.check_input(x, self.in_features)
        return frozen_linear(x, *self.packed())

    def matmul_t(self, g: Tensor) -> Tensor:
        self.check_input(g, self.out_features)
        return frozen_linear_t(g, *self.packed())

    def packed(self) -> Packed:
        return self.parts(), self.packing(self.storage), self.out_features, self.in_features

    @property
    def eight_bits(self) -> bool:
        return bool(vars(self).get("computes_in_8_bits"))

    def low_rank_linear(self, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        self.check_input(x, self.in_features)
        return super().low_rank_linear(x, a, b, scale)

    def check_input(self, x: Tensor, width: int) -> None:
        if x.shape[-1:] != (width,) or not x.is_floating_point():
            raise StorageError(
                f"the {self.storage} layer of shape {self.shape} was given {x.dtype} of shape "
                f"{tuple(x.shape)}, but multiplies floating-point rows of width {width}"
            )

    @torch.no_grad()
    def dequantize(self, rows: Tensor | slice | None = None) -> Tensor:
        if rows is None:
            return dense(self.parts(), self.storage, *self.shape, self.dtype)
        return self.dequantized_rows(torch.arange(self.out_features, device=self.device)[rows])

    def requantized(self, w: Tensor, bias: Tensor | None) -> QuantizedLinear:
        plain = QuantizedLinear.formats[self.storage]
        layer = plain.quantized(w, bias, self.dtype, **self.options())
        layer.stands_for = self.stands_for
        return layer

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, dtype={self.dtype}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move everything; cast only the compute dtype and the bias, never the packed parts."""
        parts = self.held()
        moved = {name: moved_bytes(fn, part) for name, part in parts.items()}
        self.compute_dtype = fn(torch.empty(0, dtype=self.dtype, device=self.device)).dtype
        del self._parameters["weight"]
        self._buffers.clear()
        super()._apply(fn, recurse)
        self.hold(moved)
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Tensor], prefix: str, keep_vars: bool
    ) -> None:
        del keep_vars
        held = (
            {"weight": self.turned(self.dequantize()).contiguous()}
            if self.saved_dense
            else self.serialized()
        )
        for name, tensor in held.items():
            destination[prefix + name] = tensor
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias.detach()

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Tensor],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        del local_metadata
        given = {k.removeprefix(prefix): t for k, t in state_dict.items() if k.startswith(prefix)}
        given = {k: t for k, t in given.items() if k.split(".")[0] not in self._modules}
        if "weight" not in given:
            missing_keys.extend(prefix + name for name in self.serialized())
            return
        try:
            loaded = self.restored(given, self.dtype)
            self.check_like(loaded)
        except StorageError as error:
            error_msgs.append(f"{prefix.rstrip('.') or 'the layer'}: {error}")
            return
        if strict:
            known = {*loaded.serialized(), "bias"}
            unexpected_keys.extend(prefix + k for k in given if k not in known)
        self.take(loaded)

    def check_like(self, other: QuantizedLinear) -> None:
        if other.shape != self.shape or (other.bias is None) != (self.bias is None):
            raise StorageError(
                f"the file holds a weight of shape {other.shape} {described_bias(other)}, "
                f"the model one of {self.shape} {described_bias(self)}"
            )

    def take(self, other: Self) -> None:
        """Take over the contents of `other`, on this layer's device."""
        other.to(self.device)
        self.compute_dtype = other.dtype
        self._parameters["bias"] = other._parameters["bias"]
        self.hold(other.held())


def frozen_parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach(), requires_grad=False)


def moved_bytes(fn: Callable[[Tensor], Tensor], part: Tensor) -> Tensor:
    """Apply a module-wide move to a packed part as bytes, which a cast does not change."""
    moved = fn(part.detach().contiguous().reshape(-1).view(torch.uint8))
    if moved.dtype != torch.uint8:
        raise StorageError(
            f"a packed weight cannot be cast to {moved.dtype}; use .to(dtype), which changes the "
            "dtype that products are computed in"
        )
    return moved.view(part.dtype).view(part.shape)


def described_bias(layer: FrozenLinear) -> str:
    return "without a bias" if layer.bias is None else "with a bias"


def checked_matrix(w: Tensor, storage: str) -> Tensor:
    """Return `w` contiguous, without its gradient; raise unless it is a floating-point matrix."""
    if w.ndim != 2 or not w.is_floating_point() or w.numel() == 0:
        raise StorageError(
            f"the {storage} storage holds floating-point matrices (out, in), "
            f"not {w.dtype} of shape {tuple(w.shape)}"
        )
    return w.detach().contiguous()


def checked_finite(largest: Tensor, storage: str) -> None:
    if not bool(torch.isfinite(largest).all()):
        raise StorageError(
            "the weight holds a NaN, an infinity or values too large, which the "
            f"{storage} storage cannot hold; the checkpoint is damaged or overflowed"
        )


def chunk_size(device: torch.device) -> int:
    return CHUNK if device.type == "cpu" else CHUNK_ELSEWHERE
