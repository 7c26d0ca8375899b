"""P-tuning: HF PEFT is the oracle for values, gradients and files; its losses are not repeated."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft import PromptEncoderConfig
from safetensors.torch import load_file, save_file

import inlay
from inlay.checkpoint.slots import slots
from inlay.peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        "`is_gradient_checkpointing` is deprecated:FutureWarning",  # peft's own code
        "Position ids are not supported:UserWarning",
    )
]
IDS = torch.tensor([[1, 5, 9, 2, 7, 30], [3, 3, 60, 11, 0, 8]])
LABELS = IDS.where(torch.arange(IDS.shape[1]) > 0, -100)
"""HF PEFT has the prompt predict the first token too: that one is left out."""
TENSORS = "adapter_model.safetensors"
ENCODERS: dict[str, dict[str, Any]] = {
    "mlp": {},
    "mlp of 20": {"encoder_hidden_size": 20},
    "lstm": {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 12},
    "one layer": {"encoder_reparameterization_type": "LSTM", "encoder_num_layers": 1},
    "dropout": {"encoder_reparameterization_type": "LSTM", "encoder_dropout": 0.3},
}
every_encoder = pytest.mark.parametrize("encoder", ENCODERS)


def llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def gpt2() -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    quiet = {"attn_pdrop": 0, "embd_pdrop": 0, "resid_pdrop": 0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **quiet))


def config(**options: Any) -> PromptEncoderConfig:
    return PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, **options)


def both(encoder: str, build: Any = llama) -> tuple[Any, Any]:
    """The same adapter in both libraries."""
    found = []
    for make in (get_peft_model, peft.get_peft_model):
        base = build()
        torch.manual_seed(7)
        found.append(make(base, config(**ENCODERS[encoder])))
    return found[0], found[1]


def trained(encoder: str) -> Any:
    """An adapter of ours after a few steps."""
    model = both(encoder)[0].train()
    steps(model, 3)
    return model.eval()


def steps(model: Any, count: int) -> list[float]:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(count):
        loss = model(input_ids=IDS, labels=LABELS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def logits(model: Any) -> torch.Tensor:
    """The logits at the text's own places: HF PEFT gives those of the prompt, too."""
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits[:, -IDS.shape[1] :]


def theirs_of(model: Any, folder: Path, build: Any = llama) -> Any:
    model.save_pretrained(folder)
    return peft.PeftModel.from_pretrained(build(), folder)


@pytest.mark.parametrize("build", [llama, gpt2])
@every_encoder
def test_the_same_seed_gives_the_same_values_loss_and_gradients(encoder: str, build: Any) -> None:
    ours, theirs = both(encoder, build)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-5)
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    assert ours.peft_config["default"] == theirs.peft_config["default"]
    found = []
    for model in (ours, theirs):
        torch.manual_seed(3)  # of dropout
        loss = model.train()(input_ids=IDS, labels=LABELS).loss
        loss.backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        found.append((float(loss.detach()), grads, dict(model.named_parameters())))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert found[0][1].keys() == found[1][1].keys()
    assert len(found[0][1]) >= 7
    for name, grad in found[0][1].items():
        assert torch.equal(found[0][2][name], found[1][2][name]), name
        torch.testing.assert_close(grad, found[1][1][name], rtol=1e-3, atol=1e-6)


@every_encoder
def test_training_is_that_of_peft(encoder: str) -> None:
    losses = []
    for model in both(encoder):
        torch.manual_seed(3)
        losses.append(steps(model.train(), 8))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][-1] < losses[0][0]


@every_encoder
def test_either_library_reads_what_the_other_writes(encoder: str, tmp_path: Path) -> None:
    ours = trained(encoder)
    wanted = logits(ours)
    read = theirs_of(ours, tmp_path / "ours")
    torch.testing.assert_close(logits(read), wanted, rtol=1e-4, atol=1e-5)
    read.save_pretrained(tmp_path / "theirs")
    assert set(load_file(tmp_path / "theirs" / TENSORS)) == {"prompt_embeddings"}
    back = PeftModel.from_pretrained(llama(), tmp_path / "theirs")
    torch.testing.assert_close(logits(back), wanted, rtol=1e-4, atol=1e-5)
    assert back.get_nb_trainable_parameters()[0] == 0
    back.save_pretrained(tmp_path / "again")
    again = peft.PeftModel.from_pretrained(llama(), tmp_path / "again")
    torch.testing.assert_close(logits(again), wanted, rtol=1e-4, atol=1e-5)
    with pytest.warns(UserWarning, match="as prompt tuning does"):
        plain = inlay.load_adapter(llama(), tmp_path / "theirs")
    torch.testing.assert_close(logits(plain), wanted, rtol=1e-4, atol=1e-5)


@every_encoder
def test_a_saved_adapter_goes_on_training_bit_for_bit(encoder: str, tmp_path: Path) -> None:
    model = trained(encoder)
    model.save_pretrained(tmp_path)
    read = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    assert torch.equal(logits(read), logits(model))
    assert read.get_nb_trainable_parameters() == model.get_nb_trainable_parameters()
    plain = inlay.load_adapter(llama(), tmp_path)
    assert torch.equal(logits(plain), logits(model))
    ran = []
    for each in (model, read, plain):
        torch.manual_seed(5)
        ran.append((steps(each.train(), 4), logits(each)))
    assert ran[0][0] == ran[1][0] == ran[2][0]
    assert torch.equal(ran[0][1], ran[1][1])
    assert torch.equal(ran[0][1], ran[2][1])


@every_encoder
def test_loading_over_an_adapter_that_trains_brings_its_values_back(
    encoder: str, tmp_path: Path
) -> None:
    """HF PEFT puts what the encoder computed before the encoder again, and computes another."""
    model = trained(encoder)
    wanted = logits(model)
    model.save_pretrained(tmp_path)
    steps(model.train(), 2)
    assert not torch.allclose(logits(model), wanted, atol=1e-3)
    model.load_adapter(tmp_path, "default", is_trainable=True)
    assert torch.equal(logits(model), wanted)
    theirs = both(encoder)[1]
    theirs.load_adapter(tmp_path, "default")
    assert not torch.allclose(logits(theirs), wanted, atol=1e-2), "the trap that this is about"


def test_what_has_no_encoder_trains_the_embeddings_and_says_so(tmp_path: Path) -> None:
    ours, theirs = both("mlp")
    theirs.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="not the encoder"):
        model = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    torch.testing.assert_close(logits(model), logits(ours), rtol=1e-4, atol=1e-5)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert names == ["prompt_encoder.default.embedding.weight"]
    losses = steps(model.train(), 6)
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path / "further")
    read = peft.PeftModel.from_pretrained(llama(), tmp_path / "further")
    torch.testing.assert_close(logits(read), logits(model), rtol=1e-4, atol=1e-5)
    assert read.peft_config["default"].peft_type == "P_TUNING"
    assert read.peft_config["default"].encoder_hidden_size == 32
    with pytest.raises(inlay.CheckpointError, match="finished=True"):
        ours.load_adapter(tmp_path, "default")


@pytest.mark.parametrize("writer", ["ours", "theirs"])
def test_a_folder_is_read_with_its_configuration_given(writer: str, tmp_path: Path) -> None:
    ours, theirs = both("mlp of 20")
    (ours if writer == "ours" else theirs).save_pretrained(tmp_path)
    given = peft.PeftConfig.from_pretrained(str(tmp_path))
    model = PeftModel.from_pretrained(llama(), tmp_path, config=given)
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-4, atol=1e-5)
    assert model.peft_config["default"] is given
    with pytest.raises(inlay.CheckpointError, match="leave config out"):
        PeftModel.from_pretrained(llama(), tmp_path, config=config(encoder_hidden_size=21))


def test_without_training_there_is_no_encoder_as_in_peft(tmp_path: Path) -> None:
    found = []
    for make in (get_peft_model, peft.get_peft_model):
        base = llama()
        torch.manual_seed(7)
        found.append(make(base, config(inference_mode=True)))
    torch.testing.assert_close(logits(found[0]), logits(found[1]), rtol=1e-4, atol=1e-5)
    assert found[0].get_nb_trainable_parameters()[1] == found[1].get_nb_trainable_parameters()[1]
    _, theirs = both("lstm")
    theirs.save_pretrained(tmp_path)
    lstm = get_peft_model(llama(), config(**ENCODERS["lstm"], inference_mode=True))
    lstm.load_adapter(tmp_path, "default")
    torch.testing.assert_close(logits(lstm), logits(theirs), rtol=1e-4, atol=1e-5)


@every_encoder
def test_states_hold_the_encoder_and_what_it_computes(encoder: str, tmp_path: Path) -> None:
    model = trained(encoder)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / TENSORS)
    for state in (
        get_peft_model_state_dict(model),
        get_peft_model_state_dict(model, state_dict=model.state_dict()),
    ):
        assert saved.keys() == state.keys()
        assert all(torch.equal(saved[key], state[key]) for key in saved)
    computed = model.get_prompt_embedding_to_save("default")
    assert torch.equal(saved["prompt_embeddings"], computed)
    fresh = both(encoder)[0]
    fresh.train()  # what is saved has no dropout, whatever the mode
    set_peft_model_state_dict(fresh, saved)
    assert torch.equal(fresh.get_prompt_embedding_to_save("default"), computed)
    assert torch.equal(logits(fresh), logits(model))
    wrong = {**saved, "prompt_embeddings": computed + 1}
    with pytest.raises(inlay.AdapterError, match="unlike what its others give"):
        set_peft_model_state_dict(fresh, wrong)
    with pytest.raises(inlay.AdapterError, match="missing: prompt_encoder"):
        set_peft_model_state_dict(fresh, {"prompt_embeddings": computed})


def test_a_folder_whose_parts_disagree_is_refused(tmp_path: Path) -> None:
    trained("mlp").save_pretrained(tmp_path)
    (tmp_path / "inlay.json").unlink()
    wanted = logits(inlay.load_adapter(llama(), tmp_path))
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path)), wanted)
    saved = load_file(tmp_path / TENSORS)
    halves = {key: value.bfloat16() for key, value in saved.items()}
    save_file(halves, tmp_path / TENSORS)
    rounded = logits(inlay.load_adapter(llama(), tmp_path))
    torch.testing.assert_close(rounded, wanted, rtol=0.1, atol=0.1)
    saved["prompt_embeddings"] = saved["prompt_embeddings"].flip(0)
    save_file(saved, tmp_path / TENSORS)
    with pytest.raises(inlay.CheckpointError, match="prompt_embeddings"):
        inlay.load_adapter(llama(), tmp_path)
    lacking = {key: value for key, value in saved.items() if "mlp_head.2" not in key}
    save_file(lacking, tmp_path / TENSORS)
    with pytest.raises(inlay.CheckpointError, match="2 missing"):
        inlay.load_adapter(llama(), tmp_path)


def test_names_are_pefts_and_setting_one_has_effect() -> None:
    for encoder in ENCODERS:
        ours, theirs = both(encoder)
        names = [n for n, p in theirs.named_parameters() if p.requires_grad]
        assert [n for n, p in ours.named_parameters() if p.requires_grad] == names
    before = logits(ours)
    with torch.no_grad():
        ours.prompt_encoder["default"].mlp_head.get_submodule("0").bias.add_(1.0)
    assert not torch.equal(logits(ours), before)
    twin = copy.deepcopy(ours)
    twin.load_state_dict(ours.state_dict())
    assert torch.equal(logits(twin), logits(ours))


def test_arguments_are_checked() -> None:
    for options, said in (
        ({"encoder_hidden_size": 0}, "size must be a positive number, not 0"),
        ({"encoder_reparameterization_type": "GRU"}, "must be Literal.*not .GRU"),
        ({"encoder_hidden_size": "8"}, "encoder_hidden_size must be int"),
        ({"encoder_reparameterization_type": "LSTM", "encoder_num_layers": 0}, "encoder_layers"),
        ({"encoder_reparameterization_type": "LSTM", "encoder_dropout": 1.0}, "dropout must be"),
    ):
        with pytest.raises(inlay.AdapterError, match=said):
            get_peft_model(llama(), config(**options))
    with pytest.raises(inlay.AdapterError, match="'MLP' or 'LSTM', not 'GRU'"):
        inlay.PTuning(encoder="GRU")  # pyright: ignore[reportArgumentType]
    with pytest.raises(inlay.AdapterError, match="go with encoder='LSTM'"):
        inlay.PTuning(dropout=0.1)
    with pytest.raises(inlay.AdapterError, match="tokens must be a positive number"):
        inlay.PTuning(tokens=0)


def test_options_of_an_lstm_are_without_effect_on_an_mlp(tmp_path: Path) -> None:
    ours, base = both("mlp")[0], llama()
    torch.manual_seed(7)
    with pytest.warns(UserWarning, match="ignored") as said:
        other = get_peft_model(base, config(encoder_num_layers=3, encoder_dropout=0.1))
    assert ["num_layers" in str(each.message) for each in said] == [False, True]
    assert torch.equal(logits(other), logits(ours))
    other.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (saved["encoder_num_layers"], saved["encoder_dropout"]) == (2, 0.0)


@pytest.mark.parametrize("encoder", ["MLP", "LSTM"])
def test_our_own_start_is_spread_as_pefts(encoder: Any) -> None:
    """Other values, from a seed of its own; of the same distribution."""
    method = inlay.PTuning(tokens=64, encoder=encoder, size=96)
    ours = inlay.attach(llama(), method)
    options = {"encoder_reparameterization_type": encoder, "encoder_hidden_size": 96}
    given = PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=64, **options)
    theirs = dict(peft.get_peft_model(llama(), given).named_parameters())
    for slot in slots(ours, "default"):
        other = theirs[slot.key.replace("encoder.", "encoder.default.", 1)]
        mine, other = slot.tensor.detach(), other.detach()
        assert mine.shape == other.shape
        assert float(mine.std()) == pytest.approx(float(other.std()), rel=0.25)
        if slot.name != "E":
            assert float(mine.abs().max()) == pytest.approx(float(other.abs().max()), rel=0.1)
