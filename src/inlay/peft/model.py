"""`PeftModel` and `get_peft_model`: HF PEFT's interface, run by Inlay's layers."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from peft import PeftConfig
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

from inlay.checkpoint.adapter import put_adapter, reload_adapter, warn_of_lost_encoder
from inlay.model.adapters.attach import whole_outputs
from inlay.model.fast.causal_lm import FastCausalLM
from inlay.model.fast.trl_head import reads_past
from inlay.peft import folders
from inlay.peft.errors import AdapterError, refuse
from inlay.peft.mixed_batches import routed
from inlay.peft.model_wrapper import BY_TASK, ModelWrapper

IGNORED = ("max_shard_size", "save_function", "token", "variant", "save_peft_format")
"""Options of transformers' `save_pretrained` that have no bearing on an adapter's one file."""


class PeftModel(ModelWrapper):
    """A model with adapters, used as HF PEFT's `PeftModel` is.

    Differences, all on the careful side: adapters are set into the model's own layers, so a
    parameter is called `base_model.model.<layer>.adapters.<name>.<tensor>`; merging is undone bit
    for bit; prompts leave a decoder's logits as long as the input; files are safetensors and are
    read strictly; an option that Inlay does not have is an error that names it.
    """

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

    # Running the model.

    def forward(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """Run the model; `adapter_names` gives each row of the batch an adapter of its own."""
        if kwargs.get("fused_lm_head"):
            check_head(self.get_base_model())
        model = self.get_base_model()
        if adapter_names is None and not self.prompts():
            return model(*args, **kwargs)
        with whole_outputs(model), self.rows(adapter_names, 1, kwargs, args):
            return model(*args, **kwargs)

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
        if names is None or not self.base_model.enabled:
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

    # Adding, choosing and deleting adapters.

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

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make an adapter, or several, the active ones; they train unless `inference_mode`."""
        self.base_model.set_adapter(adapter_name, inference_mode)

    def set_requires_grad(
        self, adapter_names: str | Sequence[str], requires_grad: bool = True
    ) -> None:
        self.base_model.set_requires_grad(adapter_names, requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        self.base_model.delete_adapter(adapter_name)

    # Saving and loading adapters.

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

        Of the other options of transformers' function of this name, `state_dict` gives the values
        to save, as accelerate gathers them, and `tags` go to the card; the options of the hub and
        of a whole model's weights have no effect.

        Raises:
            AdapterError: no such adapter, or an option that Inlay does not have.
            CheckpointError: the disk is full, or an adapter holds values that are not finite.
        """
        given, tags = kwargs.pop("state_dict", None), kwargs.pop("tags", None)
        for key in IGNORED:
            kwargs.pop(key, None)
        key = "path_initial_model_for_weight_conversion"
        refuse({key: bool(path_initial_model_for_weight_conversion)})
        refuse({key: value not in (None, False) for key, value in kwargs.items()})
        if not safe_serialization:
            warnings.warn(
                "safe_serialization=False asks for a pickle, which inlay never writes; the adapter "
                "is saved as safetensors, which HF PEFT reads as well",
                stacklevel=2,
            )
        embeddings = None if isinstance(save_embedding_layers, str) else save_embedding_layers
        names = list(self.peft_config) if selected_adapters is None else selected_adapters
        for name in names:
            self.base_model.check_has(name)
        with self.base_model.unmerged():
            for name in names if is_main_process else ():
                folder = Path(save_directory) / ("" if name == "default" else name)
                folders.write(self, name, folder, tags, embeddings, given)

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
        with tuner.trained_as_before(), tuner.unmerged():
            file = (put_adapter if new else reload_adapter)(model, folder, adapter_name)
        if is_trainable:
            warn_of_lost_encoder(file, folder)
        if new:
            self.peft_config[adapter_name] = config
            tuner.settle_dtype(adapter_name, autocast_adapter_dtype)
            tuner.set_requires_grad(adapter_name, is_trainable)
        tuner.settle()
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
    ) -> Self:
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
        self: Any = object.__new__(cls.of_task(found))
        self.wrap(model, found)
        prompt = config is not None and config.is_prompt_learning
        if config is not None:
            config.inference_mode = not is_trainable
        if config is not None and not prompt:
            self.add_adapter(adapter_name, config, False, autocast_adapter_dtype)
            self.peft_config[adapter_name] = config
        self.load_adapter(
            model_id, adapter_name, is_trainable, None, autocast_adapter_dtype,
            ephemeral_gpu_offload, low_cpu_mem_usage, key_mapping, **kwargs,
        )  # fmt: skip
        if config is not None and prompt:  # The file decides which tensors a prompt has.
            folders.check_means(self.get_base_model(), adapter_name, config)
            self.peft_config[adapter_name] = config
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
        peft_config: LoraConfig, IA3Config, LNTuningConfig, PrefixTuningConfig, PromptTuningConfig,
            PromptEncoderConfig.
        adapter_name: the adapter's name on this model.
        mixed: True gives a `PeftMixedModel`; adapters of several methods go on every model.
        autocast_adapter_dtype: False keeps the adapter in its layers' dtype, not in fp32.
        revision: the base model's revision, to record.
        low_cpu_mem_usage: True leaves the adapter's tensors on no device, until values are loaded
            into it; not for training a new one.

    Raises:
        AdapterError: the model has adapters already, or an option is one that Inlay lacks.
        TargetError: a target matched nothing that this method can adapt.

    >>> from peft import LoraConfig
    >>> model = nn.Sequential(nn.Linear(4, 4))
    >>> get_peft_model(model, LoraConfig(r=2, target_modules=["0"])).get_nb_trainable_parameters()
    (16, 36)
    """
    if revision is not None:
        if peft_config.revision not in (None, revision):
            warnings.warn(
                "peft config has already set base model revision to "
                f"{peft_config.revision}, overwriting with revision {revision}",
                stacklevel=2,
            )
        peft_config = copy.deepcopy(peft_config)
        peft_config.revision = revision
    given = getattr(peft_config, "base_model_name_or_path", None)
    own = vars(model).get("name_or_path")
    if given is not None and given != own:
        warnings.warn(
            f"The PEFT config's `base_model_name_or_path` was renamed from {given!r} to "
            f"'{own}', which is the model given; load that one with the adapter",
            stacklevel=2,
        )
    cls = BY_TASK["MIXED"] if mixed else PeftModel.of_task(peft_config)
    made: PeftModel = cls(
        model, peft_config, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage
    )
    return made


def check_head(model: Any) -> None:
    """Raise when TRL's fused head would read past an adapter on the output head."""
    head = model.get_output_embeddings()
    if reads_past(head) and not (isinstance(model, FastCausalLM) and model.answers_fused()):
        raise AdapterError(
            "the adapter on the output head would be left out: TRL's fused head reads the head's "
            f"own weight, and inlay has no head of its own for this {type(model).__name__} or for "
            "what this trainer asks; leave the output head out of target_modules, or train it "
            "whole through modules_to_save"
        )
