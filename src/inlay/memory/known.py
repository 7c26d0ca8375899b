"""Known values on fake tensors: ids, labels and masks, on which a model's operations may depend."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map_only

from inlay.errors import DataError

LARGEST_KNOWN = 1 << 26
"""Integer and boolean tensors of at most this many elements are followed with their values."""
FLOATS_KNOWN = 1 << 12
"""Floating-point tensors of at most this many elements are: positions, which become integers."""


def known_tensor(mode: FakeTensorMode, value: Tensor) -> Tensor:
    fake = mode.from_tensor(value)
    fake.known = value  # pyright: ignore[reportAttributeAccessIssue]
    return fake


class Literals(TorchFunctionMode):
    """Lets `torch.tensor` read the values that are known of the tensors in its list."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.tensor and all(hasattr(t, "known") for t in tensors_in(args)):
            args = tree_map_only(Tensor, lambda t: vars(t)["known"].tolist(), args)
        return func(*args, **(kwargs or {}))


def followed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operation on fake tensors; where all its inputs are known, follow their values."""
    if func is torch.ops.aten.index.Tensor:
        known = hasattr(args[0], "known")
        args = (args[0], [index for i in args[1] for index in as_integers(i, known)], *args[2:])
    if func is torch.ops.aten.lift_fresh.default and not isinstance(args[0], FakeTensor):
        literal = func(*args, **kwargs)
        literal.known = args[0]
        return literal
    if func is torch.ops.aten.embedding.default:
        check_within(*args[:2])
    if func is torch.ops.aten._grouped_mm.default and args[0].dtype != torch.bfloat16:
        return grouped_product(func, args, kwargs)
    inputs = tensors_in((args, kwargs))
    if all(hasattr(t, "known") for t in inputs) and (inputs or makes_integers(func, kwargs)):
        return with_values(func, args, kwargs)
    out = func(*args, **kwargs)
    for t in tensors_in(out) if func._schema.is_mutable else ():
        vars(t).pop("known", None)
    return out


def grouped_product(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return experts' products without data, which PyTorch follows in bfloat16 alone."""

    def halves(x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x
        return torch.empty_strided(x.shape, x.stride(), dtype=torch.bfloat16, device=x.device)

    out = func(*tree_map_only(Tensor, halves, args), **tree_map_only(Tensor, halves, kwargs))
    return torch.empty_strided(out.shape, out.stride(), dtype=args[0].dtype, device=out.device)


def check_within(table: Tensor, ids: Tensor) -> None:
    """Raise DataError where known ids read past the end of a table of embeddings."""
    known: Tensor | None = vars(ids).get("known")
    if known is None or not known.numel():
        return
    with _disable_current_modes():
        last = int(known.max())
    if last >= len(table):
        raise DataError(
            f"the longest rows need entry {last} of an embedding of the model that has "
            f"{len(table)}: give max_length at most the positions that the model has learned, or a "
            "tokenizer with no more tokens than the model has"
        )


def with_values(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    real_args, real_kwargs = tree_map_only(Tensor, lambda t: vars(t)["known"], (args, kwargs))
    with _disable_current_modes():
        real = func(*real_args, **real_kwargs)
    if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default):
        return real
    if torch.Tag.dynamic_output_shape in func.tags:
        out = tree_map_only(Tensor, unfilled, real)
    else:
        out = func(*args, **kwargs)
    for fake, value in zip(tensors_in(out), tensors_in(real), strict=True):
        largest = FLOATS_KNOWN if value.is_floating_point() else LARGEST_KNOWN
        if value.numel() <= largest or func.is_view:
            fake.known = value  # pyright: ignore[reportAttributeAccessIssue]
        else:
            vars(fake).pop("known", None)
    return out


def makes_integers(func: Any, kwargs: dict[str, Any]) -> bool:
    dtype = kwargs.get("dtype")
    integers = dtype is not None and not dtype.is_floating_point and not dtype.is_complex
    return func._schema.name.startswith("aten::") and (
        integers or func._schema.name == "aten::arange"
    )


def unfilled(real: Tensor) -> Tensor:
    return torch.empty(real.shape, dtype=real.dtype, device=real.device)


def as_integers(index: Tensor | None, known: bool) -> list[Tensor | None]:
    """Return a boolean index as integers; values are followed where the source is `known`."""
    if index is None or index.dtype not in (torch.bool, torch.uint8) or not hasattr(index, "known"):
        return [index]
    mask: Tensor = index.known  # pyright: ignore[reportAttributeAccessIssue]
    with _disable_current_modes():
        count = int(mask.count_nonzero())
        real = mask.nonzero(as_tuple=True) if known else ()
    found: list[Tensor | None] = [
        torch.empty(count, dtype=torch.long, device=index.device) for _ in index.shape
    ]
    for fake, value in zip(found, real, strict=False):
        fake.known = value  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
    return found


def tensors_in(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = cast("dict[Any, Any]", tree).values()
    elif not isinstance(tree, list | tuple):
        return []
    return [leaf for branch in cast("Iterable[Any]", tree) for leaf in tensors_in(branch)]
