"""Show the doctests of docstrings as code on the docs site.

mkdocstrings loads this file (`extensions:` in mkdocs.yml). A docstring here has its example at the
end, without a title; griffe reads only examples under one.
"""

from __future__ import annotations

from typing import Any

import griffe


class Doctests(griffe.Extension):
    """Puts the title `Examples:` above the first `>>>` of a docstring."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Change the docstring of one object."""
        if obj.docstring is None or "Examples:" in obj.docstring.value:
            return
        text, mark, example = obj.docstring.value.partition("\n>>>")
        if mark:
            lines = [f"    {line}".rstrip() for line in (">>>" + example).splitlines()]
            obj.docstring.value = "\n".join([text.rstrip(), "", "Examples:", *lines])
