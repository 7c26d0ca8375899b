"""The plan of a task on a model with a head: its rows read once, or rows of full length."""

from __future__ import annotations

from collections.abc import Callable

from transformers import PreTrainedTokenizerBase

from inlay.data.inputs import UNKNOWN_LENGTH, InputRow, longest_input
from inlay.data.rows import Rows
from inlay.errors import UsageError
from inlay.memory.devices import Device
from inlay.memory.skeleton import config_of
from inlay.methods.base import PromptMethod
from inlay.methods.catalog import catalog
from inlay.model.fast.padding import MULTIPLE
from inlay.model.load.folder import located
from inlay.model.load.libraries import quiet_transformers
from inlay.model.load.tokenizer import has_tokenizer, read_tokenizer
from inlay.run.config import RunConfig
from inlay.train import planning
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
    """Return how many tokens a row may have with this model, beside a prompt's virtual ones.

    Raises:
        UsageError: these leave no room.
    """
    virtual, limit = virtual_tokens(config), context(config)
    if not virtual:
        return longest_input(tokenizer, config.max_length, limit)
    whole = longest_input(tokenizer, UNKNOWN_LENGTH, limit)
    room = whole - virtual
    if limit and limit % MULTIPLE == 0:  # batches are padded to such a length
        room -= room % MULTIPLE
    if room < 1:
        raise UsageError(
            f"tokens is {virtual}, and the model takes {whole} tokens in all, in steps of "
            f"{MULTIPLE}: fewer virtual tokens leave room for the text"
        )
    return min(config.max_length, room)


def virtual_tokens(config: RunConfig) -> int:
    """Return how many virtual tokens a run's method puts before every row."""
    spec = catalog()[config.method]
    if spec.kind != PromptMethod.__name__:
        return 0
    return int(config.hyperparameters.get("tokens", spec.fields["tokens"].default))


def context(config: RunConfig) -> int | None:
    """Return how many positions a run's model has, where its configuration says."""
    shape, _ = config_of(config.model, config.revision)
    return getattr(shape.get_text_config(), "max_position_embeddings", None)


def full_row(config: RunConfig) -> InputRow:
    """Return a row as long as the run and the model allow."""
    room = (context(config) or UNKNOWN_LENGTH) - virtual_tokens(config)
    return InputRow([0] * max(1, min(config.max_length, room)), 0)
