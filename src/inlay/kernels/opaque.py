"""Operators that whoever traces sees as one node, and that are plain calls where nobody does.

A compiler, a dispatch mode (selective checkpointing, the memory planner), a function transform or
a tensor that is not a plain one gets a custom operator. Otherwise the same body is called at once,
or through an autograd function with the same backward: a custom operator costs more Python than
a small product takes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

R = TypeVar("R")
PLAIN = frozenset({Tensor, nn.Parameter})
"""The tensor classes with which nothing stands between a call and its arithmetic."""
hidden: Any = torch._C
below_autograd: Any = hidden._AutoDispatchBelowAutograd


def is_plain(arg: Any) -> bool:
    """Say whether an argument is no tensor, or a plain one with values, or a list of such."""
    kind = type(arg)
    if kind in PLAIN:
        return not arg.is_meta
    if kind is list:
        return all(map(is_plain, arg))
    return kind is not tuple and not isinstance(arg, Tensor)


def traced(args: tuple[Any, ...]) -> bool:
    """Say whether somebody looks at the operators that run, or the tensors are not plain."""
    return (
        torch.compiler.is_compiling()
        or hidden._len_torch_dispatch_stack() > 0
        or hidden._len_torch_function_stack() > 0
        or hidden._functorch.peek_interpreter_stack() is not None
        or hidden._get_tracing_state() is not None
        or not all(map(is_plain, args))
    )


class Operator(Generic[R]):
    """A function of tensors that is traced as the custom operator `inlay::name`."""

    def __init__(self, name: str, body: Callable[..., R]) -> None:
        self.name, self.body = name, body
        self.custom: Any = torch.library.custom_op(f"inlay::{name}", body, mutates_args=())
        self.apply: Any = None
        self.register_fake = self.custom.register_fake

    def __call__(self, *args: Any) -> R:
        if traced(args):
            return self.custom(*args)
        if torch.is_grad_enabled() and hidden._any_requires_grad(*args):
            return self.apply(*args) if self.apply else self.custom(*args)
        with below_autograd():
            return self.body(*args)

    def register_autograd(
        self,
        backward: Callable[..., tuple[Any, ...]],
        setup_context: Callable[[Any, tuple[Any, ...], Any], None],
    ) -> None:
        """Give the operator a gradient, as `torch.library` takes it."""
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


def operator(name: str) -> Callable[[Callable[..., R]], Operator[R]]:
    """Make a function of tensors the operator `inlay::name`; its arguments are given by place."""
    return lambda body: Operator(name, body)
