"""TRL's arguments for a run: everything said outright, so that no default of a release decides."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, TrainingArguments

from inlay.errors import UsageError
from inlay.run.config import RunConfig

SCHEDULERS = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}
"""Our schedules -> the names transformers has for them."""

OPTIMIZERS = {
    "adamw": "adamw_torch",
    "adamw-8bit": "adamw_bnb_8bit",
    "paged-adamw-8bit": "paged_adamw_8bit",
}
"""Our optimisers -> the names transformers has for them."""


def shared(
    kind: type[TrainingArguments],
    config: RunConfig,
    model: PreTrainedModel,
    folder: Path,
    learning_rate: float,
) -> dict[str, Any]:
    """Return the arguments that every task's trainer takes."""
    on_gpu = model.device.type == "cuda"
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": config.batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation,
        "num_train_epochs": config.epochs,
        "max_steps": config.max_steps or -1,
        "learning_rate": learning_rate,
        "lr_scheduler_type": SCHEDULERS[config.scheduler],
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "optim": OPTIMIZERS[config.optimizer],
        "seed": config.seed,
        "data_seed": config.seed,
        "use_cpu": not on_gpu,
        "bf16": False,
        "fp16": False,
        "tf32": None,
        **no_recomputation(kind),
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": on_gpu,
        "logging_strategy": "steps",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "steps",
        "save_steps": config.save_every,
        "eval_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "log_level": "error",
        "push_to_hub": False,
    }


def check_optimizer(name: str, device: str) -> None:
    """Raise unless this optimiser can run here."""
    if name == "adamw":
        return
    if find_spec("bitsandbytes") is None:
        raise UsageError(
            f"optimizer {name!r} is bitsandbytes', which is not installed; "
            "run pip install bitsandbytes, or choose adamw"
        )
    if name.startswith("paged") and device != "cuda":
        raise UsageError(
            f"optimizer {name!r} pages its state between a GPU and the host, and this model is on "
            f"{device}; choose adamw-8bit or adamw"
        )


def no_recomputation(kind: type[TrainingArguments]) -> dict[str, Any]:
    """Return the arguments that leave activations to us, as this release names them.

    What is kept is set on the model's blocks before training (`memory.policy`).
    """
    renamed = "activation_checkpointing" in kind.__dataclass_fields__
    name = "activation_checkpointing" if renamed else "gradient_checkpointing"
    return {name: False, f"{name}_kwargs": {"use_reentrant": False}}


def warmup_steps(warmup: float, total_steps: int) -> int:
    """Return the steps of warmup; a fraction is rounded down, so that a short run has none."""
    return int(warmup) if warmup >= 1 else int(warmup * total_steps)
