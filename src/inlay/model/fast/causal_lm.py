"""A causal language model whose training loss never holds the logits of all positions."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import CausalLMOutputWithPast

from inlay.kernels.loss import IGNORED, Scores, linear_cross_entropy, rows_at_once
from inlay.kernels.switches import is_on
from inlay.model.fast.attention import attending
from inlay.model.fast.base import Fast, by_name, parameters_of
from inlay.model.fast.layers import FastLastBlock
from inlay.model.fast.trl_head import acts_on, asked_for, mean_logits, reads_past, temperature_of
from inlay.model.seams.transformers import ForCausalLMLoss, ModelOutput, cache_field, cache_in
from inlay.storage.registry import frozen, kind, layer_class

FEW_SCORED = "few"
"""The case in which the last block leaves unscored positions out."""
KNOWN = frozenset({
    "input_ids", "inputs_embeds", "attention_mask", "position_ids", "labels", "shift_labels",
    "num_items_in_batch", "logits_to_keep", "return_dict", "use_cache", "output_hidden_states",
    "output_attentions", "fused_lm_head",
})  # fmt: skip
"""The arguments of a call whose meaning we know; others must be the body's own."""
NARROW = 0.9
"""The share of scored positions up to which leaving the others out is worth gathering these."""


@dataclass
class ScoredOutput(ModelOutput):
    """Per-token scores in place of logits: the fields TRL's fused head returns."""

    loss: Tensor | None = None
    log_probs: Tensor | None = None
    entropy: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None
    label_mask: Tensor | None = None
    aux_loss: Tensor | None = None


class LossOutput(CausalLMOutputWithPast):
    """A training step's output: the loss; the logits are computed when they are read."""

    @property
    def logits(self) -> Tensor | None:
        compute: Callable[[], Tensor] | None = vars(self).get("compute_logits")
        return None if compute is None else compute()

    @logits.setter
    def logits(  # pyright: ignore[reportIncompatibleVariableOverride]
        self, value: None
    ) -> None:
        assert value is None

    def __getitem__(self, k: Any) -> Any:
        if k == "logits" or (isinstance(k, int) and k > 0):
            return (self["loss"], self.logits)[k] if isinstance(k, int) else self.logits
        return super().__getitem__(k)


class FastCausalLM(Fast):
    """A causal language model whose training loss never holds the logits of all positions."""

    config: Any

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not kwargs.get("fused_lm_head") or not self.answers_fused():
            return super().__call__(*args, **kwargs)
        kwargs.pop("fused_lm_head")
        before = vars(self).get("forward")
        fields = asked_for(before) or frozenset()
        vars(self)["forward"] = functools.partial(self.scored, fields, temperature_of(before))
        try:
            return super().__call__(*args, **kwargs)
        finally:
            del vars(self)["forward"]
            if before is not None:
                vars(self)["forward"] = before

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        call = by_name(type(self).plain, args, kwargs)
        with attending(call):
            return self.in_chunks(call)

    def in_chunks(self, call: dict[str, Any]) -> Any:
        """Return the output with the loss computed in chunks if possible, else the model's own."""
        if call.get("labels") is None or not self.takes_chunks() or self.asks_for_more(call):
            return super().forward(**call)
        items = call.pop("num_items_in_batch", None)
        scores, mask, outputs, hidden, _ = self.scores(call)
        count = mask.sum() if items is None else torch.as_tensor(items, device=mask.device)
        cache: Any = {cache_field(LossOutput): cache_in(outputs.values())}
        result = LossOutput(loss=-scores.log_probs.sum() / count, **cache)
        vars(result)["compute_logits"] = functools.partial(self.logits_of, call, hidden)
        return result

    def logits_of(self, call: dict[str, Any], hidden: Tensor | None) -> Tensor:
        head = cast(Any, self).get_output_embeddings()
        if hidden is None:
            hidden = cast(Any, self).base_model(**call).last_hidden_state
        return head(hidden)

    def answers_fused(self) -> bool:
        """Return whether per-token scores are computed here: plain ones, in training.

        In evaluation too where TRL's own head would read past an adapter.
        """
        always = reads_past(cast(Any, self).get_output_embeddings())
        return self.takes_chunks(always) and asked_for(vars(self).get("forward")) is not None

    def scored(
        self, fields: frozenset[str], temperature: float, *args: Any, **kwargs: Any
    ) -> ScoredOutput:
        """Return each position's scores of its next token, zero without a label."""
        call = by_name(type(self).plain, args, kwargs)
        call["use_cache"] = False
        call.pop("num_items_in_batch", None)
        with attending(call):
            scores, mask, _, _, rows = self.scores(call, temperature)

        def spread(values: Tensor) -> Tensor:
            return values.new_zeros(mask.shape).masked_scatter(mask, values)

        log_probs, entropy, is_top1 = (spread(s) for s in scores)
        loss = -log_probs.sum() / mask.sum().clamp(min=1)
        result = ScoredOutput(
            loss=loss, log_probs=log_probs, entropy=entropy, is_top1=is_top1, label_mask=mask
        )
        if "mean_logits" in fields:
            result.mean_logits = spread(mean_logits(cast(Any, self).get_output_embeddings(), rows))
        return result

    def scores(
        self, call: dict[str, Any], temperature: float = 1.0
    ) -> tuple[Scores, Tensor, Any, Tensor | None, Tensor]:
        """Run the decoder and score the labelled positions.

        Returns their scores, the mask of these positions, the decoder's outputs, its hidden
        states of every position when they were computed, and those of the positions scored.
        """
        labels, shifted = call.pop("labels"), call.pop("shift_labels", None)
        call.pop("logits_to_keep", None)
        targets = labels[:, 1:] if shifted is None else shifted
        mask = targets != IGNORED
        positions = F.pad(mask, (0, labels.shape[1] - mask.shape[1])).flatten().nonzero().squeeze(1)
        decoder = cast(Any, self).base_model
        few = 0 < positions.numel() <= NARROW * labels.numel()
        # A cache has these tokens after the call, so that it cannot be called again for the logits.
        again = cache_in(call.values()) is None
        here = {"scored": positions} if few and again and self.narrows(decoder) else {}
        outputs = decoder(**call, **here)
        hidden: Tensor = outputs.last_hidden_state
        narrowed = bool(here) and hidden.shape[:2] == (1, positions.numel())
        rows = hidden[0] if narrowed else hidden.flatten(0, 1).index_select(0, positions)
        scores = self.score_rows(rows, targets[mask], temperature)
        return scores, mask, outputs, None if narrowed else hidden, rows

    def narrows(self, decoder: nn.Module) -> bool:
        layers: Any = getattr(decoder, "layers", None)
        proven = FEW_SCORED in self.proven and is_on("last_layer")
        return proven and bool(layers) and isinstance(layers[-1], FastLastBlock)

    def score_rows(self, rows: Tensor, labels: Tensor, temperature: float) -> Scores:
        """Score hidden states (n, d) by the output head at a temperature."""
        head = cast(Any, self).get_output_embeddings()
        packed = None if head_is_adapted(head) else frozen(head).packed()
        if packed is not None:
            to_gradient = torch.is_grad_enabled() and rows.requires_grad
            log_probs, entropy, is_top1, _ = linear_cross_entropy(
                rows, labels, frozen(head).bias, to_gradient, temperature, *packed
            )
            return Scores(log_probs, entropy.detach(), is_top1)
        step = rows_at_once(len(rows), frozen(head).shape[0])
        found = [
            Scores(*checkpoint(score_by, head, temperature, part, targets, use_reentrant=False))
            for part, targets in zip(rows.split(step), labels.split(step), strict=True)
        ]
        if not found:
            none = checkpoint(score_by, head, temperature, rows, labels, use_reentrant=False)
            return Scores(*none)
        return Scores(*(torch.cat(each) for each in zip(*found, strict=True)))

    def asks_for_more(self, call: dict[str, Any]) -> bool:
        keep = call.get("logits_to_keep", 0)
        wants = any(call.get(n) for n in ("output_hidden_states", "output_attentions", "use_cache"))
        known = KNOWN.union(parameters_of(layer_class(cast(Any, self).base_model)))
        unknown = [n for n, value in call.items() if n not in known and value is not None]
        more = wants or bool(unknown) or call.get("return_dict") is False
        return more or isinstance(keep, Tensor) or keep != 0

    def takes_chunks(self, always: bool = False) -> bool:
        """Return whether the loss may be computed in chunks: in training, or `always`."""
        own: Any = self
        head: nn.Module = own.get_output_embeddings()
        return (
            is_on("loss")
            and "loss" in self.proven
            and (self.training or always)
            and own.loss_function is ForCausalLMLoss
            and kind(head) == "linear"
            and "forward" not in vars(head)  # its hook brings weight and rows to one device
        )


def score_by(head: nn.Module, temperature: float, rows: Tensor, labels: Tensor) -> Scores:
    """Score hidden states by a trainable head, whose logits are recomputed for the gradient."""
    return scores_of(head(rows), labels, temperature)


def scores_of(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Scores:
    """Return the scores of labels (n,) under logits (n, vocabulary) divided by a temperature."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logits = logits if temperature == 1.0 else logits / temperature
    log_all = logits.log_softmax(-1)
    log_probs = log_all.gather(1, labels[:, None]).squeeze(1)
    with torch.no_grad():
        entropy = -(log_all.exp() * log_all).sum(-1)
        is_top1 = log_probs >= log_all.amax(-1) if log_all.numel() else log_probs.bool()
    return Scores(log_probs, entropy, is_top1)


def head_is_adapted(head: nn.Module) -> bool:
    """Return whether the output head has an adapter or trains: it is called as a layer."""
    return acts_on(head) or any(p.requires_grad for p in head.parameters())
