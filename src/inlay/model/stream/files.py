"""Load a model whose large weights stay in files: its own, or a packed copy made once in a cache.

The copy is an ordinary checkpoint in bitsandbytes' 4 or 8 bits, one file a block, which
transformers loads too, unless the output head is held otherwise than the rest.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedConfig

from inlay.errors import ModelError, StorageError
from inlay.files import put_in_place
from inlay.model.load.folder import INDEX
from inlay.model.load.heads import head_modules
from inlay.model.load.hf_quantizer import unread_tensors
from inlay.model.load.quantize import bitsandbytes_config, dense_view, is_dense_linear
from inlay.model.seams.transformers import tied_weights
from inlay.model.stream.host import Weight, block_name, file_weights
from inlay.storage.quantized import QuantizedLinear
from inlay.storage.registry import storage_class
from inlay.storage.weights_file import FileTensor, WeightsFile

LAYOUT = 1
"""Of the cached copies; another number makes new ones."""


def skeleton(read_as: Any, config: PreTrainedConfig, dtype: torch.dtype) -> nn.Module:
    with torch.device("meta"):
        model: nn.Module = read_as(config)
    return model.to(dtype)


def keys_of(model: nn.Module, tensors: Mapping[str, object]) -> Callable[[str], str]:
    """Return how a layer's name becomes its weight's name in a checkpoint.

    A checkpoint may lack the prefix of the base model, and the weights that are tied to others.
    """
    prefix = str(getattr(model, "base_model_prefix", "")) + "."
    ties = tied_weights(model)

    def key_of(name: str) -> str:
        full = f"{name}.weight"
        for known in (full, ties.get(full, full)):
            for key in (known, known.removeprefix(prefix), prefix + known):
                if key in tensors:
                    return key
        raise ModelError(
            f"the checkpoint has no {full}; it is incomplete, or names its weights otherwise than "
            "the model does, so that they cannot be streamed: load it without streaming"
        )

    return key_of


def streamable(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers, by name, whose weights can stay in files; not a task's head."""
    heads = head_modules(model)
    return {
        n: m
        for n, m in model.named_modules()
        if (type(m) is nn.Embedding or is_dense_linear(m)) and n.split(".")[0] not in heads
    }


def opened_files(files: Sequence[Path]) -> dict[str, FileTensor]:
    return {name: t for file in files for name, t in WeightsFile(file).tensors().items()}


def weights_in_files(
    model: nn.Module, tensors: Mapping[str, FileTensor], storages: Mapping[str, str]
) -> tuple[dict[str, Weight], set[str]]:
    """Return the weights that stay in the files, by layer, and the names of their tensors there.

    Dense weights that do not lie as (out, in), such as Conv1D's, are not among them.

    `storages`: layer -> how it is held, if it is packed.
    """
    key_of = keys_of(model, tensors)
    layers = streamable(model)
    keys = {name: key_of(name) for name in layers}
    packed = {n for n, key in keys.items() if f"{key.removesuffix('weight')}SCB" in tensors}
    packed |= {n for n, key in keys.items() if f"{key}.absmax" in tensors}
    kept = {n: m for n, m in layers.items() if n in packed or type(m) in (nn.Linear, nn.Embedding)}
    found = file_weights(kept, tensors, keys.__getitem__, storages)
    for name, weight in found.items():
        check_fits(name, weight, kept[name])
    taken = {keys[n] for n in kept}
    beside = {k for k in tensors for key in taken if k.startswith(key + ".")}
    beside |= {keys[n].removesuffix("weight") + k for n in kept for k in ("SCB", "weight_format")}
    return found, taken | (beside & tensors.keys())


def check_fits(name: str, weight: Weight, layer: nn.Module) -> None:
    if isinstance(layer, nn.Embedding):
        expected = (layer.num_embeddings, layer.embedding_dim)
    else:
        expected = dense_view(layer).shape
    if weight.shape != expected:
        raise StorageError(
            f"{name}: the checkpoint holds a weight of shape {weight.shape}, the model's "
            f"configuration says {expected}"
        )


def stand_ins(
    model: nn.Module, files: Sequence[Path], left: set[str], weights: Mapping[str, Weight]
) -> dict[str, Any]:
    """Return the tensors to load; one repeated number stands for each of those left in files."""
    unread = unread_tensors(files)
    given: dict[str, Any] = {k: t for k, t in unread.items() if k not in left}
    for name in weights:
        weight = model.get_parameter(f"{name}.weight")
        given[f"{name}.weight"] = torch.zeros((), dtype=weight.dtype).expand(weight.shape)
    return given


def packed_copy(
    folder: Path,
    files: Sequence[Path],
    model: nn.Module,
    config: PreTrainedConfig,
    storages: Mapping[str, str],
    double_quant: bool,
) -> Path:
    """Return the folder of a checkpoint's packed copy, written block by block if it is missing."""
    dtype = next(model.parameters()).dtype
    said = f"{LAYOUT} {storages} {double_quant} {dtype} {fingerprint(folder, files)}"
    digest = hashlib.sha256(said.encode()).hexdigest()[:16]
    formats = "-".join(dict.fromkeys(storages.values()))
    target = cache_folder() / f"{folder.name}-{formats}-{digest}"
    if target.is_dir():
        return target
    building = target.with_name(f"{target.name}.{os.getpid()}.part")
    building.mkdir(parents=True, exist_ok=True)
    try:
        Copy(building, files, model, storages, double_quant).write(config)
        for extra in folder.glob("generation_config.json"):
            shutil.copy(extra, building)
        put_in_place(building, target)
    except OSError as error:
        if target.is_dir():
            return target
        raise ModelError(
            f"the packed copy of {folder} cannot be written to {target.parent}: {error}; set "
            "INLAY_CACHE to a folder with room"
        ) from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return target


class Copy:
    """A packed checkpoint that is being written."""

    def __init__(
        self,
        target: Path,
        files: Sequence[Path],
        model: nn.Module,
        storages: Mapping[str, str],
        double: bool,
    ) -> None:
        self.target, self.model, self.storages, self.double = target, model, storages, double
        self.tensors = unread_tensors(files)
        self.dtype = next(model.parameters()).dtype
        key_of = keys_of(model, self.tensors)
        self.layers = {key_of(name): name for name in storages}
        self.like: QuantizedLinear | None = None

    def write(self, config: PreTrainedConfig) -> None:
        blocks: dict[str | None, list[str]] = {}
        for key in self.tensors:
            blocks.setdefault(block_name(key), []).append(key)
        places: dict[str, str] = {}
        for number, keys in enumerate(blocks.values(), 1):
            file = f"model-{number:05}-of-{len(blocks):05}.safetensors"
            held: dict[str, Tensor] = {}
            for key in keys:
                held |= self.packed(key)
            save_file(held, self.target / file, metadata={"format": "pt"})
            places |= dict.fromkeys(held, file)
        index = {"metadata": {}, "weight_map": places}
        (self.target / INDEX).write_text(json.dumps(index), "utf-8")
        self.write_config(config)

    def packed(self, key: str) -> dict[str, Tensor]:
        tensor: Tensor = self.tensors[key][...]
        if tensor.is_floating_point():
            tensor = tensor.to(self.dtype)
        if key not in self.layers:
            return {key: tensor.contiguous()}
        name = self.layers[key]
        empty = dense_view(self.model.get_submodule(name))
        try:
            layer = storage_class(self.storages[name]).quantized(
                empty.turned(tensor), None, double_quant=self.double
            )
        except StorageError as error:
            raise StorageError(f"{name}: {error}") from None
        if self.storages[name] == next(iter(self.storages.values())):
            self.like = layer
        return {key.removesuffix("weight") + k: t for k, t in layer.serialized().items()}

    def write_config(self, config: PreTrainedConfig) -> None:
        assert self.like is not None
        packed = set(self.layers.values())
        dense = [n for n, m in self.model.named_modules() if is_dense_linear(m) and n not in packed]
        said = config.to_dict() | {"quantization_config": bitsandbytes_config(self.like, dense)}
        said["dtype"] = str(self.dtype).removeprefix("torch.")
        (self.target / "config.json").write_text(json.dumps(said, indent=1), "utf-8")


def fingerprint(folder: Path, files: Sequence[Path]) -> str:
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in files:
        found = file.stat()
        digest.update(f"{file.name} {found.st_size} {found.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def cache_folder() -> Path:
    """Return the folder of packed copies: $INLAY_CACHE, else inlay in the user's cache."""
    own = os.environ.get("INLAY_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "inlay"
