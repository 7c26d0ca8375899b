"""Adapters of a `PeftModel` on disk: saved as HF PEFT places them, loaded strictly."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Self

from peft import PeftConfig
from torch import nn
from torch.nn.modules.module import _IncompatibleKeys

from inlay.checkpoint.adapter import say_finished
from inlay.peft import folders
from inlay.peft.errors import refuse
from inlay.peft.wrapped import Wrapped

NO_MATTER = ("max_shard_size", "save_function", "token", "variant", "save_peft_format")
"""Options of transformers' `save_pretrained` that have no bearing on an adapter's one file."""


class Saved(Wrapped):
    """A wrapped model whose adapters come from files and go into them."""

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
        to save, as accelerate gathers them, and `tags` go to the card; those that say how a hub is
        reached or how the weights of a whole model are cut have nothing to do here.

        Raises:
            AdapterError: no such adapter, or an option that Inlay does not have.
            CheckpointError: the disk is full, or an adapter holds values that are not finite.
        """
        given, tags = kwargs.pop("state_dict", None), kwargs.pop("tags", None)
        for key in NO_MATTER:
            kwargs.pop(key, None)
        refuse(
            {
                "path_initial_model_for_weight_conversion": bool(
                    path_initial_model_for_weight_conversion
                ),
                **{key: value not in (None, False) for key, value in kwargs.items()},
            }
        )
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
        with self.base_model.at_rest():
            for name in names if is_main_process else ():
                folder = Path(save_directory) / ("" if name == "default" else name)
                with folders.holding(self, name, given):
                    folders.write(self, name, folder, tags, embeddings)

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
            read = folders.read_new if new else folders.read_again
            file = read(model, adapter_name, folder)
        if is_trainable:
            say_finished(file, folder)
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
        if config is not None and prompt:  # what the file holds decides which tensors it has
            folders.check_means(self.get_base_model(), adapter_name, config)
            self.peft_config[adapter_name] = config
        self.prepare_checkpointing()
        return self
