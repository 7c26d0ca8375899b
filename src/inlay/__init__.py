"""Inlay: tune a large frozen model with a small trained piece set into it, flush.

Every public name is here and is imported when it is first used, so that `import inlay` and the
command's help need no torch.

>>> import inlay
>>> inlay.LoRA(rank=8).rank
8
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from inlay.errors import (
    AdapterError,
    CheckpointError,
    DataError,
    InlayError,
    MergeError,
    ModelError,
    StorageError,
    TargetError,
    TrainingError,
    UsageError,
)
from inlay.model.adapters import adapter_files
from inlay.versions import warn_of_untested

if TYPE_CHECKING:
    from inlay.checkpoint.adapter import load_adapter, save_adapter
    from inlay.kernels.switches import plain
    from inlay.methods.bitfit import BitFit
    from inlay.methods.bottleneck import Bottleneck
    from inlay.methods.dora import DoRA
    from inlay.methods.full import Full
    from inlay.methods.ia3 import IA3
    from inlay.methods.lora import LoRA
    from inlay.methods.norms import NormTuning
    from inlay.methods.p_tuning import PTuning
    from inlay.methods.prefix import PrefixTuning
    from inlay.methods.prompt import PromptTuning
    from inlay.model.adapters.attach import attach, detach, disabled, use
    from inlay.model.adapters.report import report
    from inlay.model.load.eight_bits import compute_in_8_bits
    from inlay.model.load.heads import Head
    from inlay.model.load.pretrained import load
    from inlay.model.load.quantize import quantize
    from inlay.model.merge.merge import merge
    from inlay.model.stream.host import stream

__all__ = [
    "IA3",
    "AdapterError",
    "BitFit",
    "Bottleneck",
    "CheckpointError",
    "DataError",
    "DoRA",
    "Full",
    "Head",
    "InlayError",
    "LoRA",
    "MergeError",
    "ModelError",
    "NormTuning",
    "PTuning",
    "PrefixTuning",
    "PromptTuning",
    "StorageError",
    "TargetError",
    "TrainingError",
    "UsageError",
    "attach",
    "compute_in_8_bits",
    "detach",
    "disabled",
    "load",
    "load_adapter",
    "merge",
    "plain",
    "quantize",
    "report",
    "save_adapter",
    "stream",
    "use",
]

warn_of_untested()


def checkpoint_files() -> adapter_files.AdapterFiles:
    """Import what a model with adapters saves and loads by."""
    from inlay.checkpoint import pretrained

    return pretrained


adapter_files.provider = checkpoint_files

VERBS = {
    "Head": "inlay.model.load.heads",
    "attach": "inlay.model.adapters.attach",
    "compute_in_8_bits": "inlay.model.load.eight_bits",
    "detach": "inlay.model.adapters.attach",
    "disabled": "inlay.model.adapters.attach",
    "load": "inlay.model.load.pretrained",
    "load_adapter": "inlay.checkpoint.adapter",
    "merge": "inlay.model.merge.merge",
    "plain": "inlay.kernels.switches",
    "quantize": "inlay.model.load.quantize",
    "report": "inlay.model.adapters.report",
    "save_adapter": "inlay.checkpoint.adapter",
    "stream": "inlay.model.stream.host",
    "use": "inlay.model.adapters.attach",
}
"""The verbs and the modules they are imported from."""


def __getattr__(name: str) -> Any:
    """Import a verb or a method's class when it is first asked for."""
    module = homes().get(name)
    if module is None:
        raise AttributeError(f"module 'inlay' has no attribute {name!r}")
    return getattr(import_module(module), name)


def __dir__() -> list[str]:
    """Return every public name: the verbs, the methods' classes and the errors."""
    return sorted({*globals(), *homes()})


def homes() -> dict[str, str]:
    """Return every lazy name with its module; a new method's file adds its own."""
    from inlay.methods.catalog import catalog

    return VERBS | {spec.class_name: spec.module for spec in catalog().values()}
