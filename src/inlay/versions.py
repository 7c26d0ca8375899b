"""Whether the libraries around Inlay are of the releases that it was tested with."""

from __future__ import annotations

import warnings
from importlib import metadata

from packaging.requirements import Requirement

CHECKED = ("torch", "transformers", "trl", "accelerate", "peft")
"""The libraries whose releases change what Inlay depends on."""


class UntestedVersion(UserWarning):
    """A library is installed in a release that Inlay was not tested with."""


def warn_of_untested() -> None:
    """Warn once of the installed libraries that lie outside the range in Inlay's own metadata."""
    outside = untested(requirements())
    if outside:
        warnings.warn(
            f"inlay was not tested with {', '.join(outside)}. Results may be wrong: install the "
            "tested releases with 'pip install --upgrade inlay'",
            UntestedVersion,
            stacklevel=3,
        )


def requirements() -> list[str]:
    """Return the requirements that Inlay was installed with; none where it is not installed."""
    try:
        return metadata.requires("inlay") or []
    except metadata.PackageNotFoundError:
        return []


def untested(required: list[str]) -> list[str]:
    """Return each checked library that is installed outside its range, with both.

    >>> untested(["trl<0.1"]) != [] and untested(["trl>=0.1"]) == []
    True
    """
    found: dict[str, str] = {}
    for requirement in map(Requirement, required):
        name, range_ = requirement.name, requirement.specifier
        try:
            installed = metadata.version(name) if name in CHECKED else ""
        except metadata.PackageNotFoundError:
            continue
        if installed and not range_.contains(installed, prereleases=True):
            found[name] = f"{name} {installed} (tested: {range_})"
    return list(found.values())
