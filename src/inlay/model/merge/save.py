"""A merged model on disk: written whole or not at all, read back, and compared."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from inlay.errors import MergeError
from inlay.files import write_folder
from inlay.model.load.arguments import quantization_for
from inlay.model.load.libraries import quiet_transformers
from inlay.model.load.pretrained import read_config, read_model
from inlay.model.merge.fidelity import TOLERANCE, Batches, largest, logits_of
from inlay.model.seams.transformers import attention_of, classes_of
from inlay.storage.quantized import QuantizedLinear

AUTO = (
    "AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForMaskedLM",
    "AutoModelForImageTextToText", "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification", "AutoModelForQuestionAnswering",
    "AutoModelForSpeechSeq2Seq", "AutoModelForCTC", "AutoModelForAudioClassification",
    "AutoModelForImageClassification", "AutoModelForMultimodalLM", "AutoModel",
)  # fmt: skip
"""transformers' automatic classes, those of a task before the bare model's."""


@dataclass(frozen=True)
class Written:
    checked: str
    reloaded_logit_difference: float


def check_place(model: nn.Module, output: Path) -> None:
    if not isinstance(model, PreTrainedModel):
        raise MergeError(
            f"a {type(model).__name__} has no save_pretrained, so output= cannot save it; merge "
            "without it, and save model.state_dict()"
        )
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise MergeError(f"{output} is there already; name a new folder for the merged model")


def write_whole(model: nn.Module, output: Path, check: Callable[[Path], Written]) -> Written:
    """Save a plain model in a new folder, if the check of the files passes; else write nothing."""
    assert isinstance(model, PreTrainedModel)
    found: list[Written] = []

    def fill(folder: Path) -> None:
        with quiet_transformers():
            model.save_pretrained(folder)
        found.append(check(folder))

    try:
        write_folder(output, fill)
    except OSError as error:
        raise MergeError(
            f"the merged model could not be saved in {output}: {error.strerror or error}; the "
            "model in memory is merged"
        ) from None
    return found[0]


def check_written(
    model: nn.Module, folder: Path, batches: Batches, adapted: Sequence[Tensor]
) -> Written:
    """Read a saved model back; compare its weights bit by bit, and its outputs with `adapted`."""
    assert isinstance(model, PreTrainedModel)
    again, how = read_back(model, folder)
    different = differing(model, again)
    if different:
        more = f" and {len(different) - 3} more" if len(different) > 3 else ""
        raise MergeError(
            f"the merged model, written and read back by {how}, has other values in "
            f"{', '.join(different[:3])}{more} "
            "than the model in memory, so nothing was saved: a reader of the file would get "
            "another model. Keep the adapter unmerged, or target no layer whose weight is tied"
        )
    now, after = logits_of(model, batches), logits_of(again, batches)
    off = max((float((x - y).abs().max()) for x, y in zip(now, after, strict=True)), default=0.0)
    accepted = rounding(model) * max(largest(now), 1.0)
    if not off <= accepted:
        raise MergeError(
            f"the merged model, written and read back by {how}, differs by {off:.3g} in its "
            f"logits, more than rounding explains ({accepted:.3g}), so nothing was saved"
        )
    apart = max((float((x - y).abs().max()) for x, y in zip(adapted, after, strict=True)))
    return Written(f"on the written files, read back by {how}", apart)


def rounding(model: nn.Module) -> float:
    """Return how far two runs of one model may lie apart, as a share of the largest logit.

    The order of summation differs from machine to machine and from run to run: about the square
    root of the number of sums on a path through the model, times the dtype's precision.
    """
    floating = [p for p in model.parameters() if p.is_floating_point()]
    dtype = max((p.dtype for p in floating), key=lambda d: TOLERANCE.get(d, 0))
    width = max((p.shape[-1] for p in floating if p.dim() > 1), default=1)
    depth = sum(p.dim() > 1 for p in floating)
    return min(TOLERANCE.get(dtype, 0.1), torch.finfo(dtype).eps * (4 + (depth * width) ** 0.5))


def read_back(model: PreTrainedModel, folder: Path) -> tuple[nn.Module, str]:
    if any(isinstance(module, QuantizedLinear) for module in model.modules()):
        config = read_config(folder, False)
        held = quantization_for(config, str(folder), "dense", True)
        with quiet_transformers():
            return read_model(folder, config, held, "auto", model.device, False), "inlay.load"
    saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    named = (saved.get("architectures") or [""])[0]
    found: Any = getattr(transformers, named, None)
    cls = found if isinstance(found, type) else type(model)
    if not issubclass(type(model), cls) or cls.__name__ != named:
        raise MergeError(
            f"the written config.json names {named or 'no class'}, and the model is a "
            f"{type(model).__name__}: a reader would get another model, so nothing was saved"
        )
    reader = automatic(model, cls, folder)
    with quiet_transformers():
        again, info = reader.from_pretrained(
            folder, dtype="auto", output_loading_info=True, local_files_only=True,
            attn_implementation=attention_of(model.config),
        )  # fmt: skip
    lacking = sorted({*info["missing_keys"], *info["unexpected_keys"]})
    if lacking or info["mismatched_keys"]:
        lacking += [str(key) for key in info["mismatched_keys"]]
        raise MergeError(
            f"{reader.__name__}.from_pretrained finds {', '.join(lacking[:3])} of the written "
            "model missing or without a place, so nothing was saved"
        )
    return again.to(model.device), f"{reader.__name__}.from_pretrained"


def automatic(model: PreTrainedModel, cls: Any, folder: Path) -> Any:
    """Return the Auto class that reads this folder as `cls`, else `cls` itself."""
    if str(getattr(model.config, "model_type", "")) not in transformers.CONFIG_MAPPING:
        return cls
    config = transformers.AutoConfig.from_pretrained(folder)
    for name in AUTO:
        auto = getattr(transformers, name, None)
        read_as = classes_of(auto, config)
        if read_as is cls or (isinstance(read_as, tuple) and cls is read_as[0]):
            return auto
    return cls


def differing(model: nn.Module, again: nn.Module) -> list[str]:
    mine, theirs = model.state_dict(), again.state_dict()
    names = sorted({*mine, *theirs})
    return [n for n in names if n not in mine or n not in theirs or not same(mine[n], theirs[n])]


def same(mine: Any, theirs: Any) -> bool:
    if not isinstance(mine, Tensor) or not isinstance(theirs, Tensor):
        return mine == theirs
    return torch.equal(mine.to(theirs.device, theirs.dtype), theirs)
