"""Bad adapter folders: each a sentence that names the problem, and the model stays as it was."""

from __future__ import annotations

import copy
import hashlib
import json
import pickle
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from inlay.checkpoint import folder as folder_module
from inlay.checkpoint.adapter import load_adapter, save_adapter
from inlay.checkpoint.adapter_file import read_adapter
from inlay.checkpoint.folder import CONFIG, EXTRAS, TENSORS
from inlay.checkpoint.slots import slots
from inlay.errors import AdapterError, CheckpointError
from inlay.methods.bitfit import BitFit
from inlay.methods.bottleneck import Bottleneck
from inlay.methods.full import Full
from inlay.methods.lora import LoRA
from inlay.model.adapters.attach import attach
from inlay.model.adapters.registry import active, adapters
from inlay.model.load.quantize import quantize


class Net(nn.Module):
    """Two blocks, an embedding and a head tied to it."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, width)
        self.layers = nn.ModuleList(nn.ModuleDict(self.block(width)) for _ in range(2))
        self.head = nn.Linear(width, 12, bias=False)
        self.head.weight = self.embed.weight

    def block(self, width: int) -> dict[str, nn.Module]:
        return {"up": nn.Linear(width, 32), "down_proj": nn.Linear(32, width)}

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer["down_proj"](layer["up"](x).relu())
        return self.head(x)


IDS = torch.arange(12)[None]


def net(width: int = 16, seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net(width)


def trained(model: nn.Module, name: str = "default") -> nn.Module:
    with torch.no_grad():
        for slot in slots(model, name):
            slot.tensor.normal_(generator=torch.Generator().manual_seed(len(slot.key)))
    return model


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = trained(attach(net(), LoRA(rank=2), targets=["up", "down_proj"]))
    return save_adapter(model, tmp_path / "adapter", base_model="some/base")


@pytest.fixture
def plain(saved: Path) -> Path:
    (saved / EXTRAS).unlink()
    return saved


def set_option(folder: Path, **options: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **options}))


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    values = load_file(folder / TENSORS)
    change(values)
    save_file(values, folder / TENSORS)


def refusal(folder: Path, model: nn.Module | None = None) -> str:
    """Return the sentence of the refusal; the model must be untouched."""
    model = net() if model is None else model
    before = {k: (v.clone(), v.requires_grad) for k, v in model.named_parameters()}
    modules = [type(m) for m in model.modules()]
    with pytest.raises(CheckpointError) as caught:
        load_adapter(model, folder)
    assert adapters(model) == {}
    assert [type(m) for m in model.modules()] == modules
    for name, parameter in model.named_parameters():
        assert torch.equal(before[name][0], parameter)
        assert before[name][1] == parameter.requires_grad
    return str(caught.value)


KEY = "base_model.model.layers.0.up.lora_A.weight"


def test_a_missing_folder(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "nowhere")


def test_a_file_in_place_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    assert "is a file" in refusal(tmp_path / "a")


def test_missing_files(plain: Path) -> None:
    (plain / TENSORS).rename(plain / "elsewhere")
    assert TENSORS in refusal(plain)
    (plain / CONFIG).unlink()
    assert CONFIG in refusal(plain)


def test_adapters_in_subfolders_are_named(saved: Path) -> None:
    assert "subfolders adapter are" in refusal(saved.parent)


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", ["adapter_model.bin", TENSORS])
def test_a_pickle_is_never_opened(plain: Path, name: str, zipped: bool) -> None:
    (plain / TENSORS).unlink()
    bomb = plain / "exploded"
    if zipped:
        torch.save({"x": Bomb(bomb)}, plain / name)
    else:
        (plain / name).write_bytes(pickle.dumps(Bomb(bomb)))
    assert "pickle" in refusal(plain)
    assert not bomb.exists()


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 9, 100, -1])
def test_truncated_safetensors(plain: Path, keep: int) -> None:
    whole = (plain / TENSORS).read_bytes()
    (plain / TENSORS).write_bytes(whole[:keep])
    assert "truncated or corrupt" in refusal(plain)


def test_one_changed_bit_is_seen(saved: Path) -> None:
    whole = bytearray((saved / TENSORS).read_bytes())
    whole[-3] ^= 1
    (saved / TENSORS).write_bytes(whole)
    assert "SHA-256" in refusal(saved)


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '{"r": NaN}', "\x00", "[" * 100_000])
@pytest.mark.parametrize("file", [CONFIG, EXTRAS])
def test_invalid_json(saved: Path, file: str, text: str) -> None:
    (saved / file).write_text(text)
    assert file in refusal(saved)


def test_a_config_that_is_not_utf8(saved: Path) -> None:
    (saved / CONFIG).write_bytes(b'{"r": "\xff"}')
    assert "JSON" in refusal(saved)


@pytest.mark.parametrize("kind", [None, "LORAX", "VERA", 3, ["LORA"]])
def test_an_unknown_peft_type(plain: Path, kind: Any) -> None:
    set_option(plain, peft_type=kind)
    assert "peft_type" in refusal(plain)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("use_qalora", True),
        ("layer_replication", [[0, 2], [1, 2]]),
        ("alora_invocation_tokens", [1, 2]),
        ("lora_bias", True),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "olora"),
        ("use_bdlora", {"nblocks": 2}),
        ("arrow_config", {"top_k": 1}),
        ("an_option_of_the_future", 7),
    ],
)
def test_an_option_that_inlay_does_not_have(plain: Path, option: str, value: Any) -> None:
    set_option(plain, **{option: value})
    assert f"sets {option} to" in refusal(plain)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("r", "8"),
        ("r", 0),
        ("r", -1),
        ("r", True),
        ("r", None),
        ("r", 2.5),
        ("r", 10**9),
        ("r", 10**40),
        ("lora_alpha", "x"),
        ("lora_alpha", 0),
        ("lora_dropout", 1.5),
        ("use_rslora", "no"),
        ("bias", "some"),
        ("rank_pattern", ["up"]),
        ("rank_pattern", {"up": "2"}),
        ("rank_pattern", {"(": 2}),
        ("target_modules", 3),
        ("target_modules", [1]),
        ("target_modules", []),
        ("target_modules", "("),
        ("target_modules", ["nothing"]),
        ("target_modules", ["layers"]),
        ("exclude_modules", {"a": 1}),
        ("exclude_modules", ["up", "down_proj"]),
        ("layers_to_transform", "x"),
        ("layers_to_transform", [7]),
        ("modules_to_save", "head"),
        ("modules_to_save", ["nothing"]),
    ],
)
def test_a_wrong_value(plain: Path, option: str, value: Any) -> None:
    set_option(plain, **{option: value})
    assert CONFIG in refusal(plain)


def test_all_bad_tensors_stand_in_one_sentence(plain: Path) -> None:
    def spoil(values: dict[str, Tensor]) -> None:
        del values[KEY]
        values["base_model.model.layers.9.up.lora_A.weight"] = torch.zeros(2, 2)
        values[KEY.replace("lora_A", "lora_B")] = torch.zeros(3, 3)
        values[KEY.replace("layers.0", "layers.1")] = torch.zeros(2, 16, dtype=torch.int8)

    change_tensors(plain, spoil)
    said = refusal(plain)
    assert f"1 missing: {KEY}" in said
    assert "1 not used by it: base_model.model.layers.9.up.lora_A.weight" in said
    assert "lora_B.weight of shape [3, 3], expected [32, 2]" in said
    assert "of dtype I8" in said
    assert "some/base" in said


def test_a_dtype_that_would_be_rounded(plain: Path) -> None:
    change_tensors(plain, lambda values: values.update({KEY: values[KEY].double()}))
    assert "F64" in refusal(plain)


def test_half_precision_files_are_read_exactly(plain: Path) -> None:
    change_tensors(plain, lambda v: v.update({k: t.bfloat16() for k, t in v.items()}))
    model = load_adapter(net(), plain)
    wanted = load_file(plain / TENSORS)
    assert all(torch.equal(s.tensor, wanted[s.key].float()) for s in slots(model, "default"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(plain: Path, value: float) -> None:
    change_tensors(plain, lambda values: values[KEY][0].fill_(value))
    assert f"NaN or infinite: {KEY}" in refusal(plain)


def test_an_adapter_for_another_width(saved: Path, plain: Path) -> None:
    assert "misfits" in refusal(saved, net(width=8))
    assert "misfits" in refusal(plain, net(width=8))


def test_an_adapter_for_another_architecture(saved: Path) -> None:
    said = refusal(saved, nn.Sequential(nn.Linear(16, 16)))
    assert "Net (some/base)" in said
    assert "Sequential" in said


def test_an_adapter_for_other_values_of_the_same_shapes(saved: Path) -> None:
    other = net(seed=7)
    assert "other values" in refusal(saved, other)
    (saved / EXTRAS).unlink()
    load_adapter(other, saved)


def test_a_copy_of_the_base_that_differs_from_the_model(tmp_path: Path) -> None:
    model = trained(attach(net(), LoRA(rank=2), targets=["embed"]))
    folder = save_adapter(model, tmp_path)
    (folder / EXTRAS).unlink()
    copy_key = "base_model.model.embed.base_layer.weight"
    change_tensors(folder, lambda v: v.update({copy_key: net().embed.weight.detach()}))
    load_adapter(net(), folder)
    assert f"unlike the base's own: {copy_key}" in refusal(folder, net(seed=3))


def test_the_base_in_four_bits_or_bf16_is_still_that_base(saved: Path) -> None:
    load_adapter(quantize(net(), "nf4"), saved)
    load_adapter(quantize(net(), "int8"), saved)
    load_adapter(net().bfloat16(), saved)


def test_a_config_that_contradicts_inlay_json(saved: Path) -> None:
    set_option(saved, lora_alpha=1)
    assert "sets lora_alpha to 1" in refusal(saved)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("format", 2),
        ("method", "magic"),
        ("method", 3),
        ("hyperparameters", {"rank": "x"}),
        ("hyperparameters", {"ranks": 2}),
        ("hyperparameters", []),
        ("placement", None),
        ("placement", {"targets": 3}),
        ("placement", {"targets": ["nothing"]}),
        ("base", None),
        ("files", {}),
    ],
)
def test_a_damaged_inlay_json(saved: Path, key: str, value: Any) -> None:
    extras = json.loads((saved / EXTRAS).read_text())
    (saved / EXTRAS).write_text(json.dumps({**extras, key: value}))
    assert str(saved) in refusal(saved)


def test_a_failed_load_beside_another_adapter_leaves_that_one(plain: Path) -> None:
    model = trained(attach(net(), LoRA(rank=2), name="first"), "first")
    before = model(IDS)
    trains = [p.requires_grad for p in model.parameters()]
    change_tensors(plain, lambda values: values.pop(KEY))
    with pytest.raises(CheckpointError):
        load_adapter(model, plain)
    assert list(adapters(model)) == ["first"]
    assert [p.requires_grad for p in model.parameters()] == trains
    assert torch.equal(model(IDS), before)


def test_loading_follows_attach(saved: Path) -> None:
    model = load_adapter(load_adapter(net(), saved, "a"), saved, "b")
    assert active(model) == ("a",)
    with pytest.raises(AdapterError, match="already has an adapter"):
        load_adapter(model, saved, "a")


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (BitFit(), {}),
        (Full(), {}),
        (Full(), {"targets": ["layers.1"]}),
        (Bottleneck(reduction=4), {"targets": ["down_proj"]}),
        (LoRA(rank=2), {"targets": ["up"], "modules_to_save": ["head"]}),
    ],
)
def test_every_kind_is_bit_equal_after_a_round_trip(
    method: Any, options: dict[str, Any], tmp_path: Path
) -> None:
    model = trained(attach(net(), method, **options))
    assert not torch.equal(model(IDS), net()(IDS))
    again = load_adapter(net(), save_adapter(model, tmp_path))
    assert torch.equal(again(IDS), model(IDS))
    assert adapters(again)["default"].method == method
    assert [s.key for s in slots(again, "default")] == [s.key for s in slots(model, "default")]


def test_a_tied_tensor_is_saved_once_and_restored_to_both(tmp_path: Path) -> None:
    folder = save_adapter(trained(attach(net(), Full())), tmp_path)
    keys = set(load_file(folder / TENSORS))
    assert "base_model.model.embed.weight" in keys
    assert "base_model.model.head.weight" not in keys
    again = {s.key: s.tensor for s in slots(load_adapter(net(), folder), "default")}
    assert again["base_model.model.head.weight"] is again["base_model.model.embed.weight"]


def test_the_folder_says_what_it_is(saved: Path) -> None:
    file = read_adapter(saved)
    assert file.method == LoRA(rank=2)
    assert file.folder.base_model == "some/base"
    assert file.folder.storage == "dense"
    extras = json.loads((saved / EXTRAS).read_text())
    digest = hashlib.sha256((saved / TENSORS).read_bytes()).hexdigest()
    assert extras["files"] == {TENSORS: digest}
    assert 'base_model: "some/base"' in (saved / "README.md").read_text()


def test_reading_a_folder_imports_no_torch(saved: Path) -> None:
    program = (
        "import sys; from inlay.checkpoint.folder import read_folder; "
        f"print(read_folder({str(saved)!r}).base_model, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.split() == ["some/base", "False"]


def everything_in(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_a_full_disk_leaves_the_older_adapter(saved: Path) -> None:
    before = everything_in(saved)
    model = trained(attach(net(), LoRA(rank=8), targets=["up"]))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, hard))
    try:
        with pytest.raises(CheckpointError, match="what was there before is intact"):
            save_adapter(model, saved)
        with pytest.raises(CheckpointError, match="could not be saved"):
            save_adapter(model, saved.parent / "new")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert everything_in(saved) == before
    assert not (saved.parent / "new").exists()
    load_adapter(net(), saved)


class KilledError(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("moves", range(4))
def test_a_save_killed_while_moving_files_counts_as_done(
    saved: Path, moves: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = trained(attach(net(), LoRA(rank=8), targets=["up"]))
    left = [1 + moves]  # The first one puts the folder of finished files in place.
    move = Path.replace

    def replace(path: Path, target: Path) -> Path:
        if not left[0]:
            raise KilledError
        left[0] -= 1
        return move(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", replace)
        with pytest.raises(KilledError):
            save_adapter(model, saved)
    again = load_adapter(net(), saved)
    assert torch.equal(again(IDS), model(IDS))
    save_adapter(model, saved)
    assert not (saved / folder_module.COMPLETE).exists()
    assert len(everything_in(saved)) == 4


def test_other_files_in_the_folder_stay(saved: Path) -> None:
    (saved / "notes.txt").write_text("mine")
    save_adapter(trained(attach(net(), LoRA(rank=8))), saved)
    assert (saved / "notes.txt").read_text() == "mine"


def test_saving_where_a_file_stands(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    model = attach(net(), LoRA(rank=2))
    for place in (tmp_path / "a", tmp_path / "a" / "b"):
        with pytest.raises(CheckpointError):
            save_adapter(model, place)
    assert (tmp_path / "a").read_text() == "x"


def test_values_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    model = attach(net(), LoRA(rank=2))
    with torch.no_grad():
        slots(model, "default")[0].tensor.fill_(float("nan"))
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        save_adapter(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_saving_an_adapter_that_is_not_there(tmp_path: Path) -> None:
    model = attach(net(), LoRA(rank=2))
    with pytest.raises(AdapterError, match="no adapter named 'other'"):
        save_adapter(model, tmp_path / "a", "other")
    with pytest.raises(AdapterError, match="has no adapter"):
        save_adapter(copy.deepcopy(net()), tmp_path / "a")
