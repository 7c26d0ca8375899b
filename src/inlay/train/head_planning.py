"""The plan of a task on a model with a head: its rows read once, or rows of full length."""

from __future__ import annotations

from collections.abc import Callable

from transformers import PreTrainedTokenizerBase

from inlay.data.inputs import InputRow, longest_input
from inlay.data.rows import Rows
from inlay.memory.devices import Device
from inlay.memory.skeleton import config_of
from inlay.model.folder import located
from inlay.model.libraries import quiet_transformers
from inlay.model.tokenizer import has_tokenizer, read_tokenizer
from inlay.train import planning
from inlay.train.config import RunConfig
from inlay.train.rows import rows_of_run

Planned = Callable[[RunConfig, int], planning.Rows]
"""Returns a run's largest batch, its rows padded to a multiple."""


def reader(
    config: RunConfig,
    device: Device,
    prepare: Callable[[Rows, PreTrainedTokenizerBase], Planned] | None,
    assumed: Callable[[RunConfig], planning.Rows],
) -> Callable[[RunConfig], planning.Rows]:
    """Return what works out a run's largest batch; the rows are read and encoded once.

    Args:
        config: the run.
        device: where it runs.
        prepare: what encodes the training rows; None where there are none to read.
        assumed: what returns a batch of full length.
    """
    _, where = config_of(config.model, config.revision)
    if prepare is None or (where.exists() and not has_tokenizer(where)):
        return assumed
    with quiet_transformers():
        tokenizer = read_tokenizer(located(config.model, config.revision), False)
    planned = prepare(rows_of_run(config).train, tokenizer)
    multiple = planning.padding_multiple(config, device)
    return lambda changed: planned(changed, multiple)


def longest_row(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return how many tokens a row may have with this model."""
    return longest_input(tokenizer, config.max_length, context(config))


def context(config: RunConfig) -> int | None:
    """Return how many positions a run's model has, where its configuration says."""
    shape, _ = config_of(config.model, config.revision)
    return getattr(shape.get_text_config(), "max_position_embeddings", None)


def full_row(config: RunConfig) -> InputRow:
    """Return a row as long as the run and the model allow."""
    return InputRow([0] * min(config.max_length, context(config) or config.max_length), 0)
