"""What a model sees of rows with images, as their losses and their texts need it."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from typing import Any

from torch import Tensor

from inlay.data.image_inputs import ImageInputs
from inlay.data.picture import Picture
from inlay.evaluate.generation import Fill
from inlay.evaluate.losses import Batch, Join, padded
from inlay.evaluate.samples import Sample

THUMBNAIL = 160
"""Pixels of the longer side of an image in a report at most."""


def joining(seeing: Seeing | None) -> Join | None:
    return None if seeing is None else seeing.join


def thumbnail(picture: Picture) -> str:
    small, written = picture.open(), BytesIO()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    small.save(written, "PNG")
    return f"data:image/png;base64,{b64encode(written.getvalue()).decode()}"


@dataclass(frozen=True)
class Seeing:
    """Gives the images of rows beside their tokens."""

    inputs: ImageInputs

    def join(self, rows: Sequence[Any], multiple: int) -> Batch:
        """Return rows under one another with their images, padded on the right."""
        batch = padded(rows, multiple)
        seen = self.inputs(rows, width=batch.measured.shape[1])
        return replace(batch, call={**batch.call, **seen})

    def filling(self, rows: Sequence[Any], samples: Sequence[Sample]) -> Fill:
        """Return what gives the images of samples of rows, for prompts padded on the left."""

        def fill(numbers: Sequence[int], width: int) -> Mapping[str, Tensor]:
            chosen = [samples[number] for number in numbers]
            return self.inputs(
                [rows[sample.row] for sample in chosen],
                kept=[len(sample.prompt) for sample in chosen],
                width=width,
                left=True,
            )

        return fill
