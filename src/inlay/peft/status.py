"""What HF PEFT tells of a model's adapters, layer by layer and in all."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

from peft import PEFT_TYPE_TO_TUNER_MAPPING, PeftConfig
from torch import nn

from inlay.model.layer import AdaptedLayer, own_modules
from inlay.peft.seam import TunerLayerStatus, TunerModelStatus
from inlay.peft.tuner import Tuner
from inlay.storage.registry import frozen, kind, layer_class

Agreed = bool | Literal["irregular"]


def layer_status(tuner: Tuner) -> list[TunerLayerStatus]:
    """Return the state of every adapted layer."""
    return [
        status_of(tuner, f"model.{name}", layer)
        for name, layer in own_modules(tuner.model)
        if isinstance(layer, AdaptedLayer)
    ]


def status_of(tuner: Tuner, name: str, layer: AdaptedLayer) -> TunerLayerStatus:
    """Return the state of one adapted layer."""
    here = list(layer.methods)
    params = {each: list(layer.params(each).parameters()) for each in here}
    return TunerLayerStatus(
        name=name,
        module_type=f"{kind_of(tuner, here)}.{layer_class(layer).__name__}",
        enabled=tuner.enabled,
        active_adapters=tuner.active_adapters,
        merged_adapters=[each for each in tuner.merged_adapters if each in here],
        requires_grad={n: agreed([p.requires_grad for p in ps]) for n, ps in params.items()},
        available_adapters=sorted(here),
        devices={n: sorted({p.device.type for p in ps}) for n, ps in params.items()},
        quantization_backend=backend_of(layer),
    )


def kind_of(tuner: Tuner, names: Sequence[str]) -> str:
    """Return what HF PEFT calls the kind of a layer that these adapters are on."""
    config = next((tuner.peft_config[n] for n in names if n in tuner.peft_config), None)
    return plain_type(config).lower() if config is not None else "inlay"


def plain_type(config: PeftConfig) -> str:
    """Return a configuration's peft_type as text."""
    return str(config.peft_type).rpartition(".")[2]


def model_type(tuner: Tuner) -> str:
    """Return the name of HF PEFT's class of model for the first adapter."""
    config = next(iter(tuner.peft_config.values()), None)
    known = {kind.value: made.__name__ for kind, made in PEFT_TYPE_TO_TUNER_MAPPING.items()}
    return known.get("" if config is None else plain_type(config), type(tuner).__name__)


def backend_of(layer: nn.Module) -> str | None:
    """Return how a layer's weight is held, or None when it is dense."""
    storage = frozen(layer).storage if kind(layer) else "dense"
    return None if storage == "dense" else storage


def model_status(tuner: Tuner, counts: tuple[int, int]) -> TunerModelStatus:
    """Return the state of all the adapters together; `counts` are trained and all parameters."""
    layers = layer_status(tuner)
    names = sorted(tuner.peft_config)
    backends = {layer.quantization_backend for layer in layers}
    return TunerModelStatus(
        base_model_type=type(tuner.model).__name__,
        adapter_model_type=model_type(tuner),
        peft_types={n: plain_type(config) for n, config in tuner.peft_config.items()},
        trainable_params=counts[0],
        total_params=counts[1],
        num_adapter_layers=len(layers),
        enabled=tuner.enabled,
        active_adapters=tuner.active_adapters,
        merged_adapters=sorted(tuner.merged_adapters),
        requires_grad={n: agreed(each(layers, "requires_grad", n)) for n in names},
        available_adapters=names,
        devices={n: sorted(set().union(*each(layers, "devices", n))) for n in names},
        quantization_backend=backends.pop() if len(backends) == 1 else "irregular",
    )


def each(layers: Iterable[TunerLayerStatus], field: str, name: str) -> list[Any]:
    """Return one adapter's entry of a field at every layer that has it."""
    found = (getattr(layer, field) for layer in layers)
    return [entry[name] for entry in found if name in entry]


def agreed(values: Iterable[Agreed]) -> Agreed:
    """Return what all say, or that they differ."""
    said = set(values)
    return said.pop() if len(said) == 1 else bool(said) and "irregular"
