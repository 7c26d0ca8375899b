"""transformers' Trainer, where it restores a model: its own names, which may change."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from functools import wraps
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from inlay.model.adapters.wrapped import unwrapped

TRAINER = "transformers.trainer"
RESUMES, TAKES_BEST = "_load_from_checkpoint", "_load_best_model"
"""The methods of Trainer that put a checkpoint's values into the model."""
FOLLOWED = "followed_by_inlay"

Restore = Callable[[nn.Module, Path], bool]
"""Put the adapters of a checkpoint into a model; False where it is none of this model's."""


def follow_trainer(restore: Restore) -> None:
    """Have Trainer restore adapters by this function, now or as soon as it is imported.

    It is not imported for it: that would take as much memory as all of a small model's training.
    """
    loaded = sys.modules.get(TRAINER)
    if loaded is not None:
        follow(loaded, restore)
    elif not any(isinstance(finder, AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, AfterImport(restore))


class AfterImport(MetaPathFinder):
    """Finds the one module as everybody does, and follows it once it is loaded."""

    def __init__(self, restore: Restore) -> None:
        self.restore = restore

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> Any:
        """Return the module's own spec, with a loader that goes on to `follow`."""
        del path, target
        if fullname != TRAINER:
            return None
        sys.meta_path.remove(self)
        spec: ModuleSpec | None = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            load: Any = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                load(module)
                follow(module, self.restore)

            setattr(spec.loader, "exec_module", exec_module)  # noqa: B010
        return spec


def follow(module: ModuleType, restore: Restore) -> None:
    """Wrap the two methods of Trainer, once."""
    trainer: Any = getattr(module, "Trainer", None)
    if trainer is None or FOLLOWED in vars(trainer):
        return
    resume, best = vars(trainer)[RESUMES], vars(trainer)[TAKES_BEST]

    @wraps(resume)
    def resumed(self: Any, resume_from_checkpoint: str, model: nn.Module | None = None) -> Any:
        target = self.model if model is None else model
        if not restore(unwrapped(target), Path(resume_from_checkpoint)):
            return resume(self, resume_from_checkpoint, model)
        return None

    @wraps(best)
    def took_best(self: Any) -> Any:
        if not restore(unwrapped(self.model), Path(self.state.best_model_checkpoint)):
            return best(self)
        return None

    setattr(trainer, RESUMES, resumed)
    setattr(trainer, TAKES_BEST, took_best)
    setattr(trainer, FOLLOWED, True)
