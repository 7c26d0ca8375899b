"""The trials of each kind of fast path: its inputs, and the values that must agree."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from inlay.kernels.loss import IGNORED
from inlay.kernels.scratch import HALVES
from inlay.model.fast.attention import ATTENTION, FastBackbone
from inlay.model.fast.base import Fast, become_fast, become_plain, parameters_of
from inlay.model.fast.causal_lm import FEW_SCORED, FastCausalLM
from inlay.model.fast.hints import can_be_last
from inlay.model.fast.layers import FastLastBlock
from inlay.model.fast.proof import ALCASES, Trial, Untried, compare
from inlay.model.fast.shrink import small_model, small_module
from inlay.model.process import end_lease, lease
from inlay.model.seams.transformers import SDPA, cache_argument, cache_in, set_attention
from inlay.storage.registry import layer_class

LONG, SHORT = 70, 20
"""Tokens of the two rows that are tried: one beyond a block of queries, one below."""
OTHER_EXPERTS = 0.2
"""How far results in a narrower dtype may be apart where tokens choose among experts."""
FIRST = 3
"""The least token id that is tried; those below may be special."""
ALL = frozenset({"whole", "padded", "packed", "loss", FEW_SCORED, "layer"})

Values = dict[str, Tensor]
Call = dict[str, Any]


class Tried:
    """A small model or module, run plainly and then fast on the same inputs."""

    def __init__(self, twin: nn.Module, device: torch.device, halves: torch.dtype | None) -> None:
        self.twin, self.device = twin.to(device), device
        self.halves = halves if halves in HALVES else None
        self.fast: list[Fast] = []
        self.spread = 0.0
        self.found: dict[Callable[[], Values], Values] = {}
        """What runs gave plainly, in float32."""

    def against_plain(self, run: Callable[[], Values]) -> None:
        plain = self.exactly(run)
        compare(run(), plain)

    def exactly(self, run: Callable[[], Values]) -> Values:
        """Return the plain run's values in float32; each run is computed once."""
        if run not in self.found:
            self.found[run] = self.plainly(run)
        return self.found[run]

    def plainly(self, run: Callable[[], Values]) -> Values:
        self.off()
        try:
            return run()
        except Exception as error:
            raise Untried(str(error)) from error
        finally:
            self.on()

    def in_halves(self, run: Callable[[], Values]) -> None:
        """Compare in the half precision of the user's model; the twin stays in it."""
        assert self.halves is not None
        exact = self.exactly(run)
        self.twin.to(self.halves)
        plain = self.plainly(run)
        compare(run(), plain, exact, self.spread)

    def under_autocast(self, run: Callable[[], Values]) -> None:
        exact = self.exactly(run)
        with torch.autocast(self.device.type, torch.bfloat16):
            plain = self.plainly(run)
            fast = run()
        narrow = {name: value.to(torch.bfloat16) for name, value in plain.items()}
        compare(fast, narrow, exact, self.spread)

    def on(self) -> None:
        """Put the fast path on the twin."""

    def off(self) -> None:
        for module in self.fast:
            become_plain(module)
        self.fast = []

    def make(self, module: nn.Module, fast: type[Fast]) -> None:
        become_fast(module, fast, ALL)
        self.fast.append(cast("Fast", module))

    def gradients(self, to: Tensor) -> Values:
        trained = {n: p for n, p in self.twin.named_parameters() if p.requires_grad}
        found: Any = torch.autograd.grad(
            to, list(trained.values()), allow_unused=True, materialize_grads=True
        )
        return {f"gradient of {n}": g for n, g in zip(trained, found, strict=True)}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class LayerTried(Tried):
    def __init__(
        self, module: nn.Module, fast: type[Fast], device: torch.device, dtype: torch.dtype
    ) -> None:
        sizes: dict[int, int] = {}
        twin = small_module(module, torch.float32, sizes).float().train()
        super().__init__(twin, device, dtype)
        self.kind, self.width = fast, width_of(twin)

    def on(self) -> None:
        self.make(self.twin, self.kind)

    def run(self) -> Values:
        dtype = next(self.twin.parameters()).dtype
        x = drawn(2, 3, self.width).to(self.device, dtype).requires_grad_()
        y = self.twin(x)
        weight = drawn(*y.shape, seed=1).to(self.device)
        (back,) = torch.autograd.grad((y.float() * weight).sum(), x)
        return {"value of its output": y.detach(), "gradient to its input": back}

    def trials(self) -> Iterator[Trial]:
        self.on()
        yield Trial("layer", partial(self.against_plain, self.run))
        yield Trial("layer", partial(self.under_autocast, self.run))
        if self.halves is not None:
            yield Trial("layer", partial(self.in_halves, self.run))


def width_of(twin: nn.Module) -> int:
    linear = next((m for m in twin.modules() if isinstance(m, nn.Linear)), None)
    return next(twin.parameters()).shape[-1] if linear is None else linear.in_features


class ModelTried(Tried):
    def __init__(self, model: PreTrainedModel, device: torch.device) -> None:
        super().__init__(small_model(model, runs_on_ids), device, model.dtype)
        self.model: Any = self.twin
        self.spread = OTHER_EXPERTS if has_experts(self.model.config) else 0.0
        config = self.model.config.get_text_config()
        self.long = longest(config)
        self.short = min(SHORT, self.long // 2)
        high = config.vocab_size
        generator = torch.Generator().manual_seed(2)
        self.ids = torch.randint(min(FIRST, high - 1), high, (2, self.long), generator=generator)
        self.mask = torch.ones_like(self.ids)
        self.mask[1, self.short :] = 0
        self.takes = frozenset(parameters_of(layer_class(self.twin)))

    def there(self, **call: Any) -> Call:
        """Move a call's tensors to the device; no cache unless the call asks for one."""
        if "use_cache" in self.takes:
            call = {"use_cache": False, **call}
        return {
            name: value.to(self.device) if isinstance(value, Tensor) else value
            for name, value in call.items()
        }

    def padded(self, on_left: bool = False) -> Call:
        mask = self.mask.flip(1) if on_left else self.mask
        return self.there(input_ids=self.ids, attention_mask=mask)

    def brief(self, call: Call) -> Call:
        """Return the middle of the rows, with some padding: half precision is slow here."""
        return {
            name: value[:, self.short // 2 : self.short + self.short // 2]
            if isinstance(value, Tensor) and value.ndim == 2
            else value
            for name, value in call.items()
        }


def runs_on_ids(model: PreTrainedModel) -> None:
    called: Any = model
    length = min(SHORT, longest(model.config.get_text_config()))
    called(input_ids=torch.full((2, length), FIRST))


def longest(config: Any) -> int:
    """Return how many tokens a row may have, a few positions left free."""
    positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(positions, int):
        return LONG
    return min(LONG, max(positions - 4, min(positions, 4)))


def has_experts(config: Any) -> bool:
    return any("experts" in name and bool(value) for name, value in vars(config).items())


class BackboneTried(ModelTried):
    def on(self) -> None:
        self.make(self.twin, FastBackbone)
        lease(self.twin, "attention")
        set_attention(self.model.config, ATTENTION)

    def off(self) -> None:
        super().off()
        set_attention(self.model.config, SDPA)
        end_lease(self.twin)

    def run(self, call: Call, backward: bool = True) -> Values:
        with torch.set_grad_enabled(backward):
            hidden = self.model(**call)[0]
        if call.get("attention_mask") is not None:
            hidden = hidden[call["attention_mask"].bool()]
        if not backward:
            return {"value of its hidden states": hidden.detach()}
        weight = drawn(*hidden.shape, seed=3).to(self.device)
        loss = (hidden.float() * weight).sum()
        return {"value of its hidden states": hidden.detach()} | self.gradients(loss)

    def in_two_pieces(self) -> Values:
        name, cut = cache_argument(layer_class(self.twin).forward), self.short
        assert name is not None
        with torch.no_grad():
            call = {"input_ids": self.ids[:, :cut], "use_cache": True}
            cache = cache_in(self.model(**self.there(**call)).values())
            call = {"input_ids": self.ids[:, cut:], "use_cache": True, name: cache}
            hidden = self.model(**self.there(**call))[0]
        return {"value of a second piece over a cache": hidden}

    def as_evaluated(self) -> Values:
        self.twin.eval()
        try:
            return self.run(self.padded(on_left=True), backward=False)
        finally:
            self.twin.train()

    def trials(self) -> Iterator[Trial]:
        whole = partial(self.run, self.there(input_ids=self.ids))
        if {"use_cache"} <= self.takes and cache_argument(layer_class(self.twin).forward):
            yield Trial(ALCASES, partial(self.against_plain, self.in_two_pieces))
        yield Trial(ALCASES, partial(self.against_plain, self.as_evaluated))
        left = partial(self.run, self.padded(on_left=True), False)
        yield Trial(ALCASES, partial(self.against_plain, left))
        yield Trial("whole", partial(self.against_plain, whole))
        padded = partial(self.run, self.padded())
        yield Trial("padded", partial(self.against_plain, padded))
        if "position_ids" in self.takes:
            yield Trial("packed", partial(self.against_plain, partial(self.run, self.packed())))
        brief = partial(self.run, self.brief(self.padded()))
        yield Trial(ALCASES, partial(self.under_autocast, brief))
        if self.halves is not None:
            yield Trial(ALCASES, partial(self.in_halves, brief))
        self.off()

    def packed(self) -> Call:
        ids = torch.cat([self.ids[0, : self.long - self.short], self.ids[1, : self.short]])[None]
        lengths = (self.long - self.short, self.short)
        positions = torch.cat([torch.arange(n) for n in lengths])[None]
        return self.there(input_ids=ids, position_ids=positions)


class HeadTried(ModelTried):
    last: nn.Module | None = None
    """The last block, once it is tried too."""

    def on(self) -> None:
        self.make(self.twin, FastCausalLM)
        if self.last is not None:
            self.make(self.last, FastLastBlock)

    def run(self, call: Call, head_trains: bool = False) -> Values:
        self.twin.requires_grad_(True)
        if not head_trains:
            self.model.get_output_embeddings().requires_grad_(False)
        output = self.model(**call)
        values = {"value of the loss": output.loss.detach().reshape(1)}
        values |= self.gradients(output.loss.float())
        real = call.get("attention_mask")
        with torch.no_grad():
            logits = output.logits
        return values | {"logits": logits if real is None else logits[real.bool()]}

    def scores(self, call: Call) -> Values:
        labels = call["labels"]
        if self.fast:
            with torch.no_grad():
                found = self.model(**call, fused_lm_head=True).log_probs
        else:
            with torch.no_grad():
                logits = self.model(**{k: v for k, v in call.items() if k != "labels"}).logits
            targets = labels[:, 1:]
            log_all = logits[:, :-1].float().log_softmax(-1)
            found = log_all.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
            found = found * (targets != IGNORED)
        return {"value of the scores": found.detach()}

    def trials(self) -> Iterator[Trial]:
        few = self.ids.where(self.mask == 1, IGNORED)
        few[:, ::3] = IGNORED
        some = self.padded() | self.there(labels=few)
        items = some | {"num_items_in_batch": torch.tensor(9, device=self.device)}
        labelled = partial(self.run, items)
        yield Trial("loss", partial(self.against_plain, labelled))
        whole = self.there(input_ids=self.ids, labels=self.ids)
        yield Trial("loss", partial(self.against_plain, partial(self.run, whole, True)))
        yield Trial("loss", partial(self.against_plain, partial(self.scores, some)))
        brief = partial(self.run, self.brief(items))
        yield Trial("loss", partial(self.under_autocast, brief))
        layers: Any = getattr(self.model.base_model, "layers", None)
        if layers and can_be_last(layers[-1]):
            self.off()
            self.last = layers[-1]
            self.on()
            yield Trial(FEW_SCORED, partial(self.against_plain, labelled))
        if self.halves is not None:
            yield Trial("loss", partial(self.in_halves, brief))
