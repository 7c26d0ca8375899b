"""What a model's own methods may do while adapters are on it: tie the base's weights, not theirs.

transformers ties weights when it loads, saves or resizes, and by name it would read an adapter's
trained copy in the base's place. To resize or replace an adapted embedding would leave the
adapter on a layer of another size, so that is refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from inlay.errors import AdapterError
from inlay.methods.base import Params
from inlay.model.adapters.layer import AdaptedLayer, own_modules
from inlay.model.merge.untie import own_names

TIES = ("tie_weights",)
ENDS = {
    "resize_token_embeddings": ("get_input_embeddings", "get_output_embeddings"),
    "set_input_embeddings": ("get_input_embeddings",),
    "set_output_embeddings": ("get_output_embeddings",),
}
"""The methods that put other embeddings in place -> what gets the present ones."""


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
            with own_names(self.owner):
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
        for getter in ENDS[self.method]:
            end = getattr(self.owner, getter)() if hasattr(self.owner, getter) else None
            same = end is None or self.leaves(end, *args, **kwargs)
            if not same and isinstance(end, AdaptedLayer) and len(end.adapters):
                name = next((n for n, m in own_modules(self.owner) if m is end), getter)
                raise AdapterError(
                    f"{self.method} would put other weights at {name}, where adapter "
                    f"{next(iter(end.adapters))!r} is, which was made for the present ones; call "
                    f"inlay.detach or inlay.merge, then {self.method}, then attach"
                )
        return self.own(*args, **kwargs)

    def leaves(self, end: nn.Module, *args: Any, **kwargs: Any) -> bool:
        """Say whether a call leaves an embedding or a head as it is."""
        given = [value for value in (*args[:1], *kwargs.values()) if value is not None]
        size = getattr(end, "num_embeddings", getattr(end, "out_features", None))
        return all(value is end or (isinstance(value, int) and value == size) for value in given)


def guard(model: nn.Module) -> None:
    """Put the guards on a model and on the models inside it; on a guarded one nothing changes."""
    for _, module in list(own_modules(model)):
        for names, kind in ((TIES, TieBase), (tuple(ENDS), KeepEnds)):
            for name in names:
                if callable(getattr(type(module), name, None)) and name not in vars(module):
                    vars(module)[name] = kind(module, name)


def unguard(model: nn.Module) -> None:
    """Take the guards off."""
    for _, module in own_modules(model):
        for name in (*TIES, *ENDS):
            if isinstance(vars(module).get(name), Guard):
                del vars(module)[name]


def say_shared(tables: Iterable[Params]) -> None:
    """Say which of an adapter's tensors are another's again, as transformers reads it.

    `save_pretrained` writes a shared tensor once, where a module says that it is tied.
    """
    seen: set[int] = set()
    for params in tables:
        own = {name: id(p) for name, p in params._parameters.items() if p is not None}
        again = [name for name, number in own.items() if number in seen]
        if again:
            vars(params)["_tied_weights_keys"] = dict.fromkeys(again, "")
        seen |= set(own.values())
