"""A model and the pooling that makes one vector of a text, as sentence-transformers has them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from inlay.data.inputs import InputRow
from inlay.errors import ModelError, UsageError
from inlay.evaluate.losses import Progress
from inlay.evaluate.outputs import accepted, padded_batches
from inlay.methods.base import evaluating
from inlay.model.load.folder import located

MODULES = "modules.json"
RENAMED = {"sentence_transformers.models": "sentence_transformers.sentence_transformer.modules"}
"""Where folders of older releases say that modules are, and where they are."""
OURS = "sentence_transformers."
"""The package that a module of a model's folder must be of; others would run the folder's code."""


class Embedder(nn.Module):
    """A model with poolings behind it; what sentence-transformers' losses call.

    It holds the model without owning it: its parameters are the model's own.
    """

    def __init__(self, model: PreTrainedModel, behind: Sequence[nn.Module]) -> None:
        super().__init__()
        self.__dict__["inner"] = model
        self.behind = nn.ModuleList(behind)

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        """Return the features with `sentence_embedding`, (rows, width)."""
        model: Any = self.__dict__["inner"]
        hidden = model(**accepted(model, features)).last_hidden_state
        found = {**features, "token_embeddings": hidden}
        for module in self.behind:
            found = module(found)
        return found

    def embed(
        self, rows: Sequence[InputRow], batch_size: int, on_progress: Progress | None = None
    ) -> Tensor:
        """Return each row's vector, (rows, width), in the rows' order."""
        model: Any = self.__dict__["inner"]
        found: dict[int, Tensor] = {}
        with evaluating(model), torch.no_grad():
            for batch, inputs in padded_batches(model, rows, batch_size, on_progress):
                vectors = self(inputs)["sentence_embedding"].float().cpu()
                found.update(zip(batch, vectors, strict=True))
        vectors = torch.stack([found[i] for i in range(len(rows))])
        if not bool(torch.isfinite(vectors).all()):
            raise ModelError(
                "the model gives embeddings that are not finite: its weights or adapter are not "
                "finite, or its dtype overflows (try dtype bfloat16 or float32)"
            )
        return vectors


def check_installed() -> None:
    if find_spec("sentence_transformers") is None:
        raise UsageError(
            "the task 'embed' is sentence-transformers', which is not installed; run "
            "pip install 'inlay[embed]'"
        )


def embedder(model: PreTrainedModel, base: str, revision: str | None, pooling: str) -> Embedder:
    """Return a model with its folder's own poolings, or with the one that is asked for."""
    check_installed()
    behind = [] if pooling != "auto" else modules_in(located(base, revision))
    if not behind:
        behind = [pooling_of(model, "mean" if pooling == "auto" else pooling)]
    for module in behind:
        module.requires_grad_(False).to(model.device)
    return Embedder(model, behind)


def pooling_of(model: PreTrainedModel, mode: str) -> nn.Module:
    from sentence_transformers.sentence_transformer.modules import Pooling

    width: int = model.config.get_text_config().hidden_size
    pool: Any = Pooling
    return pool(width, pooling_mode=mode)


def modules_in(folder: Path) -> list[nn.Module]:
    """Return the modules that a folder names behind its model; none where it names none."""
    path = folder / MODULES
    if not path.is_file():
        return []
    try:
        named = [(str(x["type"]), str(x["path"])) for x in json.loads(path.read_text("utf-8"))]
        return [module_in(folder, kind, inner) for kind, inner in named[1:]]
    except (ValueError, KeyError, TypeError, AttributeError, OSError, ImportError) as error:
        raise ModelError(
            f"{path} names modules that cannot be read ({type(error).__name__}: {error}); name a "
            "pooling, such as mean, to train without them"
        ) from error


def module_in(folder: Path, kind: str, inner: str) -> nn.Module:
    if not kind.startswith(OURS):
        raise ModelError(
            f"{folder / MODULES} names {kind}, code of its own; name a pooling, such as mean, to "
            "train without it"
        )
    home, _, name = kind.rpartition(".")
    home = RENAMED.get(home, home)
    cls: Any = getattr(import_module(home), name)
    return cls.load(str(folder), subfolder=inner)


def longest_in(base: str, revision: str | None) -> int | None:
    """Return how many tokens a folder says that its model reads of a text; None where it does not.

    What is cut there when it is used cannot have been trained on.
    """
    path = located(base, revision) / "sentence_bert_config.json"
    said = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    return said.get("max_seq_length")


def prompts_in(base: str, revision: str | None) -> list[str]:
    """Return the prompts that a model's folder sets before texts."""
    path = located(base, revision) / "config_sentence_transformers.json"
    said = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    return [text for text in (said.get("prompts") or {}).values() if text]


def save_modules(folder: Path, behind: Sequence[nn.Module], longest: int) -> None:
    """Make a saved model's folder one that sentence-transformers loads, poolings and all."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Transformer

    reader: Any = Transformer(str(folder))
    reader.max_seq_length = longest
    whole = SentenceTransformer(modules=[reader, *behind], device="cpu")
    whole.save_pretrained(str(folder), create_model_card=False)
