"""An adapter on disk, read without a model, and its checks against one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from inlay.checkpoint.fingerprint import describe_base
from inlay.checkpoint.folder import (
    CONFIG,
    EXTRAS,
    TENSORS,
    AdapterFolder,
    read_folder,
)
from inlay.checkpoint.metadata import (
    adapter_config,
    replaced_by,
)
from inlay.checkpoint.peft_options import WITHOUT_EFFECT, method_in, recorded_method, shortened
from inlay.checkpoint.placement import described
from inlay.errors import CheckpointError
from inlay.methods.base import (
    HiddenMethod,
    Method,
    PromptMethod,
    SelectMethod,
    WeightMethod,
)
from inlay.model.adapters.create import shape_and_device
from inlay.model.adapters.places import matrices_at
from inlay.model.adapters.registry import Attached
from inlay.model.adapters.targets import adaptable_kinds, find_targets

FAR_MORE = 16
"""A configuration that asks for more than this many times the file's values is damaged."""


@dataclass(frozen=True)
class AdapterFile:
    """An adapter on disk: its method, and its folder."""

    method: Method
    folder: AdapterFolder


def check_same(file: AdapterFile, attached: Attached, directory: str | Path) -> None:
    here, there = attached.method, file.method
    same = there.to_peft() == here.to_peft()
    if not same or there.peft_tensors("linear") != here.peft_tensors("linear"):
        raise CheckpointError(
            f"the adapter in {directory} is {there}, and adapter {attached.name!r} on this model "
            f"is {here}; load it under another name"
        )


def read_adapter(directory: str | Path) -> AdapterFile:
    """Read an adapter's method and the shapes in its files; CheckpointError if damaged."""
    folder = read_folder(directory)
    if folder.extras is not None:
        return AdapterFile(recorded_method(folder.extras, str(folder.path / EXTRAS)), folder)
    method = method_in(folder.config, str(folder.path / CONFIG))
    if isinstance(method, PromptMethod):
        method = method.held_in(folder.tensors)
    return AdapterFile(method, folder)


def check_size(model: nn.Module, file: AdapterFile, placement: Mapping[str, Any]) -> None:
    """A damaged rank would ask for more memory than there is, before shapes are compared."""
    method = file.method
    if isinstance(method, SelectMethod):
        return
    if isinstance(method, PromptMethod):
        expected = method.count_for(model.config)
    else:
        assert isinstance(method, WeightMethod | HiddenMethod)
        expected = sum(counts(model, method, placement))
    held = sum(math.prod(entry.shape) for entry in file.folder.tensors.values())
    if expected > FAR_MORE * max(held, 1):
        raise CheckpointError(
            f"{file.folder.path / CONFIG} asks for {expected:,} values on this {described(model)}, "
            f"and {TENSORS} holds {held:,}; it was made for {made_for(file.folder)}"
        )


def counts(
    model: nn.Module, method: WeightMethod | HiddenMethod, placement: Mapping[str, Any]
) -> Iterator[int]:
    targets = method.default_targets if placement["targets"] is None else placement["targets"]
    rest = {key: placement[key] for key in ("exclude", "layers") if key in placement}
    found = find_targets(model, targets, kinds=adaptable_kinds(method), **rest)
    for name in found.names:
        if isinstance(method, HiddenMethod):
            here = method.for_layer(name)
            assert isinstance(here, HiddenMethod)
            yield here.count(shape_and_device(model.get_submodule(name))[0])
            continue
        for at in matrices_at(model, name):
            here = method.for_layer(at.place)
            assert isinstance(here, WeightMethod)
            yield here.count_on(at.view) * (at.view.stack or 1)


def check_recorded(model: nn.Module, attached: Attached, folder: AdapterFolder) -> None:
    now = adapter_config(model, attached, None)
    for key in sorted(set(now) - WITHOUT_EFFECT):
        theirs = now[key]
        if folder.config.get(key, theirs) != theirs:
            raise CheckpointError(
                f"{folder.path / CONFIG} sets {key} to {shortened(folder.config[key])}, "
                f"and {EXTRAS} to {shortened(theirs)}; restore the one that was changed, or "
                f"delete {EXTRAS} to read the folder as plain HF PEFT"
            )
    check_base(model, attached, folder)


def check_base(model: nn.Module, attached: Attached, folder: AdapterFolder) -> None:
    recorded = (folder.extras or {}).get("base")
    if not isinstance(recorded, dict):
        raise CheckpointError(f"{folder.path / EXTRAS} must describe the base; it is damaged")
    now = describe_base(model, None, replaced_by(model, attached.name, folder.tensors))
    dtypes = [now["dtype"], recorded.get("dtype")]
    comparable = "float16" not in dtypes or dtypes[0] == dtypes[1]
    same_shapes = now["shapes_sha256"] == recorded.get("shapes_sha256")
    same_values = now["values_sha256"] == recorded.get("values_sha256") or not comparable
    if same_shapes and same_values:
        return
    what = "weights of the same shapes but other values" if same_shapes else "other weights"
    raise CheckpointError(
        f"the adapter in {folder.path} was trained on {made_for(folder)}, and this "
        f"{described(model)} has {what}; load that base. Rows of tokens that were added to it are "
        "in this folder only if it was saved with embeddings=True. Without "
        f"{EXTRAS} the folder is read unchecked, and computes something else on this base"
    )


def made_for(folder: AdapterFolder) -> str:
    base = (folder.extras or {}).get("base")
    architecture = base.get("architecture") if isinstance(base, dict) else None
    known = [str(word) for word in (architecture, folder.base_model) if word]
    return f"{known[0]} ({known[1]})" if len(known) == 2 else "".join(known) or "a base not named"
