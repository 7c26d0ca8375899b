"""HF PEFT's status of a model's adapters, by layer and for the whole model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

from peft import PEFT_TYPE_TO_TUNER_MAPPING
from torch import nn

from inlay.checkpoint.placement import under_any
from inlay.model.adapters.layer import own_modules
from inlay.peft.auxiliary import SavedContainer, SavedLayer, TokenLayer
from inlay.peft.configs import plain
from inlay.peft.layer import PeftLayer
from inlay.peft.seam import TunerLayerStatus, TunerModelStatus
from inlay.peft.tuner import Tuner
from inlay.storage.registry import frozen, kind

Agreed = bool | Literal["irregular"]


def layer_status(tuner: Tuner) -> list[TunerLayerStatus]:
    found: list[TunerLayerStatus] = []
    inside: tuple[str, ...] = ()
    for name, layer in own_modules(tuner.model):
        if isinstance(layer, SavedContainer):
            inside = (*inside, name)
            found.append(status_of(tuner, name, layer, layer.layers()))
        elif isinstance(layer, PeftLayer) and not under_any(name, inside):
            found.append(status_of(tuner, name, layer, [layer]))
    return found


def status_of(
    tuner: Tuner, name: str, module: PeftLayer | SavedContainer, layers: Iterable[PeftLayer]
) -> TunerLayerStatus:
    params: dict[str, list[nn.Parameter]] = {}
    for layer in layers:
        for each in layer.methods:
            params.setdefault(each, []).extend(layer.params(each).parameters())
    return TunerLayerStatus(
        name=f"model.{name}" + (".token_adapter" if isinstance(module, TokenLayer) else ""),
        module_type=type_of(tuner, name, module),
        enabled=not module.disable_adapters,
        active_adapters=module.active_adapters,
        merged_adapters=module.merged_adapters,
        requires_grad={n: agreed([p.requires_grad for p in ps]) for n, ps in params.items()},
        available_adapters=sorted(params),
        devices={n: sorted({p.device.type for p in ps}) for n, ps in params.items()},
        quantization_backend=backend_of(module),
    )


def type_of(tuner: Tuner, name: str, module: PeftLayer | SavedContainer) -> str:
    if isinstance(module, TokenLayer):
        return "TrainableTokensLayer"
    if isinstance(module, SavedContainer | SavedLayer):
        return "ModulesToSaveWrapper"
    targets = [getattr(c, "target_parameters", None) or () for c in tuner.peft_config.values()]
    single = any(f".{name}.weight".endswith(f".{target}") for each in targets for target in each)
    return "lora.ParamWrapper" if single or module.part_views else type(module).shown


def model_type(tuner: Tuner) -> str:
    config = next(iter(tuner.peft_config.values()), None)
    known = {kind.value: made.__name__ for kind, made in PEFT_TYPE_TO_TUNER_MAPPING.items()}
    return known.get("" if config is None else plain(config.peft_type), type(tuner).__name__)


def backend_of(layer: nn.Module) -> str | None:
    backend = vars(layer).get("quantization_backend")
    if backend is not None:
        return str(backend.backend_name)
    storage = frozen(layer).storage if kind(layer) else "dense"
    return None if storage == "dense" else storage


def model_status(tuner: Tuner, counts: tuple[int, int]) -> TunerModelStatus:
    """Return the state of all adapters together; `counts` are trained and all parameters."""
    layers = layer_status(tuner)
    names = sorted(tuner.peft_config)
    backends = {layer.quantization_backend for layer in layers}
    return TunerModelStatus(
        base_model_type=type(tuner.model).__name__,
        adapter_model_type=model_type(tuner),
        peft_types={n: plain(config.peft_type) for n, config in tuner.peft_config.items()},
        trainable_params=counts[0],
        total_params=counts[1],
        num_adapter_layers=len(layers),
        enabled=agreed(layer.enabled for layer in layers),
        active_adapters=one_of(layer.active_adapters for layer in layers),
        merged_adapters=merged_in(layers),
        requires_grad={n: agreed(each(layers, "requires_grad", n)) for n in names},
        available_adapters=names,
        devices={n: sorted(set().union(*each(layers, "devices", n))) for n in names},
        quantization_backend=backends.pop() if len(backends) == 1 else "irregular",
    )


def each(layers: Iterable[TunerLayerStatus], field: str, name: str) -> list[Any]:
    found = (getattr(layer, field) for layer in layers)
    return [entry[name] for entry in found if name in entry]


def agreed(values: Iterable[Agreed]) -> Agreed:
    found = set(values)
    return found.pop() if len(found) == 1 else bool(found) and "irregular"


def one_of(lists: Iterable[list[str]]) -> list[str] | Literal["irregular"]:
    found = {tuple(each) for each in lists}
    return list(found.pop()) if len(found) == 1 else "irregular" if found else []


def merged_in(layers: Sequence[TunerLayerStatus]) -> list[str] | Literal["irregular"]:
    merged = {name for layer in layers for name in layer.merged_adapters}
    left = {n for s in layers for n in set(s.available_adapters) - set(s.merged_adapters)}
    return "irregular" if merged & left else sorted(merged)
