"""What a `PeftModel` is made of, and what it says of itself."""

from __future__ import annotations

from typing import Any

import peft
from peft import PeftConfig
from torch import Tensor, nn

from inlay.checkpoint.tensors import computed, slots
from inlay.methods.base import Params
from inlay.model.adapters.registry import adapters
from inlay.model.adapters.report import base_size
from inlay.peft.configs import check_config, plain
from inlay.peft.errors import AdapterError, KindError
from inlay.peft.prompted import PromptNames
from inlay.peft.status import layer_status, model_status
from inlay.peft.tuner import Tuner

BY_TASK: dict[str, type[Any]] = {}
"""The class of a wrapped model by its configuration's task; by_task.py has them."""


class Wrapped(PromptNames, peft.PeftModel):
    """A model, and the tuner that stands around it."""

    base_model: Tuner

    def wrap(self, model: nn.Module, config: PeftConfig) -> None:
        """Stand around a plain model that has no adapter yet.

        Raises:
            AdapterError: it has some already, or the configuration is not one of HF PEFT's.
        """
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
        """Do what HF PEFT does for a model that recomputes activations already."""
        model: Any = self.get_base_model()
        if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
            self.prepare_model_for_gradient_checkpointing(model)
        config: Any = getattr(model, "config", None)
        if hasattr(config, "pretraining_tp"):
            config.pretraining_tp = 1

    @property
    def active_adapter(self) -> Any:
        """The name of the active adapter; a list where there are several, or none."""
        return self.base_model.active_adapter

    @property
    def active_adapters(self) -> list[str]:
        """The names of the active adapters."""
        return self.base_model.active_adapters

    @property
    def _adapters_disabled(self) -> bool:
        return not self.base_model.enabled

    @property
    def has_active_enabled_adapter(self) -> bool:
        """Whether an adapter acts now."""
        return self.base_model.enabled and bool(self.active_adapters)

    @property
    def active_peft_config(self) -> PeftConfig:
        """The configuration of the first active adapter.

        Raises:
            AdapterError: none is active.
        """
        if not self.active_adapters:
            raise AdapterError("no adapter is active; call set_adapter or add_adapter first")
        return self.peft_config[self.active_adapters[0]]

    @property
    def is_loaded_in_4bit(self) -> bool:
        """No, whatever the base is: TRL rounds what trains on such a model to bf16.

        Adapters are stored in fp32 here; a DoRA magnitude in bf16 would hardly move.
        """
        return False

    @property
    def is_loaded_in_8bit(self) -> bool:
        """No, as `is_loaded_in_4bit`."""
        return False

    @classmethod
    def of_task(cls, config: object) -> type[Any]:
        """Return the class for a configuration's task, unless one was asked for by its name."""
        task = str(plain(getattr(config, "task_type", None)))
        return cls if cls in BY_TASK.values() else BY_TASK.get(task, cls)

    def get_base_model(self) -> Any:
        """Return the model itself, with its adapted layers."""
        return self.base_model.model

    def _get_base_model_class(self, is_prompt_tuning: bool = False) -> type[nn.Module]:
        del is_prompt_tuning
        return type(self.get_base_model())

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Return how many parameters train, and how many there are, packed ones in full."""
        found = {id(p): p for p in self.parameters()}
        trained = sum(p.numel() for p in found.values() if p.requires_grad)
        held = {id(p): p.numel() for m in self.modules() if isinstance(m, Params)
                for p in m.parameters()}  # fmt: skip
        return trained, base_size(self.get_base_model()) + sum(held.values())

    def get_layer_status(self) -> list[Any]:
        """Return the state of every adapted layer, as HF PEFT describes it.

        Raises:
            KindError: the adapters are prompts, which are on no layer.
        """
        self.check_layers("get_layer_status")
        return layer_status(self.base_model)

    def get_model_status(self) -> Any:
        """Return the state of the model's adapters, as HF PEFT describes it.

        Raises:
            KindError: the adapters are prompts, which are on no layer.
        """
        self.check_layers("get_model_status")
        return model_status(self.base_model, self.get_nb_trainable_parameters())

    def check_layers(self, verb: str) -> None:
        """Raise where no adapter is on a layer.

        Raises:
            KindError: all are prompts.
        """
        if self.only_prompts():
            raise KindError(
                f"{verb}() got an invalid PeftModel instance; a prompt is on no layer, and its "
                "state is in peft_config and active_adapters"
            )

    def get_prompt(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse: a prompt is given to the model, not to the caller.

        Raises:
            AdapterError: always.
        """
        raise AdapterError(
            "inlay.peft gives a prompt to the model itself and has no get_prompt; call the model, "
            "or take the values from inlay.peft.get_peft_model_state_dict"
        )

    def get_prompt_embedding_to_save(self, adapter_name: str) -> Tensor:
        """Return a prompt's values, (tokens, width), as its file has them.

        Raises:
            AdapterError: there is no such adapter, or it is no prompt.
        """
        self.base_model.check_has(adapter_name)
        if not self.peft_config[adapter_name].is_prompt_learning:
            raise AdapterError(f"adapter {adapter_name!r} is no prompt")
        model = self.get_base_model()
        found = slots(model, adapter_name)
        values = {slot.key: slot.tensor.detach() for slot in found}
        return {**values, **computed(model, adapter_name, found)}["prompt_embeddings"].cpu()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Say no: `peft.convert_to_lora` reads HF PEFT's own layers."""
        del adapter_name
        return False

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Add an adapter as a configuration says; only the model's first becomes active.

        `low_cpu_mem_usage` leaves its tensors on no device, until values are loaded into it.

        Raises:
            AdapterError: the name is taken, or an option is one that Inlay does not have.
            TargetError: a target matched nothing that this method can adapt.
        """
        self.base_model.add(adapter_name, peft_config, autocast_adapter_dtype, low_cpu_mem_usage)
