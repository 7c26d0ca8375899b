"""Watch the first passes of a model: whether every adapter takes part and gets a gradient.

A place is proven once a gradient has reached it. Until then the model is watched: a place that the
model's code passes by is named in a warning after the first forward pass, and one that took part
in a forward pass but gets no gradient stops training. Once all are proven nothing is watched.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

from inlay.errors import TrainingError
from inlay.methods.base import Params
from inlay.model.adapters.entries import grouped
from inlay.model.adapters.layer import AdaptedLayer
from inlay.model.adapters.places import module_at

logger = logging.getLogger(__name__)

PASSED_BY = 4
"""Backward passes that may pass a place by before that is an error: a branch that only some inputs
take is taken by then."""
CONTAINERS = (nn.ModuleList, nn.ModuleDict)
"""Modules that are never called themselves; the input may decide which member is called."""


class InertAdapterWarning(UserWarning):
    """The model did not use a place of an adapter in its first forward pass."""


class Watch:
    """Watches the places of a model's active adapters that have not been proven yet.

    `params` has the trained tensors at each place; "" is the whole model.
    """

    def __init__(self, model: nn.Module, params: dict[str, list[Params]]) -> None:
        self.model, self.params = model, params
        at = {name: module_at(model, name) for name in params}
        self.layers = {n: m for n, (m, _) in at.items() if isinstance(m, AdaptedLayer)}
        self.parents = {n: parent_of(model, n, at[n][1]) for n in self.layers}
        self.used: set[str] = set()
        """Places that were called or read in any forward pass."""
        self.trained: set[str] = set()
        """Places that were called since the last step, in passes that can train."""
        self.entered: set[nn.Module] = set()
        self.passes: dict[str, int] = {}
        self.reached: set[str] = set()
        self.seen_forward = self.trains = self.judging = self.ended = False
        self.in_parts = self.gradients_came = False
        """Whether the backward pass is one for each block, and whether gradients came since."""
        self.backwards = 0
        self.handles: list[Any] = []
        self.layer_handles: list[Any] = []
        before = model.register_forward_pre_hook(self.before_forward)
        self.handles += [before, model.register_forward_hook(self.after_forward)]
        self.watch_layers()

    def watch_layers(self) -> None:
        names: dict[AdaptedLayer, list[str]] = {}
        for name, layer in self.layers.items():
            names.setdefault(layer, []).append(name)
        for layer, here in names.items():
            if not self.reached.issuperset(here):
                vars(layer)["watch"] = partial(self.note, here)
        parents = {p for n, p in self.parents.items() if p is not None and n not in self.reached}
        self.layer_handles = [p.register_forward_pre_hook(self.note_call) for p in parents]

    def unwatch_layers(self) -> None:
        for layer in self.layers.values():
            vars(layer).pop("watch", None)
        for handle in self.layer_handles:
            handle.remove()
        self.layer_handles = []

    def note(self, names: list[str], read: bool) -> None:
        self.used.update(names)
        if self.trains and not read:
            self.trained.update(names)
            self.in_parts |= not torch.is_grad_enabled()

    def note_call(self, module: nn.Module, *_: Any) -> None:
        if not torch.compiler.is_compiling():
            self.entered.add(module)

    def before_forward(self, *_: Any) -> None:
        if torch.compiler.is_compiling():
            return
        if self.in_parts and self.gradients_came:
            self.after_backward()
        acts = any(layer.active for layer in self.layers.values()) or "" in self.params
        self.trains = acts and torch.is_grad_enabled()
        if self.trains:
            if not self.layer_handles:
                self.watch_layers()
            self.entered.add(self.model)
            self.wait_for_gradients()

    def after_forward(self, model: nn.Module, _: Any, output: Any) -> None:
        if torch.compiler.is_compiling() or not any(m.active for m in self.layers.values()):
            return
        if not self.seen_forward:
            self.seen_forward = True
            self.warn_of_unused()
        if self.trains and model.training:
            self.check_loss(model, getattr(output, "loss", None))
        if not self.trains:
            self.unwatch_layers()

    def check_loss(self, model: nn.Module, loss: Any) -> None:
        if not isinstance(loss, torch.Tensor) or loss.requires_grad:
            return
        if any(p.requires_grad for p in model.parameters()):
            raise TrainingError(
                f"the loss of {type(model).__name__} depends on nothing that trains, expected at "
                f"least one adapter among {listed(self.params)} to act on it: choose targets that "
                "the model uses on the way to its loss. A model that computes its blocks again by "
                "itself may need model.enable_input_require_grads() first"
            )

    def warn_of_unused(self) -> None:
        """Warn of places that were passed by; log those that this input did not lead to."""
        if is_compiled(self.model):
            return
        missed = [n for n in self.layers if n not in self.used and not self.is_used_elsewhere(n)]
        passed = [n for n in missed if self.is_passed_by(n)]
        skipped = [n for n in missed if n not in passed]
        if passed:
            warnings.warn(
                f"the model's first forward pass did not use the adapter at {listed(passed)}; it "
                "changes nothing there and will not train. Leave it out with exclude",
                InertAdapterWarning,
                stacklevel=4,
            )
        if skipped:
            logger.info("not reached by the first input: the adapter at %s", listed(skipped))

    def is_used_elsewhere(self, name: str) -> bool:
        """Return whether a place's tensors are also those of used places: tied trained copies."""
        there = {id(p) for used in self.used for p in self.parameters(used)}
        own = self.parameters(name)
        return bool(own) and all(id(p) in there for p in own)

    def is_passed_by(self, name: str) -> bool:
        """Return whether the module that holds a place has run: else the place is out with it."""
        return name in self.layers and self.parents[name] in self.entered

    def wait_for_gradients(self) -> None:
        if len(self.handles) > 2:
            return
        proven = next((name for name in self.params if name in self.reached), None)
        for name in self.params:
            for p in self.parameters(name) if name not in self.reached or name == proven else ():
                self.handles.append(p.register_hook(GradientHook(self, name)))

    def parameters(self, name: str) -> list[nn.Parameter]:
        """Return the tensors of a place that train now: moving a model may replace them."""
        return [p for here in self.params[name] for p in here.parameters() if p.requires_grad]

    def on_gradient(self, name: str) -> None:
        """Note a gradient; when the backward pass ends, judge the places that it did not reach.

        Reentrant checkpointing runs each block without gradients, and again in a backward pass of
        the block's own: what all of them reached is known when the next forward pass begins.
        """
        self.reached.add(name)
        self.gradients_came = True
        if not self.in_parts and not self.judging and self.is_last_backward():
            self.judging = True
            torch.autograd.Variable._execution_engine.queue_callback(self.after_backward)

    def is_last_backward(self) -> bool:
        """Return whether this backward pass is the last over its graph, which is not kept."""
        engine: Any = torch._C._autograd  # pyright: ignore[reportAttributeAccessIssue]
        keeps = getattr(engine, "_get_current_graph_task_keep_graph", None)
        return keeps is None or not keeps()

    def after_backward(self) -> None:
        self.judging = self.gradients_came = False
        if self.ended:
            return
        self.backwards += 1
        left = [n for n in self.params if n not in self.reached and self.parameters(n)]
        passed = [n for n in left if n not in self.trained and self.is_passed_by(n)]
        for name in passed:
            self.passes[name] = self.passes.get(name, 0) + 1
        dead = [n for n in left if n in self.trained or not n or self.passes.get(n, 0) >= PASSED_BY]
        self.next_step()
        if dead or not left or self.backwards >= PASSED_BY:
            self.end()
        if dead:
            raise TrainingError(
                f"no gradient reaches the adapter at {listed(dead)}, expected one at every adapted "
                "layer in the first step: the model's loss does not depend on it. Leave it out "
                "with exclude, or choose other targets"
            )

    def next_step(self) -> None:
        self.trained, self.entered = set(), set()
        self.unwatch_layers()
        for handle in self.handles[2:]:
            handle.remove()
        del self.handles[2:]

    def end(self) -> None:
        self.ended = True
        self.unwatch_layers()
        for handle in self.handles:
            handle.remove()
        self.handles = []


class GradientHook:
    """The hook on an adapter's tensor; it is not saved with the tensor."""

    __torch_unserializable__ = True

    def __init__(self, watch: Watch, name: str) -> None:
        self.watch, self.name = watch, name

    def __call__(self, gradient: Any) -> None:
        del gradient
        if not torch.compiler.is_compiling():
            self.watch.on_gradient(self.name)


def parent_of(model: nn.Module, name: str, parameter: str | None) -> nn.Module | None:
    """Return the module that calls a layer; None where it may choose by the input."""
    layer = name if parameter is None else name.rpartition(".")[0]
    parent = model.get_submodule(layer.rpartition(".")[0])
    return None if not layer or isinstance(parent, CONTAINERS) else parent


def is_compiled(model: nn.Module) -> bool:
    return any(
        getattr(m, "_compiled_call_impl", None) is not None or type(m).__name__ == "OptimizedModule"
        for m in model.modules()
    )


def listed(names: Iterable[str]) -> str:
    shapes = grouped(names)
    shown = [f"{shape or 'the whole model'!r} ({n})" for shape, n in list(shapes.items())[:6]]
    more = f" and {len(shapes) - 6} more kinds" if len(shapes) > 6 else ""
    return ", ".join(shown) + more
