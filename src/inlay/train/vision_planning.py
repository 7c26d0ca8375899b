"""The largest batch of rows with images, as the model sees it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from inlay.data.labelled import Labelled
from inlay.data.preference import Pair
from inlay.data.processor import ImageReader, Pictured, image_reader
from inlay.data.rows import Rows
from inlay.data.vision import ROOM, ImageInputs, bytes_of
from inlay.evaluate.losses import padded
from inlay.kernels.loss import IGNORED
from inlay.memory.devices import Device
from inlay.memory.skeleton import computing_dtype, config_of
from inlay.methods.catalog import build_method
from inlay.run.config import RunConfig
from inlay.train import planning
from inlay.train.mismatched import mismatched_in_batches
from inlay.train.rows import encode_labelled_rows, encode_pair_rows, encode_rows
from inlay.train.trainer import labels


def as_seen(config: RunConfig) -> RunConfig:
    """Return a run as rows with images take it.

    They are padded, and a method that would go to all layers goes to the language part's.
    """
    method = build_method(config.method, config.hyperparameters)
    all_layers = getattr(method, "own_targets", None) == "all-linear"
    targets = "language" if config.targets is None and all_layers else config.targets
    return config.model_copy(update={"packing": False, "targets": targets})


def side_by_side(rows: Sequence[Pictured], inputs: ImageInputs, multiple: int) -> dict[str, Tensor]:
    """Return rows padded on the right to the longest, with labels and what the model sees."""
    call = padded(rows, multiple).call
    width = call["input_ids"].shape[1]
    wanted = [[*labels(r), *[IGNORED] * (width - len(r.input_ids))] for r in rows]
    return {**call, "labels": torch.tensor(wanted), **inputs(rows, width=width)}


def rows_to_plan(
    config: RunConfig, rows: Sequence[Pictured], reader: ImageReader, multiple: int
) -> planning.Rows:
    """Return the batch with the most tokens, images' among them, as the model sees it."""
    return units_to_plan(config, [[row] for row in rows], reader, multiple)


def pairs_to_plan(
    config: RunConfig, pairs: Sequence[Pair], reader: ImageReader, multiple: int
) -> planning.Rows:
    """Return the largest batch of pairs, every chosen side and then every rejected one."""
    counted = planning.counted_in(config)
    units = [pictured([counted(pair.chosen), pair.rejected]) for pair in pairs]
    return units_to_plan(config, units, reader, multiple)


def labelled_to_plan(
    config: RunConfig, rows: Sequence[Labelled], reader: ImageReader, multiple: int
) -> planning.Rows:
    """Return the largest batch of answers, and the largest of answers to other rows' prompts."""
    others = mismatched_in_batches(rows, config.batch_size, config.seed, config.max_length)
    own = units_to_plan(config, [pictured([row.answer]) for row in rows], reader, multiple)
    unkept = units_to_plan(config, [pictured([row]) for row in others], reader, multiple)
    return planning.with_unkept(own, unkept.batch)


def pictured(rows: Sequence[object]) -> list[Pictured]:
    """Return rows as what they are where the run's rows have images."""
    return cast("list[Pictured]", list(rows))


def units_to_plan(
    config: RunConfig, units: Sequence[Sequence[Pictured]], reader: ImageReader, multiple: int
) -> planning.Rows:
    """Return the batch with the most tokens, of what each of the data's rows puts into one."""
    shape, _ = config_of(config.model, config.revision)
    inputs = ImageInputs(reader, computing_dtype(shape, config.dtype))
    lengths = [max(len(row.input_ids) for row in unit) for unit in units]
    largest = [units[number] for number in planning.largest_batch(as_seen(config), lengths)]
    batch = [row for side in zip(*largest, strict=True) for row in side]
    every = [row for unit in units for row in unit]
    return planning.Rows(
        side_by_side(batch, inputs, multiple),
        len(units),
        sum(len(row.input_ids) for row in every),
        sum(row.trained_tokens for row in every),
        beside=kept_bytes(batch, every, inputs),
        as_run=as_seen,
    )


def kept_bytes(batch: Sequence[Pictured], every: Sequence[Pictured], inputs: ImageInputs) -> int:
    """Return what is kept of prepared images, reckoned from a batch's bytes an image's token."""
    stands_for = inputs.reader.image_tokens

    def tokens(rows: Sequence[Pictured]) -> int:
        different = {row.images: row for row in rows}.values()
        return sum(token in stands_for for row in different for token in row.input_ids)

    different = {row.images: row for row in batch}.values()
    prepared = sum(bytes_of(inputs.of(row)) for row in different) / max(1, tokens(batch))
    return min(ROOM, int(prepared * tokens(every)))


def row_reader(
    config: RunConfig, rows: Rows, folder: Path, device: Device
) -> Callable[[RunConfig], planning.Rows]:
    """Return what works out a run's largest batch; the rows are encoded once."""
    reader = image_reader(folder, config.max_pixels)
    multiple = planning.padding_multiple(config, device)
    if rows.kind == "preference":
        pairs = encode_pair_rows(rows, reader, config.max_length)
        return lambda changed: pairs_to_plan(changed, pairs, reader, multiple)
    if rows.kind == "labelled":
        labelled = encode_labelled_rows(rows, reader, config.max_length)
        return lambda changed: labelled_to_plan(changed, labelled, reader, multiple)
    encoded = pictured(encode_rows(rows, reader, config.max_length))
    return lambda changed: rows_to_plan(changed, encoded, reader, multiple)
