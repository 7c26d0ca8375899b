"""`PeftModel` and `get_peft_model`: HF PEFT's interface, run by Inlay's layers."""

from __future__ import annotations

import copy
from collections.abc import Generator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import peft
from peft import PeftConfig
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

from inlay.methods.base import Params
from inlay.model.attach import adapters
from inlay.model.fast.causal_lm import FastCausalLM
from inlay.model.fast.fused import reads_past
from inlay.model.report import base_size
from inlay.peft import folders
from inlay.peft.configs import check_config
from inlay.peft.errors import AdapterError
from inlay.peft.rows import routed
from inlay.peft.status import layer_status, model_status
from inlay.peft.tuner import Tuner


class PeftModel(peft.PeftModel):
    """A model with adapters, used as HF PEFT's `PeftModel` is.

    Differences, all on the careful side: adapters are set into the model's own layers, so a
    parameter is called `base_model.model.<layer>.adapters.<name>.<tensor>`; merging is undone bit
    for bit; prompts leave the logits as long as the input; files are safetensors and are read
    strictly; an option that Inlay does not have is an error that names it.
    """

    base_model: Tuner

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
    ) -> None:
        self.wrap(model, peft_config)
        self.add_adapter(adapter_name, peft_config, low_cpu_mem_usage, autocast_adapter_dtype)
        self.prepare_checkpointing()

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

    # What it is made of.

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
        """The configuration of the first active adapter."""
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
        """Return the state of every adapted layer, as HF PEFT describes it."""
        return layer_status(self.base_model)

    def get_model_status(self) -> Any:
        """Return the state of the model's adapters, as HF PEFT describes it."""
        return model_status(self.base_model, self.get_nb_trainable_parameters())

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Say no: `peft.convert_to_lora` reads HF PEFT's own layers."""
        del adapter_name
        return False

    # Running it.

    def forward(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """Run the model; `adapter_names` gives each row of the batch an adapter of its own."""
        if kwargs.get("fused_lm_head"):
            check_head(self.get_base_model())
        if adapter_names is None:
            return self.get_base_model()(*args, **kwargs)
        with self.rows(adapter_names, 1, kwargs, args):
            return self.get_base_model()(*args, **kwargs)

    def generate(
        self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any
    ) -> Any:
        """Generate; `adapter_names` as in `forward`."""
        model = self.get_base_model()
        if "generation_config" in vars(self):
            model.generation_config = self.generation_config
        settings = kwargs.get("generation_config") or model.generation_config
        copies = max(
            int(kwargs.get(key) or getattr(settings, key, None) or 1)
            for key in ("num_beams", "num_return_sequences")
        )
        with self.rows(adapter_names, copies, kwargs, args):
            return model.generate(*args, **kwargs)

    @contextmanager
    def rows(
        self,
        names: Sequence[str] | None,
        copies: int,
        kwargs: dict[str, Any],
        args: tuple[Any, ...],
    ) -> Generator[None]:
        """Give each row of a batch its adapter inside the `with` block.

        Raises:
            AdapterError: not one name a row, or the adapters are merged.
        """
        if names is None or not self.base_model.enabled:
            with nullcontext():
                yield
            return
        if self.base_model.merged:
            raise AdapterError(
                "Cannot pass `adapter_names` when there are merged adapters, please call "
                "`unmerge_adapter` first."
            )
        given = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
        if given is not None and len(given) != len(names):
            raise AdapterError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(names)} and {len(given)} respectively."
            )
        with routed(self.get_base_model(), names, copies):
            yield

    @contextmanager
    def disable_adapter(self) -> Generator[None]:
        """Run the base inside the `with` block; a merge is out meanwhile and back after it."""
        with self.base_model.disabled():
            yield

    # Adapters come and go.

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Add an adapter as a configuration says; only the model's first becomes active.

        Raises:
            AdapterError: the name is taken, or an option is one that Inlay does not have.
            TargetError: a target matched nothing that this method can adapt.
        """
        del low_cpu_mem_usage  # Inlay makes adapters where they are to lie.
        self.base_model.add(adapter_name, peft_config, autocast_adapter_dtype)

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make an adapter, or several, the active ones; they train unless `inference_mode`."""
        self.base_model.set_adapter(adapter_name, inference_mode)

    def set_requires_grad(
        self, adapter_names: str | Sequence[str], requires_grad: bool = True
    ) -> None:
        """Let adapters train, or freeze them."""
        self.base_model.set_requires_grad(adapter_names, requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter off the model."""
        self.base_model.delete_adapter(adapter_name)

    # Files.

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Save adapters in HF PEFT's layout: `default` in the folder, others in subfolders.

        Raises:
            AdapterError: no such adapter, or an option that Inlay does not have.
            CheckpointError: the disk is full, or an adapter holds values that are not finite.
        """
        refuse(
            {
                "safe_serialization=False": not safe_serialization,
                "save_embedding_layers=True": save_embedding_layers is True,
                "path_initial_model_for_weight_conversion": bool(
                    path_initial_model_for_weight_conversion
                ),
                "state_dict": kwargs.pop("state_dict", None) is not None,
                **{key: value not in (None, False) for key, value in kwargs.items()},
            }
        )
        names = list(self.peft_config) if selected_adapters is None else selected_adapters
        for name in names:
            self.base_model.check_has(name)
        with self.base_model.at_rest():
            for name in names if is_main_process else ():
                folder = Path(save_directory) / ("" if name == "default" else name)
                folders.write(self.get_base_model(), name, folder, self.peft_config[name])

    def load_adapter(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        model_id: str | Path,
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load an adapter from a folder or the hub; into one of this name, or as a new one.

        Every tensor of the file must have its place and every place its tensor, so the result's
        lists of missing and unexpected keys are always empty.

        Raises:
            CheckpointError: the files are missing, damaged, or for another base.
            AdapterError: an option that Inlay does not have.
        """
        del torch_device, low_cpu_mem_usage  # An adapter lies where its layers do.
        refuse({"ephemeral_gpu_offload": ephemeral_gpu_offload, "key_mapping": key_mapping})
        tuner, model = self.base_model, self.get_base_model()
        folder = folders.folder_of(model_id, kwargs)
        new = adapter_name not in self.peft_config
        config = folders.config_in(folder)
        config.inference_mode = not is_trainable
        with tuner.as_trained(), tuner.at_rest():
            (folders.read_new if new else folders.read_again)(model, adapter_name, folder)
        if new:
            self.peft_config[adapter_name] = config
            tuner.settle_dtype(adapter_name, autocast_adapter_dtype)
            tuner.set_requires_grad(adapter_name, is_trainable)
        if not is_trainable:
            self.eval()
        return _IncompatibleKeys([], [])

    @classmethod
    def from_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls,
        model: nn.Module,
        model_id: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """Return a model with an adapter from a folder or the hub, frozen unless `is_trainable`.

        Args:
            model: the base, changed in place.
            model_id: a folder that HF PEFT or Inlay wrote, or a name on the hub.
            adapter_name: the adapter's name on this model.
            is_trainable: whether it trains.
            config: a configuration to use in place of the folder's.
            autocast_adapter_dtype: False keeps the adapter in its layers' dtype, not in fp32.
            ephemeral_gpu_offload: must be False.
            low_cpu_mem_usage: no effect, Inlay makes adapters where they are to lie.
            key_mapping: must be None.
            **kwargs: where on the hub: subfolder, revision, token, cache_dir.

        Raises:
            CheckpointError: the files are missing, damaged, or for another base.
            AdapterError: an option that Inlay does not have.
        """
        kwargs.pop("torch_device", None)  # An adapter lies where its layers do.
        found = config or folders.config_in(folders.folder_of(model_id, kwargs))
        self = cls.__new__(cls)
        self.wrap(model, found)
        if config is not None:
            config.inference_mode = not is_trainable
            self.add_adapter(adapter_name, config, False, autocast_adapter_dtype)
            self.peft_config[adapter_name] = config
        self.load_adapter(
            model_id, adapter_name, is_trainable, None, autocast_adapter_dtype,
            ephemeral_gpu_offload, low_cpu_mem_usage, key_mapping, **kwargs,
        )  # fmt: skip
        self.prepare_checkpointing()
        return self


def get_peft_model(
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel:
    """Return a model with a new adapter, as HF PEFT's function of this name does.

    The adapter starts from the values that HF PEFT draws after the same `torch.manual_seed`.

    Args:
        model: any module whose layers are linear, embedding or transformers Conv1D; changed in
            place, its own parameters frozen.
        peft_config: LoraConfig, IA3Config, LNTuningConfig, PrefixTuningConfig, PromptTuningConfig.
        adapter_name: the adapter's name on this model.
        mixed: must be False.
        autocast_adapter_dtype: False keeps the adapter in its layers' dtype, not in fp32.
        revision: the base model's revision, to record.
        low_cpu_mem_usage: no effect, Inlay makes adapters where they are to lie.

    Raises:
        AdapterError: the model has adapters already, or an option is one that Inlay lacks.
        TargetError: a target matched nothing that this method can adapt.

    >>> from peft import LoraConfig
    >>> model = nn.Sequential(nn.Linear(4, 4))
    >>> get_peft_model(model, LoraConfig(r=2, target_modules=["0"])).get_nb_trainable_parameters()
    (16, 36)
    """
    refuse({"mixed=True": mixed})
    if revision is not None:
        peft_config = copy.deepcopy(peft_config)
        peft_config.revision = revision
    return PeftModel(model, peft_config, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)


def check_head(model: Any) -> None:
    """Raise when TRL's fused head would read past an adapter on the output head.

    Raises:
        AdapterError: it would.
    """
    head = model.get_output_embeddings()
    if reads_past(head) and not (isinstance(model, FastCausalLM) and model.answers_fused()):
        raise AdapterError(
            "the adapter on the output head would be left out: TRL's fused head reads the head's "
            f"own weight, and inlay has no head of its own for this {type(model).__name__} or for "
            "what this trainer asks; leave the output head out of target_modules, or train it "
            "whole through modules_to_save"
        )


def refuse(asked: dict[str, Any]) -> None:
    """Raise for the first option that asks for what Inlay does not have.

    Raises:
        AdapterError: one does.
    """
    for option, wanted in asked.items():
        if wanted:
            raise AdapterError(
                f"{option} is not something that inlay.peft has; leave it out, or use HF PEFT "
                "itself for it"
            )
