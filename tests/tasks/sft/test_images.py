"""A run on rows with images: what it trains, keeps, refuses, and how it stops and goes on."""

from __future__ import annotations

import base64
import json
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from train_tiny import adapter_hash, broken_at, losses_of, make_model
from vision_tiny import FAMILIES, check_kept_features, make_vision_run, notes_of, silence_projector

from inlay.data.image_inputs import ImageInputs
from inlay.data.image_reader import image_reader
from inlay.data.tokens import encode
from inlay.errors import DataError, TrainingError, UsageError
from inlay.evaluate.images import Seeing
from inlay.model.adapters.attach import attach
from inlay.model.load.pretrained import load
from inlay.tasks.config import load_config
from inlay.tasks.sft.trainer import SupervisedTrainer
from inlay.train.features import cache
from inlay.train.features.vision import VisionCache, cached_vision
from inlay.train.output import checkpoints
from inlay.train.rows import rows_of_run
from inlay.train.run import train


def test_a_run_leaves_what_one_on_text_does(tmp_path: Path):
    config = make_vision_run(tmp_path)
    result, told = notes_of(config)
    output = Path(config.output)
    assert {p.name for p in output.iterdir()} == {
        "adapter", "checkpoints", "metrics.jsonl", "report.html", "run.json",
    }  # fmt: skip
    assert not list(output.rglob("*.tmp"))
    run = json.loads((output / "run.json").read_text())
    assert run["finished"]
    assert run["rows"] == {"train": 24, "validation": 3, "test": 3}
    assert run["comparison"]["generated_rows"] == 2
    first = run["comparison"]["examples"][0]
    assert first["prompt"] == "Which digit is this?"
    row = json.loads(Path(config.data).read_text().splitlines()[first["line"] - 1])
    scan = Image.open(Path(config.data).parent / row["image"]).convert("RGB")
    [address] = first["images"]
    drawn = Image.open(BytesIO(base64.b64decode(address.removeprefix("data:image/png;base64,"))))
    assert drawn.tobytes() == scan.tobytes()
    assert f'<img src="{address}"' in (output / "report.html").read_text()
    assert {m["name"] for m in run["comparison"]["metrics"]} >= {"loss", "exact_match"}
    assert "memory planned: " in told
    held = [line["eval_loss"] for line in losses_of(config.output) if "eval_loss" in line]
    assert held[-1] < held[0] - 0.3
    assert not result.model.training


def test_only_the_language_part_is_adapted_unless_the_run_says_so(tmp_path: Path):
    config = make_vision_run(tmp_path, targets=None, max_steps=1, evaluate=False)
    run = train(config).run
    assert run["targets"]
    assert all(name.startswith("model.language_model.") for name in run["targets"])
    held = json.loads((tmp_path / "out/adapter/adapter_config.json").read_text())
    assert held["target_modules"]


@pytest.mark.parametrize("family", FAMILIES)
def test_kept_features_train_the_same(tmp_path: Path, family: str):
    def make(name: str, wanted: Any) -> Any:
        keys = {"targets": ["language"], "cache_vision": wanted, "evaluate": False}
        return make_vision_run(tmp_path, family, name, **keys)

    check_kept_features(make, "ran once over 27 rows")


def test_kept_features_are_read_and_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen = []
    own = VisionCache.seen
    monkeypatch.setattr(
        VisionCache, "seen", lambda self, *given: seen.append(1) or own(self, *given)
    )
    config = make_vision_run(tmp_path, targets=["language"], epochs=3.0, evaluate=False)
    train(config)
    assert len(seen) == 27 + 2  # every row, and the first one twice, to be tried


def test_features_over_the_memorys_share_lie_in_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    whole = make_vision_run(tmp_path, output="memory", targets=["language"], evaluate=False)
    train(whole)
    monkeypatch.setattr(cache, "available_memory", lambda: 8 * 16 * 64 * 4)
    part = make_vision_run(tmp_path, output="file", targets=["language"], evaluate=False)
    _, told = notes_of(part)
    assert "vision.tmp" in told
    assert adapter_hash(whole.output) == adapter_hash(part.output)
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_of_kept_features_is_the_models_own(tmp_path: Path, family: str):
    config = make_vision_run(tmp_path, family)
    model: Any = load(config.model)[0]
    reader = image_reader(Path(config.model), None)
    rows = encode(rows_of_run(config).train, reader, 512)[:5]
    cache = cached_vision(model, reader, rows, tmp_path / "kept.tmp")
    assert isinstance(cache, VisionCache), cache
    calls = [Seeing(inputs).join(rows, 32).call for inputs in (ImageInputs(reader), cache)]
    assert calls[1]["pixel_values"].tolist() == [0, 1, 2, 3, 4]
    own = model(**calls[0]).logits
    with cache.used():
        torch.testing.assert_close(model(**calls[1]).logits, own, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model(**calls[0]).logits, own)
    assert "get_image_features" not in vars(model.base_model)


def test_a_tower_that_trains_or_drops_is_not_kept(tmp_path: Path):
    config = make_vision_run(tmp_path)
    reader = image_reader(Path(config.model), None)
    rows = encode(rows_of_run(config).train, reader, 512)[:2]
    model: Any = load(config.model)[0]
    for module in model.modules():
        if hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = 0.5
    assert cached_vision(model, reader, rows, tmp_path / "x") == "the vision tower has dropout"
    model = load(config.model)[0]
    from inlay.methods.lora import LoRA

    attach(model, LoRA(rank=2), targets="projector")
    found = cached_vision(model, reader, rows, tmp_path / "x")
    assert found == "something in the vision tower or the projector trains"
    with pytest.raises(UsageError, match="'cache_vision' cannot be used: something in the vision"):
        train(make_vision_run(tmp_path, cache_vision=True))


# A run that goes wrong.


def test_a_loss_that_is_not_a_number_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = make_vision_run(tmp_path, resume=True)
    broken_at(monkeypatch, SupervisedTrainer, 7, float("nan"))
    with pytest.raises(TrainingError, match="the loss became nan at step 7"):
        train(config)
    last = checkpoints.latest(tmp_path / "out" / "checkpoints")
    assert last is not None
    assert last.name == "checkpoint-6"
    monkeypatch.undo()
    assert train(config).run["finished"]


@pytest.mark.parametrize("targets", [["language"], ["vision", "projector"]], ids=str)
def test_an_interrupted_run_resumes_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, targets: list[str]
):
    same = {"targets": targets, "log_every": 3, "evaluate": False}
    config = make_vision_run(tmp_path, resume=True, **same)
    broken_at(monkeypatch, SupervisedTrainer, 6, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        train(config)
    monkeypatch.undo()
    train(config)
    train(make_vision_run(tmp_path, output="whole", **same))
    assert adapter_hash(config.output) == adapter_hash(tmp_path / "whole")
    assert losses_of(config.output) == losses_of(tmp_path / "whole")


def test_an_adapter_without_gradient_stops_the_run(tmp_path: Path):
    config = make_vision_run(tmp_path, targets=["vision"])
    silence_projector(Path(config.model))
    with pytest.raises(TrainingError, match=r"no gradient reaches .*vision_tower"):
        train(config)
    assert not (tmp_path / "out" / "adapter").exists()


def test_data_that_changed_is_not_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = make_vision_run(tmp_path, resume=True)
    broken_at(monkeypatch, SupervisedTrainer, 6, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        train(config)
    monkeypatch.undo()
    scans = sorted((tmp_path / "scans").iterdir())
    scans[0].write_bytes(scans[1].read_bytes())
    with pytest.raises(UsageError, match="the data has changed"):
        train(config)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"packing": "bfd"}, "'packing' does not apply to rows with images"),
        ({"packing": True}, "'packing' does not apply to rows with images"),
        ({"cache_trunk": True}, "'cache_trunk' does not apply to rows with images"),
        ({"eight_bits": True}, "'eight_bits' does not apply to rows with images"),
    ],
)
def test_a_key_that_rows_with_images_do_not_know_is_refused(
    tmp_path: Path, changes: dict[str, Any], sentence: str
):
    with pytest.raises(UsageError, match=sentence):
        train(make_vision_run(tmp_path, **changes))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"task": "reward", "cache_vision": True},
            "'cache_vision' belongs to the tasks sft, dpo, kto and orpo, not to 'reward'",
        ),
        ({"task": "reward", "max_pixels": 9}, "'max_pixels' belongs to the tasks sft, dpo"),
        ({"max_pixels": 0}, "'max_pixels' must be a whole number above 0 or nothing, not 0"),
        ({"cache_vision": "often"}, "'cache_vision' must be 'auto' or true or false"),
    ],
)
def test_keys_are_checked(changes: dict[str, Any], sentence: str):
    with pytest.raises(UsageError) as caught:
        load_config(None, {"model": "m", "data": "d", "output": "o", **changes})
    assert sentence in str(caught.value)


@pytest.mark.parametrize("key", ["max_pixels", "allow_urls", "cache_vision"])
def test_rows_without_images_know_no_such_key(tmp_path: Path, key: str):
    from train_tiny import make_run

    with pytest.raises(UsageError, match=f"'{key}' applies to rows with images, and these have"):
        train(make_run(tmp_path, **{key: 64 if key == "max_pixels" else True}))
    assert not (tmp_path / "out").exists()


def test_a_model_that_sees_nothing_is_refused_before_it_is_loaded(tmp_path: Path):
    config = make_vision_run(tmp_path)
    blind = config.model_copy(update={"model": str(make_model(tmp_path / "blind"))})
    with pytest.raises(DataError, match=r"blind \(llama\) is a model that sees none"):
        train(blind)
    assert not (tmp_path / "out").exists()


# Storages, methods, options.


@pytest.mark.parametrize(
    "changes",
    [
        {"storage": "nf4", "dtype": "bfloat16"},
        {"storage": "int8"},
        {"storage": "nf4", "stream": "host"},
        {"targets": ["language", "lm_head"]},
        {"targets": ["language"], "modules_to_save": ["multi_modal_projector"]},
        {"activations": "layer-inputs"},
        {"method": "dora", "targets": ["language", "vision"]},
        {"method": "full", "learning_rate": 1e-3, "targets": ["language"]},
        {"batch_size": 8, "max_pixels": 16},
    ],
    ids=str,
)
def test_every_kind_of_run_learns(tmp_path: Path, changes: dict[str, Any]):
    if changes.get("method") == "full":
        changes = {**changes, "dropout": None, "rank": None}
    train(make_vision_run(tmp_path, evaluate=False, epochs=3.0, **changes))
    held = [x["eval_loss"] for x in losses_of(tmp_path / "out") if "eval_loss" in x]
    assert held[-1] < held[0] - 0.3


def test_text_trains_a_model_that_sees(tmp_path: Path):
    config = make_vision_run(tmp_path, evaluate=False)
    rows = [{"prompt": f"Say {n}:", "completion": str(n)} for n in range(30)]
    (tmp_path / "text.jsonl").write_text("\n".join(map(json.dumps, rows)))
    changed = {"data": str(tmp_path / "text.jsonl"), "targets": ["language"]}
    result = train(config.model_copy(update=changed))
    assert result.run["finished"]
    assert "Tokenizer" in type(result.tokenizer).__name__
