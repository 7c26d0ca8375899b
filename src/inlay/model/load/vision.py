"""Models that see images: their processor, and their parts as found in the loaded model."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

from torch import nn
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    PROCESSOR_MAPPING,
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from inlay.model.seams.transformers import NoVideos, no_video_class
from inlay.storage.registry import kind

Part = Literal["language", "vision", "projector"]
PARTS: tuple[Part, ...] = get_args(Part)
"""The parts of a model that sees images; each is a name for `targets`."""
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
OTHER_PROCESSOR_FILES = (
    "video_preprocessor_config.json", "chat_template.json", "chat_template.jinja",
)  # fmt: skip


def sees_images(config: PreTrainedConfig) -> bool:
    classes: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return type(config) in classes.keys() and hasattr(config, "vision_config")  # noqa: SIM118


def has_processor(folder: Path) -> bool:
    return any((folder / name).is_file() for name in PROCESSOR_FILES)


def read_processor(
    folder: Path, config: PreTrainedConfig, trust_remote_code: bool = False
) -> ProcessorMixin:
    """Read a model's processor; without torchvision it takes no videos."""
    classes: Any = PROCESSOR_MAPPING
    made_as: Any = classes.get(type(config), None)
    if made_as is None or not takes_videos(made_as) or find_spec("torchvision") is not None:
        return AutoProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code)
    readers: dict[str, Any] = {"image_processor": AutoImageProcessor, "tokenizer": AutoTokenizer}
    parts: list[Any] = [
        NoVideos() if name == "video_processor" else readers[name].from_pretrained(folder)
        for name in made_as.get_attributes()
    ]
    settings, _ = made_as.get_processor_dict(folder)
    with no_video_class():
        return made_as.from_args_and_dict(parts, settings)


def takes_videos(processor: Any) -> bool:
    return "video_processor" in processor.get_attributes()


def copy_processor(base: Path, to: Path) -> None:
    for name in (*PROCESSOR_FILES, *OTHER_PROCESSOR_FILES):
        if has_processor(base) and (base / name).is_file():
            shutil.copyfile(base / name, to / name)


def tokenizer_in(reader: Any) -> PreTrainedTokenizerBase:
    return reader.tokenizer if isinstance(reader, ProcessorMixin) else reader


# Parts, by structure


def parts_of(model: nn.Module) -> dict[str, Part]:
    """Return the part that each module belongs to; empty for a model that sees no images.

    `vision` is the tower that reads pixels, `language` the decoder with its output head, and
    `projector` what leads from one to the other: the modules beside the two, or those at the
    tower's end that give the decoder's width.
    """
    config: Any = getattr(model, "config", None)
    shape = getattr(config, "vision_config", None)
    if shape is None or not isinstance(model, PreTrainedModel):
        return {}
    towers = [name for name, m in model.named_modules() if name and is_tower(m, shape)]
    decoder = decoder_name(model)
    if not towers or decoder is None:
        return {}
    body, _, _ = decoder.rpartition(".")
    found: dict[str, Part] = {}
    for name, module in model.named_modules():
        part = part_at(name, module, model, towers, decoder, body)
        if part is not None:
            found[name] = part
    if "projector" not in found.values():
        for name in ends_of_towers(model, towers):
            found |= dict.fromkeys(within(found, name), "projector")
    return found


def is_tower(module: nn.Module, shape: PreTrainedConfig) -> bool:
    return isinstance(module, PreTrainedModel) and type(module.config) is type(shape)


def decoder_name(model: PreTrainedModel) -> str | None:
    text = model.config.get_text_config()
    return next(
        (
            name
            for name, m in model.named_modules()
            if name and isinstance(m, PreTrainedModel) and type(m.config) is type(text)
        ),
        None,
    )


def part_at(
    name: str, module: nn.Module, model: PreTrainedModel, towers: list[str], decoder: str, body: str
) -> Part | None:
    if any(is_within(name, tower) for tower in towers):
        return "vision"
    if is_within(name, decoder) or module is model.get_output_embeddings():
        return "language"
    holds = not name or is_within(decoder, name) or is_within(towers[0], name)
    beside = name.startswith(f"{body}." if body else "")
    return "projector" if beside and not holds else None


def is_within(name: str, of: str) -> bool:
    return name == of or name.startswith(of + ".")


def within(names: dict[str, Part], of: str) -> list[str]:
    return [name for name in names if is_within(name, of)]


def ends_of_towers(model: PreTrainedModel, towers: list[str]) -> Iterator[str]:
    """Yield the modules of a tower, beside its blocks, that give the decoder's width."""
    width = model.config.get_text_config().hidden_size
    for tower in towers:
        for name, child in model.get_submodule(tower).named_children():
            linears = [m for m in child.modules() if kind(m) == "linear"]
            last: Any = linears[-1] if linears else None
            if last is not None and last.out_features == width and not is_stack(child):
                yield f"{tower}.{name}"


def unread_blocks(model: nn.Module) -> list[str]:
    """Return the tower's blocks after the one whose output is read, such as the last of Llava's."""
    config: Any = getattr(model, "config", None)
    chosen = getattr(config, "vision_feature_layer", None)
    if chosen is None:
        return []
    count = config.vision_config.num_hidden_layers
    layers = chosen if isinstance(chosen, list | tuple) else [chosen]
    read = max(place if place >= 0 else count + 1 + place for place in layers)
    parts = parts_of(model)
    return [
        f"{name}.{number}"
        for name, module in model.named_modules()
        if parts.get(name) == "vision"
        and isinstance(module, nn.ModuleList)
        and len(module) == count
        for number in range(read, count)
    ]


def is_stack(module: nn.Module) -> bool:
    return any("attn" in name or "attention" in name for name, _ in module.named_modules())
