"""Fast paths inside a model, put there by `attach` and taken off by `detach`.

Modules change their class in place, as adapted layers do, so that whoever calls the model, by hand,
by transformers' Trainer or by TRL, takes these paths. A module is changed only when its source is
the computation that the fast path does; whatever is not met runs as transformers wrote it. Each
path can be switched off (`kernels.switches`), and is looked up at every call.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.activations import SiLUActivation
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import AttentionInterface
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaMLP,
    LlamaRMSNorm,
)
from transformers.utils.generic import ModelOutput

from inlay.kernels.attention import segment_attention, segments_of
from inlay.kernels.gate import gated
from inlay.kernels.loss import Scores, linear_cross_entropy, rows_at_once
from inlay.kernels.native import keep_memory
from inlay.kernels.norm import rms_norm
from inlay.kernels.switches import is_on
from inlay.model.fused import acts_on, asked_for, mean_logits, reads_past
from inlay.model.source import assigned, computes_as, text
from inlay.storage.dense import DenseLinear
from inlay.storage.registry import frozen, kind

IGNORED = -100
"""The label of a position that is not scored."""
NARROW = 0.9
"""The share of scored positions up to which leaving the others out is worth gathering these."""
ATTENTION = "inlay"
"""The name under which transformers finds our attention."""


class Fast(nn.Module):
    """A module in place, with a fast way to compute what its own class computes."""

    plain: ClassVar[type[nn.Module]]


class FastLinear(Fast):
    """`nn.Linear` in the dtype that this machine multiplies fastest."""

    def forward(self, x: Tensor) -> Tensor:
        """Return `x @ W.T + bias`."""
        if not is_on("products"):
            return super().forward(x)
        return DenseLinear(self).linear(x)


class FastNorm(Fast):
    """An RMS norm as one operator."""

    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalise; a weight that trains takes the module's own way."""
        if not is_on("norms") or self.weight.requires_grad or not self.training:
            return super().forward(hidden_states)
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)[0]


class FastGate(Fast):
    """A gated feed-forward block with activation and product as one operator."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module
    act_fn: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """Return `down(act(gate(x)) * up(x))`."""
        act = name_of_activation(self.act_fn)
        if not is_on("gates") or act is None or not self.training:
            return super().forward(x)
        gate, up = self.gate_proj(x), self.up_proj(x)
        h = gated(gate, up, act)
        with made_again(h, lambda: gated(gate, up, act)):
            return self.down_proj(h)


@contextmanager
def made_again(product: Tensor, make: Callable[[], Tensor]) -> Generator[None]:
    """Keep nothing of `product` for the gradient of what reads it here: `make` makes it again.

    Where others decide what is kept, as activation checkpointing does, it is left to them.
    """
    if torch.compiler.is_compiling() or others_decide_what_is_kept():
        yield
        return
    storage, shape = product.untyped_storage()._cdata, product.shape

    def pack(saved: Tensor) -> Tensor | None:
        same = saved.shape == shape and saved.untyped_storage()._cdata == storage
        return None if same else saved

    def unpack(kept: Tensor | None) -> Tensor:
        if kept is not None:
            return kept
        with torch.no_grad():
            return make()

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def others_decide_what_is_kept() -> bool:
    """Say whether hooks on saved tensors are in force already."""
    hooks: Any = torch._C._autograd  # pyright: ignore[reportAttributeAccessIssue]
    return hooks._top_saved_tensors_default_hooks(False) is not None


def name_of_activation(act: nn.Module) -> str | None:
    """Return the name that the gate kernel has for an activation, or None."""
    if isinstance(act, nn.SiLU | SiLUActivation):
        return "silu"
    tanh = isinstance(act, nn.GELU) and act.approximate == "tanh"
    return "gelu_tanh" if tanh or type(act).__name__ == "GELUTanh" else None


class FastLastBlock(Fast):
    """The last Transformer block: past attention, only positions that are scored go on."""

    input_layernorm: nn.Module
    post_attention_layernorm: nn.Module
    self_attn: nn.Module
    mlp: nn.Module

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the block's output at all positions, or (1, n, d) at the `scored` ones."""
        scored: Tensor | None = kwargs.pop("scored", None)
        if scored is None:
            return super().forward(hidden_states, *args, **kwargs)
        normed = self.input_layernorm(hidden_states)
        attended, _ = self.self_attn(*args, hidden_states=normed, **kwargs)
        here = (hidden_states + attended).flatten(0, 1).index_select(0, scored).unsqueeze(0)
        return here + self.mlp(self.post_attention_layernorm(here))


class FastBackbone(Fast):
    """A decoder whose attention is given segments in place of a mask."""

    config: Any

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the decoder; segments are worked out once for all its layers."""
        call = by_name(type(self).plain, args, kwargs)
        segments = self.segments(call)
        if segments is not None:
            call["attention_mask"] = segments
        return super().forward(**call)

    def segments(self, call: dict[str, Any]) -> Tensor | None:
        """Return the segments as a mask that is passed on as it is, (1, 1, n, 3), or None."""
        given = call.get("input_ids")
        given = call.get("inputs_embeds") if given is None else given
        mask = call.get("attention_mask")
        if (
            torch.compiler.is_compiling()
            or not is_on("attention")
            or self.config._attn_implementation != ATTENTION
            or not isinstance(given, Tensor)
            or call.get("past_key_values") is not None
            or not self.training
            or not (mask is None or (isinstance(mask, Tensor) and mask.ndim == 2))
        ):
            return None
        positions = call.get("position_ids")
        readable = given.device.type == "cpu" or (
            given.device.type == "meta" and mask is None and positions is None
        )
        found = segments_of(positions, mask, *given.shape[:2]) if readable else None
        return None if found is None else found[None, None]


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend within segments where they were worked out, else by torch's own attention."""
    if attention_mask is None or attention_mask.dtype != torch.int64:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    segments = attention_mask[0, 0]
    window = kwargs.get("sliding_window")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    near = window is None or int((segments[:, 2] - segments[:, 1]).max()) <= window
    if near and not dropout and "position_bias" not in kwargs:
        return segment_attention(query, key, value, segments, scale)[0], None
    mask = dense_mask(segments, query.shape[0], query.shape[2], window)
    return sdpa_attention_forward(
        module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs
    )


def dense_mask(segments: Tensor, rows: int, length: int, window: int | None) -> Tensor:
    """Return the mask that says what segments say, (rows, 1, length, length)."""
    mask = torch.zeros(rows, 1, length, length, dtype=torch.bool)
    for row, start, stop in segments.tolist():
        inside = torch.ones(stop - start, stop - start, dtype=torch.bool).tril()
        mask[row, 0, start:stop, start:stop] = inside if window is None else inside.triu(1 - window)
    return mask | torch.eye(length, dtype=torch.bool)


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


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
    """A training step's output: the loss now, the logits only if somebody asks for them."""

    @property
    def logits(self) -> Tensor | None:
        """The logits of every position, computed when asked for."""
        compute: Callable[[], Tensor] | None = vars(self).get("compute_logits")
        return None if compute is None else compute()

    @logits.setter
    def logits(  # pyright: ignore[reportIncompatibleVariableOverride]
        self, value: None
    ) -> None:
        assert value is None

    def __getitem__(self, k: Any) -> Any:
        """Return a field by name or by place."""
        if k == "logits" or (isinstance(k, int) and k > 0):
            return (self["loss"], self.logits)[k] if isinstance(k, int) else self.logits
        return super().__getitem__(k)


class FastCausalLM(Fast):
    """A causal language model whose training loss never holds the logits of all positions."""

    config: Any

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model; TRL's request for per-token scores is answered without its own head."""
        if not kwargs.get("fused_lm_head") or not self.answers_fused():
            return super().__call__(*args, **kwargs)
        kwargs.pop("fused_lm_head")
        before = vars(self).get("forward")
        vars(self)["forward"] = functools.partial(self.scored, asked_for(before) or frozenset())
        try:
            return super().__call__(*args, **kwargs)
        finally:
            del vars(self)["forward"]
            if before is not None:
                vars(self)["forward"] = before

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the model's output; with labels, in training, the loss comes in chunks."""
        call = by_name(type(self).plain, args, kwargs)
        if call.get("labels") is None or not self.takes_chunks() or asks_for_more(call):
            return super().forward(**call)
        items = call.pop("num_items_in_batch", None)
        scores, mask, outputs, hidden, _ = self.scores(call)
        count = mask.sum() if items is None else torch.as_tensor(items, device=mask.device)
        result = LossOutput(
            loss=-scores.log_probs.sum() / count,
            past_key_values=outputs.get("past_key_values"),
        )
        vars(result)["compute_logits"] = functools.partial(self.logits_of, call, hidden)
        return result

    def logits_of(self, call: dict[str, Any], hidden: Tensor | None) -> Tensor:
        """Return the logits of every position."""
        head = cast(Any, self).get_output_embeddings()
        if hidden is None:
            hidden = cast(Any, self).base_model(**call).last_hidden_state
        return head(hidden)

    def answers_fused(self) -> bool:
        """Say whether per-token scores are computed here: plain ones, in training.

        In evaluation too where TRL's own head would read past an adapter.
        """
        always = reads_past(cast(Any, self).get_output_embeddings())
        return self.takes_chunks(always) and asked_for(vars(self).get("forward")) is not None

    def scored(self, wanted: frozenset[str], *args: Any, **kwargs: Any) -> ScoredOutput:
        """Return every position's scores for its next token, zero where it is not labelled."""
        call = by_name(type(self).plain, args, kwargs)
        call["use_cache"] = False
        call.pop("num_items_in_batch", None)
        scores, mask, _, _, rows = self.scores(call)

        def spread(values: Tensor) -> Tensor:
            return values.new_zeros(mask.shape).masked_scatter(mask, values)

        log_probs, entropy, is_top1 = (spread(s) for s in scores)
        loss = -log_probs.sum() / mask.sum().clamp(min=1)
        result = ScoredOutput(
            loss=loss, log_probs=log_probs, entropy=entropy, is_top1=is_top1, label_mask=mask
        )
        if "mean_logits" in wanted:
            result.mean_logits = spread(mean_logits(cast(Any, self).get_output_embeddings(), rows))
        return result

    def scores(self, call: dict[str, Any]) -> tuple[Scores, Tensor, Any, Tensor | None, Tensor]:
        """Run the decoder and score the labelled positions.

        Returns their scores, the mask of these positions, the decoder's outputs, its hidden
        states of every position when they were computed, and those of the positions scored.
        """
        labels, shifted = call.pop("labels"), call.pop("shift_labels", None)
        call.pop("logits_to_keep", None)
        wanted = labels[:, 1:] if shifted is None else shifted
        mask = wanted != IGNORED
        positions = F.pad(mask, (0, labels.shape[1] - mask.shape[1])).flatten().nonzero().squeeze(1)
        decoder = cast(Any, self).base_model
        few = 0 < positions.numel() <= NARROW * labels.numel()
        here = {"scored": positions} if few and self.narrows(decoder) else {}
        outputs = decoder(**call, **here)
        hidden: Tensor = outputs.last_hidden_state
        narrowed = bool(here) and hidden.shape[:2] == (1, positions.numel())
        rows = hidden[0] if narrowed else hidden.flatten(0, 1).index_select(0, positions)
        scores = self.score_rows(rows, wanted[mask])
        return scores, mask, outputs, None if narrowed else hidden, rows

    def narrows(self, decoder: nn.Module) -> bool:
        """Say whether the last block can leave unscored positions out."""
        layers: Any = getattr(decoder, "layers", None)
        return is_on("last_layer") and bool(layers) and isinstance(layers[-1], FastLastBlock)

    def score_rows(self, rows: Tensor, labels: Tensor) -> Scores:
        """Score hidden states (n, d) by the output head."""
        head = cast(Any, self).get_output_embeddings()
        packed = None if head_is_adapted(head) else frozen(head).packed()
        if packed is not None:
            to_gradient = torch.is_grad_enabled() and rows.requires_grad
            log_probs, entropy, is_top1, _ = linear_cross_entropy(
                rows, labels, frozen(head).bias, to_gradient, *packed
            )
            return Scores(log_probs, entropy.detach(), is_top1)
        step = rows_at_once(len(rows), frozen(head).shape[0])
        found = [
            Scores(*checkpoint(score_by, head, part, wanted, use_reentrant=False))
            for part, wanted in zip(rows.split(step), labels.split(step), strict=True)
        ]
        if not found:
            return Scores(*checkpoint(score_by, head, rows, labels, use_reentrant=False))
        return Scores(*(torch.cat(each) for each in zip(*found, strict=True)))

    def takes_chunks(self, always: bool = False) -> bool:
        """Say whether the loss may be computed in chunks now: in training, or `always`."""
        own: Any = self
        return (
            is_on("loss")
            and (self.training or always)
            and own.loss_function is ForCausalLMLoss
            and kind(own.get_output_embeddings()) == "linear"
        )


def score_by(head: nn.Module, rows: Tensor, labels: Tensor) -> Scores:
    """Score hidden states by a head that trains; its logits are made again for the gradient."""
    logits = head(rows)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    log_all = logits.log_softmax(-1)
    log_probs = log_all.gather(1, labels[:, None]).squeeze(1)
    with torch.no_grad():
        entropy = -(log_all.exp() * log_all).sum(-1)
        is_top1 = log_probs >= log_all.amax(-1) if log_all.numel() else log_probs.bool()
    return Scores(log_probs, entropy, is_top1)


def head_is_adapted(head: nn.Module) -> bool:
    """Say whether something at the output head acts or trains: it must be called as a layer."""
    return acts_on(head) or any(p.requires_grad for p in head.parameters())


def asks_for_more(call: dict[str, Any]) -> bool:
    """Say whether a call wants more than the loss: hidden states, some logits, a tuple."""
    keep = call.get("logits_to_keep", 0)
    wants = any(call.get(n) for n in ("output_hidden_states", "output_attentions", "use_cache"))
    return wants or call.get("return_dict") is False or isinstance(keep, Tensor) or keep != 0


@cache
def parameters_of(plain: type[nn.Module]) -> tuple[str, ...]:
    """Return the names of a class's forward parameters that may be given by position."""
    return tuple(inspect.signature(plain.forward).parameters)[1:]


def by_name(
    plain: type[nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Return a call's arguments by name."""
    return dict(zip(parameters_of(plain), args, strict=False)) | kwargs


@cache
def fast_class(plain: type[nn.Module], fast: type[Fast]) -> type[nn.Module]:
    """Return the subclass of `plain` with a fast path; its name and signature stay the same."""
    body: dict[str, Any] = {
        "plain": plain,
        "original": plain,
        "__module__": plain.__module__,
        "__qualname__": plain.__qualname__,
        "__doc__": plain.__doc__,
        # In the body, so that transformers wraps a block's forward for checkpointing.
        "forward": with_signature(fast.forward, plain),
    }
    return type(plain.__name__, (fast, plain), body)


def with_signature(forward: Any, plain: type[nn.Module]) -> Any:
    """Return a forward that shows the signature of the plain one, as Trainer and PEFT read it."""

    @functools.wraps(plain.forward)
    def fast_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs)

    return fast_forward


def install(model: nn.Module) -> None:
    """Put the fast paths on a model's modules, in place; on a fast model nothing changes.

    On a CPU the process keeps freed memory from now on, for the steps to come.
    """
    if is_on("memory") and all(p.device.type == "cpu" for p in model.parameters()):
        keep_memory()
    for module, fast in list(fitting(model)):
        if not isinstance(module, Fast):
            module.__class__ = fast_class(type(module), fast)
    config: Any = getattr(model, "config", None)
    has_segments = any(isinstance(m, FastBackbone) for m in model.modules())
    if has_segments and config._attn_implementation == "sdpa":
        config._attn_implementation = ATTENTION


def uninstall(model: nn.Module) -> None:
    """Take the fast paths off: every module is of its own class again."""
    for module in model.modules():
        if isinstance(module, Fast):
            object.__setattr__(module, "__class__", type(module).plain)
    config: Any = getattr(model, "config", None)
    if getattr(config, "_attn_implementation", None) == ATTENTION:
        config._attn_implementation = "sdpa"


def fitting(model: nn.Module) -> Iterator[tuple[nn.Module, type[Fast]]]:
    """Every module whose source is what a fast path computes, with that path."""
    for module in model.modules():
        cls = type(module)
        if cls is nn.Linear:
            yield module, FastLinear
        elif computes_as(cls, LlamaRMSNorm):
            yield module, FastNorm
        elif computes_as(cls, LlamaMLP):
            yield module, FastGate
        elif isinstance(module, PreTrainedModel) and is_plain_head(cls):
            yield module, FastCausalLM
        elif isinstance(module, PreTrainedModel) and "create_causal_mask" in text(cls):
            yield module, FastBackbone
            layers: Any = getattr(module, "layers", None)
            if layers and computes_as(type(layers[-1]), LlamaDecoderLayer):
                yield layers[-1], FastLastBlock


def is_plain_head(cls: type[nn.Module]) -> bool:
    """Say whether a model's logits are its head on the decoder's output, and nothing more."""
    states = {e.rsplit(".", 1)[-1] for e in assigned(cls, "hidden_states")}
    return (
        assigned(cls, "logits") == frozenset({"self.lm_head(hidden_states)"})
        and states <= {"last_hidden_state", "slice_logits_to_keep(hidden_states, logits_to_keep)"}
        and "self.loss_function(" in text(cls)
        and "router_logits" not in text(cls)
    )
