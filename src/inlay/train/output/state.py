"""A training state as one safetensors file: tensors beside a JSON tree, no pickle."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from inlay.errors import CheckpointError

Tree = Any
"""None, bool, int, float, str, Tensor, and lists, tuples and dicts of these."""


def save_tree(path: Path, tree: Tree) -> None:
    """Write a tree of plain values and tensors, bit for bit."""
    tensors: dict[str, Tensor] = {}
    skeleton = json.dumps(without_tensors(tree, tensors))
    save_file(tensors, path, metadata={"tree": skeleton})


def load_tree(path: Path) -> Tree:
    """Read a tree that `save_tree` wrote; its tensors lie on the CPU."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
        return with_tensors(json.loads(metadata["tree"]), tensors)
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"the training state {path} cannot be read ({error}); delete its checkpoint folder to "
            "resume from the one before"
        ) from None


def without_tensors(tree: Tree, tensors: dict[str, Tensor]) -> Tree:
    """Return JSON for a tree, its tensors put aside under numbers."""
    match tree:
        case Tensor():
            name = str(len(tensors))
            tensors[name] = tree.detach().cpu().clone().contiguous()
            return {"tensor": name}
        case Mapping():
            pairs: Iterable[tuple[Any, Any]] = tree.items()
            return {"dict": [[k, without_tensors(v, tensors)] for k, v in pairs]}
        case tuple():
            return {"tuple": [without_tensors(item, tensors) for item in tree]}
        case list():
            return [without_tensors(item, tensors) for item in tree]
        case None | bool() | int() | float() | str():
            return tree
        case _:
            raise TypeError(f"a training state cannot hold a {type(tree).__name__}")


def with_tensors(tree: Tree, tensors: Mapping[str, Tensor]) -> Tree:
    """Return the tree that a JSON skeleton and its tensors stand for."""
    match tree:
        case {"tensor": name}:
            return tensors[name]
        case {"dict": pairs}:
            return {k: with_tensors(v, tensors) for k, v in pairs}
        case {"tuple": items}:
            return tuple(with_tensors(item, tensors) for item in items)
        case list():
            return [with_tensors(item, tensors) for item in tree]
        case _:
            return tree


def random_state() -> Tree:
    algorithm, keys, *rest = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (str(algorithm), torch.tensor(np.asarray(keys, dtype=np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": list(torch.cuda.get_rng_state_all()) if torch.cuda.is_available() else [],
    }


def restore_random_state(state: Tree) -> None:
    """Put every random generator back to a state that `random_state` gave.

    The state may be of a process that saw more GPUs than this one.
    """
    random.setstate(state["python"])
    algorithm, keys, *rest = state["numpy"]
    np.random.set_state((algorithm, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"][: torch.cuda.device_count()])
