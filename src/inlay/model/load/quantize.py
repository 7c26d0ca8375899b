"""Hold a model's linear layers in fewer bits."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence

from torch import nn
from transformers import PreTrainedModel

from inlay.errors import ModelError, StorageError, did_you_mean
from inlay.model.adapters.targets import output_head
from inlay.model.adapters.wrappers import looks_through
from inlay.model.load.heads import head_modules
from inlay.model.load.vision import parts_of
from inlay.model.seams.transformers import get_keys_to_not_convert, kept_in_full, tied_weights
from inlay.storage.dense import DenseView
from inlay.storage.own import own_kind
from inlay.storage.quantized import QuantizedLinear
from inlay.storage.registry import frozen, kind, layer_class, storage_class

logger = logging.getLogger(__name__)


@looks_through
def quantize(
    model: nn.Module,
    storage: str = "nf4",
    *,
    double_quant: bool = True,
    skip: Sequence[str] | None = None,
    head_storage: str = "dense",
) -> nn.Module:
    """Hold the model's linear layers in `storage`, in place, one after another.

    Each dense weight is freed before the next is quantised. Weights that are shared with another
    layer, such as an embedding's, stay dense, and so do the output head and what sees images.

    Args:
        model: any module; `nn.Linear` and transformers' `Conv1D` are quantised.
        storage: `nf4` or `int8`; `dense` leaves the model as it is.
        double_quant: for nf4, whether the blocks' scales are quantised too.
        skip: names or dotted suffixes of layers to leave dense; default: the output head, and of
            a model that sees images everything but the language part.
        head_storage: how a language model's output head is held; `dense` leaves it to `skip`. A
            head that is tied to the embedding cannot be held otherwise than the embedding.

    Returns:
        The model; its quantised layers are new modules under the same names.

    Raises:
        StorageError: no such storage, or a weight that it cannot hold.
        ModelError: the model has no layer to quantise, or `skip` names none of them, or no output
            head that can be held by itself.
    """
    if storage == head_storage == "dense":
        return model
    check_not_adapted(model)
    if any(hasattr(p, "full_tensor") for p in model.parameters()):
        raise ModelError(
            "the model's weights are divided among processes (FSDP2), and quantising needs them "
            "whole; quantise first, then divide"
        )
    if is_dense_linear(model):
        view = dense_view(model)
        held_as = storage_class(storage)
        return held_as.quantized(view.matrix(), view.bias, double_quant=double_quant)
    names = storages(model, storage, head_storage, skip)
    if not names:
        raise ModelError(
            f"{type(model).__name__} has no linear layer to hold in {storage}: it has none, or "
            "all are skipped or share their weights"
        )
    for name, held in names.items():
        replace(model, name, storage_class(held), double_quant)
    describe_quantization(model)
    for held, count in Counter(names.values()).items():
        logger.info("%d linear layers are held in %s", count, held)
    for name, count in Counter(own_forwards(model)).items():
        logger.warning(
            "layers of class %s stay dense (%d): tried, their forward is no plain product",
            name,
            count,
        )
    return model


def own_forwards(model: nn.Module) -> Iterator[str]:
    """Yield the classes of the linear layers that stay dense as their forward is their own."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and kind(module) is None and own_kind(module):
            yield layer_class(module).__name__


def replace(
    model: nn.Module, name: str, held_as: type[QuantizedLinear], double_quant: bool
) -> None:
    view = dense_view(model.get_submodule(name))
    try:
        layer = held_as.quantized(view.matrix(), view.bias, double_quant=double_quant)
        layer.stands_for = kind(view.layer) or "linear"
    except StorageError as error:
        raise StorageError(f"{name}: {error}") from None
    model.set_submodule(name, layer.train(view.layer.training))


def check_not_adapted(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if layer_class(module) is not type(module):
            raise ModelError(
                f"{name} carries adapters, which quantising would drop; quantise first, then "
                "attach, or detach the adapters before"
            )


def storages(
    model: nn.Module, storage: str, head_storage: str = "dense", skip: Sequence[str] | None = None
) -> dict[str, str]:
    """Return the dense layers to be packed -> their storage; raise for a wrong name."""
    for name in {storage, head_storage} - {"dense"}:
        storage_class(name)
    found = {} if storage == "dense" else dict.fromkeys(quantizable(model, skip), storage)
    return found if head_storage == "dense" else found | {separate_head(model): head_storage}


def separate_head(model: nn.Module) -> str:
    head = output_head(model)
    name = next((n for n, m in model.named_modules() if m is head), None)
    if head is None or name is None or kind(head) != "linear":
        raise ModelError(
            f"{type(model).__name__} has no output head that could be held by itself; leave "
            "head_storage at 'dense'"
        )
    ties = tied_weights(model)
    weight = f"{name}.weight"
    if weight in {*ties, *ties.values()} or id(head._parameters["weight"]) in shared_parameters(
        model
    ):
        raise ModelError(
            f"the output head of {type(model).__name__} is its embedding too (their weights are "
            "tied), so that packing it would change what is read or hold it twice; leave "
            "head_storage at 'dense'"
        )
    return name


def quantizable(model: nn.Module, skip: Sequence[str] | None = None) -> list[str]:
    linear = [n for n, m in model.named_modules() if n and is_dense_linear(m)]
    skipped = kept_by_default(model) if skip is None else set(matching(linear, skip))
    shared = shared_parameters(model)
    return [
        n
        for n in linear
        if n not in skipped and id(dense_view(model.get_submodule(n)).weight) not in shared
    ]


def kept_by_default(model: nn.Module) -> set[str]:
    """Return the layers left dense: output head, task head, tied weights, and what sees images.

    And those that the model keeps in full precision, whose weight's dtype it may read (T5's `wo`).
    """
    if not isinstance(model, PreTrainedModel):
        return set()
    heads = head_modules(model)
    in_head = {n for n, _ in model.named_modules() if n.split(".")[0] in heads}
    seeing = {name for name, part in parts_of(model).items() if part != "language"}
    full = [f".{part}." for part in kept_in_full(model)]
    in_full = {n for n, _ in model.named_modules() if any(part in f".{n}." for part in full)}
    return set(get_keys_to_not_convert(model)) | in_head | seeing | in_full


def matching(names: Sequence[str], entries: Sequence[str]) -> Iterator[str]:
    for entry in entries:
        found = [n for n in names if n == entry or n.endswith("." + entry)]
        if not found:
            last = {n.rsplit(".", 1)[-1] for n in names}
            raise ModelError(f"skip {entry!r} matches no linear layer.{did_you_mean(entry, last)}")
        yield from found


def shared_parameters(model: nn.Module) -> set[int]:
    every = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    return {key for key, count in every.items() if count > 1}


def describe_quantization(model: nn.Module) -> None:
    """Say in a transformers model's configuration how its layers are held, or that all are dense.

    `save_pretrained` then writes a checkpoint that transformers loads with bitsandbytes, which
    knows one format a checkpoint: layers in another than the first one's are saved dense.
    """
    if not isinstance(model, PreTrainedModel):
        return
    quantised = tuple(QuantizedLinear.formats.values())
    held = [m for m in model.modules() if isinstance(m, quantised)]
    if not held:
        vars(model.config).pop("quantization_config", None)
        return
    others = others_than_first(model)
    for name in others:
        model.get_submodule(name).saved_dense = True  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    dense = [n for n, m in model.named_modules() if n and is_dense_linear(m)]
    model.config.quantization_config = bitsandbytes_config(held[0], dense + others)


def others_than_first(model: nn.Module) -> list[str]:
    packed = [(n, m.storage) for n, m in model.named_modules() if isinstance(m, QuantizedLinear)]
    return [name for name, storage in packed if storage != packed[0][1]]


def bitsandbytes_config(layer: QuantizedLinear, dense: list[str]) -> dict[str, object]:
    method = {"quant_method": "bitsandbytes", "llm_int8_skip_modules": dense}
    return {**method, **layer.bitsandbytes_options()}


def is_dense_linear(module: nn.Module) -> bool:
    return kind(module) in ("linear", "conv1d") and isinstance(frozen(module), DenseView)


def dense_view(module: nn.Module) -> DenseView:
    view = frozen(module)
    assert isinstance(view, DenseView)
    return view
