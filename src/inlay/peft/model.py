"""`PeftModel` and `get_peft_model`: HF PEFT's interface, run by Inlay's layers."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Generator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from peft import PeftConfig
from torch import Tensor, nn

from inlay.model.adapters.attach import whole_outputs
from inlay.model.fast.causal_lm import FastCausalLM
from inlay.model.fast.trl_head import reads_past
from inlay.peft.errors import AdapterError
from inlay.peft.rows import routed
from inlay.peft.saving import Saved
from inlay.peft.wrapped import BY_TASK


class PeftModel(Saved):
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

    # Running it.

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
