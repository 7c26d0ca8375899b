"""What runs of a model with a head share: how long a row may be, and what is shown of rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from inlay.data.inputs import UNKNOWN_LENGTH, InputRow, longest_input
from inlay.data.rows import Rows
from inlay.errors import UsageError
from inlay.evaluate.outputs import padding_of
from inlay.memory.skeleton import config_of
from inlay.methods.base import PromptMethod
from inlay.methods.catalog import catalog
from inlay.model.fast.padding import MULTIPLE
from inlay.run.config import RunConfig
from inlay.train.overview import Example, LabelledRows, label_part, parts_of
from inlay.train.rows import RunRows
from inlay.train.task_run import Config, Row, TaskRun, Tokens


class HeadRun(TaskRun[Config, Row]):
    """A run that trains a model with a head in place of the language model's."""

    padding: int = 0
    """The token that fills short rows."""

    def prepare(self, model: PreTrainedModel, tokens: Tokens[Row], record: dict[str, Any]) -> None:
        del tokens, record
        self.padding = padding_of(model)

    @cached_property
    def longest(self) -> int:
        """The most tokens that a text may have."""
        return longest_row(self.config, self.tokenizer)

    def trained_tokens(self, rows: Sequence[Row]) -> int:
        return len(rows)

    def full_text(self) -> InputRow:
        room = (context(self.config) or UNKNOWN_LENGTH) - virtual_tokens(self.config)
        return InputRow([0] * max(1, min(self.config.max_length, room)), 0)

    def note_shorter_model(self, what: str) -> None:
        if self.longest < self.config.max_length:
            self.note(f"the model takes {what} of {self.longest} tokens, fewer than max_length")

    def overview(self, rows: RunRows, show: int) -> LabelledRows:
        encoded = {name: self.encode(part) for name, part in parts_of(rows).items()}
        parts = {
            name: label_part(found, part.lines, self.texts, self.labels(part))
            for (name, part), found in zip(parts_of(rows).items(), encoded.values(), strict=True)
        }
        first = enumerate(encoded["train"][:show])
        examples = [each for i, row in first for each in self.examples(rows.train, i, row)]
        return LabelledRows(self.kind_of(rows.train), self.longest, parts, examples)

    def kind_of(self, rows: Rows) -> str:
        return rows.kind.replace("_", " ")

    def labels(self, rows: Rows) -> Iterable[str]:
        """Return the classes that rows name, repeats included."""
        del rows
        return ()

    def examples(self, rows: Rows, index: int, row: Row) -> Iterable[Example]:
        raise NotImplementedError

    def example(
        self, where: str, text: InputRow, answer: str, marked: Sequence[bool] | None = None
    ) -> Example:
        pieces = [str(self.tokenizer.decode([token])) for token in text.input_ids]
        return Example(where, pieces, list(marked or [False] * len(pieces)), answer)


def longest_row(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return how many tokens a row may have with this model, without a prompt's virtual ones."""
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
    """Return the positions of a run's model; None if its configuration gives none."""
    shape, _ = config_of(config.model, config.revision)
    return getattr(shape.get_text_config(), "max_position_embeddings", None)
