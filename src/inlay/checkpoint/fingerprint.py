"""A base model's fingerprint: equal for every load of the same weights, dense or quantised."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from inlay.model.adapters.copies import own_parameters
from inlay.model.adapters.layer import own_modules
from inlay.model.adapters.targets import output_head
from inlay.model.load.folder import EMBEDDED
from inlay.model.seams.accelerate import brought_in
from inlay.storage.base import FrozenLinear
from inlay.storage.registry import frozen, kind

SAMPLED_ROWS = 16
DESCRIBED = "described_base"
"""The attribute of a model that keeps its description."""


def describe_base(
    model: nn.Module, base_model: str | None, replaced: Mapping[str, set[int] | None]
) -> dict[str, Any]:
    """Leave out the values of `replaced` parameters: a new classifier's differ on every load."""
    kept: dict[str, Any] = vars(model).get(DESCRIBED) or {}
    return {"model": base_model, **(kept or description(model, replaced))}


def warn_unfrozen(model: nn.Module) -> None:
    """Warn when the base's own parameters train, whose values no adapter's file holds."""
    found = [
        f"{name}.{key}" if name else key
        for name, module in own_modules(model)
        for key, parameter in own_parameters(module)
        if parameter.requires_grad and not parameter.is_meta
    ]
    if found:
        warnings.warn(
            f"{len(found)} of the base's own parameters are set to train, such as {found[0]}, and "
            "what they learn is not in the adapter that is saved; call inlay.use after "
            "requires_grad_(True) to freeze them, or name what is to train in modules_to_save",
            UserWarning,
            stacklevel=3,
        )


def description(model: nn.Module, replaced: Mapping[str, set[int] | None]) -> dict[str, Any]:
    return {
        "architecture": type(model).__name__,
        "storage": storage_of(model),
        "head_storage": head_storage_of(model),
        "dtype": dtype_of(model),
        "shapes_sha256": shapes_digest(model),
        "values_sha256": values_digest(model, replaced),
    }


def base_name(model: nn.Module) -> str | None:
    path = getattr(model, "name_or_path", None) or None
    return next((name for name, folder in EMBEDDED.items() if str(folder) == path), path)


def storage_of(model: nn.Module) -> str:
    """Return the storage of the packed layers without the output head, or `dense` without any."""
    head = output_head(model)
    layers = [m for _, m in own_modules(model) if m is not head and kind(m) == "linear"]
    held = {frozen(layer).storage for layer in layers}
    return ",".join(sorted(held - {"dense"})) or "dense"


def head_storage_of(model: nn.Module) -> str:
    """Return the storage of a language model's output head, or `dense` when there is none."""
    head = output_head(model)
    return frozen(head).storage if head is not None and kind(head) else "dense"


def dtype_of(model: nn.Module) -> str:
    dtypes = (p.dtype for p in model.parameters() if p.is_floating_point())
    return str(next(dtypes, torch.float32)).removeprefix("torch.")


def shapes_digest(model: nn.Module) -> str:
    """Return the SHA-256 of every weight's name and shape, of packed ones the logical shape."""
    digest = hashlib.sha256()
    for name, shape in sorted(shapes(model)):
        digest.update(f"{name} {shape}\n".encode())
    return digest.hexdigest()


def shapes(model: nn.Module) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield every parameter's name and logical shape; a matrix is (out, in) whatever its layout."""
    for name, module in own_modules(model):
        matrix = frozen(module) if kind(module) else None
        if matrix is not None:
            yield f"{name}.weight", matrix.shape
        for parameter, value in own_parameters(module):
            if matrix is None or parameter == "bias":
                yield f"{name}.{parameter}", tuple(value.shape)


def values_digest(model: nn.Module, replaced: Mapping[str, set[int] | None]) -> str:
    """Digest vectors and some embedding rows in bf16: equal for dense and quantised loads."""
    digest = hashlib.sha256()
    for name, module in own_modules(model):
        with brought_in(module):
            for full, value in sampled(name, module, replaced):
                digest.update(full.encode())
                digest.update(as_bytes(value))
    return digest.hexdigest()


def sampled(
    name: str, module: nn.Module, replaced: Mapping[str, set[int] | None]
) -> Iterator[tuple[str, Tensor]]:
    for parameter, value in own_parameters(module):
        full = f"{name}.{parameter}"
        rows = replaced.get(full, set())
        packed = isinstance(module, FrozenLinear) and parameter != "bias"
        if rows is None or packed or not value.is_floating_point():
            continue
        if value.ndim == 1:
            yield full, value
        elif kind(module) == "embedding":
            yield full, value[sampled_rows(value.shape[0], rows).to(value.device)]
    rows = replaced.get(f"{name}.weight", set())
    if isinstance(module, FrozenLinear) and kind(module) == "embedding" and rows is not None:
        yield f"{name}.weight", module.matmul(sampled_rows(module.shape[1], rows))


def sampled_rows(count: int, without: Collection[int]) -> Tensor:
    numbers = torch.linspace(0, count - 1, min(SAMPLED_ROWS, count)).long()
    return torch.tensor([n for n in numbers.tolist() if n not in without], dtype=torch.long)


def whole_tensor(tensor: Tensor) -> Tensor:
    full = getattr(tensor, "full_tensor", None)
    return tensor if full is None else full()


def as_bytes(value: Tensor) -> bytes:
    rounded = whole_tensor(value.detach()).to("cpu", torch.bfloat16)
    return rounded.contiguous().view(torch.uint8).numpy().tobytes()
