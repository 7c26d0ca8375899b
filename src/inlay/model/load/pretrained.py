"""Load a model and its tokenizer: the embedded base, a folder, or a hub id."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from inlay.errors import ModelError
from inlay.model.load.arguments import check_word, checked_device, checked_dtype, quantization_for
from inlay.model.load.folder import check_folder, located, weight_files
from inlay.model.load.heads import (
    Head,
    check_head_complete,
    class_with,
    configured,
    initialise,
    pad_token,
)
from inlay.model.load.hf_quantizer import (
    InlayQuantizationConfig,
    InlayQuantizer,
    registered,
    unread_tensors,
)
from inlay.model.load.libraries import failures_as_sentences, quiet_transformers
from inlay.model.load.quantize import describe_quantization, separate_head, storages
from inlay.model.load.tokenizer import read_reader
from inlay.model.load.vision import sees_images, tokenizer_in
from inlay.model.stream import files as stream_files
from inlay.model.stream.host import BUFFERS, connect, embedding_on_host
from inlay.model.stream.host import stream as stream_from_host
from inlay.storage.registry import storage_class

Stream = Literal["off", "disk", "host"]
EmbeddingStorage = Literal["dense", "host"]


def load(
    model: str,
    storage: str = "dense",
    *,
    double_quant: bool = True,
    head_storage: str = "dense",
    embedding_storage: EmbeddingStorage = "dense",
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    stream: Stream = "off",
    revision: str | None = None,
    trust_remote_code: bool = False,
    head: Head | None = None,
) -> tuple[PreTrainedModel, Any]:
    """Load a frozen model and its tokenizer, or its processor if it sees images.

    Args:
        model: `pocket`, a local folder, or a hub id.
        storage: `dense` keeps the weights as they were saved, packed ones included; `nf4` and
            `int8` quantise each weight as it is read, so that memory peaks near that size. What
            sees images stays as it was saved.
        double_quant: for nf4, whether the blocks' scales are quantised too.
        head_storage: how a language model's output head is held, which `storage` leaves as it was
            saved; a head that is tied to the embedding cannot be held by itself.
        embedding_storage: `host` leaves the embedding in host memory, of which the rows that are
            looked up go to the device; values are the same.
        dtype: of the dense weights and of all products; `auto` is the checkpoint's own.
        device: where the model goes; default: the first GPU, else the CPU.
        stream: `disk` leaves the large weights in files and `host` in host memory; each block is
            brought in just ahead of use. What is to be packed is packed once, into a cache.
        revision: branch, tag or commit of a hub id.
        trust_remote_code: run code that comes with the model; off unless you say so.
        head: what the model is to give in place of its checkpoint's own output; what the
            checkpoint does not hold of it is new, from the head's seed.

    Returns:
        The model, frozen and in evaluation mode, and its tokenizer; in the tokenizer's place the
        processor of a model that sees images.

    Raises:
        ModelError: the model is not there, is damaged, incomplete, or not in safetensors.
        StorageError: no such storage, or a weight that it cannot hold.
    """
    for name in {storage, head_storage} - {"dense"}:
        storage_class(name)
    check_word("stream", stream, Stream)
    check_word("embedding_storage", embedding_storage, EmbeddingStorage)
    if head is not None and head_storage != "dense":
        raise ModelError(
            f"head_storage {head_storage!r} is for a language model's output head, but another "
            "head takes its place here, which is new and dense; leave head_storage at 'dense'"
        )
    folder = located(model, revision)
    with quiet_transformers(), torch.random.fork_rng(enabled=head is not None):
        config = read_config(folder, trust_remote_code)
        quantization = quantization_for(config, model, storage, double_quant, head_storage)
        dtype = checked_dtype(dtype)
        where = checked_device(device)
        if stream == "disk":
            loaded = read_streamed(folder, config, quantization, dtype, where, head)
        else:
            at = torch.device("cpu") if stream == "host" else where
            loaded = read_model(folder, config, quantization, dtype, at, trust_remote_code, head)
        reader = read_reader(folder, config, trust_remote_code)
    if head is not None:
        pad_token(loaded, tokenizer_in(reader))
    loaded.config.name_or_path = str(folder) if Path(model).is_dir() else model
    describe_quantization(loaded)
    if stream == "host":
        stream_from_host(loaded, where)
    elif embedding_storage == "host" and stream == "off":
        embedding_on_host(loaded, where)
    return loaded.requires_grad_(False).eval(), reader


def read_config(folder: Path, trust_remote_code: bool) -> PreTrainedConfig:
    with failures_as_sentences(folder, "configuration"):
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)


def read_model(
    folder: Path,
    config: PreTrainedConfig,
    quantization: InlayQuantizationConfig | None,
    dtype: str | torch.dtype,
    where: torch.device,
    trust_remote_code: bool,
    head: Head | None = None,
) -> PreTrainedModel:
    """Read the weights; raise unless every one outside the head was found and used."""
    read_as = model_class(config, head)
    packed = quantization is not None or "quantization_config" in vars(config)
    # transformers would map the files into memory; packed weights are better read piecemeal.
    piecemeal = packed and reads_piecemeal(read_as)
    if piecemeal and dtype == "auto":
        with failures_as_sentences(folder, "weights"):
            dtype = stored_dtype(folder, config)
    with registered:
        model = with_weights(
            read_as,
            folder,
            config,
            head,
            partial(unread_tensors, weight_files(folder)) if piecemeal else None,
            quantization_config=quantization,
            dtype=dtype,
            device_map={"": where},
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
        )
    quantizer = getattr(model, "hf_quantizer", None)
    if isinstance(quantizer, InlayQuantizer):
        quantizer.release(model)
    return model


def read_streamed(
    folder: Path,
    config: PreTrainedConfig,
    quantization: InlayQuantizationConfig | None,
    dtype: str | torch.dtype,
    device: torch.device,
    head: Head | None = None,
) -> PreTrainedModel:
    """Read the small weights; leave the large ones in the files, or in a packed copy."""
    read_as = model_class(config, head)
    if not reads_piecemeal(read_as):
        raise ModelError(
            f"{folder} is a model of its own code, which cannot be streamed; load it with "
            "stream='off', or stream='host'"
        )
    packing = vars(config).pop("quantization_config", None) or {}
    compute = stored_dtype(folder, config) if isinstance(dtype, str) else dtype
    with failures_as_sentences(folder, "configuration"):
        skeleton = stream_files.skeleton(read_as, config, compute)
    if quantization is not None:
        packed_as = storages(skeleton, quantization.storage, quantization.head_storage)
        folder = stream_files.packed_copy(
            folder, weight_files(folder), skeleton, config, packed_as, quantization.double_quant
        )
        check_cached(folder)
    else:
        stored_as = str(packing.get("storage", "dense"))
        packed_as = dict.fromkeys(stream_files.streamable(skeleton), stored_as)
    files = weight_files(folder)
    tensors = stream_files.opened_files(files)
    weights, left = stream_files.weights_in_files(skeleton, tensors, packed_as)
    if packing.get("head_storage", "dense") != "dense":
        check_head_streams(
            folder, weights[separate_head(skeleton)].packing, packing["head_storage"]
        )
    state = partial(stream_files.stand_ins, skeleton, files, left, weights)
    at = {"": "cpu"}
    model: Any = with_weights(read_as, folder, config, head, state, dtype=compute, device_map=at)
    connect(model, weights, device, BUFFERS)
    return model.to(device)


def with_weights(
    read_as: Any,
    folder: Path,
    config: PreTrainedConfig,
    head: Head | None,
    state: Callable[[], dict[str, Any]] | None,
    **given: Any,
) -> PreTrainedModel:
    """Return the model with its weights, a missing head initialised; raise unless all are used."""
    kept = head is None or configured(config, head)
    with failures_as_sentences(folder, "weights"):
        model, report = read_as.from_pretrained(
            folder if state is None else None,
            config=config,
            state_dict=None if state is None else state(),
            output_loading_info=True,
            ignore_mismatched_sizes=not kept,
            **given,
        )
        if state is not None and (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
    if head is None:
        check_complete(folder, report)
    else:
        initialise(model, check_head_complete(model, folder, report), kept, head.seed)
    return model


def check_head_streams(folder: Path, held: str, asked: str) -> None:
    if held != asked:
        raise ModelError(
            f"head_storage {asked!r} was asked for, but {folder} is packed already and streamed "
            f"from its own files, where the head is {held}; leave head_storage at 'dense' (a "
            "streamed head takes no room), or give stream='host'"
        )


def check_cached(folder: Path) -> None:
    try:
        check_folder(folder)
    except ModelError as error:
        raise ModelError(
            f"the packed copy in the cache is damaged: {error}. Delete {folder}; loading again "
            "makes a new one"
        ) from error


def stored_dtype(folder: Path, config: PreTrainedConfig) -> torch.dtype:
    """Return the dtype a model was saved in: its configuration's, else its first weight's."""
    dtype = getattr(config, "dtype", None)
    if isinstance(dtype, torch.dtype):
        return dtype
    tensors = stream_files.opened_files(weight_files(folder)[:1]).values()
    return next((t.dtype for t in tensors if t.dtype.is_floating_point), torch.float32)


def model_class(config: PreTrainedConfig, head: Head | None = None) -> Any:
    """Return the head's class, else the checkpoint's own, else the causal language model's."""
    if head is not None:
        return class_with(config, head)
    saved_from = (config.architectures or [""])[0]
    known = getattr(transformers, saved_from, None)
    if isinstance(known, type) and issubclass(known, PreTrainedModel):
        return known
    mapping: Any = MODEL_FOR_CAUSAL_LM_MAPPING
    if sees_images(config):
        mapping = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return mapping.get(type(config), AutoModelForCausalLM)


def reads_piecemeal(read_as: type[Any]) -> bool:
    """Return whether a class takes tensors in place of a folder; the Auto classes do not."""
    return issubclass(read_as, PreTrainedModel)


def check_complete(folder: Path, report: Mapping[str, Any]) -> None:
    missing, unexpected = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    if missing:
        raise ModelError(
            f"{folder} lacks {len(missing)} of the model's weights, such as {missing[0]}; they "
            "would be random. The checkpoint is incomplete or of another architecture"
        )
    if unexpected:
        raise ModelError(
            f"{folder} holds {len(unexpected)} weights that the model has no place for, such as "
            f"{unexpected[0]}; its config.json describes another architecture"
        )
