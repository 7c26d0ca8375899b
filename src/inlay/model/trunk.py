"""The trunk: the blocks below the lowest adapted one, whose output training never changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from inlay.errors import ModelError
from inlay.model.seams.transformers import checkpointing_function, input_gradients_required


@dataclass(frozen=True)
class Trunk:
    """The first `depth` blocks of a model, all frozen."""

    model: nn.Module
    blocks: nn.ModuleList
    depth: int

    def output(self, **call: Any) -> Tensor:
        """Return the last block's output (batch, tokens, width); raise `ModelError` for several."""
        hook = self.blocks[self.depth - 1].register_forward_hook(stop)
        try:
            self.model(**call, use_cache=False)
        except Reached as reached:
            return reached.hidden
        finally:
            hook.remove()
        raise ModelError(f"{type(self.model).__name__} did not run its blocks")

    def replace(self, hidden: Tensor) -> Callable[[], None]:
        """Have the trunk return `hidden` without running; return the undo."""
        modules = self.blocks._modules
        before = {name: modules[name] for name in list(modules)[: self.depth]}
        for name, block in before.items():
            assert block is not None
            modules[name] = PassThrough(block, hidden)
        return lambda: modules.update(before)


class Reached(Exception):  # noqa: N818
    """Ends a forward pass early, with the hidden states."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


def stop(block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    del args
    if not isinstance(output, Tensor):
        raise ModelError(f"{type(block).__name__} gives more than its hidden states")
    raise Reached(output)


class PassThrough(nn.Module):
    """Replaces a block without running it; its attributes are the block's."""

    def __init__(self, block: nn.Module, hidden: Tensor) -> None:
        super().__init__()
        self.__dict__["block"], self.hidden = block, hidden

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        del args, kwargs
        return self.hidden

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["block"], name)


def block_list(model: nn.Module) -> tuple[str, nn.ModuleList] | None:
    config: Any = getattr(model, "config", None)
    if config is None:
        return None
    count = getattr(config.get_text_config(), "num_hidden_layers", None)
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    return lists[0] if len(lists) == 1 else None


def trunk_of(model: nn.Module) -> Trunk | str:
    """Return the blocks below the lowest trainable one, or why there are none."""
    found = block_list(model)
    if found is None:
        return f"{type(model).__name__} has not one list of blocks"
    prefix = found[0] + "."
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    numbers = [int(n.removeprefix(prefix).split(".")[0]) for n in trained if n.startswith(prefix)]
    depth = min(numbers, default=len(found[1]))
    return Trunk(model, found[1], depth) if depth else "the lowest block trains"


def changes(trunk: Trunk, call: dict[str, Tensor]) -> str | None:
    """Return why the trunk's output is not the same at every step, or None if it is."""
    before = {module: module.training for module in trunk.model.modules()}
    trunk.model.train()
    try:
        first, second = trunk.output(**call), trunk.output(**call)
    finally:
        for module, training in before.items():
            module.training = training
    if first.requires_grad:
        return "something below the lowest adapted block trains"
    return None if torch.equal(first, second) else "the frozen blocks have dropout"


class InputGradients:
    """`enable_input_require_grads` of an attached model: only where checkpointing needs it.

    transformers calls it whenever activations are recomputed, which drags the backward pass through
    all frozen blocks; only reentrant checkpointing needs gradients of the embeddings.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self) -> None:
        """Require gradients of the embeddings, unless non-reentrant checkpointing is on."""
        if needs_no_input_gradients(self.model):
            if input_gradients_required(self.model):
                self.model.disable_input_require_grads()
            return
        type(self.model).enable_input_require_grads(self.model)


def needs_no_input_gradients(model: nn.Module) -> bool:
    found = (checkpointing_function(module) for module in model.modules())
    functions = [function for function in found if function is not None]
    reentrant = [getattr(f, "keywords", {}).get("use_reentrant", True) for f in functions]
    return bool(functions) and not any(reentrant)
