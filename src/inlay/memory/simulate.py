"""One training step on fake tensors: its memory over time, and its arithmetic.

The step is the real one: the model's own forward, autograd's backward, the optimiser's update.
Its tensors have shapes, dtypes and storages but no data, so that a 70B model takes as little room
as its configuration. `ledger` counts every storage, and `known` follows the values of those inputs
that the model may depend on.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

from inlay.errors import InlayError, ModelError
from inlay.kernels.cost import planning_for
from inlay.memory import policy as policies
from inlay.memory.gathers import Gathers
from inlay.memory.heap import Event, Heap
from inlay.memory.known import Literals, known_tensor
from inlay.memory.ledger import CATEGORIES, HOST, Ledger, Work
from inlay.memory.optimisers import Optimiser
from inlay.memory.policy import Policy
from inlay.model.adapters.targets import output_head
from inlay.model.load.libraries import in_model_code
from inlay.model.stream.host import BUFFERS
from inlay.storage.quantized import QuantizedLinear
from inlay.storage.sources import SEGMENT
from inlay.storage.streamed import StreamedEmbedding

NO_DATA = "its data is not allocated"
"""PyTorch's message where a fake tensor's values are read without an operation."""
OTHER_LENGTHS = 0.04
"""The share of a step's passing memory that batches of other lengths leave in pieces: from runs of
benchmarks/memory/plan_runs.py whose figures are not committed."""


@dataclass(frozen=True)
class Frozen:
    """Bytes of a model's frozen weights."""

    total: int
    outside: int
    """Bytes outside the repeated blocks: embeddings, the output head."""
    blocks: int
    """The number of repeated blocks."""


@dataclass
class Simulation:
    """Memory and work of one training step."""

    peak: int
    """The most bytes alive at once on the device."""
    at_peak: dict[str, int]
    """Category -> bytes, at the peak."""
    resting: dict[str, int]
    """Category -> bytes, between two steps."""
    kept: int
    """Bytes of activations and loss that the forward pass leaves for the backward pass."""
    passes: int
    """The peak of the first forward and backward pass, before there is an optimiser's state."""
    host: int
    """The most bytes moved to the host at once."""
    buffer: int
    """Bytes of the buffer that operations keep."""
    products: frozenset[tuple[int, int, int]]
    """The shapes (m, k, n) that are multiplied."""
    half_products: int
    """Kinds of PyTorch's own products in halves."""
    trace: list[Event]
    """The blocks of memory that come and go in the step."""
    trained: int
    """Parameters that train."""
    streamed_weights: int
    """Bytes of the frozen weights that lie on the device when they are streamed."""
    on_host: int
    """Bytes of the frozen weights that lie in the host's memory."""
    frozen: Frozen
    """The frozen weights on the device."""
    work: dict[str, Work]
    """Operation -> what it did."""

    def fragmentation(self, keeps: bool) -> int:
        """Return the bytes that the allocator holds at its peak beyond the live blocks."""
        heap = Heap(keeps=keeps)
        for _ in range(3):
            heap.replay(self.trace)
        passing = sum(self.at_peak.values()) - sum(self.resting.values()) - self.buffer
        return max(0, heap.peak - passing) + int(OTHER_LENGTHS * passing)

    @property
    def flops(self) -> int:
        return sum(work.flops for work in self.work.values())


@contextmanager
def fake_tensors() -> Generator[FakeTensorMode]:
    try:
        with FakeTensorMode() as mode, conversions_to_the_same():
            yield mode
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise ModelError(
            f"the step cannot be planned: what the model computes depends on values that are "
            f"known only in training ({error.func})"
        ) from None
    except InlayError:
        raise
    except Exception as error:
        sentence = unplannable(str(error))
        if sentence is None and in_model_code(error):
            said = (str(error).strip().splitlines() or [""])[0]
            sentence = f"the model's own code ends in {type(error).__name__}: {said}"
        if sentence is None:
            raise
        raise ModelError(f"the step cannot be planned: {sentence}") from None


@contextmanager
def conversions_to_the_same() -> Generator[None]:
    """Skip conversions of a module to what it is, which fake tensors do not support."""
    convert = nn.Module._apply

    def convert_if_needed(self: nn.Module, fn: Any, recurse: bool = True) -> Any:
        with torch.no_grad():
            same = all(fn(t) is t for t in (*self.parameters(), *self.buffers()))
        return self if same else convert(self, fn, recurse)

    nn.Module._apply = convert_if_needed
    try:
        yield
    finally:
        nn.Module._apply = convert


def unplannable(said: str) -> str | None:
    """Return the reason in PyTorch's message why a step needs real data; None if it is another."""
    if NO_DATA in said:
        return f"the model reads values that are known only in training ({said.splitlines()[0]})"
    return None


def simulate(
    build: Callable[[], nn.Module],
    batch: Mapping[str, Tensor],
    loss: Callable[[nn.Module, dict[str, Any]], Tensor],
    *,
    optimiser: Optimiser,
    policy: Policy = "keep-all",
    accumulation: int = 1,
    kind: Literal["cpu", "cuda"] = "cpu",
    shards: int = 1,
) -> Simulation:
    """Run one training step of a model on fake tensors.

    Args:
        build: returns the model, ready to train.
        batch: the step's inputs with their real values.
        loss: the training loop's own loss of a model and a batch.
        optimiser: makes the optimiser of the trained parameters, its state included.
        policy: which activations are kept.
        accumulation: passes to a step; with several, gradients live through the passes.
        kind: the kind of device whose scratch memory is counted.
        shards: the devices that divide the frozen weights, and gather them block by block.
    """
    with planning_for(kind), fake_tensors() as mode, Literals():
        ledger = Ledger()
        model = build()
        inputs = {name: known_tensor(mode, value) for name, value in batch.items()}
        with ledger:
            step = Step(ledger, model, loss, policy)
            if shards > 1:
                step.divide(shards, copied=kind == "cpu")
            return step.result(inputs, optimiser, accumulation)


class Step:
    """One training step under a ledger."""

    def __init__(
        self,
        ledger: Ledger,
        model: nn.Module,
        loss: Callable[[nn.Module, dict[str, Any]], Tensor],
        policy: Policy,
    ) -> None:
        self.ledger, self.model, self.loss = ledger, model, loss
        self.trained = [p for p in model.parameters() if p.requires_grad]
        policies.apply(model, policy, to_host=self.to_host, back=self.back)
        self.gathers: Gathers | None = None
        for tensor in (*model.parameters(), *model.buffers()):
            ledger.add(tensor, "adapter" if tensor.requires_grad else "weights")
        for p in self.trained:
            p.register_post_accumulate_grad_hook(self.count_gradient)
        head = output_head(model)
        if head is not None:
            head.register_forward_pre_hook(lambda *_: self.at_head())

    def divide(self, shards: int, *, copied: bool) -> None:
        self.gathers = Gathers(self.model, shards, copied=copied, making=self.making)
        for tensor in self.gathers.divided:
            self.ledger.lend(tensor)
        self.making("weights")
        self.parts = self.gathers.parts()

    def result(self, inputs: dict[str, Any], optimiser: Optimiser, accumulation: int) -> Simulation:
        ledger = self.ledger
        step = self.first_update(optimiser)
        if accumulation == 1:
            self.model.zero_grad()
        ledger.start_over()
        resting = {name: ledger.live[name] for name in CATEGORIES}
        kept = self.forward_and_backward(inputs)
        passes = ledger.peak - resting["optimiser"] - resting["gradients"]
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        step()
        at_peak = {**ledger.at_peak, "buffers": ledger.at_peak["buffers"] + ledger.kept}
        return Simulation(
            peak=ledger.peak + ledger.kept,
            at_peak=at_peak,
            resting=resting,
            kept=kept,
            passes=passes + ledger.kept,
            host=ledger.host_peak,
            trained=sum(p.numel() for p in self.trained),
            streamed_weights=streamed_bytes(self.model),
            on_host=host_bytes(self.model),
            frozen=frozen_weights(self.model),
            work=ledger.work,
            buffer=ledger.kept,
            products=frozenset(ledger.products),
            half_products=len(ledger.half_products),
            trace=ledger.trace,
        )

    def forward_and_backward(self, inputs: dict[str, Any]) -> int:
        """Run both passes; return the bytes kept between them."""
        self.making("activations")
        loss = self.loss(self.model, dict(inputs))
        kept = self.ledger.live["activations"] + self.ledger.live["loss"]
        self.making("buffers")
        if self.gathers is not None:
            self.gathers.begin_backward()
        loss.backward()
        if self.gathers is not None:
            self.gathers.end()
        return kept

    def at_head(self) -> None:
        self.making("loss")

    def first_update(self, optimiser: Optimiser) -> Callable[[], Any]:
        self.making("gradients")
        for p in self.trained:
            p.grad = torch.zeros_like(p)
        self.making("optimiser")
        step = optimiser(self.trained)
        self.making("buffers")
        return step

    def making(self, category: str) -> str:
        """Set the category of what is created next; return the one before."""
        before, self.ledger.category = self.ledger.category, category
        return before

    def count_gradient(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self.ledger.recategorise(parameter.grad, "gradients")

    def to_host(self, x: Tensor) -> Tensor:
        before = self.making(HOST)
        copy = torch.empty_like(x)
        self.making(before)
        return copy

    def back(self, x: Tensor) -> Tensor:
        return torch.empty_like(x)


def streamed_bytes(model: nn.Module) -> int:
    """Count two of the largest repeated block, of a packed head, or of a dense head's shares."""
    blocks = repeated_blocks(model)
    sizes = [frozen_bytes(block) for block in blocks]
    inside = {m for block in blocks for m in block.modules()}
    packed = [m for m in model.modules() if isinstance(m, QuantizedLinear) and m not in inside]
    share = min(SEGMENT, frozen_bytes(model) - sum(sizes))
    return BUFFERS * max(share, *sizes, *map(frozen_bytes, packed), 0)


def host_bytes(model: nn.Module) -> int:
    tables = [m.source.table for m in model.modules() if isinstance(m, StreamedEmbedding)]
    return sum(table.nbytes for table in tables)


def frozen_weights(model: nn.Module) -> Frozen:
    blocks = repeated_blocks(model)
    sizes = [frozen_bytes(block) for block in blocks]
    total = frozen_bytes(model)
    return Frozen(total, total - sum(sizes), len(blocks))


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    return [m for each in model.modules() if isinstance(each, nn.ModuleList) for m in each]


def frozen_bytes(module: nn.Module) -> int:
    tensors = (*module.parameters(), *module.buffers())
    return sum(t.nbytes for t in tensors if not t.requires_grad)
