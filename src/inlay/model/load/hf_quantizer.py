"""Quantise a model's weights one by one while transformers reads them, or take packed ones in.

Memory peaks near the quantised size, because no more than one dense weight is held at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from inlay.errors import InlayError, ModelError, StorageError
from inlay.model.load.quantize import dense_view, separate_head, storages
from inlay.model.process import Change
from inlay.model.seams.transformers import (
    ConversionOps,
    HfQuantizer,
    QuantizationConfigMixin,
    mark_initialised,
    register_quantizer,
    release_quantizer,
)
from inlay.storage.quantized import QuantizedLinear
from inlay.storage.registry import STORAGES, kind, storage_class

NAME = "inlay"
"""The name of the quantizer in transformers' tables, and in configurations while they load."""


class Stopped(BaseException):
    """Carries an error past transformers' loader, which would log any Exception and go on."""

    def __init__(self, error: InlayError) -> None:
        self.error = error
        super().__init__(str(error))


def stopped_at(layer: str, error: StorageError) -> Stopped:
    return Stopped(StorageError(f"{layer}: {error}"))


@dataclass(kw_only=True)
class InlayQuantizationConfig(QuantizationConfigMixin):
    """The storages that `load` asks transformers' loader for."""

    storage: str = "nf4"
    double_quant: bool = True
    head_storage: str = "dense"
    quant_method: Any = NAME


class InlayQuantizer(HfQuantizer):
    """transformers' hooks: which weights are quantised as they are read, and how.

    The skeleton keeps its empty dense layers until their weight comes; then the layer is replaced
    by one that holds the packed weight.
    """

    quantization_config: InlayQuantizationConfig
    serialized_names = {
        "weight": list(dict.fromkeys(n for c in STORAGES.values() for n in c.tensor_names))
    }

    def __init__(self, quantization_config: InlayQuantizationConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.storages: dict[str, str] = {}
        self.head: str | None = None
        """The output head, where it is to be packed."""

    @property
    def quantized_element_size(self) -> float:
        config = self.quantization_config
        most = config.head_storage if config.storage == "dense" else config.storage
        return storage_class(most).bytes_per_weight

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        del kwargs
        config = self.quantization_config
        try:
            self.storages = storages(model, config.storage, config.head_storage)
            self.head = None if config.head_storage == "dense" else separate_head(model)
        except ModelError as error:
            raise Stopped(error) from error

    def param_needs_quantization(
        self, model: PreTrainedModel, param_name: str, **kwargs: Any
    ) -> bool:
        del model, kwargs
        layer, _, name = param_name.rpartition(".")
        return name == "weight" and layer in self.storages

    def get_quantize_ops(self) -> ConversionOps:
        return QuantizeOne(self)

    def get_load_operations(self) -> dict[str, type[ConversionOps]]:
        return {"deserialize": TakePacked}

    def replace(self, model: nn.Module, name: str, layer: QuantizedLinear) -> Tensor:
        empty = model.get_submodule(name)
        layer._parameters["bias"] = empty._parameters["bias"]
        layer.stands_for = kind(empty) or "linear"
        model.set_submodule(name, layer)
        self.storages[name] = layer.storage
        mark_initialised(layer, True)
        return layer.packed_weight

    def release(self, model: PreTrainedModel) -> None:
        """Detach from the model, which transformers then saves, moves and trains like any other."""
        release_quantizer(model, self, keep=lambda conversion: not takes_packed(conversion))

    def is_serializable(self) -> Any:
        return True

    @property
    def is_trainable(self) -> Any:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True


registered = Change(lambda: register_quantizer(NAME, InlayQuantizationConfig, InlayQuantizer))
"""`with registered:` lets transformers' loader find the quantizer."""


class QuantizeOne(ConversionOps):
    """Quantise one dense weight that was just read."""

    def __init__(self, hf_quantizer: InlayQuantizer) -> None:
        self.hf_quantizer = hf_quantizer

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, Any]:
        del source_patterns, target_patterns
        return {name: self.packed(kwargs["model"], name, w) for name, w in input_dict.items()}

    def packed(self, model: nn.Module, parameter: str, read: Tensor | list[Tensor]) -> Tensor:
        weight = read[0] if isinstance(read, list) else read
        name = parameter.removesuffix(".weight")
        empty = dense_view(model.get_submodule(name))
        quantizer = self.hf_quantizer
        double_quant = quantizer.quantization_config.double_quant
        try:
            check_shape(weight, empty.weight)
            layer = storage_class(quantizer.storages[name]).quantized(
                empty.turned(weight), None, double_quant=double_quant
            )
        except StorageError as error:
            raise stopped_at(name, error) from error
        return quantizer.replace(model, name, layer)


class TakePacked(QuantizeOne):
    """Read one packed weight as bitsandbytes wrote it."""

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Return the packed weight; a weight without other tensors is dense and stays so."""
        del source_patterns, target_patterns
        model: PreTrainedModel = kwargs["model"]
        parameter: str = kwargs["full_layer_name"]
        tensors = {k: v[0] if isinstance(v, list) else v for k, v in input_dict.items()}
        empty = model.get_parameter_or_buffer(parameter)
        name = parameter.removesuffix(".weight")
        try:
            if set(tensors) == {"weight"}:
                check_shape(tensors["weight"], empty)
                weight = as_dtype(tensors["weight"], empty.dtype)
                packs = name == self.hf_quantizer.head
                return {"weight": self.packed(model, parameter, weight) if packs else weight}
            layer = self.restored(model, name, tensors)
        except StorageError as error:
            raise stopped_at(name, error) from error
        return {"weight": self.hf_quantizer.replace(model, name, layer)}

    def restored(self, model: nn.Module, name: str, tensors: dict[str, Tensor]) -> QuantizedLinear:
        empty = dense_view(model.get_submodule(name))
        config = self.hf_quantizer.quantization_config
        if name == self.hf_quantizer.head and config.head_storage != config.storage:
            raise StorageError(
                f"the checkpoint holds it in {config.storage} already, so that it cannot be held "
                f"in {config.head_storage}"
            )
        layer = storage_class(config.storage).restored(tensors, empty.dtype)
        if layer.shape != empty.shape:
            raise StorageError(
                f"the checkpoint holds a weight of shape {layer.shape}, the model's configuration "
                f"says {empty.shape}"
            )
        layer.compute_dtype = empty.dtype
        return layer


def takes_packed(conversion: Any) -> bool:
    """Return whether a weight conversion reads packed weights, which has no inverse."""
    operations = getattr(conversion, "operations", ())
    return any(isinstance(operation, TakePacked) for operation in operations)


def as_dtype(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.to(dtype) if weight.is_floating_point() else weight


def check_shape(weight: Tensor, empty: Tensor) -> None:
    if weight.shape != empty.shape:
        raise StorageError(
            f"the checkpoint holds a weight of shape {tuple(weight.shape)}, the model's "
            f"configuration says {tuple(empty.shape)}"
        )


def unread_tensors(files: Sequence[str | Path]) -> dict[str, Any]:
    """Return tensors as slices, read from the file when taken: a mapped file counts as memory."""
    tensors: dict[str, Any] = {}
    for file in files:
        opened = safe_open(file, framework="pt", backend="pread")
        keys: list[str] = list(opened.keys())
        tensors |= {key: opened.get_slice(key) for key in keys}
    return tensors
