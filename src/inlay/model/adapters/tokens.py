"""Rows of embeddings that an adapter trains or brings: where they go, tied heads included."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from inlay.errors import AdapterError, TargetError, UsageError, did_you_mean
from inlay.methods.base import Params, stored
from inlay.methods.tokens import give_tokens
from inlay.model.adapters.entries import Entry, nearest
from inlay.model.adapters.layer import own_modules
from inlay.model.adapters.targets import Found, output_head
from inlay.storage.base import FrozenLinear
from inlay.storage.registry import frozen, matrix_kind

Tokens = Sequence[int] | Mapping[str, Sequence[int]]
"""Ids of the input embedding's rows, or ids by the name of a module."""


def token_rows(
    model: nn.Module, tokens: Tokens, saved: Collection[str]
) -> tuple[dict[str, Params], dict[str, tuple[int, ...]]]:
    """Return the rows to train by module, tied ones shared, and the ids that were asked for.

    `saved` names the modules that train whole.
    """
    ids_by_name = by_whole_name(model, tokens)
    found: dict[str, Params] = {}
    for name, ids in ids_by_name.items():
        if name in found:
            continue
        if name in saved:
            raise AdapterError(
                f"{name} trains whole, as modules_to_save says, so no token's row trains apart; "
                "leave it out of modules_to_save or of trainable_tokens"
            )
        module = model.get_submodule(name)
        check_ids(name, module, ids)
        rows = nn.Parameter(rows_of(module, ids))
        # Rows of the embedding go to a tied head too; rows of the head alone stay there.
        tied = tied_to(model, name) if name == input_name(model) else ()
        sharing = [n for n in tied if ids_by_name.get(n, ids) == ids and n not in saved]
        for each in (name, *sharing):
            found[each] = Params({"token_rows": rows})
            give_tokens(found[each], "token_rows", ids)
    return found, ids_by_name


def by_whole_name(model: nn.Module, tokens: Tokens) -> dict[str, tuple[int, ...]]:
    """Return the ids by the whole name of each module, an input embedding before its head."""
    first = input_name(model)
    if not isinstance(tokens, Mapping):
        if not len(tokens):
            return {}
        if first is None:
            raise TargetError(
                f"this {type(model).__name__} does not say which module is its input embedding; "
                "give trainable_tokens as a mapping from the module's name to ids"
            )
        return {first: tuple(tokens)}
    names = [n for n, _ in own_modules(model) if n]
    found: dict[str, tuple[int, ...]] = {}
    for entry, ids in tokens.items():
        here = [n for n in names if Entry(entry).matches(n)]
        if not here:
            raise TargetError(f"trainable_tokens names {entry!r}, no module{nearest(entry, names)}")
        found |= {n: tuple(ids) for n in here}
    return dict(sorted(found.items(), key=lambda item: item[0] != first))


def check_ids(name: str, module: nn.Module, ids: Sequence[int]) -> None:
    if matrix_kind(module) not in ("linear", "conv1d", "embedding"):
        raise TargetError(
            f"trainable_tokens names {name!r}, a {type(module).__name__}, which has no rows of "
            "tokens that can train apart; train it whole with modules_to_save"
        )
    count = row_count(module)
    wrong = [i for i in ids if not 0 <= i < count]
    if wrong or not ids:
        raise AdapterError(
            f"trainable_tokens has {wrong[0] if wrong else 'no ids'}, and {name} has rows 0 to "
            f"{count - 1}; call model.resize_token_embeddings first where tokens were added"
        )
    if len(set(ids)) < len(ids):
        twice = max(ids, key=list(ids).count)
        raise AdapterError(f"trainable_tokens names token {twice} twice for {name}")


def input_name(model: nn.Module) -> str | None:
    return name_of(model, input_embeddings(model))


def input_embeddings(model: nn.Module) -> nn.Module | None:
    getter: Any = getattr(model, "get_input_embeddings", None)
    try:
        return getter() if getter else None
    except (AttributeError, NotImplementedError):
        return None


def name_of(model: nn.Module, module: nn.Module | None) -> str | None:
    return next((n for n, m in own_modules(model) if m is module), None)


def tied_to(model: nn.Module, name: str) -> Iterator[str]:
    """Yield every other module whose rows are the same tensor, or are meant to be."""
    module = model.get_submodule(name)
    own = module._parameters.get("weight")
    config: Any = getattr(model, "config", None)
    says_tied = bool(getattr(config, "tie_word_embeddings", False))
    head = output_head(model) if says_tied and module is input_embeddings(model) else None
    for other_name, other in own_modules(model):
        tied = other is head or (own is not None and other._parameters.get("weight") is own)
        if tied and other is not module and matrix_kind(other):
            yield other_name


def row_count(module: nn.Module) -> int:
    matrix = frozen(module)
    return matrix.shape[1] if is_embedding(matrix) else matrix.shape[0]


def is_embedding(matrix: FrozenLinear) -> bool:
    return "embedding" in (matrix.layer_kind, matrix.stands_for)


def rows_of(module: nn.Module, ids: Sequence[int]) -> Tensor:
    """Return copies of some rows, (ids, width), in the dtype that adapters are stored in."""
    matrix = frozen(module)
    places = torch.tensor(list(ids), device=matrix.device)
    with torch.no_grad():
        rows = matrix.matmul(places) if is_embedding(matrix) else matrix.dequantize(places)
        return stored(matrix, *rows.shape).copy_(rows)


def check_disjoint(rows: Collection[str], found: Found) -> None:
    """Raise when a layer is adapted and some of its rows train: HF PEFT's layout has no both."""
    both = [name for name in found.names if name in rows]
    if both:
        raise AdapterError(
            f"{both[0]} is both a target of the method and a layer whose tokens' rows train; "
            "leave it out of targets or of trainable_tokens (a tied head goes with its embedding)"
        )


def ids_of(words: Sequence[str | int], tokenizer: Any) -> list[int]:
    """Return the ids of tokens given as text or ids, each once; raise `UsageError` for others."""
    known: Mapping[str, int] = tokenizer.get_vocab() if words else {}
    found: dict[int, None] = {}
    for each in words:
        word = str(each)
        if word not in known and not word.isdecimal():
            raise UsageError(
                f"trainable_tokens names {word!r}, which is no token of the model's tokenizer"
                f"{did_you_mean(word, known)}; give a token as the vocabulary spells it, or its "
                "id. To train new tokens, add them to a copy of the model first: "
                "tokenizer.add_tokens, model.resize_token_embeddings, save_pretrained of both"
            )
        found[known[word] if each in known else int(word)] = None
    return list(found)
