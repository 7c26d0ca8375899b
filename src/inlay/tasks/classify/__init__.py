"""A class, several, a number, or a tag for each word, by a new head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from inlay.data.raw import RawRow
from inlay.data.rows import Rows
from inlay.evaluate.titles import Titles
from inlay.run.config import RunConfig, Text
from inlay.tasks.classify.rows import LABELLED, LabelKind, normalise_labels
from inlay.train.task import HEADED, Task

if TYPE_CHECKING:
    from inlay.tasks.classify.run import ClassifyRun

PROBLEMS = {
    "single_label_classification": "single",
    "multi_label_classification": "multi",
    "regression": "regression",
}
"""What transformers calls a problem -> the kind of label."""


class ClassifyConfig(RunConfig):
    """A run on labels."""

    kind: LabelKind = Field(
        "auto",
        description="classify: single (one class per row), multi (several), regression (a number), "
        "tokens (a tag per word) or auto: from the data",
    )
    text_pair: Text | None = Field(
        None, description="classify: column or template of a second text; default: text_pair"
    )
    label: Text | None = Field(
        None, description="classify: column of the label; default: label, labels or tags"
    )


class Classify(Task):
    name = "classify"
    about = "a class, several, a number, or a tag for each word, by a new head"
    options = ClassifyConfig
    fixed = HEADED
    titles = Titles(
        {
            "exact_labels": "all labels right",
            "macro_f1": "macro F1",
            "micro_f1": "micro F1",
            "rmse": "RMSE",
            "mae": "MAE",
            "pearson": "Pearson correlation",
            "spearman": "Spearman correlation",
            "entity_f1": "entity F1",
        },
        curves={"accuracy": "accuracy"},
    )
    has_head = True

    def read(self, raw: Sequence[RawRow], config: ClassifyConfig, group: str | None) -> Rows:
        return normalise_labels(
            raw,
            kind=config.kind,
            text=config.text,
            text_pair=config.text_pair,
            label=config.label,
            group=group,
            skip_empty=config.skip_empty,
        )

    def read_held_out(self, raw: Sequence[RawRow], config: ClassifyConfig, train: Rows) -> Rows:
        return self.read(raw, config.model_copy(update={"kind": LABELLED[train.kind]}), None)

    def trained(self, head: Mapping[str, Any]) -> bool:
        whole_rows = head.get("purpose") == "sequence"
        return head.get("purpose") == "tokens" or (whole_rows and head.get("problem") is not None)

    def keys_of_head(self, head: Mapping[str, Any]) -> dict[str, Any]:
        tokens = head.get("purpose") == "tokens"
        return {"kind": "tokens" if tokens else PROBLEMS.get(str(head.get("problem")), "auto")}

    def run(self, config: ClassifyConfig) -> ClassifyRun:
        from inlay.tasks.classify.run import ClassifyRun

        return ClassifyRun(self, config)
