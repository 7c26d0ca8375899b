"""The gathering of divided weights in a simulated step, as PyTorch's FSDP2 does it.

A block's weights arrive in one buffer and are copied out into tensors, which are released after
the block. Forward, the buffer of the block before lives until the next has been copied out;
backward, the next block arrives while one computes. What lies outside the blocks is gathered once
and stays. So it stands in `wait_for_unshard` and `_backward_prefetch` of torch 2.13's
`distributed/fsdp/_fully_shard`. gloo gathers into a copy of its own, from one of the part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from inlay.model.stream.shard import SMALL, blocks_of, kept_whole


class Gathered:
    """The weights that are gathered at once."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.sizes = [t.nbytes for t in tensors]
        self.buffer: Tensor | None = None
        """The buffer that has arrived and is not copied out yet."""
        self.whole: list[Tensor] = []
        """The tensors in use."""

    def let_go(self) -> None:
        self.whole = []


class Gathers:
    """Makes the memory come and go that a model's divided weights take in a step."""

    def __init__(
        self, model: nn.Module, shards: int, *, copied: bool, making: Callable[[str], str]
    ) -> None:
        """`copied`: gloo gathers into a copy; `making` sets the category of new memory."""
        self.shards, self.copied, self.making = shards, copied, making
        self.order: list[Gathered] = []
        """The blocks of the forward pass, as they were run."""
        self.last: Tensor | None = None
        whole = {id(p) for p in kept_whole(model)}
        self.divided = divided_tensors(model, whole)
        blocks = list(blocks_of(model))
        inside = {id(t) for block in blocks for t in divided_tensors(block, whole)}
        self.outside = Gathered(t for t in self.divided if id(t) not in inside)
        model.register_forward_pre_hook(lambda *_: self.enter(self.outside))
        for block in blocks:
            group = Gathered(divided_tensors(block, whole))
            block.register_forward_pre_hook(self.before(group))
            block.register_forward_hook(self.behind(group))

    def parts(self) -> list[Tensor]:
        return [empty(-(-t.nbytes // self.shards)) for t in self.divided]

    # Forward

    def before(self, group: Gathered) -> Callable[..., Any]:

        def hook(module: nn.Module, args: tuple[Any, ...]) -> Any:
            del module
            self.enter(group)
            if not args or not isinstance(args[0], Tensor) or not args[0].requires_grad:
                return None
            x = args[0].view_as(args[0])
            x.register_hook(lambda _: group.let_go())
            return (x, *args[1:])

        return hook

    def behind(self, group: Gathered) -> Callable[..., Any]:

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            del module, args
            group.let_go()
            tensors = [output] if isinstance(output, Tensor) else list(output)
            waiting = [t for t in tensors if isinstance(t, Tensor) and t.requires_grad]
            if waiting:
                self.order.append(group)
                waiting[0].register_hook(lambda _: self.turn_back(group))

        return hook

    def enter(self, group: Gathered) -> None:
        if group.whole:
            return
        arrived = self.arrive(group)
        self.last = None
        self.copy_out(group)
        self.last = arrived

    # Backward

    def begin_backward(self) -> None:
        self.last = None
        self.prefetch()

    def turn_back(self, group: Gathered) -> None:
        """Gather a block for its backward pass, and start the gather of the one before it."""
        if group.buffer is None and not group.whole:
            group.buffer = self.arrive(group)
        self.copy_out(group)
        if self.order and self.order[-1] is group:
            self.order.pop()
        self.prefetch()

    def prefetch(self) -> None:
        if self.order and self.order[-1].buffer is None and not self.order[-1].whole:
            self.order[-1].buffer = self.arrive(self.order[-1])

    def end(self) -> None:
        self.outside.let_go()
        for group in self.order:
            group.let_go()
        self.order.clear()

    # Memory

    def arrive(self, group: Gathered) -> Tensor:
        before = self.making("weights")
        size = sum(group.sizes)
        buffer = empty(size)
        if self.copied:
            passing = [empty(-(-size // self.shards)), empty(size)]
            del passing
        self.making(before)
        return buffer

    def copy_out(self, group: Gathered) -> None:
        if not group.whole:
            before = self.making("weights")
            group.whole = [empty(size) for size in group.sizes]
            self.making(before)
        group.buffer = None


def empty(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8)


def divided_tensors(module: nn.Module, whole: set[int]) -> list[Tensor]:
    """Return the tensors that are divided, each once; `whole` are the ids of others."""
    tensors = (*module.parameters(), *module.buffers())
    return [t for t in tensors if id(t) not in whole and t.ndim and t.nbytes >= SMALL]
