"""The hooks that accelerate puts on modules: a forward of the instance around the class's own.

`dispatch_model`, `cpu_offload` and `device_map` set `module._hf_hook`, keep the forward that was
there as `module._old_forward`, and call it between `pre_forward`, which brings offloaded weights
in, and `post_forward`, which lets them go again.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from inlay.methods.base import Params

HOOK = "_hf_hook"
KEPT_FORWARDS = ("_old_forward", "_original_forward")
"""Where a module keeps the forward that accelerate wrapped: for a hook, and for autocast."""
META = torch.device("meta")


def hook_of(module: nn.Module) -> Any:
    return vars(module).get(HOOK)


def is_offloaded(module: nn.Module) -> bool:
    """Return whether a module's own weights are away until its hook loads them."""
    return hook_of(module) is not None and any(t.device == META for t in own_tensors(module))


@contextmanager
def brought_in(module: nn.Module) -> Generator[None]:
    if not is_offloaded(module):
        yield
        return
    hook = hook_of(module)
    hook.pre_forward(module)
    try:
        yield
    finally:
        hook.post_forward(module, None)


def own_tensors(module: nn.Module) -> list[Tensor]:
    return [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]


def carry_over(hooked: nn.Module, successor: nn.Module) -> None:
    hook = hook_of(hooked)
    if hook is not None and hook_of(successor) is None:
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(successor, hook)


class ResidentParams(Params):
    """An adapter's tensors, which no hook takes away: they are read, never called, and train.

    A hook that a later `dispatch_model` puts here is undone at once; only its device is kept.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name in (HOOK, "forward", *KEPT_FORWARDS):
            if name == HOOK:
                undo(self, value)
            return
        super().__setattr__(name, value)


def undo(params: nn.Module, hook: Any) -> None:
    """Take a hook off and load what it had offloaded, onto the device it computes on."""
    hook.detach_hook(params)
    device = execution_device(hook)
    if device is not None and device != META:
        params.to(device)


def execution_device(hook: Any) -> torch.device | None:
    said = getattr(hook, "execution_device", None)
    if said is None:
        return None
    return torch.device("cuda", said) if isinstance(said, int) else torch.device(said)


def keep_resident(params: Params) -> None:
    for each in params.modules():
        if type(each) is Params:
            each.__class__ = ResidentParams
