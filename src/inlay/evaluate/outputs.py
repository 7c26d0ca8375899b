"""What a model with a head gives for each row."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from inlay.data.inputs import InputRow
from inlay.data.padding import pad
from inlay.errors import ModelError
from inlay.evaluate.losses import Progress, buckets
from inlay.methods.base import evaluating
from inlay.model.fast.padding import length_multiple
from inlay.model.merge.fidelity import first_tensor


def padding_of(model: nn.Module) -> int:
    config: Any = model.config
    return config.get_text_config().pad_token_id or 0


def padded_inputs(rows: Sequence[InputRow], padding: int, multiple: int) -> dict[str, Tensor]:
    """Return rows under one another, filled on the right; each tensor (rows, longest)."""
    found = {
        "input_ids": pad([row.input_ids for row in rows], padding, multiple),
        "attention_mask": pad([[1] * len(row.input_ids) for row in rows], 0, multiple),
    }
    if all(row.types is not None for row in rows):
        found["token_type_ids"] = pad([row.types or () for row in rows], 0, multiple)
    return found


def accepted(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    known = inspect.signature(model.forward).parameters
    return {name: x for name, x in batch.items() if name in known and name != "labels"}


def outputs(
    model: nn.Module,
    rows: Sequence[InputRow],
    batch_size: int = 8,
    *,
    lines: Sequence[int] | None = None,
    on_progress: Progress | None = None,
) -> list[Tensor]:
    """Return each row's logits or hidden states, in the rows' order, padding left out.

    Args:
        model: a model of one output a row, (classes), or of one a token, (tokens, classes).
        rows: the rows as tokens.
        batch_size: rows in one forward pass, of similar length.
        lines: the rows' lines in their file, for error messages; else numbered from 1.
        on_progress: called after each batch with (rows done, rows in all).
    """
    found: dict[int, Tensor] = {}
    with evaluating(model), torch.no_grad():
        for batch, inputs in padded_batches(model, rows, batch_size, on_progress):
            given = first_tensor(model(**accepted(model, inputs))).float().cpu()
            for i, output in zip(batch, given, strict=True):
                own = output[: len(rows[i].input_ids)] if given.dim() == 3 else output
                check_finite(own, i, lines)
                found[i] = own
    return [found[i] for i in range(len(rows))]


def padded_batches(
    model: nn.Module, rows: Sequence[InputRow], batch_size: int, on_progress: Progress | None
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    device, done = next(model.parameters()).device, 0
    for batch in buckets([len(row.input_ids) for row in rows], batch_size):
        chosen = [rows[i] for i in batch]
        inputs = padded_inputs(chosen, padding_of(model), length_multiple(model))
        yield batch, {name: x.to(device) for name, x in inputs.items()}
        done += len(batch)
        if on_progress is not None:
            on_progress(done, len(rows))


def check_finite(output: Tensor, index: int, lines: Sequence[int] | None) -> None:
    if not bool(torch.isfinite(output).all()):
        line = index + 1 if lines is None else lines[index]
        raise ModelError(
            f"the model gives an output that is not finite on the row of line {line}: its weights "
            "or adapter are not finite, or its dtype overflows (try dtype bfloat16 or float32)"
        )
