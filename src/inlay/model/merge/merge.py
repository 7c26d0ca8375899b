"""Merge adapters into the base, and prove on inputs that nothing was lost."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor, nn

from inlay.errors import MergeError, ModelError
from inlay.model.adapters.attach import detach, disabled
from inlay.model.adapters.layer import AdaptedLayer, own_modules
from inlay.model.adapters.registry import active, adapted_layers, adapters
from inlay.model.adapters.wrappers import looks_through
from inlay.model.example_inputs import example_inputs
from inlay.model.load.quantize import describe_quantization
from inlay.model.merge.fidelity import (
    LEAST_EFFECT,
    Batches,
    Fidelity,
    check_fidelity,
    compared,
    explained,
    logits_of,
)
from inlay.model.merge.finite import check_adapters_finite
from inlay.model.merge.plan import Plan
from inlay.model.merge.save import check_place, check_written, write_whole
from inlay.model.merge.untie import Ties
from inlay.model.stream.host import is_streamed

Storage = Literal["dense", "keep"]


@dataclass(frozen=True)
class MergeReport:
    """How near the merged model is to the adapted one, on the inputs named.

    `kl` is KL(adapted || merged) in nats a position; `effect_kept` is the share of what the
    adapter changes in the outputs that the merged model keeps; `surviving_fraction` is the share
    of the update left in the weights after rounding, `<W_merged - W, ΔW> / <ΔW, ΔW>`; `checked`
    says whether the model in memory was compared, or what was written, read back.
    """

    max_logit_difference: float
    kl: float
    top1_agreement: float
    effect_kept: float
    surviving_fraction: float
    dtype: str
    positions: int
    layers: int
    inputs: str
    untied: tuple[str, ...] = ()
    checked: str = "in memory"
    reloaded_logit_difference: float | None = None


@looks_through
def merge(
    model: nn.Module,
    *,
    inputs: Batches | None = None,
    storage: Storage = "dense",
    minimum_survival: float = 0.9,
    accept_loss: bool = False,
    output: str | Path | None = None,
) -> MergeReport:
    """Merge the active adapters into the base in place, checked against the adapted model.

    A quantised layer becomes dense in its compute dtype (`storage="dense"`), which keeps the
    update; `storage="keep"` stays quantised. Adapters that are not active are dropped with the
    rest. Where rounding takes part of the update, the outputs decide: a merge that keeps most of
    what the adapter changes in them is done with a warning, another is refused.

    Args:
        model: a model with active, mergeable adapters.
        inputs: batches to check on; when None, seeded random ones that the model's family takes.
        storage: `dense` or `keep`.
        minimum_survival: the surviving fraction of the update below which a warning gives figures.
        accept_loss: merge all the same where rounding takes most of the adapter's effect.
        output: a new folder to save the merged model in; what was written is read back with
            transformers and compared with the adapted model.

    Raises:
        MergeError: a method cannot merge, the merged model differs, or what was written does. The
            model stays adapted, but where the files differ: those are removed.
    """
    if output is not None:
        check_place(model, Path(output))
    batches = inputs_for(model) if inputs is None else list(inputs)
    source = "random" if inputs is None else "given"
    report, adapted = merged(model, batches, source, storage, minimum_survival, accept_loss)
    if output is None:
        return report
    found = write_whole(model, Path(output), lambda at: check_written(model, at, batches, adapted))
    return MergeReport(**{**asdict(report), **asdict(found)})


@looks_through
def inputs_for(model: nn.Module) -> Batches:
    check_mergeable(model)
    try:
        return example_inputs(model)
    except ModelError as error:
        raise MergeError(f"merge compares outputs, and {error}") from None


@looks_through
def merged(
    model: nn.Module,
    batches: Batches,
    inputs: str,
    storage: Storage = "dense",
    minimum_survival: float = 0.9,
    accept_loss: bool = False,
) -> tuple[MergeReport, list[Tensor]]:
    """Merge as `merge` does; return the report, and the adapted model's outputs."""
    check_mergeable(model)
    if storage not in ("dense", "keep"):
        raise MergeError(f"merge storage must be 'dense' or 'keep', not {storage!r}")
    check_adapters_finite(model, active(model))
    before = logits_of(model, batches)
    with disabled(model):
        base = logits_of(model, batches)
    ties = Ties(model)
    plan = Plan(storage)
    for name, module in list(model.named_modules()):
        if isinstance(module, AdaptedLayer) and module.active_methods():
            plan.layer(model, name, module)
    low = plan.surviving_fraction < minimum_survival
    try:
        plan.apply()
        plan.make_uniform(model)
        ties.write_untied()
        with disabled(model):
            found = compared(before, base, logits_of(model, batches))
            if ties.set_false and not explained(found, before, plan.dtype):
                ties.write_back()  # The family computes otherwise where the configuration says so.
                found = compared(before, base, logits_of(model, batches))
        if low:
            check_kept(found, plan, storage, accept_loss)
        else:
            check_fidelity(found, before, plan.dtype)
    except BaseException:
        ties.write_back()
        plan.undo()
        raise
    detach(model)
    describe_quantization(model)
    for sentence in (lossy(found, plan) if low else None, ties.warning()):
        if sentence:
            warnings.warn(sentence, stacklevel=3)
    return MergeReport(
        **asdict(found),
        surviving_fraction=plan.surviving_fraction,
        dtype=plan.dtype_name,
        layers=plan.layers,
        inputs=inputs,
        untied=ties.separate(),
    ), before


@looks_through
def check_mergeable(model: nn.Module) -> None:
    names = active(model)
    reason = why_not_mergeable(model, names)
    if reason is not None:
        raise MergeError(reason)
    if not names:
        raise MergeError("no adapter is active, so there is nothing to merge; call inlay.use first")


@looks_through
def why_not_mergeable(model: nn.Module, names: Sequence[str]) -> str | None:
    if is_streamed(model):
        return (
            "a streamed model's weights stay where they are, and merging would hold all of them in "
            "memory; save the adapter, load the model with stream='off' and the adapter on it"
        )
    if any(p.is_meta for layer in adapted_layers(model) for p in layer.parameters()):
        return (
            "weights of the model are not in memory (accelerate has offloaded them), and a merge "
            "changes them; save the adapter, load the whole model and merge there"
        )
    computed = next(computed_weights(model), None)
    if computed is not None:
        return (
            f"the weight of {computed} is computed from other tensors whenever the layer runs "
            "(torch.nn.utils.weight_norm, spectral_norm, pruning), so that a merged one would be "
            "overwritten; make it a parameter first (remove_weight_norm, remove_spectral_norm, "
            "prune.remove), or keep the adapter unmerged"
        )
    for name in names:
        method = adapters(model)[name].method
        if not method.mergeable:
            return (
                f"adapter {name!r} ({method.name}) adds computation that no weight can hold, so it "
                "cannot merge; keep it as an adapter, or train a mergeable method such as LoRA"
            )
    return None


def computed_weights(model: nn.Module) -> Iterator[str]:
    """Yield the adapted layers whose weight is no parameter but computed by a hook."""
    for name, layer in own_modules(model):
        adapted = isinstance(layer, AdaptedLayer) and layer.base is not None
        if adapted and isinstance(vars(layer).get("weight"), Tensor):
            yield name


def check_kept(found: Fidelity, plan: Plan, storage: str, accept_loss: bool) -> None:
    if found.effect_kept >= LEAST_EFFECT or accept_loss:
        return
    dense = (
        "Merge with storage='dense', which exports the dequantised base plus the update"
        if storage == "keep"
        else "Merge in float32 (load with dtype='float32', or inlay merge --dtype float32)"
    )
    raise MergeError(
        f"merging would keep only {max(found.effect_kept, 0):.1%} of what the adapter changes in "
        f"the model's outputs (at least {LEAST_EFFECT:.0%} was expected): {plan.lost()}. {dense}; "
        "or keep the adapter unmerged; or accept it with accept_loss=True (--accept-loss). The "
        "model was left adapted"
    )


def lossy(found: Fidelity, plan: Plan) -> str:
    return (
        f"the merge rounded part of the update away: {plan.lost()}. On the inputs compared the "
        f"merged model keeps {found.effect_kept:.1%} of what the adapter changes in the outputs; "
        "merged in float32 (dtype='float32', --dtype float32) it would keep all of it"
    )
