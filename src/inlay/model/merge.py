"""Merge adapters into the base, and prove on inputs that nothing was lost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from inlay.errors import MergeError
from inlay.methods.base import evaluating
from inlay.model.attach import active, adapters, detach, disabled
from inlay.model.layer import AdaptedLayer
from inlay.model.quantize import describe_quantization, others_than_first
from inlay.model.stream import is_streamed
from inlay.storage.base import FrozenLinear
from inlay.storage.registry import frozen

TOLERANCE = {
    torch.float64: 1e-9,
    torch.float32: 1e-3,
    torch.bfloat16: 0.1,
    torch.float16: 0.02,
}
"""Largest accepted difference of logits, as a share of the largest logit, by weight dtype."""


@dataclass(frozen=True)
class MergeReport:
    """How near the merged model is to the adapted one, on the inputs named.

    `kl` is KL(adapted || merged) in nats a position; `surviving_fraction` is the share of the
    update that is left in the weights after rounding, `<W_merged - W, ΔW> / <ΔW, ΔW>`.
    """

    max_logit_difference: float
    kl: float
    top1_agreement: float
    surviving_fraction: float
    dtype: str
    positions: int
    layers: int
    inputs: str
    untied: tuple[str, ...] = ()


def merge(
    model: nn.Module,
    *,
    inputs: Sequence[Mapping[str, Tensor]] | None = None,
    storage: Literal["dense", "keep"] = "dense",
    minimum_survival: float = 0.9,
) -> MergeReport:
    """Merge the active adapters into the base in place, checked against the adapted model.

    A quantised layer becomes dense in its compute dtype (`storage="dense"`), which keeps the
    update; `storage="keep"` stays quantised and is refused when the update would be rounded away.
    Adapters that are not active are dropped with the rest.

    Args:
        model: a model with active, mergeable adapters.
        inputs: batches to check on; when None, 256 seeded random token ids.
        storage: `dense` or `keep`.
        minimum_survival: the smallest accepted surviving fraction of the update.

    Raises:
        MergeError: a method cannot merge, or the merged model differs; the model stays adapted.
    """
    check_mergeable(model)
    if storage not in ("dense", "keep"):
        raise MergeError(f"merge storage must be 'dense' or 'keep', not {storage!r}")
    batches = random_ids(model) if inputs is None else list(inputs)
    before = logits_of(model, batches)
    ties = tied_names(model)
    plan = Plan(storage)
    for name, module in model.named_modules():
        if isinstance(module, AdaptedLayer) and module.here():
            plan.layer(model, name, module)
    check_survival(plan, storage, minimum_survival)
    try:
        plan.apply()
        plan.make_uniform(model)
        with disabled(model):
            after = logits_of(model, batches)
        fidelity = compared(before, after)
        check_fidelity(fidelity, before, plan.dtype)
    except BaseException:
        plan.undo()
        raise
    detach(model)
    describe_quantization(model)
    return MergeReport(
        **fidelity,
        surviving_fraction=plan.surviving_fraction,
        dtype=str(plan.dtype).removeprefix("torch."),
        layers=plan.layers,
        inputs="random token ids" if inputs is None else "given",
        untied=untie(model, ties),
    )


class Update:
    """What a merge changes in the weights, and how much of that is left after rounding."""

    def __init__(self) -> None:
        self.kept = self.whole = 0.0
        self.shared: dict[int, nn.Parameter] = {}

    @property
    def surviving_fraction(self) -> float:
        """Return the share of the update left after rounding; 1 when there was no update."""
        return self.kept / self.whole if self.whole else 1.0

    def account(self, before: Tensor, wanted: Tensor, got: Tensor) -> None:
        """Add one weight to the surviving fraction."""
        delta = (wanted.double() - before.double()).flatten()
        self.kept += float((got.double() - before.double()).flatten() @ delta)
        self.whole += float(delta @ delta)

    def copies(self, layer: AdaptedLayer) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Every tensor of a layer with a trained copy: name, own, rounded; tied stay tied."""
        for name, own in layer._parameters.items():
            copy = trained_copy(layer, name)
            if own is None or copy is None:
                continue
            if id(copy) not in self.shared:
                rounded = copy.detach().to(own.dtype, copy=True)
                self.shared[id(copy)] = nn.Parameter(rounded, requires_grad=False)
                self.account(own, copy, rounded)
            yield name, own, self.shared[id(copy)]
        holder = layer.holder_of_buffers()
        for name in sorted(layer.moved):
            own, moved = layer._buffers[name], holder and holder._buffers.get(name)
            if own is not None and moved is not None:
                yield name, own, moved.clone()


class Plan(Update):
    """The new layers and parameters of a merge, what they lose, and how to undo them."""

    def __init__(self, storage: str) -> None:
        super().__init__()
        self.storage = storage
        self.layers = 0
        self.dtype = torch.float64
        self.places: list[tuple[nn.Module, str, nn.Module | Tensor]] = []
        self.before: list[tuple[nn.Module, str, Any]] = []

    @torch.no_grad()
    def layer(self, model: nn.Module, name: str, layer: AdaptedLayer) -> None:
        """Plan one adapted layer."""
        self.layers += 1
        if not layer.weight_methods():
            for parameter, own, rounded in self.copies(layer):
                self.places.append((layer, parameter, rounded))
                self.note_dtype(own.dtype)
            return
        if not name:
            raise MergeError(
                f"the model is itself the {type(layer).__name__} to merge into, which is replaced "
                "by another; put it in a module, such as nn.Sequential, before attach"
            )
        base = layer.base
        assert base is not None
        w, bias = layer.adapted_weight()
        new = held(base, w, bias, self.storage)
        self.account(base.dequantize(), w, frozen(new).dequantize())
        self.note_dtype(base.dtype)
        parent, _, leaf = name.rpartition(".")
        self.places.append((model.get_submodule(parent), leaf, new))

    def note_dtype(self, dtype: torch.dtype) -> None:
        """Keep the dtype with the widest tolerance."""
        self.dtype = min(self.dtype, dtype, key=lambda d: -TOLERANCE.get(d, 0))

    def apply(self) -> None:
        """Put the new layers and parameters in place."""
        for owner, name, new in self.places:
            self.before.append((owner, name, home_of(owner, name)[name]))
            put(owner, name, new)

    def make_uniform(self, model: nn.Module) -> None:
        """Hold the packed layers dense, exactly, that are not in the format of the first.

        A checkpoint of bitsandbytes has one format.
        """
        for name in others_than_first(model):
            parent, _, leaf = name.rpartition(".")
            base = frozen(model.get_submodule(name))
            owner = model.get_submodule(parent)
            self.before.append((owner, leaf, owner._modules[leaf]))
            put(owner, leaf, held(base, base.dequantize(), base.bias, "dense"))

    def undo(self) -> None:
        """Put back what was there."""
        for owner, name, old in reversed(self.before):
            put(owner, name, old)


def put(owner: nn.Module, name: str, value: nn.Module | Tensor) -> None:
    """Set a child, a parameter or a buffer of a module under its name."""
    home_of(owner, name)[name] = value


def home_of(owner: nn.Module, name: str) -> dict[str, Any]:
    """Return where a module keeps what it has under a name."""
    homes: tuple[dict[str, Any], ...] = (owner._parameters, owner._buffers, owner._modules)
    return next(home for home in homes if name in home)


def trained_copy(layer: AdaptedLayer, name: str) -> nn.Parameter | None:
    """Return the last active adapter's trained copy of a parameter of this layer."""
    copies = [p._parameters.get(name) for _, p in layer.here()]
    return next((c for c in reversed(copies) if c is not None), None)


def held(base: FrozenLinear, w: Tensor, bias: Tensor | None, storage: str) -> nn.Module:
    """Return a plain layer that holds the merged weight."""
    if storage == "keep" or base.storage == "dense" or base.layer_kind == "embedding":
        return base.requantized(w, bias)
    out, width = base.shape
    with torch.device("meta"):
        conv1d = base.stands_for == "conv1d"
        plain = Conv1D(out, width) if conv1d else nn.Linear(width, out, bias is not None)
    return frozen(plain.to(base.dtype)).requantized(w, bias)


def check_mergeable(model: nn.Module) -> None:
    """Raise when nothing is active or an active method is not a map on weights."""
    names = active(model)
    reason = why_not_mergeable(model, names)
    if reason is not None:
        raise MergeError(reason)
    if not names:
        raise MergeError("no adapter is active, so there is nothing to merge; call inlay.use first")


def why_not_mergeable(model: nn.Module, names: Sequence[str]) -> str | None:
    """Return why these adapters cannot merge: the weights lie elsewhere, or a method is no map."""
    if is_streamed(model):
        return (
            "a streamed model's weights stay where they are, and merging would hold all of them in "
            "memory; save the adapter, load the model with stream='off' and the adapter on it"
        )
    for name in names:
        method = adapters(model)[name].method
        if not method.mergeable:
            return (
                f"adapter {name!r} ({method.name}) adds computation that no weight can hold, so it "
                "cannot merge; keep it as an adapter, or train a mergeable method such as LoRA"
            )
    return None


def check_survival(plan: Plan, storage: str, minimum: float) -> None:
    """Raise when rounding would lose more of the update than accepted."""
    if plan.surviving_fraction >= minimum:
        return
    raise MergeError(
        f"merging with storage {storage!r} would keep only {plan.surviving_fraction:.1%} of the "
        f"update (at least {minimum:.0%} was expected): the rest is rounded away. Merge with "
        "storage='dense', which exports the dequantised base plus the update; or keep the adapter "
        "apart; or merge into the original dense model"
    )


def check_fidelity(found: Mapping[str, Any], before: Sequence[Tensor], dtype: torch.dtype) -> None:
    """Raise when the merged logits are further off than rounding in this dtype explains."""
    largest = max((float(x.abs().max()) for x in before), default=0.0)
    accepted = TOLERANCE.get(dtype, 0.1) * max(largest, 1.0)
    if found["max_logit_difference"] <= accepted:
        return
    raise MergeError(
        f"the merged model's logits differ from the adapted model's by up to "
        f"{found['max_logit_difference']:.3g}, more than rounding in {dtype} explains "
        f"({accepted:.3g}); the model was left adapted. Merge in a wider dtype (load with "
        "dtype='float32'), or keep the adapter apart"
    )


@torch.no_grad()
def logits_of(model: nn.Module, batches: Sequence[Mapping[str, Tensor]]) -> list[Tensor]:
    """Return the outputs of each batch in fp64, padding positions left out, in eval mode."""
    with evaluating(model):
        return [outputs(model, batch) for batch in batches]


def outputs(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Return one batch's logits as (positions, classes)."""
    logits = first_tensor(model(**batch))
    mask = batch.get("attention_mask")
    if mask is not None and logits.dim() == 3 and logits.shape[:2] == mask.shape:
        logits = logits[mask.bool()]
    return logits.double().flatten(end_dim=-2)


def first_tensor(result: Any) -> Tensor:
    """Return a model output's logits, or its hidden states when it has none."""
    if isinstance(result, Tensor):
        return result
    return result.logits if "logits" in result else result[0]


def compared(before: Sequence[Tensor], after: Sequence[Tensor]) -> dict[str, Any]:
    """Measure how far two lists of logits lie apart."""
    x, y = torch.cat(list(before)), torch.cat(list(after))
    if not bool(torch.isfinite(y).all()):
        raise MergeError("the merged model gives logits that are not finite; it was left adapted")
    kl = F.kl_div(y.log_softmax(-1), x.log_softmax(-1), log_target=True, reduction="batchmean")
    return {
        "max_logit_difference": float((x - y).abs().max()),
        "kl": max(float(kl), 0.0),
        "top1_agreement": float((x.argmax(-1) == y.argmax(-1)).double().mean()),
        "positions": x.shape[0],
    }


def random_ids(model: nn.Module) -> list[dict[str, Tensor]]:
    """Return one seeded batch of random token ids for a language model."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if isinstance(config, PreTrainedConfig) else config
    size = getattr(config, "vocab_size", None)
    if size is None:
        raise MergeError(
            f"merge cannot make inputs for a {type(model).__name__}: give inputs=[...] to check on"
        )
    seed = torch.Generator().manual_seed(0)
    length = min(64, getattr(config, "max_position_embeddings", None) or 64)
    ids = torch.randint(size, (4, length), generator=seed)
    return [{"input_ids": ids.to(next(model.parameters()).device)}]


def tied_names(model: nn.Module) -> list[tuple[str, str]]:
    """Return pairs of parameter names that share one tensor."""
    seen: dict[int, str] = {}
    pairs: list[tuple[str, str]] = []
    for name, p in model.named_parameters(remove_duplicate=False):
        if id(p) in seen:
            pairs.append((seen[id(p)], name))
        seen.setdefault(id(p), name)
    return pairs


def untie(model: nn.Module, ties: Sequence[tuple[str, str]]) -> tuple[str, ...]:
    """Tell the model's configuration when merging separated tied weights; name them."""
    now = dict(model.named_parameters(remove_duplicate=False))
    broken = [b for a, b in ties if a in now and b in now and now[a] is not now[b]]
    config = getattr(model, "config", None)
    if broken and config is not None and getattr(config, "tie_word_embeddings", False):
        config.tie_word_embeddings = False
    return tuple(broken)
