"""The trunk: the blocks below the lowest adapted one, whose output training never changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from inlay.errors import ModelError
from inlay.model.seams.transformers import checkpointing_function


@dataclass(frozen=True)
class Trunk:
    """The first `depth` of a model's blocks; nothing in them trains."""

    model: nn.Module
    blocks: nn.ModuleList
    depth: int

    def output(self, **call: Any) -> Tensor:
        """Return the last trunk block's output (batch, tokens, width); nothing above it runs.

        Raises:
            ModelError: the blocks give more than one tensor, or do not run.
        """
        hook = self.blocks[self.depth - 1].register_forward_hook(stop)
        try:
            self.model(**call, use_cache=False)
        except Reached as reached:
            return reached.hidden
        finally:
            hook.remove()
        raise ModelError(f"{type(self.model).__name__} did not run its blocks")

    def replace(self, hidden: Tensor) -> Callable[[], None]:
        """Let the trunk give `hidden` instead of running; return what undoes that."""
        modules = self.blocks._modules
        before = {name: modules[name] for name in list(modules)[: self.depth]}
        for name, block in before.items():
            assert block is not None
            modules[name] = PassThrough(block, hidden)
        return lambda: modules.update(before)


class Reached(Exception):  # noqa: N818
    """The pass has come as far as it needs to."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


def stop(block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """End the pass with a block's output."""
    del args
    if not isinstance(output, Tensor):
        raise ModelError(f"{type(block).__name__} gives more than its hidden states")
    raise Reached(output)


class PassThrough(nn.Module):
    """Stands for a block without running it; its attributes are the block's."""

    def __init__(self, block: nn.Module, hidden: Tensor) -> None:
        super().__init__()
        self.__dict__["block"], self.hidden = block, hidden

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the trunk's output, as its last block would."""
        del args, kwargs
        return self.hidden

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["block"], name)


def block_list(model: nn.Module) -> tuple[str, nn.ModuleList] | None:
    """Return the name and list of the model's Transformer blocks, if it has one such list."""
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
    """Return the blocks below the lowest one that trains, or why the model has none."""
    found = block_list(model)
    if found is None:
        return f"{type(model).__name__} has not one list of blocks"
    prefix = found[0] + "."
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    numbers = [int(n.removeprefix(prefix).split(".")[0]) for n in trained if n.startswith(prefix)]
    depth = min(numbers, default=len(found[1]))
    return Trunk(model, found[1], depth) if depth else "the lowest block trains"


def changes(trunk: Trunk, call: dict[str, Tensor]) -> str | None:
    """Return why the trunk's output is not the same each time it trains, or None if it is."""
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
            if getattr(self.model, "_require_grads_hooks", None):
                self.model.disable_input_require_grads()
            return
        type(self.model).enable_input_require_grads(self.model)


def needs_no_input_gradients(model: nn.Module) -> bool:
    """Say whether activations are recomputed, and nowhere by reentrant checkpointing."""
    found = (checkpointing_function(module) for module in model.modules())
    functions = [function for function in found if function is not None]
    reentrant = [getattr(f, "keywords", {}).get("use_reentrant", True) for f in functions]
    return bool(functions) and not any(reentrant)
