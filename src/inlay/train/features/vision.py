"""What a frozen vision tower and projector give for every row, kept, so that they run once a row.

The rows are known before training, so the features are made before it, one row after another: a
resumed run makes the same bits. What lies over the memory's share goes to a file.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from inlay.data.image_inputs import ImageInputs
from inlay.data.image_reader import ImageReader
from inlay.data.tokens import Encoded
from inlay.errors import InlayError, ModelError
from inlay.evaluate.images import Seeing
from inlay.methods.base import evaluating
from inlay.model.fast.padding import length_multiple
from inlay.train.features.cache import FeatureCache, InFile, in_memory, off_by

FEATURES = "get_image_features"
"""The method by which transformers' models see."""
UNREAD = ("last_hidden_state", "hidden_states", "attentions")
"""What the tower gives beside what the language part reads."""
PIXELS = ("pixel_values", "pixel_attention_mask")
"""The inputs that only the tower reads; the first is replaced by the rows' numbers."""

Tree = Any
"""Tensors in lists, tuples and ModelOutputs."""


class VisionCache(FeatureCache, ImageInputs):
    """The features of images, found again by their numbers, which stand in for the pixels.

    Rows of the same images have one number.
    """

    def __init__(self, model: PreTrainedModel, reader: ImageReader, path: Path) -> None:
        FeatureCache.__init__(self, path)
        ImageInputs.__init__(self, reader, model.dtype)
        self.model = model
        self.body: Any = body_of(model)
        self.own: Callable[..., Any] = getattr(self.body, FEATURES)
        self.numbers: dict[tuple[str, ...], int] = {}
        self.rows = 0
        self.others: list[dict[str, Tensor]] = []
        self.features: list[Tree] = []

    def __str__(self) -> str:
        return (
            f"the vision tower and projector are frozen and ran once over {self.rows} rows; what "
            f"they gave is read from now on: {self.where()}"
        )

    def fill(self, rows: Sequence[Encoded]) -> None:
        """Run tower and projector once over the images of every row."""
        self.rows += len(rows)
        with evaluating(self.model), torch.no_grad():
            for row in {row.images: row for row in rows}.values():
                self.numbers[row.images] = len(self.others)
                found = self.reader.of(row)
                self.features.append(mapped(self.keep, self.seen(row, found)))
                self.others.append({k: v for k, v in found.items() if k not in PIXELS})

    def seen(self, row: Encoded, found: Mapping[str, Tensor]) -> Tree:
        """Return what the tower and the projector make of one row's images."""
        if PIXELS[0] not in found:
            return None
        device = next(self.model.parameters()).device
        call: dict[str, Any] = {
            name: (value.to(self.dtype) if value.is_floating_point() else value).to(device)
            for name, value in found.items()
        }
        features: list[Tree] = []

        def noticed(*args: Any, **kwargs: Any) -> Any:
            features.append(self.own(*args, **kwargs))
            raise Seen

        ids = torch.zeros(1, len(row.input_ids), dtype=torch.long, device=device)
        with replaced(self.body, noticed):
            try:
                self.model(input_ids=ids, attention_mask=torch.ones_like(ids), **call)
            except Seen:
                return without_unread(features[0])
        raise ModelError(f"{type(self.model).__name__} does not see by {FEATURES}")

    def of(self, row: Encoded) -> dict[str, Tensor]:
        """Return the inputs of one row's images, their number in place of their pixels."""
        number = self.numbers[row.images]
        found = dict(self.others[number])
        if self.features[number] is not None:
            found[PIXELS[0]] = torch.tensor([number])
        return found

    def read(self, *args: Any, **kwargs: Any) -> Any:
        """Return the features of the rows whose numbers stand in for pixels; else the model's own.

        This is what the model calls in place of its `get_image_features`.
        """
        pixels: Tensor = kwargs[PIXELS[0]] if PIXELS[0] in kwargs else args[0]
        if pixels.ndim != 1 or pixels.is_floating_point():
            return self.own(*args, **kwargs)
        device = next(self.model.parameters()).device
        return merged([self.features[i] for i in pixels.tolist()], device)

    def reading(self) -> AbstractContextManager[None]:
        return replaced(self.body, self.read)

    def forget(self) -> None:
        self.features.clear()

    def differs(self, rows: Sequence[Encoded]) -> str | None:
        """Return how far the logits from kept features are from the model's own, if too far."""
        multiple = length_multiple(self.model)
        plain = ImageInputs(self.reader, self.dtype)
        with evaluating(self.model), torch.no_grad():
            own = self.logits(Seeing(plain).join(rows, multiple).call)
            with self.reading():
                read = self.logits(Seeing(self).join(rows, multiple).call)
        return off_by(read, own)

    def logits(self, call: Mapping[str, Tensor]) -> Tensor:
        device = next(self.model.parameters()).device
        moved = {name: value.to(device) for name, value in call.items()}
        real = moved["attention_mask"].bool()
        return self.model(**moved, use_cache=False).logits[real]


class Seen(Exception):  # noqa: N818
    """The model has come as far as it needs to."""


def body_of(model: PreTrainedModel) -> Any:
    """Return the model inside that sees."""
    body: Any = model.base_model
    if not hasattr(body, FEATURES):
        raise ModelError(f"{type(model).__name__} does not see by {FEATURES}")
    return body


@contextmanager
def replaced(body: nn.Module, by: Callable[..., Any]) -> Generator[None]:
    vars(body)[FEATURES] = by
    try:
        yield
    finally:
        del vars(body)[FEATURES]


def without_unread(features: Any) -> Any:
    """Return the features without those that the language part does not read."""
    if isinstance(features, ModelOutput):
        read = {name: value for name, value in features.items() if name not in UNREAD}
        return type(features)(**cast("dict[str, Any]", read))
    return features


# Trees of tensors


def mapped(change: Callable[[Any], Any], tree: Tree) -> Tree:
    """Return a tree with every tensor changed."""
    if isinstance(tree, Tensor | InFile):
        return change(tree)
    if isinstance(tree, ModelOutput):
        return type(tree)(**{name: mapped(change, value) for name, value in tree.items()})
    if isinstance(tree, list | tuple):
        return type(tree)(mapped(change, item) for item in tree)
    return tree


def merged(trees: Sequence[Tree], device: torch.device) -> Tree:
    """Return the features of several rows as the model gives those of a batch.

    Tensors are joined along the first dimension and the rows' lists of images one after another;
    a list of layers, whose items are such lists, is joined layer by layer.
    """
    first = trees[0]
    if isinstance(first, Tensor | InFile):
        return torch.cat([in_memory(tree) for tree in trees]).to(device)
    if isinstance(first, ModelOutput):
        fields = {name: merged([t[name] for t in trees], device) for name in first}
        return type(first)(**cast("dict[str, Any]", fields))
    if isinstance(first, list | tuple) and first and isinstance(first[0], list | tuple):
        layers = zip(*trees, strict=True)
        return type(first)(merged(list(layer), device) for layer in layers)
    if isinstance(first, list | tuple):
        return type(first)(in_memory(item).to(device) for tree in trees for item in tree)
    return first


# Whether features can be kept


def cached_vision(
    model: PreTrainedModel, reader: ImageReader, rows: Sequence[Encoded], path: Path
) -> VisionCache | str:
    """Return the features of these rows, or why they cannot be kept.

    Tried on the model first: tower and projector give the same features each time they run in
    training, without a gradient, and the first rows' logits are the same, to rounding, with
    features kept as with pixels seen.
    """
    try:
        cache = VisionCache(model, reader, path)
        with_images = [row for row in rows if row.pictures]
        reason = changes(cache, with_images[0]) if with_images else "no row has an image"
        if reason is not None:
            return reason
        cache.fill(rows)
        return cache.refused(cache.differs(with_images[:4])) or cache
    except (InlayError, OSError, RuntimeError, ValueError) as error:
        path.unlink(missing_ok=True)
        return str(error).splitlines()[0]


def changes(cache: VisionCache, row: Encoded) -> str | None:
    """Return why a row's features are not the same each time it trains, or None if they are."""
    before = {module: module.training for module in cache.model.modules()}
    found = cache.reader.of(row)
    cache.model.train()
    try:
        tensors = [flat(cache.seen(row, found)) for _ in range(2)]
    finally:
        for module, training in before.items():
            module.training = training
    if any(tensor.requires_grad for tensor in tensors[0]):
        return "something in the vision tower or the projector trains"
    if not all(map(torch.equal, *tensors)):
        return "the vision tower has dropout"
    return None


def flat(tree: Tree) -> list[Tensor]:
    found: list[Tensor] = []
    mapped(found.append, tree)
    return found
