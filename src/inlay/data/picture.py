"""One image, from wherever a row or a flag says it lies; it is decoded when it is opened."""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import urllib.request
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inlay.data.fields import EmptyFieldError, is_missing
from inlay.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

WEB = ("http://", "https://")
TIMEOUT = 30
LARGEST_FILE = 64 << 20
"""Bytes that are fetched for one image at most."""


@dataclass(frozen=True)
class Picture:
    """One image of a row, as it was found; it is decoded each time it is opened."""

    source: Any
    """A path, an image file's bytes, or an image of PIL."""
    where: str
    """`data.jsonl, line 3: 'image'`, the start of every error about it."""
    sha256: str

    def open(self) -> Image:
        """Return the image in RGB, turned as its camera says."""
        from PIL import Image, ImageOps

        found = self.content()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                if isinstance(found, bytes):
                    found = Image.open(io.BytesIO(found))
                return ImageOps.exif_transpose(found).convert("RGB")
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            raise DataError(f"{self.where} is too large to be opened safely: {error}") from None
        except Exception as error:  # PIL's readers fail in many ways on damaged files
            reason = " ".join(str(error).split())
            raise DataError(f"{self.where} cannot be decoded as an image: {reason}") from None

    def content(self) -> Any:
        """Return an image file's bytes, or an image of PIL."""
        if not isinstance(self.source, Path):
            return self.source
        try:
            found = self.source.read_bytes()
        except OSError as error:
            raise DataError(f"{self.where} cannot be read any more: {error}") from None
        if hashlib.sha256(found).hexdigest() != self.sha256:
            raise DataError(f"{self.where} has changed since the rows were checked; begin anew")
        return found


def picture_at(value: Any, where: str, folder: Path, allow_urls: bool = False) -> Picture:
    source = source_of(value, where, folder, allow_urls)
    content = source.read_bytes() if isinstance(source, Path) else source
    if not isinstance(content, bytes):
        content = repr((content.mode, content.size)).encode() + content.tobytes()
    elif not is_image(content):
        what = source if isinstance(source, Path) else "these bytes"
        raise DataError(f"{where}: {what} cannot be read as an image")
    return Picture(source, where, hashlib.sha256(content).hexdigest())


def source_of(value: Any, where: str, folder: Path, allow_urls: bool) -> Any:
    """Return where an image's content lies: a path, its bytes, or PIL's image."""
    if isinstance(value, Mapping):
        value = content_in(value, where)
    if isinstance(value, bytes | bytearray):
        return bytes(value)
    if hasattr(value, "tobytes") and hasattr(value, "convert"):
        return value
    if not isinstance(value, str):
        raise DataError(
            f"{where} is of type {type(value).__name__}; expected a path, an address, bytes, or an "
            "object with 'bytes' or 'path'"
        )
    if value.startswith("data:"):
        return decoded(value.partition(",")[2], where)
    if value.lower().startswith(WEB):
        return fetched(value, where, allow_urls)
    path = (folder / Path(value).expanduser()).resolve()
    if not path.is_file():
        there = "a folder" if path.is_dir() else "not there"
        raise DataError(
            f"{where}: {path} is {there}; paths are relative to {folder}, and a column of words "
            "must have another name"
        )
    return path


def content_in(value: Mapping[str, Any], where: str) -> Any:
    """Return what an image column's `{"bytes", "path"}` holds: the bytes if there are some."""
    held, path = value.get("bytes"), value.get("path")
    if is_missing(held) and is_missing(path):
        raise EmptyFieldError(f"{where} has neither bytes nor a path")
    if is_missing(held):
        return path
    return decoded(held, where) if isinstance(held, str) else held


def decoded(text: str, where: str) -> bytes:
    """Return bytes from base64."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(f"{where} is not base64: {error}") from None


def fetched(address: str, where: str, allow_urls: bool) -> bytes:
    """Return the bytes at an address."""
    if not allow_urls:
        raise DataError(
            f"{where} is an address ({address[:60]}), which is not fetched unless allow_urls says "
            "so; fetch the images first, or set allow_urls"
        )
    try:
        with urllib.request.urlopen(address, timeout=TIMEOUT) as answer:
            content = answer.read(LARGEST_FILE + 1)
    except (OSError, ValueError) as error:
        raise DataError(f"{where}: {address} cannot be fetched: {error}") from None
    if len(content) > LARGEST_FILE:
        raise DataError(f"{where}: {address} has more than {LARGEST_FILE >> 20} MB")
    return content


def is_image(content: bytes) -> bool:
    """Return whether bytes begin as an image file that can be read; its pixels are not decoded."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content)):
                return True
    except Exception:  # PIL's readers fail in many ways on what is no image
        return False
