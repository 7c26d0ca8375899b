"""A run file: YAML whose keys stand once, with the line of each."""

from __future__ import annotations

import re
from pathlib import Path
from typing import cast

import yaml

from inlay.errors import UsageError


class RunLoader(yaml.SafeLoader):
    """YAML's safe subset, where `1e-4` is a number and a key stands only once."""


RunLoader.yaml_implicit_resolvers = {
    first: [pair for pair in pairs if pair[0] != "tag:yaml.org,2002:float"]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
RunLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.?\d*([eE][-+]?\d+)|\d+\.\d*|\.\d+([eE][-+]?\d+)?|\.(inf|nan))$"),
    list("-+.0123456789"),
)


def read_yaml(path: Path) -> tuple[dict[str, object], dict[str, int]]:
    """Return a run file's keys with their values, and with their line numbers."""
    source = read_text(path)
    try:
        root = yaml.compose(source, Loader=RunLoader)
        if root is None:
            return {}, {}
        if not isinstance(root, yaml.MappingNode):
            raise UsageError(
                f"{path}:{root.start_mark.line + 1}: a run file holds 'key: value' lines"
            )
        lines = key_lines(root, path)
        values = yaml.load(source, Loader=RunLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise UsageError(f"{path}:{line}: this is not YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise UsageError(f"{path}: this is not YAML: {error}") from None
    except (RecursionError, ValueError) as error:
        raise UsageError(f"{path}: this YAML cannot be read: {error}") from None
    return cast("dict[str, object]", values), lines


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8: byte {error.start} is {error.reason}") from None
    except OSError as error:
        raise UsageError(f"the run file {path} cannot be read: {error.strerror}") from None


def key_lines(mapping: yaml.MappingNode, path: Path) -> dict[str, int]:
    """Return the line of every key; raise when one repeats, in nested mappings too."""
    lines: dict[str, int] = {}
    nested: dict[str, int] = {}
    for key, value in mapping.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode) or key.tag != "tag:yaml.org,2002:str":
            raise UsageError(f"{path}:{line}: a key must be a word")
        if key.value in lines:
            first = lines[key.value]
            raise UsageError(f"{path}:{line}: {key.value!r} stands twice, first in line {first}")
        lines[key.value] = line
        if isinstance(value, yaml.MappingNode):
            nested |= key_lines(value, path)
    return nested | lines
