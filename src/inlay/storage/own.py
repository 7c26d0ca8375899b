"""Layers that keep their own forward: it runs on the adapted weight, whatever it computes.

A subclass of `nn.Linear` may scale, cast or gate its product. Where a trial shows that it computes
the plain product, it is treated as the plain layer; an embedding that scales its rows likewise.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.utils._python_dispatch import _disable_current_modes
from transformers.pytorch_utils import Conv1D

from inlay.errors import StorageError
from inlay.storage.base import FrozenLinear, Kind, Packed
from inlay.storage.dense import DenseEmbedding, DenseView

READ_ELSEWHERE: tuple[type[nn.Module], ...] = (NonDynamicallyQuantizableLinear,)
"""Layers whose weight is read outside their forward: an attention module's output projection."""
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
UNPACKED = (nn.Parameter, FakeTensor)
"""Types of a parameter that no library has packed; a plan's parameters are FakeTensors."""
TRIED_ROWS = 64
"""The most rows of a weight that a trial makes."""
TOLERANCE = 1e-5
"""Accepted difference of a product in float32, as a share of its largest value."""


class ByWeight(DenseView):
    """A dense parameter of a layer whose own forward runs on the adapted weight."""

    by_weight = True
    linear_in_weight = False

    def __init__(self, layer: nn.Module, parameter: str = "weight", bias: str | None = "bias"):
        super().__init__(layer)
        self.parameter, self.bias_name = parameter, bias

    @property
    def weight(self) -> Tensor:
        return stored_parameter(self.layer, self.parameter)

    @property
    def bias(self) -> Tensor | None:
        name = self.bias_name
        held = None if name is None else self.layer._parameters.get(name)
        return None if held is None or name is None else stored_parameter(self.layer, name)

    def as_stored(self, w: Tensor) -> Tensor:
        return self.turned(w)

    def packed(self) -> Packed | None:
        return None

    @property
    def eight_bits(self) -> bool:
        return False

    def matmul(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix()) if x.is_floating_point() else F.embedding(x, self.weight)

    linear = FrozenLinear.linear

    def empty(self) -> nn.Module:
        raise StorageError(
            f"a {type(self.layer).__name__} computes in its own way, so that no other layer can "
            "take its place"
        )


class OwnLinear(ByWeight):
    """A subclass of `nn.Linear` that computes something else than its product."""


class OwnConv1D(ByWeight):
    """A subclass of transformers' `Conv1D` that computes something else than its product."""

    stands_for = "conv1d"


class OwnEmbedding(ByWeight):
    """A subclass of `nn.Embedding` that gives something else than its rows."""

    stands_for = "embedding"


class ScaledEmbedding(DenseEmbedding):
    """A subclass of `nn.Embedding` that gives its rows times a number."""

    def finished(self, y: Tensor) -> Tensor:
        factor = self.scale(y.dtype)
        return y if factor == 1.0 else y * factor

    def scale(self, dtype: torch.dtype) -> float:
        """Return the number in this dtype, as the layer's own forward rounds it."""
        factor = embedding_factor(self.layer, own_class(self.layer), dtype)
        return 1.0 if factor is None else factor


def own_class(module: nn.Module) -> type[nn.Module]:
    """Return a layer's class, before it was changed in place."""
    found = type(module)
    while "original" in vars(found):
        found = vars(found)["original"]
    return found


def stored_parameter(layer: nn.Module, name: str) -> Tensor:
    """Return a parameter without weight methods; a trained copy replaces its original."""
    read: Callable[[str], Tensor] | None = getattr(layer, "stored_parameter", None)
    held = layer._parameters[name] if read is None else read(name)
    assert held is not None
    return held


def own_kind(module: nn.Module) -> Kind | None:
    if not holds_floats(module, "weight"):
        return None
    if isinstance(module, nn.Embedding):
        return None if module.max_norm is not None else "embedding"
    if isinstance(module, Conv1D):
        return "conv1d"
    return "linear" if isinstance(module, nn.Linear) else None


def own_view(module: nn.Module) -> DenseView | None:
    match own_kind(module):
        case "linear":
            return OwnLinear(module)
        case "conv1d":
            return OwnConv1D(module)
        case "embedding":
            dtype = stored_parameter(module, "weight").dtype
            scaled = embedding_factor(module, own_class(module), dtype) is not None
            return ScaledEmbedding(module) if scaled else OwnEmbedding(module, bias=None)
        case None:
            return None


def holds_floats(module: nn.Module, name: str) -> bool:
    held = module._parameters.get(name)
    return held is not None and type(held) in UNPACKED and held.dtype in FLOATS


def is_plain_linear(module: nn.Module) -> bool:
    if not isinstance(module, nn.Linear) or not holds_floats(module, "weight"):
        return False
    cls = own_class(module)
    if issubclass(cls, READ_ELSEWHERE):
        return False
    return bool(tried(module, cls, "linear", linear_is_plain))


def gives_product(module: nn.Module) -> bool:
    """Return whether a subclass gives one tensor of its product's shape, whatever is in it."""
    if not isinstance(module, nn.Linear | Conv1D) or not holds_floats(module, "weight"):
        return False
    return bool(tried(module, own_class(module), "shape", shape_is_products))


def embedding_factor(module: nn.Module, cls: type[nn.Module], dtype: torch.dtype) -> float | None:
    """Return the factor by which an embedding scales its rows; None where it does more."""
    return tried(module, cls, f"embedding in {dtype}", lambda m, c: factor_of_rows(m, c, dtype))


Tried = dict[str, Any]
BY_MODULE: WeakKeyDictionary[nn.Module, Tried] = WeakKeyDictionary()
BY_CLASS: dict[tuple[Any, ...], Any] = {}
"""Results of trials: by module, and by all that a result depends on."""


def tried(module: nn.Module, cls: type[nn.Module], what: str, trial: Callable[..., Any]) -> Any:
    """Return what a trial of a module shows, made once for modules alike.

    It is made again where a buffer changed, which a forward may multiply by; not while compiling.
    """
    known = BY_MODULE.setdefault(module, {})
    before, found = known.get(what, (None, None))
    if before is not None and torch.compiler.is_compiling():
        return found
    state = state_of_buffers(module)
    if before != state:
        key = signature(module, cls, what)
        if key is None or key not in BY_CLASS:
            with torch.no_grad(), _disable_current_modes():
                found = trial(module, cls)
            if key is not None:
                BY_CLASS[key] = found
        else:
            found = BY_CLASS[key]
        known[what] = state, found
    return found


def state_of_buffers(module: nn.Module) -> tuple[tuple[int, int], ...]:
    buffers = [b for b in module._buffers.values() if b is not None]
    return tuple((id(b), 0 if b.is_inference() else b._version) for b in buffers)


def signature(module: nn.Module, cls: type[nn.Module], what: str) -> tuple[Any, ...] | None:
    """Return all that a trial's result depends on; None where the module's values may matter."""
    if set(module._parameters) - {"weight", "bias"} or module._buffers:
        return None
    if any(name != "adapters" for name in module._modules):
        return None
    own = {n: v for n, v in vars(module).items() if not n.startswith("_") and n != "training"}
    plain = {n: v for n, v in own.items() if isinstance(v, int | float | str | bool | None)}
    known = {"methods", "active", "base", "part_methods", "part_views", "reads_as"}
    if set(own) - set(plain) - known:
        return None
    weight = module._parameters["weight"]
    assert weight is not None
    biased = module._parameters.get("bias") is not None
    return cls, what, tuple(weight.shape), biased, tuple(sorted(plain.items(), key=str))


def linear_is_plain(module: nn.Module, cls: type[nn.Module]) -> bool:
    weight, bias = module._parameters["weight"], module._parameters.get("bias")
    assert weight is not None
    rows, columns = min(TRIED_ROWS, weight.shape[0]), weight.shape[1]
    seed = torch.Generator().manual_seed(0)
    w, x = torch.randn(rows, columns, generator=seed), torch.randn(2, 3, columns, generator=seed)
    b = None if bias is None else torch.randn(rows, generator=seed)
    expected = F.linear(x, w, b)
    found = [run_on(module, cls, mode, {"weight": w, "bias": b}, x) for mode in (False, True)]
    return all(agrees(y, expected) for y in found)


def shape_is_products(module: nn.Module, cls: type[nn.Module]) -> bool:
    """Try a subclass of a linear layer on its own number of inputs."""
    weight, bias = module._parameters["weight"], module._parameters.get("bias")
    assert weight is not None
    shape = weight.shape if isinstance(module, nn.Linear) else weight.shape[::-1]
    stored = torch.zeros(weight.shape)
    b = None if bias is None else torch.zeros(bias.shape)
    y = run_on(module, cls, False, {"weight": stored, "bias": b}, torch.zeros(2, 3, shape[1]))
    return isinstance(y, Tensor) and y.shape == (2, 3, shape[0])


def factor_of_rows(module: nn.Module, cls: type[nn.Module], dtype: torch.dtype) -> float | None:
    """Try a subclass of `nn.Embedding` on random rows, then on ones in its own dtype."""
    weight = module._parameters["weight"]
    assert weight is not None
    padding: int | None = getattr(module, "padding_idx", None)
    count = max(8, -1 if padding is None else padding + 1)
    if (padding is not None and padding < 0) or count > weight.shape[0] + 8:
        return None
    seed = torch.Generator().manual_seed(0)
    w = torch.randn(count, weight.shape[1], generator=seed)
    ids = torch.tensor([[i for i in range(8) if i != padding][:6]]).view(2, 3)
    ones = torch.ones(count, weight.shape[1], dtype=dtype)
    y = run_on(module, cls, False, {"weight": ones}, ids)
    if not isinstance(y, Tensor) or y.shape != (2, 3, weight.shape[1]) or y.dtype != dtype:
        return None
    factor = float(y.flatten()[0])
    expected = F.embedding(ids, w)
    coarse = float(torch.finfo(dtype).eps)
    for mode in (False, True):
        y = run_on(module, cls, mode, {"weight": w}, ids)
        if not isinstance(y, Tensor) or y.shape != expected.shape:
            return None
        if float((y - expected * factor).abs().max()) > 4 * coarse * float(y.abs().max()):
            return None
    return factor if factor == factor and abs(factor) != float("inf") else None


def run_on(
    module: nn.Module,
    cls: type[nn.Module],
    training: bool,
    parameters: dict[str, Tensor | None],
    x: Tensor,
) -> Any:
    """Return the output of the class's forward with other parameters; None where it fails."""
    twin = copy.copy(module)
    object.__setattr__(twin, "__class__", cls)
    state = vars(twin)
    held = {n: None if p is None else nn.Parameter(p, False) for n, p in parameters.items()}
    state["_parameters"] = {**module._parameters, **held}
    state["training"] = training
    rows = next(p.shape[0] for p in parameters.values() if p is not None)
    for name in ("out_features", "num_embeddings"):
        if name in state:
            state[name] = rows
    try:
        return cls.forward(twin, x)  # pyright: ignore[reportCallIssue]
    except Exception:  # a class that raises computes no plain product
        return None


def agrees(y: Any, expected: Tensor) -> bool:
    if not isinstance(y, Tensor) or y.shape != expected.shape or not y.is_floating_point():
        return False
    return bool(((y.float() - expected).abs().max() <= TOLERANCE * expected.abs().max()).item())
