"""The model card beside an adapter."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from inlay.methods.base import Method

TEXT = """\
---
{front}
---

# {title}

An adapter made with inlay: {method}, {count:,} trained values.
It needs its base model, {base}.

| hyperparameter | value |
|---|---|
{rows}

```python
import inlay

model, tokenizer = inlay.load({base_code})
inlay.load_adapter(model, "path/to/this/folder")
```
{peft}"""

PEFT = """
HF PEFT reads it too: `PeftModel.from_pretrained(model, "path/to/this/folder")`.
"""


def card(
    method: Method,
    hyperparameters: Mapping[str, object],
    base: str | None,
    count: int,
    differs: Sequence[str] = (),
) -> str:
    """Return the text of an adapter's README.md."""
    kind = [method.peft_type.lower()] if method.peft_type else []
    tags = dict.fromkeys(["inlay", method.name, *kind])
    front = [f"base_model: {json.dumps(base)}"] if base else []
    front += ["library_name: peft", "tags:", *(f"- {tag}" for tag in tags)]
    rows = [f"| {key} | `{json.dumps(value)}` |" for key, value in hyperparameters.items()]
    return TEXT.format(
        front="\n".join(front),
        title=f"{method.name} adapter" + (f" for {base}" if base else ""),
        method=method.name,
        count=count,
        base=f"`{base}`" if base else "which this folder does not name",
        rows="\n".join(rows),
        base_code=json.dumps(base or "the base model"),
        peft=peft_text(method, differs),
    )


def peft_text(method: Method, differs: Sequence[str]) -> str:
    """Return what the card says of HF PEFT."""
    if method.peft_type is None:
        return ""
    rows = "\n".join(f"- {each}" for each in differs)
    return f"\nHF PEFT 0.21 computes otherwise or cannot load it:\n\n{rows}\n" if rows else PEFT
