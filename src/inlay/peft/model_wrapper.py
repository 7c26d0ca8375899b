"""The base class of `PeftModel`: the wrapped model, its names, its counts and its status."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any

import peft
from peft import PeftConfig
from torch import Tensor, nn

from inlay.checkpoint.slots import computed, slots
from inlay.methods.params import Params
from inlay.model.adapters.registry import adapters
from inlay.model.adapters.report import base_size
from inlay.peft.configs import check_config, plain
from inlay.peft.errors import AdapterError, KindError
from inlay.peft.status import layer_status, model_status
from inlay.peft.tuner import Tuner
from inlay.peft.views import Leaf, named_below, nested

BY_TASK: dict[str, type[Any]] = {}
"""The class of a wrapped model by its configuration's task; task_models.py has them."""


class ModelWrapper(peft.PeftModel):
    """A model, and the tuner around it."""

    base_model: Tuner

    def wrap(self, model: nn.Module, config: PeftConfig) -> None:
        check_config(config)
        if isinstance(model, peft.PeftModel) or adapters(model):
            raise AdapterError(
                "You are trying to modify a model with PEFT for a second time: this "
                f"{type(model).__name__} has adapters; use its add_adapter or load_adapter, or "
                "call unload() first"
            )
        nn.Module.__init__(self)
        self.peft_type = config.peft_type
        self.special_peft_forward_args = {"adapter_names"}
        self._is_prompt_learning = False
        self._peft_config = None
        self.base_model = Tuner(model)

    def prepare_checkpointing(self) -> None:
        model: Any = self.get_base_model()
        if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
            self.prepare_model_for_gradient_checkpointing(model)
        config: Any = getattr(model, "config", None)
        if hasattr(config, "pretraining_tp"):
            config.pretraining_tp = 1

    @property
    def active_adapter(self) -> Any:
        return self.base_model.active_adapter

    @property
    def active_adapters(self) -> list[str]:
        return self.base_model.active_adapters

    @property
    def _adapters_disabled(self) -> bool:
        return not self.base_model.enabled

    @property
    def has_active_enabled_adapter(self) -> bool:
        return self.base_model.enabled and bool(self.active_adapters)

    @property
    def active_peft_config(self) -> PeftConfig:
        """The configuration of the first active adapter; AdapterError where none is active."""
        if not self.active_adapters:
            raise AdapterError("no adapter is active; call set_adapter or add_adapter first")
        return self.peft_config[self.active_adapters[0]]

    @property
    def is_loaded_in_4bit(self) -> bool:
        """False: TRL would round the adapters, which are fp32, to bf16 on a quantised model."""
        return False

    @property
    def is_loaded_in_8bit(self) -> bool:
        """False, as `is_loaded_in_4bit`."""
        return False

    @classmethod
    def of_task(cls, config: object) -> type[Any]:
        """Return the class for a configuration's task, unless one was asked for by its name."""
        task = str(plain(getattr(config, "task_type", None)))
        return cls if cls in BY_TASK.values() else BY_TASK.get(task, cls)

    def get_base_model(self) -> Any:
        return self.base_model.model

    def _get_base_model_class(self, is_prompt_tuning: bool = False) -> type[nn.Module]:
        del is_prompt_tuning
        return type(self.get_base_model())

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Return the numbers of trained and of all parameters, packed ones counted in full."""
        found = {id(p): p for p in self.parameters()}
        trained = sum(p.numel() for p in found.values() if p.requires_grad)
        held = {id(p): p.numel() for m in self.modules() if isinstance(m, Params)
                for p in m.parameters()}  # fmt: skip
        return trained, base_size(self.get_base_model()) + sum(held.values())

    def get_layer_status(self) -> list[Any]:
        """Return the state of every adapted layer; KindError where the adapters are prompts."""
        self.check_layers("get_layer_status")
        return layer_status(self.base_model)

    def get_model_status(self) -> Any:
        """Return the state of the adapters; KindError where they are prompts."""
        self.check_layers("get_model_status")
        return model_status(self.base_model, self.get_nb_trainable_parameters())

    def check_layers(self, verb: str) -> None:
        if self.only_prompts():
            raise KindError(
                f"{verb}() got an invalid PeftModel instance; a prompt is on no layer, and its "
                "state is in peft_config and active_adapters"
            )

    def get_prompt(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse: a prompt is given to the model, not to the caller."""
        raise AdapterError(
            "inlay.peft gives a prompt to the model itself and has no get_prompt; call the model, "
            "or take the values from inlay.peft.get_peft_model_state_dict"
        )

    def get_prompt_embedding_to_save(self, adapter_name: str) -> Tensor:
        """Return a prompt's values, (tokens, width); AdapterError where it is no prompt."""
        self.base_model.check_has(adapter_name)
        if not self.peft_config[adapter_name].is_prompt_learning:
            raise AdapterError(f"adapter {adapter_name!r} is no prompt")
        model = self.get_base_model()
        found = slots(model, adapter_name)
        values = {slot.key: slot.tensor.detach() for slot in found}
        return {**values, **computed(model, adapter_name, found)}["prompt_embeddings"].cpu()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Return False: `peft.convert_to_lora` reads HF PEFT's own layers."""
        del adapter_name
        return False

    # Names. HF PEFT puts no tuner around a model that has prompts alone: its parameters are
    # `base_model.<name>`, and the prompt is `prompt_encoder.<adapter>.embedding.weight`.

    def configs(self) -> dict[str, PeftConfig]:
        return self.base_model.peft_config if "base_model" in self._modules else {}

    def only_prompts(self) -> bool:
        configs = self.configs().values()
        return bool(configs) and all(config.is_prompt_learning for config in configs)

    @property
    def prompt_encoder(self) -> nn.ModuleDict:
        found = nn.ModuleDict({name: self.encoder(name) for name in self.prompts()})
        return found.train(self.training)

    def prompts(self) -> list[str]:
        return [n for n, config in self.configs().items() if config.is_prompt_learning]

    def encoder(self, name: str) -> nn.Module:
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
        if self.only_prompts():
            yield "prompt_encoder", self.prompt_encoder
        yield from super().named_children()

    def children(self) -> Iterator[nn.Module]:
        """Yield every child once: what moves, casts and trains tensors need not see them twice."""
        yield from (m for m in self._modules.values() if m is not None)

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Generator[tuple[str, nn.Module]]:
        if not self.only_prompts():
            yield from super().named_modules(memo, prefix, remove_duplicate)
            return
        children = {"prompt_encoder": self.prompt_encoder, "base_model": self.base_model.model}
        yield from named_below(self, children.items(), memo, prefix, remove_duplicate)

    def get_submodule(self, target: str) -> nn.Module:
        """Return the module of a name, HF PEFT's or that of the tree."""
        if self.only_prompts() and target.startswith("base_model."):
            try:
                found: nn.Module = self.base_model.model.get_submodule(
                    target.removeprefix("base_model.")
                )
                return found
            except AttributeError:
                pass
        return super().get_submodule(target)
