"""A layer's `weight` as others read it: tools get the parameter, the model's own code the value.

Some models multiply by `layer.weight` themselves (attention of WavLM, Mamba's steps, torch's fused
encoder layers). What they read must be the matrix that the layer stands for: dequantised, adapters
included. Libraries that place, save, shard or initialise parameters must get the parameter itself.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from inlay.errors import StorageError

TOOLS = (
    "inlay", "accelerate", "bitsandbytes", "deepspeed", "peft", "safetensors", "torch.distributed",
    "torch.nn.modules.module", "torch.nn.parallel", "torch.nn.utils", "torch.optim",
    "transformers.core_model_loading", "transformers.initialization", "transformers.modeling_utils",
    "transformers.integrations.accelerate", "transformers.integrations.bitsandbytes",
    "transformers.integrations.deepspeed", "transformers.quantizers", "transformers.trainer",
)  # fmt: skip
"""Libraries and modules that handle parameters rather than compute with their values."""
READ = "_read_past_forward"
"""Attribute of a layer whose adapted weight was seen to be computed with past its forward."""
VIEWS = frozenset({"detach", "__getitem__", "view", "reshape", "t", "transpose"})
PLAIN = (torch.Tensor, torch.nn.Parameter)


def asked_by_tool(depth: int = 2) -> bool:
    """Return whether the code that reads an attribute handles parameters; never while compiling."""
    if torch.compiler.is_compiling():
        return False
    return is_tool(sys._getframe(depth).f_globals.get("__name__", ""))


@cache
def is_tool(module: str) -> bool:
    return any(module == tool or module.startswith(tool + ".") for tool in TOOLS)


def as_value(value: Tensor, what: str, used: Callable[[], None] | None = None) -> Tensor:
    """Return a value for one reader, which raises when it is written to: that would be lost.

    `what` names it in the error; `used` is called when the value, not its shape, is read.
    """
    if torch.compiler.is_compiling() or type(value) not in PLAIN:
        return value
    read = value.as_subclass(Value)
    read.what, read.used = what, used
    return read


class Value(Tensor):
    """A weight that was computed when it was read; every operation on it gives plain tensors."""

    what: str
    used: Callable[[], None] | None

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run the operation, unless it changes a value that nothing else holds."""
        del types
        name = getattr(func, "__name__", "")
        into = args[0] if args and isinstance(args[0], cls) and writes(name) else None
        if into is not None and args[1:] == (False,) and "requires_grad" in str(func):
            return into  # it is frozen already
        with torch._C.DisableTorchFunctionSubclass():
            before = None if into is None else into.detach().clone()
            found = func(*args, **(kwargs or {}))
            if into is not None and before is not None and not torch.equal(into.detach(), before):
                raise StorageError(
                    f"{into.what} is written to from outside ({name}), but it is computed from the "
                    "layer's packed or adapted weight each time that it is read, so that the "
                    "change would be lost; change the model before it is quantised or adapted"
                )
        if (name in VIEWS or func == DATA) and type(found) in PLAIN:
            return as_value(found, args[0].what, args[0].used)
        if any(isinstance(x, Tensor) for x in tree_leaves(found)):
            for each in tree_leaves((args, kwargs)):
                if isinstance(each, cls) and each.used is not None:
                    each.used()
        return found


DATA: Any = torch.Tensor.data.__get__  # pyright: ignore[reportAttributeAccessIssue]
ITEMS = ("__set__", "__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__")


def writes(name: str) -> bool:
    return name in ITEMS or (name.endswith("_") and not name.endswith("__"))
