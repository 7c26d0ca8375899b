"""Judged answers about images: pairs of which one is preferred, and labelled ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from inlay.data.image_columns import hold_images
from inlay.data.images import Placing, pictured, same_images, with_images, without_images
from inlay.data.labelled import both_labels, label_shape, normalise_labelled
from inlay.data.picture import Picture
from inlay.data.preference import SIDES, normalise_pairs, pair_shape, said, same_prompt
from inlay.data.read import RawRow
from inlay.data.rows import Kind, Rows, Shape, group_of

__all__ = ["normalise_shown_labelled", "normalise_shown_pairs"]


def normalise_shown_pairs(
    raw: Sequence[RawRow],
    *,
    group: str | None = None,
    skip_empty: bool = False,
    allow_urls: bool = False,
) -> Rows:
    """Return rows of preferences with or without images, as the first of them has some or not.

    Those with images have prompts of messages, whose parts are `{"type": "image" | "text"}`, and
    the images of the prompt, which both answers are to.

    Args:
        raw: the rows as read; at least one.
        group: as in `normalise_pairs`, and so is skip_empty.
        allow_urls: fetch images named by an http(s) address.

    Raises:
        DataError: as `normalise_pairs`, and what `normalise_images` raises for images.
    """
    if not raw or not hold_images(raw[0]):
        return normalise_pairs(raw, group=group, skip_empty=skip_empty)
    shape = pair_shape(without_images(raw[0])[0], group)
    return judged(raw, "preference", shape, SIDES, group, skip_empty, allow_urls)


def normalise_shown_labelled(
    raw: Sequence[RawRow],
    *,
    group: str | None = None,
    skip_empty: bool = False,
    allow_urls: bool = False,
) -> Rows:
    """Return labelled rows with or without images, as the first of them has some or not.

    Arguments, errors and images are those of `normalise_shown_pairs`.
    """
    if not raw or not hold_images(raw[0]):
        return normalise_labelled(raw, group=group, skip_empty=skip_empty)
    shape = label_shape(without_images(raw[0])[0], group)
    answers = ("completion",)
    return both_labels(judged(raw, "labelled", shape, answers, group, skip_empty, allow_urls))


def judged(
    raw: Sequence[RawRow],
    kind: Kind,
    shape: Shape,
    answers: Sequence[str],
    group: str | None,
    skip_empty: bool,
    allow_urls: bool,
) -> Rows:
    """Return rows of answers to a prompt with images; those of the same images stay together."""

    def place(row: RawRow, found: dict[str, Any], pictures: list[Picture]) -> dict[str, Any]:
        return about_images(row, found, pictures, answers)

    def groups(row: RawRow, found: dict[str, Any]) -> str:
        if group is not None:
            return group_of(row, group)
        return same_images(row, found) if found["images"] else same_prompt(row, found)

    return pictured(raw, kind, Placing(shape, place, allow_urls), groups, skip_empty)


def about_images(
    row: RawRow, found: dict[str, Any], pictures: list[Picture], answers: Sequence[str]
) -> dict[str, Any]:
    """Return a row whose prompt is messages with images, and whose answers are text.

    A prompt of text becomes a user's message, and the space that its answers took is left out.

    Raises:
        DataError: there are more or fewer places than images, or one outside a user's message.
    """
    if isinstance(found["prompt"], str):
        said_alone = {name: found[name].removeprefix(" ") for name in answers}
        found = {**found, **said_alone, "prompt": [{"role": "user", "content": found["prompt"]}]}
    shown = [with_images(row, [*found["prompt"], said(found[name])], pictures) for name in answers]
    return {**found, "prompt": shown[0]["messages"][:-1], "images": pictures}
