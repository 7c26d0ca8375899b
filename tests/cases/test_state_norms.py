"""DoRA's row norms follow the weight, however that weight was changed after attach."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import inlay
from inlay.model.adapters.registry import adapter_places


def small(seed: int, storage: str = "dense") -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    return inlay.quantize(model, storage) if storage != "dense" else model  # pyright: ignore[reportReturnType]


def trained(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for _, params in adapter_places(model, "default"):
            for p in params.parameters():
                p.add_(0.2 * torch.randn(p.shape, generator=generator).to(p.dtype))
    return model


X = torch.randn(5, 64, generator=torch.Generator().manual_seed(9))


def merged(model: nn.Module) -> Tensor:
    """What the definition gives: the merged weight is computed without any kept norm."""
    copied = copy.deepcopy(model)
    inlay.merge(copied, inputs=[{"input": X}], minimum_survival=0)
    return copied(X)


def load(model: nn.Module, other: nn.Module) -> None:
    model.load_state_dict(other.state_dict(), strict=False)


def copy_data(model: nn.Module, other: nn.Module) -> None:
    for name, value in other.state_dict().items():
        model.state_dict()[name].data.copy_(value)


def set_data(model: nn.Module, other: nn.Module) -> None:
    for name, value in other.state_dict().items():
        model.get_parameter(name).data = value.clone()


def in_place(model: nn.Module, other: nn.Module) -> None:
    del other
    with torch.no_grad():
        model.get_parameter("0.weight")[3].mul_(7)


def one_row_of_data(model: nn.Module, other: nn.Module) -> None:
    del other
    model.get_parameter("0.weight").data[3] *= 7


def assign(model: nn.Module, other: nn.Module) -> None:
    model.load_state_dict(other.state_dict(), strict=False, assign=True)


CHANGES = [load, copy_data, set_data, in_place, one_row_of_data, assign]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_the_norms_are_those_of_the_present_weight(
    change: Callable[[nn.Module, nn.Module], None],
) -> None:
    model = trained(inlay.attach(small(1), inlay.DoRA(rank=4)))
    before = model(X)
    change(model, small(2))
    assert not torch.allclose(model(X), before, atol=1e-3)
    torch.testing.assert_close(model(X), merged(model), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("storage", ["nf4", "int8"])
def test_packed_weights_that_are_loaded_after_attach(storage: str) -> None:
    model = trained(inlay.attach(small(1, storage), inlay.DoRA(rank=4)))
    model(X)
    load(model, small(2, storage))
    torch.testing.assert_close(model(X), merged(model), atol=1e-5, rtol=1e-5)


def test_an_untrained_adapter_changes_nothing_after_other_weights_are_loaded() -> None:
    model = inlay.attach(small(1), inlay.DoRA(rank=4))
    load(model, small(2))
    torch.testing.assert_close(model(X), small(2)(X), atol=1e-6, rtol=1e-6)


def test_a_model_that_was_attached_to_on_the_meta_device() -> None:
    source = trained(inlay.attach(small(2), inlay.DoRA(rank=4)))
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    inlay.attach(model, inlay.DoRA(rank=4))
    model.to_empty(device="cpu")
    model.load_state_dict(source.state_dict())
    torch.testing.assert_close(model(X), source(X), atol=0, rtol=0)


def test_a_compiled_model_follows_what_is_loaded_into_it() -> None:
    model = trained(inlay.attach(small(1), inlay.DoRA(rank=4)))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    compiled(X)
    load(model, small(2))
    torch.testing.assert_close(compiled(X), merged(model), atol=1e-5, rtol=1e-5)


def test_a_half_precision_model_has_norms_in_full_precision() -> None:
    model = trained(inlay.attach(small(1), inlay.DoRA(rank=4)))
    model.to(torch.bfloat16)(X.bfloat16())
    (params, _) = [p for _, p in adapter_places(model, "default")]
    assert params.base_norms.dtype == torch.float32


def test_detach_leaves_no_hook() -> None:
    model = inlay.detach(inlay.attach(small(1), inlay.DoRA(rank=4)))
    assert not any(m._load_state_dict_post_hooks for m in model.modules())
