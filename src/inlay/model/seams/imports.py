"""Act on a module of another library as soon as somebody imports it, without importing it."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from typing import Any


def when_imported(name: str, act: Callable[[Any], object]) -> Callable[[], None]:
    """Call `act` with a module, now or once it is imported; return what stops that."""
    loaded = sys.modules.get(name)
    if loaded is not None:
        act(loaded)
        return lambda: None
    finder = Finder(name, act)
    sys.meta_path.insert(0, finder)
    return finder.end


class Finder(MetaPathFinder):
    """Finds one module as the other finders do, with a loader that also acts on it."""

    def __init__(self, name: str, act: Callable[[Any], object]) -> None:
        self.name, self.act = name, act

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        del path, target
        if fullname != self.name:
            return None
        self.end()
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                load(module)
                self.act(module)

            setattr(spec.loader, "exec_module", exec_module)  # noqa: B010
        return spec

    def end(self) -> None:
        if self in sys.meta_path:
            sys.meta_path.remove(self)
