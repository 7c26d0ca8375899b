"""The trunk's output for every row, kept, so that its blocks run once a row and not once an epoch.

The rows are known before training, so the cache is filled before it, in an order that depends on
the rows alone: a resumed run fills it with the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from inlay.errors import InlayError
from inlay.evaluate.losses import PADDING, EncodedRow, buckets, joined, padded
from inlay.methods.base import evaluating
from inlay.model.fast.packing import mixes_rows, positions, segments
from inlay.model.fast.padding import length_multiple
from inlay.model.seams.transformers import has_cache
from inlay.model.trunk import Trunk, changes, trunk_of
from inlay.train.features.cache import FeatureCache, Kept, in_memory, off_by

ROWS_AT_ONCE = 8


class TrunkCache(FeatureCache):
    """The trunk's output (tokens, width) for rows, found again by their tokens."""

    def __init__(self, trunk: Trunk, rows: Sequence[Sequence[int]], path: Path) -> None:
        super().__init__(path)
        self.trunk = trunk
        self.outputs: dict[tuple[int, ...], Kept | None] = dict.fromkeys(map(tuple, rows))

    def __str__(self) -> str:
        tokens = sum(map(len, self.outputs))
        return (
            f"blocks 0-{self.trunk.depth - 1} are frozen and ran once over {tokens} tokens; "
            f"their output is read from now on: {self.where()}"
        )

    def fill(self, packed: bool) -> None:
        """Run the trunk once over every row."""
        rows = [Row(row) for row in self.outputs]
        multiple = length_multiple(self.trunk.model)
        device = next(self.trunk.model.parameters()).device
        with evaluating(self.trunk.model), torch.no_grad():
            for batch in buckets([len(row.input_ids) for row in rows], ROWS_AT_ONCE):
                made = (joined if packed else padded)([rows[i] for i in batch], multiple)
                hidden = self.trunk.output(**{n: x.to(device) for n, x in made.call.items()})
                self.put(made.call, hidden)

    def put(self, call: dict[str, Tensor], hidden: Tensor) -> None:
        for sequence, start, end, row in rows_in(call):
            if self.outputs.get(row, hidden) is None:  # the same padding ends many batches
                self.outputs[row] = self.keep(hidden[sequence, start:end])

    def get(self, call: dict[str, Any]) -> Tensor | None:
        """Return the trunk's output for a call, or None unless all of its rows are here."""
        if call.get("input_ids") is None or has_cache(call):
            return None
        if call.get("position_ids") is not None and self.keeps_keys(call):
            return None
        found = list(rows_in(call))
        every = (self.outputs.get(row) for *_, row in found)
        kept = [each for each in every if each is not None]
        if not kept or len(kept) < len(found):
            return None
        ids, first = call["input_ids"], kept[0]
        hidden = torch.zeros(*ids.shape, first.shape[1], dtype=first.dtype)
        for (sequence, start, end, _), output in zip(found, kept, strict=True):
            hidden[sequence, start:end] = in_memory(output)
        return hidden.to(ids.device)

    def keeps_keys(self, call: dict[str, Any]) -> bool:
        """Return whether a call keeps keys and values: rows in one sequence then see each other."""
        config: Any = self.trunk.model.config
        wanted = call.get("use_cache")
        return bool(getattr(config, "use_cache", True) if wanted is None else wanted)

    def forget(self) -> None:
        self.outputs.clear()

    @contextmanager
    def reading(self) -> Generator[None]:
        """Let every call of the model inside the `with` block read the trunk from here."""
        undo: list[Callable[[], None]] = []

        def before(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            del model
            hidden = None if args else self.get(kwargs)
            if hidden is not None:
                undo.append(self.trunk.replace(hidden))

        def after(model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            del model, args, output
            while undo:
                undo.pop()()

        model = self.trunk.model
        hooks = [
            model.register_forward_pre_hook(before, with_kwargs=True),
            model.register_forward_hook(after, always_call=True),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def differs(self, rows: Sequence[Sequence[int]], packed: bool) -> str | None:
        """Return how far the model's logits with the trunk read are from its own, if too far."""
        model = self.trunk.model
        batch = (joined if packed else padded)([Row(row) for row in rows], length_multiple(model))
        device = next(model.parameters()).device
        call: dict[str, Any] = {name: x.to(device) for name, x in batch.call.items()}
        real = call["attention_mask"].bool() if not packed else batch.owner < len(rows)
        call["use_cache"] = False
        hidden = self.get(call)
        assert hidden is not None
        with evaluating(model), torch.no_grad():
            own = model(**call).logits[real]
            undo = self.trunk.replace(hidden)
            try:
                read = model(**call).logits[real]
            finally:
                undo()
        return off_by(read, own)


class Row:
    """A row of which nothing is measured."""

    def __init__(self, input_ids: Sequence[int]) -> None:
        self.input_ids, self.trained = input_ids, [False] * len(input_ids)


def rows_in(call: dict[str, Any]) -> Generator[tuple[int, int, int, tuple[int, ...]]]:
    """Yield (sequence, start, end, tokens) for every row of a call, padding on the right left out.

    A row whose positions do not run from 0 on is yielded without tokens.
    """
    ids, where, mask = (call.get(n) for n in ("input_ids", "position_ids", "attention_mask"))
    assert ids is not None
    for number, tokens in enumerate(ids.tolist()):
        line = positions([len(tokens)])[0] if where is None else where[number].cpu()
        edges = segments(line)
        if mask is not None:
            length = int(mask[number].sum())
            whole = mask.ndim == 2 and bool(mask[number, :length].all()) and len(edges) == 1
            edges = [(0, length if whole else 0)]
        for start, end in edges:
            yield number, start, end, tuple(tokens[start:end] if line[start] == 0 else ())


def cached_trunk(
    model: nn.Module,
    rows: Sequence[EncodedRow],
    training_rows: int,
    path: Path,
) -> TrunkCache | str:
    """Return the trunk's output for these rows, or why it cannot be kept.

    It goes to a file at `path` where it is too large for memory.
    Tried on the model first: the trunk has no dropout and no gradient, and the first training
    rows' logits are the same, to rounding, with the trunk read as with the trunk run.
    """
    trunk = trunk_of(model)
    if isinstance(trunk, str):
        return trunk
    tokens = [row.input_ids for row in rows]
    packed = mixes_rows(model, tokens) is None
    padding = [[PADDING] * n for n in range(1, length_multiple(model))] if packed else []
    cache = TrunkCache(trunk, [*tokens, *padding], path)
    tried = tokens[: min(training_rows, 4)]
    device = next(model.parameters()).device
    try:
        first = torch.tensor([list(tokens[0])], device=device)
        reason = changes(trunk, {"input_ids": first})
        if reason is not None:
            return reason
        cache.fill(packed)
        return cache.refused(cache.differs(tried, packed)) or cache
    except (InlayError, OSError) as error:
        return cache.refused(str(error))
