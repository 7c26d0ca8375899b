"""The file of an adapter's tensors: written and read back, read strictly."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from inlay.checkpoint.embeddings import PREFIX, ends_of, keep_embeddings, module_of
from inlay.checkpoint.folder import TENSORS, AdapterFolder, Entry, located
from inlay.checkpoint.pickled import read_pickled
from inlay.checkpoint.slots import (
    OF_PROMPTS,
    Slot,
    computed,
    first_of_shared,
    slots,
    without_tied_rows,
)
from inlay.errors import CheckpointError
from inlay.files import share_as_usual
from inlay.model.adapters.copies import own_parameters
from inlay.model.adapters.deferred import allocate
from inlay.storage.dtypes import FLOATING, INTEGERS
from inlay.storage.streamed import StreamedEmbedding

COMPUTED = "unlike what its others give"
"""The problem of a value that is not what is computed from the others."""


def write_tensors(
    path: Path, found: list[Slot], more: Mapping[str, Tensor], *, shared_once: bool
) -> None:
    kept = first_of_shared(found) if shared_once else without_tied_rows(found)
    tensors = {s.key: s.written for s in kept} | dict(more)
    nowhere = sorted(key for key, value in tensors.items() if value.is_meta)
    if nowhere:
        raise CheckpointError(
            f"the adapter is not saved: low_cpu_mem_usage=True left it with no values yet in "
            f"{listed(nowhere)}; load values into it first"
        )
    values = {key: t.to("cpu", copy=True).contiguous() for key, t in tensors.items()}
    bad = sorted(key for key, value in values.items() if not bool(torch.isfinite(value).all()))
    if bad:
        raise CheckpointError(
            f"the adapter is not saved: it holds NaN or infinite values in {listed(bad)}; "
            "training diverged: take the last good checkpoint"
        )
    save_file(values, path, metadata={"format": "pt"})
    share_as_usual(path)
    check_written(path, values)


def check_written(path: Path, values: Mapping[str, Tensor]) -> None:
    with safe_open(path, framework="pt") as file:
        read: dict[str, Tensor] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    wrong = sorted(k for k in {*read, *values} if not same_bits(read.get(k), values.get(k)))
    if wrong:
        raise CheckpointError(
            f"the adapter is not saved: {listed(wrong)}, read back from the file, differ from the "
            "model's; check the disk"
        )


def same_bits(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None or a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(*(t.reshape(-1).contiguous().view(torch.uint8) for t in (a, b)))


def values_in(folder: AdapterFolder) -> dict[str, Tensor]:
    path = located(folder.path, folder.source)
    names = {key: folder.renamed.get(key, key) for key in folder.tensors}
    if folder.source != TENSORS:
        held = read_pickled(path)
        return {key: held[name] for key, name in names.items()}
    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(name) for key, name in names.items()}


def fill(model: nn.Module, name: str, folder: AdapterFolder, about: str) -> None:
    """Copy a folder's tensors into an adapter's; CheckpointError unless every one fits."""
    found, entries = slots(model, name), folder.tensors
    own = {slot.key for slot in found}
    copies = {k: base for k in entries if k not in own for base in base_of(model, k)}
    check_entries(found, entries, computed(model, name, found), copies, about)
    values = values_in(folder)
    ends = ends_of(model)
    embeddings = {module_of(key): values[key] for key in copies if module_of(key) in ends}
    others = {key: base for key, base in copies.items() if module_of(key) not in embeddings}
    raise_problems(
        about,
        {
            "NaN or infinite": (k for k, v in values.items() if not bool(v.isfinite().all())),
            "unlike the base's own": (k for k, base in others.items() if differs(values[k], base)),
            COMPUTED: unlike(values, computed(model, name, found, values)),
        },
    )
    put_values(model, name, found, values)
    weights = [slot.key for slot in found if slot.name == "weight"]
    copied = {key.removeprefix(PREFIX).removeprefix(OF_PROMPTS) for key in weights}
    kept = {n: value for n, value in embeddings.items() if f"{n}.weight" not in copied}
    keep_embeddings(model, name, kept)


def check_entries(
    found: list[Slot],
    entries: Mapping[str, Entry],
    computed_values: Mapping[str, Tensor],
    copies: Mapping[str, Tensor],
    about: str,
) -> None:
    """`copies` are the base's own parameters that the file repeats."""
    expected = {**copies, **{slot.key: slot.written for slot in found}, **computed_values}
    misfits = (
        misfit(key, entries[key], tensor, key in copies)
        for key, tensor in expected.items()
        if key in entries
    )
    raise_problems(
        about,
        {
            "missing": missing(found, entries),
            "not used by it": (key for key in entries if key not in expected),
            "misfits": (problem for each in misfits for problem in each),
        },
    )


def put_values(
    model: nn.Module, name: str, found: list[Slot], values: Mapping[str, Tensor]
) -> None:
    separate(found, values)
    allocate(model, name)
    with torch.no_grad():
        for slot in found:
            if slot.key in values:
                slot.tensor.copy_(slot.layout.read(values[slot.key]))


def separate(found: list[Slot], values: Mapping[str, Tensor]) -> None:
    """Give each module its own tensor where shared ones differ in the file."""
    first: dict[int, Slot] = {}
    for slot in found:
        if slot.key not in values:
            continue
        other = first.setdefault(id(slot.tensor), slot)
        if not torch.equal(values[slot.key], values[other.key]):
            own = nn.Parameter(slot.tensor.detach().clone(), slot.tensor.requires_grad)
            slot.home.register_parameter(slot.name, own)


def missing(found: list[Slot], entries: Mapping[str, Entry]) -> Iterator[str]:
    """Return the keys that the file lacks; a shared tensor needs only one of its keys."""
    there = {id(slot.tensor) for slot in found if slot.key in entries}
    return (slot.key for slot in found if id(slot.tensor) not in there)


def unlike(values: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> Iterator[str]:
    """Yield the keys of values that are not, to rounding, what is computed from the others."""
    for key in {*values} & {*expected}:
        room = max(1e-4, 8 * torch.finfo(values[key].dtype).eps) * expected[key].abs().max()
        if bool(((values[key].to(expected[key]) - expected[key]).abs() > room).any()):
            yield key


def misfit(key: str, entry: Entry, tensor: Tensor, is_copy: bool) -> Iterator[str]:
    if entry.shape != tuple(tensor.shape):
        expected = f"expected {list(tensor.shape)}"
        if is_copy and entry.shape[1:] == tuple(tensor.shape[1:]):
            expected += f" (call model.resize_token_embeddings({entry.shape[0]}))"
        yield f"{key} of shape {list(entry.shape)}, {expected}"
    elif not tensor.is_floating_point():
        if INTEGERS.get(entry.dtype) != tensor.dtype:
            yield f"{key} of dtype {entry.dtype}, expected {tensor.dtype}"
    elif entry.dtype not in FLOATING:
        yield f"{key} of dtype {entry.dtype}, expected a floating-point one"
    elif not is_copy and torch.promote_types(FLOATING[entry.dtype], tensor.dtype) != tensor.dtype:
        yield f"{key} of dtype {entry.dtype}, which does not fit into {tensor.dtype}"


def base_of(model: nn.Module, key: str) -> Iterator[Tensor]:
    """Yield the base's parameter that a key copies: HF PEFT writes the whole embeddings too."""
    module_name = module_of(key)
    parameter = "weight"
    if not module_name:
        module_name, _, parameter = key.removeprefix(PREFIX).rpartition(".")
        module_name = module_name.removesuffix(".base_layer")
    if key.startswith(PREFIX) and module_name in dict(model.named_modules()):
        module = model.get_submodule(module_name)
        if isinstance(module, StreamedEmbedding) and parameter == "weight":
            yield module.turned(module.dequantize())
        yield from (p for n, p in own_parameters(module) if n == parameter)


def differs(value: Tensor, base: Tensor) -> bool:
    """Return whether a copy of a base parameter is another value in the base's precision."""
    return not torch.equal(value.to(base.dtype), base.detach().cpu())


def raise_problems(about: str, problems: Mapping[str, Iterable[str]]) -> None:
    found = {problem: list(keys) for problem, keys in problems.items()}
    parts = [f"{len(keys)} {problem}: {listed(keys)}" for problem, keys in found.items() if keys]
    if parts:
        raise CheckpointError(f"{about}. Tensors {'; '.join(parts)}")


def listed(keys: list[str], most: int = 3) -> str:
    more = f" and {len(keys) - most} more" if len(keys) > most else ""
    return ", ".join(keys[:most]) + more
