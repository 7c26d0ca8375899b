"""A prompt's names as HF PEFT has them, where a wrapped model has no other adapter.

HF PEFT puts no tuner around such a model: its parameters are `base_model.<name>`, and the prompt is
`prompt_encoder.<adapter>.embedding.weight`.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, Any

from peft import PeftConfig
from torch import nn

from inlay.checkpoint.tensors import slots
from inlay.methods.base import Params
from inlay.peft.views import Leaf, nested

if TYPE_CHECKING:
    Base = nn.Module
else:
    Base = object


class PromptNames(Base):
    """What of a wrapped model's names is other where it has prompts only."""

    base_model: Any

    def configured(self) -> dict[str, PeftConfig]:
        """Return the adapters' configurations."""
        return self.base_model.peft_config if "base_model" in self._modules else {}

    def only_prompts(self) -> bool:
        """Say whether every adapter here is a prompt."""
        configs = self.configured().values()
        return bool(configs) and all(config.is_prompt_learning for config in configs)

    @property
    def prompt_encoder(self) -> nn.ModuleDict:
        """Each prompt's values, as the embedding that HF PEFT has."""
        found = nn.ModuleDict({name: self.encoder(name) for name in self.prompts()})
        return found.train(self.training)

    def prompts(self) -> list[str]:
        """Return the names of the adapters that are prompts."""
        return [n for n, config in self.configured().items() if config.is_prompt_learning]

    def encoder(self, name: str) -> nn.Module:
        """Return one prompt as HF PEFT's module: an embedding, and the layers of an encoder."""
        homes: dict[str, dict[str, tuple[Params, str]]] = {}
        for slot in slots(self.base_model.model, name):
            first, _, rest = slot.key.partition(".")
            if first in ("prompt_embeddings", "prompt_encoder"):
                place, _, tensor = (rest or "embedding.weight").rpartition(".")
                homes.setdefault(place, {})[tensor] = (slot.home, slot.name)
        found: dict[str, nn.Module] = {}
        for place, here in homes.items():
            nested(found, place, Leaf(here))
        return nn.ModuleDict(found)

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """Every child by name, prompts first."""
        if self.only_prompts():
            yield "prompt_encoder", self.prompt_encoder
        yield from super().named_children()

    def children(self) -> Iterator[nn.Module]:
        """Every child once: what moves, casts and trains the tensors need not see them twice."""
        yield from (m for m in self._modules.values() if m is not None)

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Generator[tuple[str, nn.Module]]:
        """Every module below by name, as HF PEFT names them."""
        if not self.only_prompts():
            yield from super().named_modules(memo, prefix, remove_duplicate)
            return
        memo = set() if memo is None else memo
        if self in memo:
            return
        if remove_duplicate:
            memo.add(self)
        yield prefix, self
        dot = f"{prefix}." if prefix else ""
        for name, child in (
            ("prompt_encoder", self.prompt_encoder),
            ("base_model", self.base_model.model),
        ):
            yield from child.named_modules(memo, dot + name, remove_duplicate)

    def get_submodule(self, target: str) -> nn.Module:
        """Return the module of a name, by HF PEFT's or by the tree's."""
        if self.only_prompts() and target.startswith("base_model."):
            try:
                found: nn.Module = self.base_model.model.get_submodule(
                    target.removeprefix("base_model.")
                )
                return found
            except AttributeError:
                pass
        return super().get_submodule(target)
