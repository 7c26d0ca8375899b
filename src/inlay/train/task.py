"""What a task is: its keys, how its rows are read, and what a run of it does. No torch here."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from inlay.data.raw import RawRow
from inlay.data.rows import Rows
from inlay.evaluate.titles import ANSWERS, Titles
from inlay.run.config import RunConfig, RunWithImages

if TYPE_CHECKING:
    from inlay.train.task_run import TaskRun


@dataclass(frozen=True)
class Fixed:
    """The only value that a key may have under a task, beside `auto`, and why."""

    value: object
    reason: str


class Task(ABC):
    """One thing to train for. A task is one folder of `inlay/tasks`; `register` makes it known."""

    name: ClassVar[str]
    """The word in a run file: `task: dpo`."""
    about: ClassVar[str]
    """What is trained, in a few words."""
    options: ClassVar[type[RunConfig]] = RunConfig
    """The keys of its runs, its own among them."""
    fixed: ClassVar[Mapping[str, Fixed]] = {}
    """The keys of every run that it does not know."""
    titles: ClassVar[Titles] = ANSWERS
    """The words for its metrics, on the page and in the terminal."""
    learning_rate_factor: ClassVar[float] = 1.0
    """How the best learning rate stands to the one for supervised rows."""
    least_batch: ClassVar[int] = 1
    """The fewest rows that may go through the model together."""
    why_least: ClassVar[str] = ""
    has_head: ClassVar[bool] = False
    """Whether its model has a head in place of the language model's, and so writes no text."""
    needs_answers: ClassVar[bool] = True
    """Whether a prompt's column is nothing without one of answers."""
    answers_all_rows: ClassVar[bool] = True
    """Whether every row has an answer that a model should give."""
    rows_in_words: ClassVar[Mapping[str, str]] = {}
    """The kind of its rows -> what they are called in the terminal."""

    @property
    def sees_images(self) -> bool:
        return issubclass(self.options, RunWithImages)

    @property
    def own(self) -> dict[str, object]:
        """The keys that this task has and other runs need not have, with their defaults."""
        fields = self.options.model_fields
        return {k: f.default for k, f in fields.items() if k not in RunConfig.model_fields}

    def settled(self) -> dict[str, object]:
        """Return the values of the keys that the task does not know."""
        return {key: fixed.value for key, fixed in self.fixed.items()}

    def problems(self, config: Any) -> dict[str, str]:
        """Return a sentence for each key whose value is wrong under this task alone."""
        del config
        return {}

    def undividable(self, config: Any, own_rows: int, step_rows: int) -> dict[str, str]:
        """Return a sentence for each key that several processes cannot follow.

        Args:
            config: the run.
            own_rows: the rows of a step that each process runs.
            step_rows: the rows of a step.
        """
        del config, own_rows, step_rows
        return {}

    @abstractmethod
    def read(self, raw: Sequence[RawRow], config: Any, group: str | None) -> Rows:
        """Return rows as a run of this configuration reads them, every one checked.

        Raises:
            DataError: a row lacks what the task needs; names file and line.
        """

    def read_held_out(self, raw: Sequence[RawRow], config: Any, train: Rows) -> Rows:
        """Return held-out rows, of the kind that the training rows are."""
        del train
        return self.read(raw, config, None)

    def fits(self, row: RawRow, keys: Mapping[str, Any]) -> bool:
        """Return whether rows like this one are measured as the task's own."""
        del row, keys
        return False

    def trained(self, head: Mapping[str, Any]) -> bool:
        """Return whether an adapter whose folder says this of its head was trained for the task."""
        del head
        return False

    def keys_of_head(self, head: Mapping[str, Any]) -> dict[str, Any]:
        """Return the keys that an adapter's head decides."""
        del head
        return {}

    def merged_readers(self, folder: str) -> list[str]:
        """Return sentences on what else reads a merged model's folder."""
        del folder
        return []

    @abstractmethod
    def run(self, config: Any) -> TaskRun[Any, Any]:
        """Return what a run of this configuration does with its rows; imports torch."""


TASKS: dict[str, Task] = {}
"""Every task by its name; `inlay.tasks` fills it."""


def register(task: Task) -> None:
    """Make a task known to the command, the run file and the library."""
    TASKS[task.name] = task


PADDED: dict[str, Fixed] = {
    "cache_trunk": Fixed(False, "every row goes through the whole model"),
    "eight_bits": Fixed(False, "its gate measures the loss of supervised rows"),
}
"""What no task but the supervised one knows."""


def positive(key: str, value: float) -> dict[str, str]:
    """Return a sentence where a key that scales a loss is 0, so that the loss would be nothing."""
    return {} if value else {key: f"{key!r} must be a number above 0, not 0"}


def not_supervised(fields: str, padded: str) -> dict[str, Fixed]:
    """Return the keys that only supervised rows know, for rows of these fields."""
    columns = f"its rows have the fields {fields}"
    return {
        **{key: Fixed(None, columns) for key in ("prompt", "completion", "text")},
        "format": Fixed("auto", columns),
        "packing": Fixed(False, padded),
        **PADDED,
    }


NEW_HEAD = {"head_storage": Fixed("dense", "its own head takes that one's place")}
PREFERENCE = not_supervised(
    "prompt, chosen and rejected", "the two answers to a prompt are padded side by side"
)
"""What no task on preferences knows."""
HEADED: dict[str, Fixed] = {
    "format": Fixed("auto", "its rows are read by the columns' names"),
    "prompt": Fixed(None, "text names the input, and may be a template"),
    "completion": Fixed(None, "label names what is predicted"),
    "packing": Fixed(False, "rows are padded side by side"),
    **PADDED,
    **NEW_HEAD,
}
"""What no task on a model with a head knows."""
