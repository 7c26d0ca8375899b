"""The tensors a model sees images by, beside the tokens of rows in a batch.

Only tokens are kept of a row; its images are decoded and prepared again whenever it is used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from inlay.data.tokens import Encoded

if TYPE_CHECKING:
    from inlay.data.image_reader import ImageReader

ROOM = 256 << 20
"""Bytes of prepared images that are kept in memory at most."""


def kinds_beside(
    rows: Sequence[Encoded],
    width: int,
    *,
    kept: Sequence[int] | None = None,
    left: bool = False,
) -> dict[str, Tensor]:
    """Return what is read of each token beside its number, for rows under one another.

    Args:
        rows: the rows.
        width: the batch's tokens a row; shorter ones are padded with zeros.
        kept: how many tokens of each row are used; all that it has if not given.
        left: whether rows end, rather than begin, together.
    """
    counts = [len(row.input_ids) for row in rows] if kept is None else kept
    batch: dict[str, Tensor] = {}
    for name in dict.fromkeys(name for row in rows for name in row.kinds):
        batch[name] = torch.zeros(len(rows), width, dtype=torch.long)
        for number, (row, count) in enumerate(zip(rows, counts, strict=True)):
            if name in row.kinds:
                part = slice(width - count, width) if left else slice(0, count)
                batch[name][number, part] = torch.tensor(row.kinds[name][:count])
    return batch


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Return tensors one after another, smaller ones filled with zeros as processors do."""
    largest = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True)]
    filled: list[Tensor] = []
    for part in parts:
        whole = part.new_zeros(part.shape[0], *largest)
        whole[tuple(slice(0, size) for size in part.shape)] = part
        filled.append(whole)
    return torch.cat(filled)


class ImageInputs:
    """Gives what a model needs of rows beside their tokens: pixels, grids, kinds of tokens.

    What was prepared for images is kept while there is room for it, once for all rows of the same
    ones; else it is made again.
    """

    def __init__(
        self, reader: ImageReader, dtype: torch.dtype = torch.float32, room: int = ROOM
    ) -> None:
        self.reader, self.dtype, self.room = reader, dtype, room
        self.kept: dict[tuple[str, ...], dict[str, Tensor]] = {}

    def __call__(
        self,
        rows: Sequence[Encoded],
        *,
        width: int,
        kept: Sequence[int] | None = None,
        left: bool = False,
    ) -> dict[str, Tensor]:
        return kinds_beside(rows, width, kept=kept, left=left) | self.images_of(rows)

    def images_of(self, rows: Sequence[Encoded]) -> dict[str, Tensor]:
        """Return the images of rows as one batch: their inputs joined along the first dimension."""
        found = [self.of(row) for row in rows]
        names = dict.fromkeys(name for inputs in found for name in inputs)
        batch = {name: joined([each[name] for each in found if name in each]) for name in names}
        return {
            name: value.to(self.dtype) if value.is_floating_point() else value
            for name, value in batch.items()
        }

    def of(self, row: Encoded) -> dict[str, Tensor]:
        """Return the inputs of one row's images."""
        if row.images in self.kept:
            return self.kept[row.images]
        found = self.reader.of(row)
        size = bytes_of(found)
        if size <= self.room:
            self.room -= size
            self.kept[row.images] = found
        return found


def bytes_of(inputs: Mapping[str, Tensor]) -> int:
    return sum(value.nbytes for value in inputs.values())
