"""Conversations as tokens: which of them the assistant says, told by the model's chat template."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from inlay.data.rows import Rows
from inlay.data.tokens import Encoded
from inlay.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def chat_tokens(
    rows: Rows, index: int, tokenizer: PreTrainedTokenizerBase, chat_template: str | None
) -> Encoded:
    """Return a conversation, trained where the assistant speaks."""
    from jinja2 import TemplateError

    template = chat_template or own_template(tokenizer)
    messages = rows.rows[index]["messages"]
    try:
        if GENERATION.search(template):
            return marked_chat(tokenizer, messages, template)
        return plain_chat(tokenizer, messages, template)
    except TemplateError as error:
        raise DataError(
            f"{rows.where(index)}: the model's chat template refuses the messages: {error}"
        ) from error


def own_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the tokenizer's chat template."""
    template: Any = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if not isinstance(template, str):
        raise ModelError(
            "the model's tokenizer has no chat template, which messages need; take a chat model, "
            "or write the rows as prompt and completion"
        )
    return template


def marked_chat(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], template: str
) -> Encoded:
    """Return a conversation whose template marks what is generated."""
    found: Any = tokenizer.apply_chat_template(
        messages,
        chat_template=template,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        tokenizer_kwargs={"verbose": False},
    )
    ids = list(found["input_ids"])
    return Encoded(ids, [bool(mark) for mark in found["assistant_masks"]], len(ids))


def plain_chat(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], template: str
) -> Encoded:
    """Return a conversation whose template marks nothing: what each turn adds is generated."""

    def render(upto: int, generate: bool) -> str:
        text: Any = tokenizer.apply_chat_template(
            messages[:upto],
            chat_template=template,
            tokenize=False,
            add_generation_prompt=generate,
        )
        return text

    text = render(len(messages), False)
    spans: list[tuple[int, int]] = []
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            before, after = render(number, True), render(number + 1, False).rstrip()
            if not (text.startswith(after) and after.startswith(before)):
                raise ModelError(
                    "the model's chat template writes a turn otherwise once more turns follow, so "
                    "that what the assistant generates cannot be told; give a template with "
                    "{% generation %} marks"
                )
            spans.append((len(before), len(after)))
    encoding: Any = tokenizer(
        text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    trained = [
        any(start < to and begin < end for begin, to in spans)
        for start, end in encoding["offset_mapping"]
    ]
    return Encoded(list(encoding["input_ids"]), trained, len(trained))
