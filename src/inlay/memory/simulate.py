"""One training step on fake tensors: what is alive when, and what the step computes.

The step is the real one: the model's own forward, autograd's backward, the optimiser's update.
Its tensors have shapes, dtypes and storages but no data, so that a 70B model takes as little room
as its configuration. Every storage is counted from the operation that makes it until it dies.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from inlay.errors import ModelError
from inlay.memory import policy as policies
from inlay.memory.costs import FLOPS, SCRATCH, Scratch, planning_for
from inlay.memory.gathers import Gathers
from inlay.memory.heap import SMALLEST, Event, Heap
from inlay.memory.policy import Policy
from inlay.model.stream import BUFFERS
from inlay.model.targets import output_head
from inlay.storage.quantized import QuantizedLinear
from inlay.storage.streamed import SEGMENT, StreamedEmbedding

CATEGORIES = ("weights", "adapter", "gradients", "optimiser", "activations", "loss", "buffers")
"""What device memory is for; `buffers` is what lives for a moment, recomputed layers among it."""
HOST = "host"
"""Tensors that were moved to the host's memory, which do not count as the device's."""
BFLOAT16_ALONE = "Expected inputs of BF16 type"
"""What PyTorch says of grouped products without data in another dtype, which it does compute."""
NO_DATA = "its data is not allocated"
"""What torch says where a fake tensor's values are read behind the operations' back."""
LARGEST_KNOWN = 1 << 26
"""Integer and boolean tensors of at most this many elements are followed with their values."""
FLOATS_KNOWN = 1 << 12
"""Others of at most this many: positions, on their way to integers again."""


@dataclass
class Work:
    """What one kind of operation did in a step."""

    calls: int = 0
    flops: int = 0
    bytes: int = 0
    """Read and written, if every tensor goes through memory once."""


@dataclass(frozen=True)
class Frozen:
    """Bytes of a model's frozen weights."""

    total: int
    outside: int
    """Of what is outside the repeated blocks: embeddings, the output head."""
    blocks: int
    """How many there are."""


@dataclass
class Simulation:
    """What one training step holds and does."""

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
        """Return the bytes that glibc holds at its peak beyond what is alive at the step's."""
        heap = Heap(keeps=keeps)
        for _ in range(3):
            heap.replay(self.trace)
        passing = sum(self.at_peak.values()) - sum(self.resting.values()) - self.buffer
        return max(0, heap.peak - passing)

    @property
    def flops(self) -> int:
        """Floating-point operations of the step."""
        return sum(work.flops for work in self.work.values())


@dataclass
class Entry:
    """One storage that is alive."""

    size: int
    category: str
    block: int
    alive: weakref.ref[Any] = field(repr=False)


class Ledger(TorchDispatchMode):
    """Counts every storage from the operation that makes it until it dies, by category."""

    def __init__(self) -> None:
        super().__init__()
        self.entries: dict[int, Entry] = {}
        self.live: Counter[str] = Counter()
        self.total = self.peak = self.host_peak = 0
        self.kept = 0
        """Bytes of the buffer that operations keep; alive from the first step on."""
        self.at_peak: dict[str, int] = {}
        self.category = "weights"
        """The category of what is made now."""
        self.work: dict[str, Work] = {}
        self.products: set[tuple[int, int, int]] = set()
        self.trace: list[Event] = []
        """Blocks as they come and go, for what the allocator makes of them."""
        self.made = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = str(func).removesuffix(".default")
        scratch = SCRATCH[name](*args, **kwargs) if name in SCRATCH else Scratch()
        passing = [self.block(size) for size in scratch.passing]
        out = followed(func, args, kwargs)
        inputs = tensors_in((args, kwargs))
        outputs = tensors_in(out)
        category = "loss" if "cross_entropy" in name else None
        made = [t for t in outputs if self.add(t, category)]
        self.kept = max(self.kept, scratch.kept)
        if scratch.multiplied is not None:
            self.products.add(scratch.multiplied)
        self.touch(sum(scratch.passing))
        self.trace += [(number, 0) for number in passing]
        self.note_work(name, func, args, kwargs, out, inputs, made)
        return out

    def add(self, tensor: Tensor, category: str | None = None) -> bool:
        """Count a tensor's storage, unless it is counted already; say whether it was new."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.entries:
            return False
        category = category or self.category
        size = storage.nbytes()
        alive = weakref.ref(storage, lambda _: self.drop(key))
        self.entries[key] = Entry(size, category, self.block(size), alive)
        self.change(category, size)
        return True

    def lend(self, tensor: Tensor) -> None:
        """Count a tensor that is known no more; its bytes are counted elsewhere."""
        entry = self.entries[tensor.untyped_storage()._cdata]
        self.change(entry.category, -entry.size)
        entry.size = 0

    def drop(self, key: int) -> None:
        """A storage has died."""
        entry = self.entries.pop(key)
        self.change(entry.category, -entry.size)
        self.trace.append((entry.block, 0))

    def block(self, size: int) -> int:
        """Note that a block of memory is made; return its number."""
        self.made += 1
        if size >= SMALLEST:
            self.trace.append((self.made, size))
        return self.made

    def recategorise(self, tensor: Tensor, category: str) -> None:
        """Count a tensor's storage as something else from now on."""
        if not self.add(tensor, category):
            entry = self.entries[tensor.untyped_storage()._cdata]
            self.change(entry.category, -entry.size)
            entry.category = category
            self.change(category, entry.size)

    def change(self, category: str, size: int) -> None:
        """Add to, or take from, what is alive."""
        self.live[category] += size
        if category == HOST:
            self.host_peak = max(self.host_peak, self.live[HOST])
        else:
            self.total += size

    def touch(self, workspace: int) -> None:
        """Look whether what is alive now is the most so far."""
        if self.total + workspace > self.peak:
            self.peak = self.total + workspace
            self.at_peak = {name: self.live[name] for name in CATEGORIES}
            self.at_peak["buffers"] += workspace

    def start_over(self) -> None:
        """Forget the peak and the work so far; what is alive stays."""
        self.peak, self.host_peak, self.work = 0, 0, {}
        self.trace.clear()
        self.touch(0)

    def note_work(
        self,
        name: str,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        out: Any,
        inputs: Sequence[Tensor],
        made: Sequence[Tensor],
    ) -> None:
        """Count an operation's arithmetic and traffic; views and bookkeeping do neither."""
        written = made or (inputs[:1] if func._schema.is_mutable else [])
        if not written:
            return
        work = self.work.setdefault(name, Work())
        work.calls += 1
        work.bytes += sum(t.nbytes for t in (*inputs, *written))
        packet = getattr(func, "overloadpacket", None)
        if name in FLOPS:
            work.flops += FLOPS[name](*args, **kwargs)
        elif packet in flop_registry:
            work.flops += flop_registry[packet](*args, **kwargs, out_val=out)


@contextmanager
def fake_tensors() -> Generator[FakeTensorMode]:
    """Make every tensor of the `with` block one without data; say what cannot be followed."""
    try:
        with FakeTensorMode() as mode:
            yield mode
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise ModelError(
            f"the step cannot be planned: what the model computes depends on values that are "
            f"known only in training ({error.func})"
        ) from None
    except RuntimeError as error:
        sentence = unplannable(str(error))
        if sentence is None:
            raise
        raise ModelError(f"the step cannot be planned: {sentence}") from None


def unplannable(said: str) -> str | None:
    """Return why a step cannot be followed without data, from what PyTorch says; None if it can."""
    if BFLOAT16_ALONE in said:
        return (
            "PyTorch follows the products of a mixture of experts in bfloat16 alone, and this run "
            "computes in another dtype"
        )
    if NO_DATA in said:
        return f"the model reads values that only training knows ({said.splitlines()[0]})"
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

    Raises:
        ModelError: what the model computes depends on values that only training knows.
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
        """Count a part of the frozen weights only, and what is gathered of the others'."""
        self.gathers = Gathers(self.model, shards, copied=copied, making=self.making)
        for tensor in self.gathers.divided:
            self.ledger.lend(tensor)
        self.making("weights")
        self.parts = self.gathers.parts()

    def result(self, inputs: dict[str, Any], optimiser: Optimiser, accumulation: int) -> Simulation:
        """Run the step and return what it held and did."""
        ledger = self.ledger
        step = self.first_update(optimiser)
        if accumulation == 1:
            self.model.zero_grad()
        ledger.start_over()
        resting = {name: ledger.live[name] for name in CATEGORIES}
        self.making("activations")
        loss = self.loss(self.model, dict(inputs))
        kept = ledger.live["activations"] + ledger.live["loss"]
        self.making("buffers")
        if self.gathers is not None:
            self.gathers.begin_backward()
        loss.backward()
        if self.gathers is not None:
            self.gathers.end()
        del loss
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
            trace=ledger.trace,
        )

    def at_head(self) -> None:
        """Count what is made from here on as the loss's."""
        self.making("loss")

    def first_update(self, optimiser: Optimiser) -> Callable[[], Any]:
        """Let the optimiser create its state; return its update."""
        self.making("gradients")
        for p in self.trained:
            p.grad = torch.zeros_like(p)
        self.making("optimiser")
        step = optimiser(self.trained)
        self.making("buffers")
        return step

    def making(self, category: str) -> str:
        """Count what is made from now on as this; return what it was counted as."""
        before, self.ledger.category = self.ledger.category, category
        return before

    def count_gradient(self, parameter: Tensor) -> None:
        """Count a parameter's gradient as one."""
        assert parameter.grad is not None
        self.ledger.recategorise(parameter.grad, "gradients")

    def to_host(self, x: Tensor) -> Tensor:
        """Return a copy of a tensor in the host's memory."""
        before, self.ledger.category = self.ledger.category, HOST
        copy = torch.empty_like(x)
        self.ledger.category = before
        return copy

    def back(self, x: Tensor) -> Tensor:
        """Return a copy of a tensor of the host's in the device's memory."""
        return torch.empty_like(x)


def streamed_bytes(model: nn.Module) -> int:
    """Return what lies on the device of a model's frozen weights when they are streamed.

    Two of the largest repeated block, of a packed output head, or of a dense one's shares.
    """
    blocks = [m for each in model.modules() if isinstance(each, nn.ModuleList) for m in each]
    sizes = [frozen_bytes(block) for block in blocks]
    inside = {m for block in blocks for m in block.modules()}
    packed = [m for m in model.modules() if isinstance(m, QuantizedLinear) and m not in inside]
    share = min(SEGMENT, frozen_bytes(model) - sum(sizes))
    return BUFFERS * max(share, *sizes, *map(frozen_bytes, packed), 0)


def host_bytes(model: nn.Module) -> int:
    """Return the bytes of the tables of which only rows come to the device."""
    tables = [m.source.table for m in model.modules() if isinstance(m, StreamedEmbedding)]
    return sum(table.nbytes for table in tables)


def frozen_weights(model: nn.Module) -> Frozen:
    """Return what a model's frozen weights take, inside and outside its blocks."""
    blocks = [m for each in model.modules() if isinstance(each, nn.ModuleList) for m in each]
    sizes = [frozen_bytes(block) for block in blocks]
    total = frozen_bytes(model)
    return Frozen(total, total - sum(sizes), len(blocks))


def frozen_bytes(module: nn.Module) -> int:
    """Return the bytes of a module's tensors that do not train."""
    tensors = (*module.parameters(), *module.buffers())
    return sum(t.nbytes for t in tensors if not t.requires_grad)


def known_tensor(mode: FakeTensorMode, value: Tensor) -> Tensor:
    """Return a fake tensor whose values are followed."""
    fake = mode.from_tensor(value)
    fake.known = value  # pyright: ignore[reportAttributeAccessIssue]
    return fake


# Optimisers: their state and what an update allocates.

Optimiser = Callable[[Sequence[Tensor]], Callable[[], Any]]
"""Creates the state for parameters that have a gradient; returns the update."""


def adamw(parameters: Sequence[Tensor], *, foreach: bool = False) -> Callable[[], Any]:
    """PyTorch's AdamW: two moments of the parameter's size each."""
    made = torch.optim.AdamW(parameters, foreach=foreach)
    made.step()
    return made.step


EIGHT_BIT_BLOCK = 256
SMALLEST_IN_EIGHT_BIT = 4096
"""bitsandbytes keeps the moments of smaller parameters in 32 bits."""


def adamw_8bit(parameters: Sequence[Tensor]) -> Callable[[], Any]:
    """bitsandbytes' AdamW: two moments of a byte each, with a scale for every 256."""
    state = [moment for p in parameters for moment in eight_bit_moments(p)]

    def step() -> list[Tensor]:
        return state

    return step


def eight_bit_moments(p: Tensor) -> list[Tensor]:
    """Return both moments of a parameter as bitsandbytes holds them."""
    if p.numel() < SMALLEST_IN_EIGHT_BIT:
        return [torch.empty_like(p, dtype=torch.float32) for _ in range(2)]
    blocks = -(-p.numel() // EIGHT_BIT_BLOCK)
    return [
        part
        for _ in range(2)
        for part in (torch.empty_like(p, dtype=torch.uint8), p.new_empty(blocks))
    ]


# Values: token ids, labels and masks are known, and what a model does may depend on them.


class Literals(TorchFunctionMode):
    """Lets `torch.tensor` read the values that are known of the tensors in its list."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.tensor and all(hasattr(t, "known") for t in tensors_in(args)):
            args = tree_map_only(Tensor, lambda t: vars(t)["known"].tolist(), args)
        return func(*args, **(kwargs or {}))


def followed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operation on fake tensors; where all its inputs are known, follow their values."""
    if func is torch.ops.aten.index.Tensor:
        known = hasattr(args[0], "known")
        args = (args[0], [index for i in args[1] for index in as_integers(i, known)], *args[2:])
    if func is torch.ops.aten.lift_fresh.default and not isinstance(args[0], FakeTensor):
        literal = func(*args, **kwargs)
        literal.known = args[0]
        return literal
    inputs = tensors_in((args, kwargs))
    if all(hasattr(t, "known") for t in inputs) and (inputs or makes_integers(func, kwargs)):
        return with_values(func, args, kwargs)
    out = func(*args, **kwargs)
    for t in tensors_in(out) if func._schema.is_mutable else ():
        vars(t).pop("known", None)
    return out


def with_values(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operation on the known values, and return fake tensors that know the result."""
    real_args, real_kwargs = tree_map_only(Tensor, lambda t: vars(t)["known"], (args, kwargs))
    with _disable_current_modes():
        real = func(*real_args, **real_kwargs)
    if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default):
        return real
    if torch.Tag.dynamic_output_shape in func.tags:
        out = tree_map_only(Tensor, unfilled, real)
    else:
        out = func(*args, **kwargs)
    for fake, value in zip(tensors_in(out), tensors_in(real), strict=True):
        largest = FLOATS_KNOWN if value.is_floating_point() else LARGEST_KNOWN
        if value.numel() <= largest or func.is_view:
            fake.known = value  # pyright: ignore[reportAttributeAccessIssue]
        else:
            vars(fake).pop("known", None)
    return out


def makes_integers(func: Any, kwargs: dict[str, Any]) -> bool:
    """Say whether an operation without tensors makes one whose values are worth following."""
    dtype = kwargs.get("dtype")
    integers = dtype is not None and not dtype.is_floating_point and not dtype.is_complex
    return func._schema.name.startswith("aten::") and (
        integers or func._schema.name == "aten::arange"
    )


def unfilled(real: Tensor) -> Tensor:
    """Return a fake tensor of a real one's shape."""
    return torch.empty(real.shape, dtype=real.dtype, device=real.device)


def as_integers(index: Tensor | None, known: bool) -> list[Tensor | None]:
    """Return a boolean index as the integer ones it stands for; others as they are.

    Their values are followed only where what they index is `known` too.
    """
    if index is None or index.dtype not in (torch.bool, torch.uint8) or not hasattr(index, "known"):
        return [index]
    mask: Tensor = index.known  # pyright: ignore[reportAttributeAccessIssue]
    with _disable_current_modes():
        count = int(mask.count_nonzero())
        real = mask.nonzero(as_tuple=True) if known else ()
    found: list[Tensor | None] = [
        torch.empty(count, dtype=torch.long, device=index.device) for _ in index.shape
    ]
    for fake, value in zip(found, real, strict=False):
        fake.known = value  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
    return found


def tensors_in(tree: Any) -> list[Tensor]:
    """Return the tensors of nested arguments or results."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
