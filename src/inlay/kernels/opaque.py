"""Operators that are one node to a tracer, and plain calls where nothing traces.

A compiler, a dispatch mode (selective checkpointing, the memory planner), a function transform or
a tensor that is not a plain one gets a custom operator. Otherwise the same body is called at once,
or through an autograd function with the same backward: a custom operator costs more Python than
a small product takes.

Autocast casts the inputs of torch's own operators by a policy of each. Ours name the inputs that
are lowered, as `F.linear`'s are; their bodies and their gradients then run as they are written.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from inlay.errors import UsageError
from inlay.kernels.cost import FLOPS, SCRATCH, Scratch
from inlay.kernels.switches import transformed

R = TypeVar("R")
P = ParamSpec("P")
PLAIN = frozenset({Tensor, nn.Parameter})
"""The tensor classes on which an operator is called directly."""
hidden: Any = torch._C
below_autograd: Any = hidden._AutoDispatchBelowADInplaceOrView
"""Neither gradients nor views are recorded, so that results may be changed in place."""
disable_autocast: Any = hidden._DisableAutocast


def without_autocast(function: Callable[P, R]) -> Callable[P, R]:
    @functools.wraps(function)
    def as_written(*args: P.args, **kwargs: P.kwargs) -> R:
        if not torch._C._is_any_autocast_enabled() or torch.compiler.is_compiling():
            return function(*args, **kwargs)
        with disable_autocast():
            return function(*args, **kwargs)

    return as_written


def below(body: Callable[P, R]) -> Callable[P, R]:
    """Make a function run below autograd and autocast: nothing is recorded or cast."""

    @functools.wraps(body)
    def alone(*args: P.args, **kwargs: P.kwargs) -> R:
        with below_autograd(), disable_autocast():
            return body(*args, **kwargs)

    return alone


def lowered(x: Any) -> Any:
    """Return a tensor in the dtype that autocast gives a product's inputs on its device."""
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dtype == torch.float64:
        return x
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def is_plain(arg: Any) -> bool:
    kind = type(arg)
    if kind in PLAIN:
        return not arg.is_meta
    if kind is list:
        return all(map(is_plain, arg))
    return kind is not tuple and not isinstance(arg, Tensor)


def traced(args: tuple[Any, ...]) -> bool:
    """Return whether operators are being watched, or the tensors are not plain."""
    return (
        torch.compiler.is_compiling()
        or hidden._len_torch_dispatch_stack() > 0
        or hidden._len_torch_function_stack() > 0
        or hidden._functorch.peek_interpreter_stack() is not None
        or hidden._get_tracing_state() is not None
        or not all(map(is_plain, args))
    )


class Operator(Generic[R]):
    """A function of tensors that is traced as the custom operator `inlay::name`.

    Under autocast its first `lowers` inputs are cast as a product's are.
    """

    def __init__(self, name: str, body: Callable[..., R], lowers: int, again: bool) -> None:
        self.name, self.body, self.lowers = name, body, lowers
        self.custom: Any = torch.library.custom_op(f"inlay::{name}", below(body), mutates_args=())
        self.apply: Any = None
        self.plainly: Callable[..., R] = self.custom
        self.again = again
        self.register_fake = self.custom.register_fake

    def __call__(self, *args: Any) -> R:
        if torch._C._is_any_autocast_enabled():
            return self.cast(args)
        return self.called(args)

    def cast(self, args: Sequence[Any]) -> R:
        args = (*map(lowered, args[: self.lowers]), *args[self.lowers :])
        if torch.compiler.is_compiling():
            return self.called(args)
        with disable_autocast():
            return self.called(args)

    def called(self, args: tuple[Any, ...]) -> R:
        if traced(args):
            return self.plainly(*args) if transformed() else self.custom(*args)
        if torch.is_grad_enabled() and hidden._any_requires_grad(*args):
            return self.apply(*args) if self.apply else self.custom(*args)
        with below_autograd():
            return self.body(*args)

    def register_transformed(self, plainly: Callable[..., R]) -> None:
        self.plainly = plainly

    def register_cost(
        self, scratch: Callable[..., Scratch], flops: Callable[..., int] | None = None
    ) -> None:
        SCRATCH[f"inlay.{self.name}"] = scratch
        if flops is not None:
            FLOPS[f"inlay.{self.name}"] = flops

    def once(self, backward: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
        """Wrap a backward function so that it raises where its gradient is to be differentiated."""

        @functools.wraps(backward)
        def refusing(ctx: Any, *grads: Any) -> tuple[Any, ...]:
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                raise UsageError(
                    f"inlay's operator {self.name!r} has no second derivative, and a gradient that "
                    "can be differentiated was requested (create_graph=True); run the forward "
                    "pass inside `with inlay.plain():`, where PyTorch's own operators compute"
                )
            return backward(ctx, *grads)

        return refusing

    def register_autograd(
        self,
        backward: Callable[..., tuple[Any, ...]],
        setup_context: Callable[[Any, tuple[Any, ...], Any], None],
    ) -> None:
        backward = without_autocast(backward if self.again else self.once(backward))
        self.custom.register_autograd(backward, setup_context=setup_context)

        def forward(ctx: Any, *args: Any) -> R:
            with below_autograd():
                output = self.body(*args)
            setup_context(ctx, args, output)
            return output

        def gradient(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
            found = backward(ctx, *grads)
            return tuple(None if isinstance(each, list) else each for each in found)

        functions = {"forward": staticmethod(forward), "backward": staticmethod(gradient)}
        function: Any = type(self.name, (torch.autograd.Function,), functions)
        # The class's own `apply` first looks for function transforms, which `traced` excludes.
        parent: Any = super(torch.autograd.Function, function)
        self.apply = parent.apply


def operator(
    name: str, lowers: int = 0, again: bool = False
) -> Callable[[Callable[..., R]], Operator[R]]:
    """Make a function of tensors the operator `inlay::name`; its arguments are given by place.

    `again` says that its gradient can itself be differentiated.
    """
    return lambda body: Operator(name, body, lowers, again)
