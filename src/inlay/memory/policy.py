"""Which activations a training step keeps, and which it computes again: all exact.

Names from the most memory to the least:

- `keep-all`: what autograd saves.
- `keep-products`: matrix products and attention outputs; norms and activations are redone.
- `recompute-mlp`: the same without the wide products of an MLP, which are redone too.
- `layer-inputs`: each block's input; the whole block is redone.
- `offload`: the same, the inputs lying in the host's memory; on a GPU only.

The blocks are the model's own, untouched: transformers calls a function of ours in place of
each, and PyTorch's selective checkpointing keeps what the policy names. Embeddings are never
made to require a gradient, so that blocks below the lowest adapter cost no backward work.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    get_device_states,
    set_device_states,
)

from inlay.errors import ModelError
from inlay.model.adapters.places import BLOCKS
from inlay.model.adapters.targets import output_head
from inlay.model.seams.transformers import checkpoint_blocks
from inlay.storage.registry import frozen, kind

Policy = Literal["keep-all", "keep-products", "recompute-mlp", "layer-inputs", "offload"]
POLICIES: tuple[Policy, ...] = (
    "keep-all",
    "keep-products",
    "recompute-mlp",
    "layer-inputs",
    "offload",
)
"""From the most memory and the least work to the opposite."""

Move = Callable[[Tensor], Any]

PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::linear")
ATTENTION = ("aten::_scaled_dot_product_", "aten::_flash_attention", "aten::_efficient_attention")
REDONE = ("norm", "gated", "dense")
"""Words in the names of our own operators that are not worth their room."""


Product = tuple[Any, int]
"""One product of a block: the operation, and which call of it in the block this is."""


class KeptChangedError(Exception):
    """A block changes in place what is kept of it; it is begun again without keeping that."""

    def __init__(self, product: Product) -> None:
        super().__init__(product)
        self.product = product


def apply(
    model: nn.Module, policy: Policy, *, to_host: Move | None = None, back: Move | None = None
) -> None:
    """Make the model's blocks keep what the policy says, when they train.

    Args:
        model: a transformers model.
        policy: one of `POLICIES`.
        to_host: for `offload`, moves a block's input away; default: into pinned memory.
        back: for `offload`, brings it back.
    """
    blocks: Any = model
    recomputes = getattr(model, "supports_gradient_checkpointing", False)
    if policy == "keep-all":
        if recomputes:
            checkpoint_blocks(blocks, None)
        return
    if not recomputes:
        raise ModelError(
            f"the blocks of {type(model).__name__} cannot be computed again, so that only the "
            f"activation policy 'keep-all' is possible, not {policy!r}"
        )
    if policy == "offload" and to_host is None:
        check_on_gpu(model)
    checkpoint_blocks(blocks, block_runner(model, policy, to_host, back))


def check_on_gpu(model: nn.Module) -> None:
    if all(p.device.type == "cpu" for p in model.parameters()):
        raise ModelError(
            "the activation policy 'offload' moves activations from a GPU to the host, and this "
            "model is on the CPU; 'layer-inputs' is the one that needs the least memory there"
        )


def block_runner(
    model: nn.Module, policy: Policy, to_host: Move | None, back: Move | None
) -> Callable[..., Any]:
    """Return the function that runs a block in training: `(forward, *inputs) -> output`."""
    again = partial(checkpoint, use_reentrant=False)
    if policy == "layer-inputs":
        return again
    if policy == "offload":
        return offloading(again, to_host, back)
    return keeping(again, wide_outputs(model) if policy == "recompute-mlp" else frozenset())


def offloading(
    again: Callable[..., Any], to_host: Move | None, back: Move | None
) -> Callable[..., Any]:

    def run(function: Callable[..., Any], *inputs: Any) -> Any:
        if to_host is None or back is None:
            saving: Any = torch.autograd.graph.save_on_cpu(pin_memory=True)
        else:
            saving = torch.autograd.graph.saved_tensors_hooks(to_host, back)
        with saving:
            return again(function, *inputs)

    return run


def keeping(again: Callable[..., Any], wide: frozenset[int]) -> Callable[..., Any]:
    """Keep products, but not those that a block changes in place, which the first pass finds."""
    changed: set[Product] = set()

    def run(function: Callable[..., Any], *inputs: Any) -> Any:
        while True:
            random = torch.get_rng_state(), get_device_states(*inputs)
            kept = Kept(wide, changed)
            try:
                return kept.checked(again(function, *inputs, context_fn=kept.contexts))
            except KeptChangedError as found:
                changed.add(found.product)
                torch.set_rng_state(random[0])
                set_device_states(*random[1])

    return run


class Kept:
    """The products that are kept of one pass through a block."""

    def __init__(self, wide: frozenset[int], changed: set[Product]) -> None:
        self.wide, self.changed = wide, changed
        self.calls: Counter[Any] = Counter()
        self.products: dict[int, Product] = {}
        """Storage -> the kept product in it; it stays alive, so that its key is unique."""
        self.unseen: set[int] = set()
        """Storages of which PyTorch would not see a later change."""

    def contexts(self) -> tuple[Any, Any]:
        return create_selective_checkpoint_contexts(self.choice)

    def choice(self, context: Any, op: Any, *args: Any, **kwargs: Any) -> Any:
        """Whether to keep the last result; KeptChangedError if it changed a kept one."""
        if op._schema.is_mutable:
            named = dict(zip((a.name for a in op._schema.arguments), args, strict=False)) | kwargs
            written = [named.get(a.name) for a in op._schema.arguments if a.is_write]
            self.check(written, self.products)
        if op._schema.name == "aten::_unsafe_view":
            self.unseen.update(storages(args[0]))
        self.calls[op] += 1
        product = (op, self.calls[op])
        wide = bool(self.wide) and output_width(op, args) in self.wide
        if not is_product(op) or wide or product in self.changed:
            return CheckpointPolicy.PREFER_RECOMPUTE
        self.products |= dict.fromkeys(storages(context.op_output), product)
        return CheckpointPolicy.MUST_SAVE

    def checked(self, output: Any) -> Any:
        """Raise KeptChangedError if a kept product is output: PyTorch misses changes to it."""
        self.check(output, {k: p for k, p in self.products.items() if k in self.unseen})
        return output

    def check(self, values: Any, products: dict[int, Product]) -> None:
        for storage in storages(values):
            if storage in products:
                raise KeptChangedError(products[storage])


def storages(values: Any) -> list[int]:
    return [x.untyped_storage()._cdata for x in tree_leaves(values) if isinstance(x, Tensor)]


def is_product(op: Any) -> bool:
    name = op._schema.name
    if name.startswith("inlay::"):
        return not any(word in name for word in REDONE)
    return name in PRODUCTS or name.startswith(ATTENTION)


def output_width(op: Any, args: tuple[Any, ...]) -> int | None:
    """Return the last dimension of a product's result, as far as its arguments tell."""
    name = op._schema.name
    if name.startswith("inlay::"):
        named = dict(zip((a.name for a in op._schema.arguments), args, strict=False))
        return named.get("rows")
    tensors = [a for a in args if isinstance(a, Tensor)]
    return int(tensors[-1].shape[-1]) if name in PRODUCTS else None


def wide_outputs(model: nn.Module) -> frozenset[int]:
    shapes = {
        name: frozen(m).shape
        for name, m in model.named_modules()
        if kind(m) in ("linear", "conv1d")
    }
    head = output_head(model)
    inner = {
        out
        for name, (out, width) in shapes.items()
        if out > width and not set(BLOCKS).isdisjoint(name.split("."))
    }
    return frozenset(
        inner
        or {
            out
            for name, (out, width) in shapes.items()
            if out >= 2 * width and model.get_submodule(name) is not head
        }
    )


@contextmanager
def applied(model: nn.Module, policy: Policy) -> Generator[nn.Module]:
    apply(model, policy)
    try:
        yield model
    finally:
        apply(model, "keep-all")
