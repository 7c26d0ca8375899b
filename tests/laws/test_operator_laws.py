"""Every operator is the same function called directly and as a custom operator; tracers see it."""

from __future__ import annotations

import importlib
import itertools
import pkgutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from law_cases import seeded
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import inlay.kernels
import inlay.storage
from inlay.kernels import attention, formats, frozen, gate, loss, low_rank, norm, opaque
from inlay.kernels.opaque import Operator
from inlay.storage import sources

ROWS, COLUMNS, RANK = 12, 20, 3


def drawn(*shape: int, seed: int = 0, trains: bool = False) -> Tensor:
    return torch.randn(shape, generator=seeded(seed)).requires_grad_(trains)


W = drawn(ROWS, COLUMNS, seed=1)
HELD = ([W], "dense", ROWS, COLUMNS)
HALF = ([W.bfloat16()], "dense", ROWS, COLUMNS)
SEGMENTS = torch.tensor([[0, 0, 4], [0, 4, 9], [1, 0, 7]])
WHOLE = torch.tensor([[0, 0, 9], [1, 0, 9]])


class Table:
    """A streamed table that lies in memory."""

    def take(self, ids: Tensor) -> Tensor:
        return W[ids]


def heads(seed: int, count: int, length: int, width: int = 8) -> Tensor:
    return drawn(2, length, count, width, seed=seed).transpose(1, 2).requires_grad_()


def attention_case(
    segments: Tensor, kept: int, length: int = 9, of_values: int = 8
) -> tuple[Any, ...]:
    shapes = ((2, 4, 8), (3, kept, 8), (4, kept, of_values))
    each = (heads(seed, count, length, width) for seed, count, width in shapes)
    return *each, segments, 0.3


def attention_backward_case(segments: Tensor, kept: int) -> tuple[Any, ...]:
    q, k, v, *rest = attention_case(segments, kept)
    out = attention.segment_attention.body(q, k, v, segments, 0.3)
    given = (drawn(2, 9, 4, 8, seed=5), q, k, v, *out, *rest)
    return tuple(x.detach() if isinstance(x, Tensor) else x for x in given)


def factors(trains: bool = True) -> tuple[Tensor, Tensor]:
    return drawn(RANK, COLUMNS, seed=6, trains=trains), drawn(ROWS, RANK, seed=7, trains=trains)


X, G = (2, 5, COLUMNS), (2, 5, ROWS)
CASES: dict[str, Callable[[], tuple[Operator[Any], tuple[Any, ...]]]] = {
    "dense": lambda: (formats.dense, (*HELD, torch.float64)),
    "frozen_linear": lambda: (frozen.frozen_linear, (drawn(*X, trains=True), *HELD)),
    "frozen_linear_t": lambda: (frozen.frozen_linear_t, (drawn(*G, trains=True), *HALF)),
    "biased_linear": lambda: (
        frozen.biased_linear, (drawn(*X, trains=True), drawn(ROWS, seed=8, trains=True), *HELD),
    ),
    "low_rank_linear": lambda: (
        low_rank.low_rank_linear,
        (drawn(*X, trains=True), *factors(), drawn(ROWS, trains=True), 0.7, *HELD),
    ),
    "low_rank_linear in halves": lambda: (
        low_rank.low_rank_linear,
        (drawn(*X).bfloat16().requires_grad_(), *factors(), None, 0.7, *HALF),
    ),
    "low_rank_linear on ids": lambda: (
        low_rank.low_rank_linear, (drawn(*X), *factors(), None, 0.7, *HELD),
    ),
    "low_rank_linear_backward": lambda: (
        low_rank.low_rank_linear_backward,
        (drawn(*G), drawn(*X), *factors(trains=False), 0.7, *HELD, True),
    ),
    "gated silu": lambda: (gate.gated, (drawn(*X, trains=True), drawn(*X, seed=8), "silu")),
    "gated gelu": lambda: (
        gate.gated, (drawn(*X, trains=True), drawn(*X, seed=8, trains=True), "gelu_tanh"),
    ),
    "gated_backward": lambda: (
        gate.gated_backward, (drawn(*X), drawn(*X, seed=8), drawn(*X, seed=9), "silu"),
    ),
    "rms_norm": lambda: (norm.rms_norm, (drawn(*X, trains=True), drawn(COLUMNS, seed=8), 1e-6)),
    "rms_norm_backward": lambda: (
        norm.rms_norm_backward, (drawn(*X), drawn(*X, seed=8), drawn(COLUMNS), drawn(2, 5)),
    ),
    "segment_attention": lambda: (attention.segment_attention, attention_case(SEGMENTS, 2)),
    "segment_attention of rows": lambda: (attention.segment_attention, attention_case(WHOLE, 4)),
    "segment_attention of narrower values": lambda: (
        attention.segment_attention, attention_case(SEGMENTS, 2, of_values=6),
    ),
    "segment_attention in blocks": lambda: (
        attention.segment_attention,
        attention_case(torch.tensor([[0, 0, 70], [1, 0, 70]]), 2, 70),
    ),
    "segment_attention_backward": lambda: (
        attention.segment_attention_backward, attention_backward_case(SEGMENTS, 2),
    ),
    "segment_attention_backward of rows": lambda: (
        attention.segment_attention_backward, attention_backward_case(WHOLE, 2),
    ),
    "linear_cross_entropy": lambda: (
        loss.linear_cross_entropy,
        (drawn(5, COLUMNS, trains=True), torch.arange(5), drawn(ROWS), True, 0.7, *HELD),
    ),
    "streamed_rows": lambda: (
        sources.streamed_rows, (torch.tensor([3, 1]), torch.tensor(-7), COLUMNS, torch.float64),
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "found", lambda number: Table())
    monkeypatch.setattr(sources, "Rows", Table)


def operators() -> dict[str, Operator[Any]]:
    """Every operator in the kernels and the storages."""
    found: dict[str, Operator[Any]] = {}
    for room in (inlay.kernels, inlay.storage):
        for file in pkgutil.iter_modules(room.__path__, room.__name__ + "."):
            values = vars(importlib.import_module(file.name)).values()
            found |= {v.name: v for v in values if isinstance(v, Operator)}
    return found


def flat(output: Any) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else list(output)


def computed(call: Callable[..., Any], args: tuple[Any, ...]) -> list[Tensor]:
    """What a call returns, and the gradients of every tensor that trains."""
    outputs = flat(call(*args))
    trained = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
    if not trained:
        return outputs
    wanted = [o for o in outputs if o.requires_grad]
    given = [torch.randn(o.shape, generator=seeded(11), dtype=o.dtype) for o in wanted]
    return [*outputs, *torch.autograd.grad(wanted, trained, given)]


def refuse(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("this path was not to be taken")


def only_directly(monkeypatch: pytest.MonkeyPatch) -> None:
    for each in operators().values():
        monkeypatch.setattr(each, "custom", refuse)


def only_as_custom(monkeypatch: pytest.MonkeyPatch) -> None:
    for each in operators().values():
        monkeypatch.setattr(each, "body", refuse)
        monkeypatch.setattr(each, "apply", refuse)


def test_every_operator_has_a_case() -> None:
    assert {case()[0].name for case in CASES.values()} == set(operators())


@pytest.mark.parametrize("case", CASES)
def test_both_ways_give_the_same_bits(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    operator, args = CASES[case]()
    with monkeypatch.context() as m:
        m.setattr(opaque, "traced", lambda args: True)
        only_as_custom(m)
        wanted = computed(operator, args)
    only_directly(monkeypatch)
    got = computed(operator, args)
    for ours, theirs in itertools.zip_longest(got, wanted):
        assert (ours.dtype, ours.requires_grad) == (theirs.dtype, theirs.requires_grad)
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("case", CASES)
def test_both_ways_keep_the_same_tensors(case: str) -> None:
    operator, args = CASES[case]()
    kept: list[list[tuple[int, ...]]] = []
    for call in (operator, operator.custom):
        kept.append([])
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: kept[-1].append(tuple(t.shape)) or t, lambda t: t
        ):
            call(*args)
    assert kept[0] == kept[1]


class Seen(TorchDispatchMode):
    """The names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", CASES)
def test_a_dispatch_mode_sees_it_both_ways(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    operator, args = CASES[case]()
    only_as_custom(monkeypatch)
    with Seen() as seen:
        computed(operator, args)
    assert f"inlay::{operator.name}" in seen.names
    backward = f"inlay::{operator.name}_backward"
    if operator.name + "_backward" in operators():
        assert backward in seen.names


@pytest.mark.parametrize("case", CASES)
def test_a_compiler_sees_it(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    operator, args = CASES[case]()
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    only_as_custom(monkeypatch)
    wanted = flat(operator.custom(*args))
    torch.compiler.reset()
    got = flat(torch.compile(operator, fullgraph=True, backend=backend)(*args))
    assert f"inlay.{operator.name}.default" in graphs
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_fake_tensors_transforms_and_function_modes_get_the_custom_operator(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    only_as_custom(monkeypatch)
    x = drawn(4, COLUMNS)
    fake = torch._subclasses.FakeTensorMode()
    held = ([fake.from_tensor(W)], *HELD[1:])
    assert frozen.frozen_linear(fake.from_tensor(x), *held).shape == (4, ROWS)
    assert frozen.frozen_linear(x.to("meta"), [W.to("meta")], *HELD[1:]).is_meta
    found = torch.func.grad(lambda x: frozen.frozen_linear(x, *HELD).sum())(x)
    torch.testing.assert_close(found, W.sum(0).expand_as(x))  # by torch's own operators
    with torch.device("cpu"):
        assert torch.equal(frozen.frozen_linear(x, *HELD), x @ W.T)


def test_plain_calls_never_reach_the_dispatcher(monkeypatch: pytest.MonkeyPatch) -> None:
    only_directly(monkeypatch)
    for case in CASES.values():
        operator, args = case()
        computed(operator, args)
        with torch.no_grad():
            assert not any(o.requires_grad for o in flat(operator(*args)))


@pytest.mark.parametrize("transposed", [False, True])
def test_the_frozen_products_differentiate_twice(transposed: bool) -> None:
    operator = frozen.frozen_linear_t if transposed else frozen.frozen_linear
    held = ([W.double()], *HELD[1:])
    x = drawn(3, ROWS if transposed else COLUMNS).double().requires_grad_()
    for call in (operator, operator.custom):
        assert torch.autograd.gradgradcheck(lambda x, call=call: call(x, *held) ** 2, x)


def test_an_operator_without_a_gradient_says_so() -> None:
    operator, args = CASES["gated_backward"]()
    y = operator(args[0].requires_grad_(), *args[1:])[0]
    with pytest.raises(RuntimeError, match="no autograd formula"):
        y.sum().backward()


@pytest.mark.parametrize("length", [1, 63, 64, 65, 200, 512, 513])
@pytest.mark.parametrize(
    ("kv", "width", "of_values"),
    [(1, 8, 8), (2, 8, 8), (6, 8, 8), (6, 128, 128), (2, 24, 16), (6, 16, 24), (6, 192, 128)],
)
def test_attention_is_that_of_the_formula_at_every_length(
    length: int, kv: int, width: int, of_values: int
) -> None:
    generator = torch.Generator().manual_seed(length)
    q, k, v = (
        torch.randn(2, heads, length, wide, generator=generator, dtype=torch.float64)
        .requires_grad_()
        for heads, wide in ((6, width), (kv, width), (kv, of_values))
    )  # fmt: skip
    rows = torch.tensor([[0, 0, length], [1, 0, length]])
    out = attention.segment_attention(q, k, v, rows, 0.3)[0]
    keys, values = (x.repeat_interleave(6 // kv, 1) for x in (k, v))
    later = torch.ones(length, length, dtype=torch.bool).triu(1)
    logits = (q @ keys.transpose(2, 3) * 0.3).masked_fill(later, -torch.inf)
    expected = (logits.softmax(-1) @ values).transpose(1, 2)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    g = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    found = torch.autograd.grad(out, (q, k, v), g)
    for to, exact in zip(found, torch.autograd.grad(expected, (q, k, v), g), strict=True):
        torch.testing.assert_close(to, exact, rtol=1e-10, atol=1e-12)
