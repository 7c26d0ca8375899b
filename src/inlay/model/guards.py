"""What a model's own methods may do while adapters are on it: tie the base's weights, not theirs.

transformers ties weights when it loads, saves or resizes, and by name it would read an adapter's
trained copy in the base's place. To resize or replace an adapted embedding would leave the
adapter on a layer of another size, so that is refused.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from inlay.errors import AdapterError
from inlay.model.layer import AdaptedLayer, own_modules

TIES = ("tie_weights",)
RESIZES = ("resize_token_embeddings", "resize_position_embeddings")
REPLACES = ("set_input_embeddings", "set_output_embeddings")


class Guard:
    """A method of a model in place of the class's own, while adapters are on the model."""

    def __init__(self, owner: nn.Module, method: str) -> None:
        self.owner, self.method = owner, method

    def own(self, *args: Any, **kwargs: Any) -> Any:
        """Call the class's own method."""
        return getattr(type(self.owner), self.method)(self.owner, *args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the class's own method, with what has to hold."""
        raise NotImplementedError


class TieBase(Guard):
    """`tie_weights`: ties the base's weights; adapters' own copies stay what they are."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Tie with every adapter off."""
        layers = [m for m in self.owner.modules() if isinstance(m, AdaptedLayer)]
        active = [layer.active for layer in layers]
        for layer in layers:
            layer.active = ()
        try:
            return self.own(*args, **kwargs)
        finally:
            for layer, names in zip(layers, active, strict=True):
                layer.active = names


class KeepEnds(Guard):
    """Methods that put other embeddings in place: refused where an adapter is at one of them."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Put others in place where no adapter is.

        Raises:
            AdapterError: an adapter is at the input embedding or the output head.
        """
        if not (args or any(v is not None for v in kwargs.values())):
            return self.own(*args, **kwargs)
        for getter in ("get_input_embeddings", "get_output_embeddings"):
            end = getattr(self.owner, getter)() if hasattr(self.owner, getter) else None
            if isinstance(end, AdaptedLayer) and len(end.adapters):
                name = next((n for n, m in own_modules(self.owner) if m is end), getter)
                raise AdapterError(
                    f"{self.method} would put other weights at {name}, where adapter "
                    f"{next(iter(end.adapters))!r} is, which was made for the present ones; call "
                    f"inlay.detach or inlay.merge, then {self.method}, then attach"
                )
        return self.own(*args, **kwargs)


def guard(model: nn.Module) -> None:
    """Put the guards on a model and on the models inside it; on a guarded one nothing changes."""
    for _, module in list(own_modules(model)):
        for names, kind in ((TIES, TieBase), (RESIZES + REPLACES, KeepEnds)):
            for name in names:
                if callable(getattr(type(module), name, None)) and name not in vars(module):
                    vars(module)[name] = kind(module, name)


def unguard(model: nn.Module) -> None:
    """Take the guards off."""
    for _, module in own_modules(model):
        for name in (*TIES, *RESIZES, *REPLACES):
            if isinstance(vars(module).get(name), Guard):
                del vars(module)[name]
