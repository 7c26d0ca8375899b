"""A weight with weight methods on it: as the base of one more method, and as a layer's parameter.

The parameter is made for each pass of a layer whose own forward reads it. What autograd would keep
of it for the backward pass is computed again there instead, so that no layer holds a dense copy of
its weight between the two.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from inlay.methods.base import Params, WeightMethod
from inlay.storage.base import FrozenLinear, tensor_identity
from inlay.storage.own import ByWeight


class Composed(FrozenLinear):
    """What the next method on a layer takes for its base: `base` with `method` applied."""

    storage = "composed"

    def __init__(
        self, base: FrozenLinear, method: WeightMethod, params: Params, training: bool
    ) -> None:
        self.base, self.method, self.params, self.training = base, method, params, training

    @property
    def shape(self) -> tuple[int, int]:
        return self.base.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.base.dtype

    @property
    def device(self) -> torch.device:
        return self.base.device

    @property
    def padding(self) -> int | None:
        return self.base.padding

    @property
    def bias(self) -> Tensor | None:
        return self.method.bias(self.params, self.base.bias)

    def linear(self, x: Tensor) -> Tensor:
        return self.method.forward(self.params, x, self.base, self.training)

    def matmul(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return y if self.bias is None else y - self.bias

    def matmul_t(self, g: Tensor) -> Tensor:
        return g @ self.dequantize()

    def state(self) -> tuple[object, ...] | None:
        below = self.base.state()
        return None if below is None else (*below, *map(tensor_identity, self.params.parameters()))

    def dequantize(self, rows: Tensor | slice | None = None) -> Tensor:
        w = self.method.weight(self.params, self.base.dequantize())
        return w if rows is None else w[rows]


class AdaptedParameter(NamedTuple):
    """One parameter of a layer, and the active weight methods on it, in order of activation."""

    view: ByWeight
    pairs: Sequence[tuple[WeightMethod, Params]]

    def names(self) -> tuple[str, ...]:
        bias = self.view.bias_name
        return (self.view.parameter,) if bias is None else (self.view.parameter, bias)

    def parameters(self, wide: bool = False) -> dict[str, Tensor]:
        """Return the adapted parameters by name; `wide`: in float32 at least, for a merge."""
        w, b = self.view.matrix(), self.view.bias
        if wide:
            w = w.to(torch.promote_types(w.dtype, torch.float32))
        with torch.autocast(w.device.type, enabled=False):
            for method, p in self.pairs:
                w, b = method.weight(p, w), method.bias(p, b)
        found = {self.view.parameter: self.view.as_stored(w)}
        if b is not None and self.view.bias_name is not None:
            found[self.view.bias_name] = b
        return found


class Recomputed:
    """Stands for a tensor in what autograd keeps, and computes it again when it is asked for."""

    def __init__(self, compute: Callable[[], Tensor]) -> None:
        self.compute = compute
        self.value: Tensor | None = None
        self.kept = self.given = 0

    def part(self, of: Tensor) -> Callable[[], Tensor]:
        self.kept += 1
        shape, stride, start = of.shape, of.stride(), of.storage_offset()
        return lambda: self.whole().as_strided(shape, stride, start)

    def whole(self) -> Tensor:
        if self.value is None:
            with torch.no_grad():
                self.value = self.compute().detach()
        found = self.value
        self.given += 1
        if self.given >= self.kept:
            self.value, self.given = None, 0
        return found


@contextmanager
def recomputed_in_backward(
    found: Sequence[tuple[AdaptedParameter, dict[str, Tensor]]],
) -> Generator[None]:
    """Recompute adapted parameters in the backward pass, unless other hooks save them already."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or others_decide():
        yield
        return
    own: dict[int, Recomputed] = {}
    for changed, parameters in found:
        name = changed.view.parameter
        tensor = parameters[name]
        if tensor.requires_grad:
            own[tensor.untyped_storage()._cdata] = Recomputed(
                lambda changed=changed, name=name: changed.parameters()[name]
            )

    def pack(t: Tensor) -> Tensor | Callable[[], Tensor]:
        again = own.get(t.untyped_storage()._cdata) if t.layout == torch.strided else None
        return t if again is None else again.part(t)

    def unpack(kept: Tensor | Callable[[], Tensor]) -> Tensor:
        return kept if isinstance(kept, Tensor) else kept()

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def others_decide() -> bool:
    """Return whether saved tensors go through other hooks now; yes when it is not known."""
    autograd: Any = getattr(torch._C, "_autograd", None)  # torch tells it nowhere else
    top = getattr(autograd, "_top_saved_tensors_default_hooks", None)
    return top is None or top(False) is not None
