"""Load a model and its tokenizer: the embedded base, a folder, or a hub id."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from inlay.errors import ModelError, did_you_mean
from inlay.model.quantize import describe_quantization
from inlay.model.streaming import Stopped, StreamingConfig, StreamingQuantizer
from inlay.storage.registry import storage_class

EMBEDDED = {"pocket": Path(__file__).parent / "pocket"}
"""Names of the base models that come with Inlay -> their folder."""
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack")
INDEX = "model.safetensors.index.json"


def load(
    model: str,
    storage: str = "dense",
    *,
    double_quant: bool = True,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a frozen model and its tokenizer.

    Args:
        model: `pocket`, a local folder, or a hub id.
        storage: `dense` keeps the weights as they were saved, packed ones included; `nf4` and
            `int8` quantise each weight as it is read, so that memory peaks near that size.
        double_quant: for nf4, whether the blocks' scales are quantised too.
        dtype: of the dense weights and of all products; `auto` is the checkpoint's own.
        device: where the model goes; default: the first GPU, else the CPU.
        revision: branch, tag or commit of a hub id.
        trust_remote_code: run code that comes with the model; off unless you say so.

    Returns:
        The model, frozen and in evaluation mode, and its tokenizer.

    Raises:
        ModelError: the model is not there, is damaged, incomplete, or not in safetensors.
        StorageError: no such storage, or a weight that it cannot hold.
    """
    if storage != "dense":
        storage_class(storage)
    source = located(model)
    with quiet_transformers():
        config = read_config(source, revision, trust_remote_code)
        streaming = streaming_config(config, model, storage, double_quant)
        loaded = read_model(
            source, config, streaming, checked_dtype(dtype), device, revision, trust_remote_code
        )
        tokenizer = read_tokenizer(source, revision, trust_remote_code)
    describe_quantization(loaded)
    return loaded.requires_grad_(False).eval(), tokenizer


def located(model: str) -> str:
    """Return the folder or hub id that a model's name means; a folder's files are checked."""
    folder = EMBEDDED[model] if model in EMBEDDED else Path(model).expanduser()
    if folder.is_dir():
        check_folder(folder)
        return str(folder)
    if folder.exists():
        raise ModelError(f"{model} is a file; a model is a folder with config.json in it")
    if not looks_like_hub_id(model):
        raise ModelError(f"there is no folder {model!r}.{did_you_mean(model, EMBEDDED)}")
    return model


def looks_like_hub_id(model: str) -> bool:
    """Say whether a name could be `owner/name` or `name` on the hub."""
    parts = model.split("/")
    plain = all(part and part.strip(".~") == part and "\\" not in part for part in parts)
    return len(parts) <= 2 and plain and " " not in model


def check_folder(folder: Path) -> None:
    """Raise unless a folder holds a configuration and whole safetensors files.

    Raises:
        ModelError: what is missing or damaged, and where.
    """
    if not (folder / "config.json").is_file():
        adapter = (folder / "adapter_config.json").is_file()
        hint = " It holds an adapter; give the model it was trained on." if adapter else ""
        raise ModelError(f"{folder} has no config.json, which every model folder has.{hint}")
    files = sorted(folder.glob("*.safetensors"))
    pickles = sorted(p.name for pattern in PICKLES for p in folder.glob(pattern))
    if not files and pickles:
        raise ModelError(
            f"{folder} holds its weights as {pickles[0]}, and only safetensors is read, because "
            "the other formats can run code; convert it with transformers' save_pretrained"
        )
    if not files:
        raise ModelError(f"{folder} holds no *.safetensors file, so there are no weights to load")
    check_shards(folder)
    for file in files:
        check_safetensors(file)


def check_shards(folder: Path) -> None:
    """Raise unless every file that a sharded checkpoint's index names is there."""
    index = folder / INDEX
    if not index.is_file() or (folder / "model.safetensors").is_file():
        return
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index} is damaged: {error}; fetch the model anew") from error
    missing = sorted(name for name in shards if not (folder / str(name)).is_file())
    if missing:
        raise ModelError(f"{folder} lacks {missing[0]}, which {INDEX} names; fetch it again")


def check_safetensors(file: Path) -> None:
    """Raise when a safetensors file is truncated or its header is damaged."""
    try:
        with safe_open(file, framework="pt") as opened:
            opened.keys()
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file} is truncated or damaged: {error}; fetch it again") from error


def read_config(source: str, revision: str | None, trust_remote_code: bool) -> PreTrainedConfig:
    """Read the model's configuration."""
    with failures_as_sentences(source, "configuration"):
        return AutoConfig.from_pretrained(
            source, revision=revision, trust_remote_code=trust_remote_code
        )


def read_tokenizer(
    source: str, revision: str | None, trust_remote_code: bool
) -> PreTrainedTokenizerBase:
    """Read the model's tokenizer."""
    with failures_as_sentences(source, "tokenizer"):
        return AutoTokenizer.from_pretrained(
            source, revision=revision, trust_remote_code=trust_remote_code
        )


def streaming_config(
    config: PreTrainedConfig, model: str, storage: str, double_quant: bool
) -> StreamingConfig | None:
    """Return how the weights are to be packed while loading; None when they stay as they are.

    A configuration that says bitsandbytes is given our reader instead.
    """
    packed_as = packed_storage(getattr(config, "quantization_config", None), model)
    if packed_as is None:
        return (
            None
            if storage == "dense"
            else StreamingConfig(storage=storage, double_quant=double_quant)
        )
    if storage not in ("dense", packed_as):
        raise ModelError(
            f"{model} is held in {packed_as} already, so it cannot be loaded as {storage}; "
            f"load it with storage='{packed_as}' or find the model it was made from"
        )
    config.quantization_config = {"quant_method": "inlay", "storage": packed_as}
    return None


def packed_storage(quantization: Mapping[str, Any] | Any, model: str) -> str | None:
    """Return the storage that a checkpoint's own quantisation is, or None for a dense one."""
    if quantization is None:
        return None
    said = quantization if isinstance(quantization, Mapping) else quantization.to_dict()
    if said.get("load_in_8bit"):
        return "int8"
    if said.get("load_in_4bit") and said.get("bnb_4bit_quant_type") == "nf4":
        return "nf4"
    kind = said.get("bnb_4bit_quant_type") or said.get("quant_method") or "an unnamed method"
    raise ModelError(
        f"{model} is quantised with {kind}; of quantised models, those in bitsandbytes' nf4 "
        "and int8 can be loaded. Load the model it was made from, with storage='nf4'"
    )


def checked_dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    """Return a floating-point dtype or `auto`; raise for anything else."""
    names = ("bfloat16", "float16", "float32", "float64")
    if dtype == "auto" or dtype in {getattr(torch, n) for n in names}:
        return dtype
    if dtype in names:
        return getattr(torch, str(dtype))
    raise ModelError(
        f"dtype must be 'auto', {', '.join(names)}, not {dtype!r}.{did_you_mean(str(dtype), names)}"
    )


def read_model(
    source: str,
    config: PreTrainedConfig,
    streaming: StreamingConfig | None,
    dtype: str | torch.dtype,
    device: str | torch.device | None,
    revision: str | None,
    trust_remote_code: bool,
) -> PreTrainedModel:
    """Read the weights; raise unless every one of them was found and used."""
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with failures_as_sentences(source, "weights"):
        model, report = model_class(config).from_pretrained(
            source,
            config=config,
            quantization_config=streaming,
            dtype=dtype,
            device_map={"": where},
            revision=revision,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
        )
    check_complete(source, report)
    quantizer = getattr(model, "hf_quantizer", None)
    if isinstance(quantizer, StreamingQuantizer):
        quantizer.release(model)
    return model


def model_class(config: PreTrainedConfig) -> type[Any]:
    """Return the class that the checkpoint was saved from, else the causal language model's."""
    saved_from = (config.architectures or [""])[0]
    known = getattr(transformers, saved_from, None)
    is_model = isinstance(known, type) and issubclass(known, PreTrainedModel)
    return known if is_model else AutoModelForCausalLM


def check_complete(source: str, report: Mapping[str, Any]) -> None:
    """Raise unless every weight was found and every weight found was used."""
    missing, unexpected = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    if missing:
        raise ModelError(
            f"{source} lacks {len(missing)} of the model's weights, such as {missing[0]}; they "
            "would be random. The checkpoint is incomplete or of another architecture"
        )
    if unexpected:
        raise ModelError(
            f"{source} holds {len(unexpected)} weights that the model has no place for, such as "
            f"{unexpected[0]}; its config.json describes another architecture"
        )


@contextmanager
def failures_as_sentences(source: str, what: str) -> Iterator[None]:
    """Turn whatever transformers raises over these files into a sentence for the user."""
    try:
        yield
    except Stopped as stopped:
        raise stopped.error from None
    except Exception as error:
        raise ModelError(sentence(source, what, error)) from error


def sentence(source: str, what: str, error: Exception) -> str:
    """Say what could not be read, where, and why."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if Path(source).is_dir():
        return f"the {what} of {source} cannot be read: {type(error).__name__}: {reason}"
    if isinstance(error, OSError):
        return (
            f"{source!r} is neither a folder nor reachable on the hub: {reason}. Check the "
            "spelling and the connection, or give a local folder"
        )
    return f"the {what} of the hub model {source!r} cannot be read: {reason}"


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' progress bars and reports off the terminal; errors are ours to tell."""
    level, bars = (
        transformers_logging.get_verbosity(),
        transformers_logging.is_progress_bar_enabled(),
    )
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
