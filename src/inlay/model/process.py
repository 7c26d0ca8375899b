"""The process's own settings that adapted models change, given back with the last of them."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field

import torch
from torch import nn

from inlay.kernels.native import keep_memory, release_memory
from inlay.kernels.switches import is_on


@dataclass
class Settings:
    """What was changed in this process, and for which models."""

    models: weakref.WeakSet[nn.Module] = field(default_factory=weakref.WeakSet[nn.Module])
    keeps_memory: bool = False
    fused_encoder: bool | None = None
    """What torch's setting was, once it was changed."""


settings = Settings()


def enter(model: nn.Module) -> None:
    """Change what a model needs: memory kept on a CPU, torch's encoder layers run one by one."""
    if model not in settings.models:
        settings.models.add(model)
        weakref.finalize(model, give_back_unused).atexit = False
    if is_on("memory") and all(p.device.type == "cpu" for p in model.parameters()):
        settings.keeps_memory = keep_memory() is None or settings.keeps_memory
    if any(isinstance(m, nn.TransformerEncoderLayer) for m in model.modules()):
        if settings.fused_encoder is None:
            settings.fused_encoder = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)  # it reads weights past the layers' adapters


def leave(model: nn.Module) -> None:
    """Give back what was changed, unless another model needs it."""
    settings.models.discard(model)
    give_back_unused()


def give_back_unused() -> None:
    """Give back what was changed once no adapted model is left."""
    if next(iter(settings.models), None) is not None:
        return
    if settings.keeps_memory:
        release_memory()
        settings.keeps_memory = False
    if settings.fused_encoder is not None:
        torch.backends.mha.set_fastpath_enabled(settings.fused_encoder)
        settings.fused_encoder = None
