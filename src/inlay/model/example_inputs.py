"""Small random inputs that a model's own forward takes, whatever family it is of."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from inlay.errors import ModelError, first_line
from inlay.methods.base import evaluating

Batch = dict[str, Tensor]
Maker = Callable[["Sizes"], Tensor | None]

ROWS, TOKENS = 4, 64
TARGET_TOKENS = 16
"""How many tokens an encoder-decoder's target has."""
FRAMES = 64
"""How many frames of speech features, where the model does not say."""
SAMPLES = 4000
"""How many samples of sound: a quarter of a second, more than any feature encoder's window."""
SIDES = (224, 384, 448, 512, 64)
"""Sides of an image to try where the configuration names none."""


def example_inputs(
    model: nn.Module, *, rows: int = ROWS, tokens: int = TOKENS, seed: int = 0
) -> list[Batch]:
    """Return seeded random inputs that this model's forward has taken, as batches.

    Ids of special tokens (padding, images, sounds) are left out. What the forward takes is found
    by trying: the inputs that the configuration suggests first, in eval mode and without gradient.
    A row has `tokens` tokens at most, and is a batch of its own where the model takes no more at
    once. Raises `ModelError` when the model takes none of the inputs.
    """
    config: Any = getattr(model, "config", None)
    if not isinstance(config, PreTrainedConfig):
        raise ModelError(
            f"inputs for a {type(model).__name__} cannot be made, for it has no configuration of "
            "transformers; give inputs=[...], a list of what its forward takes by name"
        )
    tried: list[str] = []
    for batch in candidates(model, config, rows, tokens, seed):
        for batches in ([batch], split(batch)):
            problem = refused(model, batches)
            if problem is None:
                return batches
            tried.append(f"{' and '.join(batch)} ({problem})")
    known = f"; tried {'; '.join(list(dict.fromkeys(tried))[:3])}" if tried else ""
    raise ModelError(
        f"inputs for a {type(model).__name__} cannot be made: its forward takes none that could be "
        f"derived from its configuration{known}. Give inputs=[...], a list of what it takes by name"
    )


def refused(model: nn.Module, batches: list[Batch]) -> str | None:
    try:
        with torch.no_grad(), evaluating(model):
            for batch in batches:
                model(**batch)
    except Exception as error:  # Whatever another library's forward raises on inputs it lacks.
        return first_line(error)[:120]
    return None


def split(batch: Batch) -> list[Batch]:
    rows = next(iter(batch.values())).shape[0]
    return [{name: value[i : i + 1] for name, value in batch.items()} for i in range(rows)]


def candidates(
    model: nn.Module, config: PreTrainedConfig, rows: int, tokens: int, seed: int
) -> Iterator[Batch]:
    taken = inspect.signature(model.forward).parameters
    main = getattr(model, "main_input_name", "input_ids")
    mains = (main,) if isinstance(main, str) else tuple(main)
    decodes = "decoder_input_ids" in taken
    both = ("input_ids", "pixel_values")
    combinations: dict[tuple[str, ...], None] = {}
    for first in (mains, ("input_ids",), both, ("pixel_values",), *((n,) for n in MAKERS)):
        names = tuple(n for n in first if n in taken and n in MAKERS)
        if names and decodes and "decoder_input_ids" not in names:
            combinations[*names, "decoder_input_ids"] = None
        if names:
            combinations[names] = None
            combinations[tuple(dict.fromkeys((*names, *(n for n in EXTRA if n in taken))))] = None
    for names in combinations:
        for side in SIDES if "pixel_values" in names and not Sizes.knows_side(config) else (None,):
            sizes = Sizes(model, config, rows, tokens, seed, side)
            made = {name: MAKERS[name](sizes) for name in names}
            if all(value is not None for value in made.values()):
                yield {n: v for n, v in made.items() if v is not None}


class Sizes:
    """Makes seeded inputs on the model's device, in the sizes that its configuration names."""

    def __init__(
        self,
        model: nn.Module,
        config: PreTrainedConfig,
        rows: int,
        tokens: int,
        seed: int,
        side: int | None,
    ) -> None:
        self.model, self.config, self.rows, self.side = model, config, rows, side
        self.seed = torch.Generator().manual_seed(seed)
        first = next((p for p in model.parameters() if p.device.type != "meta"), None)
        floating = (p.dtype for p in model.parameters() if p.is_floating_point())
        self.device = torch.device("cpu") if first is None else first.device
        self.dtype = next(floating, torch.float32)
        self.tokens = min(tokens, self.context() or tokens)

    def context(self) -> int | None:
        """Return how many tokens the model has positions for, two kept for offsets."""
        text: Any = self.config.get_text_config()
        names = ("max_position_embeddings", "n_positions", "max_target_positions")
        found = [v for n in names if isinstance(v := getattr(text, n, None), int) and v > 2]
        return max(min(found) - 2, 1) if found else None

    def find(self, *names: str) -> Any:
        for config in configs(self.config):
            for name in names:
                value = vars(config).get(name)
                if value is not None:
                    return value
        return None

    @staticmethod
    def knows_side(config: PreTrainedConfig) -> bool:
        return any(vars(c).get("image_size") is not None for c in configs(config))

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.seed).to(self.device, self.dtype)

    def ids(self, length: int) -> Tensor | None:
        text: Any = self.config.get_text_config()
        decoder: Any = self.config.get_text_config(decoder=True)
        size = getattr(text, "vocab_size", None) or getattr(decoder, "vocab_size", None)
        if not isinstance(size, int) or size < 1:
            return None
        special = {v for c in configs(self.config) for v in special_ids(c)}
        plain = [i for i in range(size) if i not in special] or list(range(size))
        chosen = torch.randint(len(plain), (self.rows, length), generator=self.seed)
        return torch.tensor(plain)[chosen].to(self.device)


def configs(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    yield config
    for value in list(vars(config).values()):
        if isinstance(value, PreTrainedConfig):
            yield from configs(value)


def special_ids(config: PreTrainedConfig) -> Iterator[int]:
    for name, value in vars(config).items():
        if name.endswith(("_token_id", "_token_index", "_token_ids")):
            yield from (v for v in (value if isinstance(value, list) else [value])
                        if isinstance(v, int))  # fmt: skip


def input_ids(sizes: Sizes) -> Tensor | None:
    """Token ids; an encoder-decoder's source ends in its end token, which its classifiers read."""
    ids, end = sizes.ids(sizes.tokens), sizes.find("eos_token_id")
    if ids is not None and sizes.config.is_encoder_decoder and isinstance(end, int):
        ids[:, -1] = end
    return ids


def decoder_input_ids(sizes: Sizes) -> Tensor | None:
    return sizes.ids(min(TARGET_TOKENS, sizes.tokens))


def pixel_values(sizes: Sizes) -> Tensor | None:
    side = sizes.side or sizes.find("image_size", "input_size")
    height, width = side if isinstance(side, list | tuple) else (side, side)
    channels = sizes.find("num_channels", "in_channels", "in_chans") or 3
    if not isinstance(height, int) or not isinstance(width, int):
        return None
    return sizes.normal(sizes.rows, channels, height, width)


def pixel_values_videos(sizes: Sizes) -> Tensor | None:
    image = pixel_values(sizes)
    frames = sizes.find("num_frames", "frames_per_clip") or 8
    return None if image is None else image[:, None].repeat(1, int(frames), 1, 1, 1)


def input_features(sizes: Sizes) -> Tensor | None:
    """Speech as a spectrogram: of Whisper's exact length, or frames one after another."""
    bins = sizes.find("num_mel_bins")
    positions = sizes.find("max_source_positions")
    if bins is not None and positions is not None and not sizes.find("input_feat_per_channel"):
        return sizes.normal(sizes.rows, bins, 2 * positions)
    width = sizes.find("input_feat_per_channel", "feature_projection_input_dim", "input_dim")
    width = width or bins or sizes.find("num_mel_channels", "input_size")
    return sizes.normal(sizes.rows, FRAMES, width) if isinstance(width, int) else None


def input_values(sizes: Sizes) -> Tensor | None:
    """Sound, sample by sample, or the spectrogram of a set length that some models take."""
    bins, length = sizes.find("num_mel_bins"), sizes.find("max_length")
    if bins is not None and length is not None and sizes.find("conv_dim") is None:
        return sizes.normal(sizes.rows, length, bins)
    return sizes.normal(sizes.rows, SAMPLES)


def bbox(sizes: Sizes) -> Tensor | None:
    box = torch.tensor([0, 0, 100, 100], device=sizes.device)
    return box.expand(sizes.rows, sizes.tokens, 4).clone()


MAKERS: Mapping[str, Maker] = {
    "input_ids": input_ids,
    "pixel_values": pixel_values,
    "input_features": input_features,
    "input_values": input_values,
    "pixel_values_videos": pixel_values_videos,
    "decoder_input_ids": decoder_input_ids,
    "bbox": bbox,
}
"""What a forward may take by name -> how it is made."""
EXTRA = ("bbox", "decoder_input_ids")
"""What is tried beside the main inputs, where the forward knows it."""
