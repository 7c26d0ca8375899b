"""Conversations about small random images."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from vision_tiny import SIDE

from inlay.data.images import normalise_images
from inlay.data.raw import RawRow
from inlay.data.rows import Rows


def picture(seed: int, size: tuple[int, int] = (SIDE, SIDE)) -> Image.Image:
    torch.manual_seed(seed)
    pixels = torch.randint(255, (size[1], size[0], 3), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def rows_of(*rows: dict[str, Any]) -> Rows:
    raw = [RawRow(row, "data.jsonl", number) for number, row in enumerate(rows, start=1)]
    return normalise_images(raw)


def turns(*words: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[n % 2], "content": w} for n, w in enumerate(words)]


TWO_TURNS = {
    "images": [picture(1), picture(2)],
    "messages": turns("<image>First?", "One.", "And <image>?", "Two."),
}
MIXED = (
    {"images": [picture(3)], "messages": turns("What?", "It.")},
    TWO_TURNS,
    {"images": [], "messages": turns("No image at all?", "None.")},
)
