"""Over a thousand mutated run files, data files and adapter folders: each one known to be wrong.

The oracle is the mutation itself: what is changed is always invalid, so every one must end with
exit code 2, at least one sentence on stderr, no traceback, and nothing on stdout. That the
unmutated originals are accepted is tested first, so that nothing else can be what is refused.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import inlay
from inlay.cli.main import main
from inlay.files import sha256_of
from inlay.methods.catalog import catalog
from inlay.model.load.folder import EMBEDDED
from inlay.run.config import RunConfig

CONFIGS, DATA_FILES, ADAPTERS = 550, 300, 250
"""How many of each are tried; together over a thousand."""
SEEDS = st.integers(0, 2**32 - 1).map(random.Random)
BUT = settings(
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def refused(words: list[str]) -> str:
    """Run a command line that must be refused; return what it says."""
    code, out, err = answer(words)
    assert code == 2, f"exit code {code} for {words}\nstdout: {out}\nstderr: {err}"
    assert out == "", f"refused, but wrote {out!r}"
    lines = err.splitlines()
    assert lines, "refused without a word"
    assert "Traceback" not in err
    assert "bug" not in err, err
    assert any(line.startswith("inlay: ") for line in lines), err
    return err


def answer(words: list[str]) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(words)
    return code, out.getvalue(), err.getvalue()


# Run files

RUN: dict[str, Any] = {
    "model": "pocket", "data": "reports", "output": "out", "method": "lora", "rank": 8,
    "alpha": 16.0, "dropout": 0.1, "epochs": 2, "batch_size": 4, "max_length": 128,
    "learning_rate": 1e-4, "split": [0.8, 0.1, 0.1], "targets": ["q_proj", "v_proj"],
    "packing": False, "seed": 3, "storage": "dense", "scheduler": "cosine", "eval_rows": 10,
}  # fmt: skip
KNOWN = set(RunConfig.model_fields) | {f for spec in catalog().values() for f in spec.fields}
WHOLE = ("rank", "batch_size", "max_length", "eval_rows", "seed")
NUMBERS = ("alpha", "dropout", "epochs", "learning_rate")
WORDS = ("model", "data", "output", "method")
CHOICES = ("storage", "scheduler")


def typo(run: dict[str, Any], r: random.Random) -> str:
    """A key with a letter dropped, doubled, swapped or replaced, that no method has."""
    key = r.choice(sorted(run))
    at = r.randrange(len(key))
    ways = [
        key[:at] + key[at + 1 :],
        key[:at] + key[at] + key[at:],
        key[:at] + r.choice("xqz") + key[at + 1 :],
        key[: at - 1] + key[at : at + 1] + key[at - 1 : at] + key[at + 1 :] if at else key + "s",
    ]
    wrong = r.choice(ways)
    if wrong in KNOWN or not wrong:
        wrong = key + "_"
    return yaml.safe_dump({(wrong if k == key else k): v for k, v in run.items()})


def wrong_type(run: dict[str, Any], r: random.Random) -> str:
    """A value of a type that the key never takes."""
    key = r.choice([*WHOLE, *NUMBERS, *WORDS, *CHOICES, "packing", "split"])
    values: list[Any] = [{"a": 1}, [[1]]]
    if key in WHOLE:
        values += [1.5, "four", True, None, float("nan"), "", [4]]
    elif key in NUMBERS:
        values += ["fast", True, None, [0.1], ""]
    elif key in WORDS:
        values += [3, 2.5, True, None, "", ["pocket"]]
    elif key in CHOICES:
        values += ["fp4", "Dense", 4, None, True, ""]
    elif key == "packing":
        values += ["maybe", 2, None, 0.0]
    else:
        values += ["0.8", 0.8, [0.8, 0.2], [0.8, 0.1, "x"], None, [True, 0.0, 0.0]]
    return yaml.safe_dump(run | {key: r.choice(values)})


def out_of_range(run: dict[str, Any], r: random.Random) -> str:
    """A number outside what the key takes."""
    key, value = r.choice(
        [
            ("epochs", 0), ("epochs", -1), ("epochs", float("inf")), ("epochs", float("nan")),
            ("batch_size", 0), ("batch_size", -4), ("max_length", 0), ("max_length", -1),
            ("learning_rate", 0), ("learning_rate", -1e-4), ("learning_rate", float("nan")),
            ("seed", -1), ("seed", 2**40), ("split", [0.8, 0.3, 0.1]), ("split", [2, -1, 0]),
            ("split", [0.0, 0.5, 0.5]), ("eval_rows", 0), ("warmup", -0.1), ("weight_decay", -1),
            ("max_grad_norm", 0), ("save_every", 0), ("log_every", 0), ("generate_rows", -1),
        ]
    )  # fmt: skip
    return yaml.safe_dump(run | {key: value})


def missing(run: dict[str, Any], r: random.Random) -> str:
    """Without a key that a run needs."""
    key = r.choice(["model", "data", "output"])
    return yaml.safe_dump({k: v for k, v in run.items() if k != key})


def foreign(run: dict[str, Any], r: random.Random) -> str:
    """A key of another method, of another tool, or made up; or a method there is not."""
    other, value = r.choice(
        [
            ("non_linearity_", "relu"), ("lora_r", 8), ("r", 8), ("lr", 1e-3), ("fp16", True),
            ("num_train_epochs", 3), ("deepspeed", "zero3.json"), ("method", "qlora"),
            ("method", "LoRA"), ("method", "lora "), ("hyperparameters", {"rnk": 3}),
            ("hyperparameters", [1]), ("hyperparameters", {"rank": 8}), ("hyperparameters", "x"),
        ]
    )  # fmt: skip
    return yaml.safe_dump(run | {other: value})


def contradictory(run: dict[str, Any], r: random.Random) -> str:
    """Keys that exclude each other."""
    pair = r.choice(
        [
            {"resume": True, "overwrite": True},
            {"text": "a", "prompt": "b", "completion": "c"},
            {"prompt": "b"},
            {"completion": "c"},
            {"format": "alpaca", "text": "a"},
        ]
    )
    return yaml.safe_dump(run | pair)


def twice(run: dict[str, Any], r: random.Random) -> str:
    """A key that stands twice."""
    key = r.choice(sorted(run))
    return yaml.safe_dump(run) + yaml.safe_dump({key: run[key]})


def broken_yaml(run: dict[str, Any], r: random.Random) -> str:
    """Text that is no YAML mapping."""
    text = yaml.safe_dump(run)
    lines = text.splitlines(keepends=True)
    at = r.randrange(len(lines) + 1)
    bad = r.choice(["\tx: [\n", "key: 'open\n", "{\n", "? [\n", "key: [1, 2\n", "a: b: c\n", "]\n"])
    return r.choice(["".join([*lines[:at], bad, *lines[at:]]), "- a\n- b\n", "just words\n", ""])


CONFIG_MUTATIONS: list[Callable[[dict[str, Any], random.Random], str]] = [
    typo, typo, wrong_type, wrong_type, out_of_range, missing, foreign, contradictory, twice,
    broken_yaml,
]  # fmt: skip


def test_the_unmutated_run_is_accepted(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(RUN))
    code, out, err = answer(["train", str(path), "--print-config"])
    assert (code, err) == (0, "")
    assert yaml.safe_load(out)["rank"] == 8


@settings(BUT, max_examples=CONFIGS)
@given(mutate=st.sampled_from(CONFIG_MUTATIONS), r=SEEDS)
def test_every_mutated_run_is_refused(
    tmp_path: Path,
    mutate: Callable[[dict[str, Any], random.Random], str],
    r: random.Random,
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(mutate(RUN, r), encoding="utf-8")
    refused(["train", str(path), "--print-config"])
    assert [p.name for p in tmp_path.iterdir()] == ["run.yaml"]


@settings(BUT, max_examples=60)
@given(r=SEEDS)
def test_a_run_file_that_is_not_utf8_is_refused(tmp_path: Path, r: random.Random) -> None:
    content = yaml.safe_dump(RUN).encode()
    at = r.randrange(len(content) + 1)
    path = tmp_path / "run.yaml"
    path.write_bytes(content[:at] + r.choice([b"\xff", b"\xc3(", b"\xed\xa0\x80"]) + content[at:])
    assert "UTF-8" in refused(["train", str(path), "--print-config"])


# Data files

ROWS = [
    {"prompt": f"Findings: finding number {i}.\nImpression:", "completion": f"Impression {i}."}
    for i in range(20)
]


def as_jsonl(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def as_csv(rows: list[dict[str, str]]) -> bytes:
    lines = ["prompt,completion", *(f'"{r["prompt"]}","{r["completion"]}"' for r in rows)]
    return ("\n".join(lines) + "\n").encode()


def without_field(r: random.Random) -> tuple[str, bytes]:
    at, key = r.randrange(20), r.choice(["prompt", "completion"])
    rows = [{k: v for k, v in row.items() if i != at or k != key} for i, row in enumerate(ROWS)]
    return "d.jsonl", as_jsonl(rows)


def misspelt_field(r: random.Random) -> tuple[str, bytes]:
    at = r.randrange(1, 20)
    rows: list[Any] = [dict(row) for row in ROWS]
    rows[at]["promt"] = rows[at].pop("prompt")
    return "d.jsonl", as_jsonl(rows)


def wrong_field(r: random.Random) -> tuple[str, bytes]:
    rows: list[Any] = [dict(row) for row in ROWS]
    key = r.choice(["prompt", "completion"])
    rows[r.randrange(20)][key] = r.choice(
        [None, 3, 2.5, True, [], ["a"], {}, {"a": "b"}, "", " \n"]
    )
    return "d.jsonl", as_jsonl(rows)


def wrong_row(r: random.Random) -> tuple[str, bytes]:
    rows: list[Any] = list(ROWS)
    rows[r.randrange(20)] = r.choice([None, 3, "text", [1, 2], [], True, [["prompt", "a"]]])
    return "d.jsonl", as_jsonl(rows)


def cut_row(r: random.Random) -> tuple[str, bytes]:
    lines = as_jsonl(ROWS).splitlines(keepends=True)
    at = r.randrange(20)
    lines[at] = lines[at][: r.randrange(1, len(lines[at]) - 2)] + b"\n"
    return "d.jsonl", b"".join(lines)


def cut_list(r: random.Random) -> tuple[str, bytes]:
    content = json.dumps(ROWS, indent=1).encode()
    return "d.json", content[: r.randrange(1, len(content) - 1)]


def bad_utf8(r: random.Random) -> tuple[str, bytes]:
    name, content = r.choice([("d.jsonl", as_jsonl(ROWS)), ("d.csv", as_csv(ROWS))])
    at = r.randrange(len(content) + 1)
    return name, content[:at] + r.choice([b"\xff", b"\xc3(", b"\xed\xa0\x80"]) + content[at:]


def nothing(r: random.Random) -> tuple[str, bytes]:
    return r.choice(
        [
            ("d.jsonl", b""), ("d.jsonl", b"\n\n \n"), ("d.csv", b""), ("d.csv", b"\n"),
            ("d.csv", b"prompt,completion\n"), ("d.json", b""), ("d.json", b"[]"),
            ("d.parquet", b""), ("d.parquet", b"PAR1"), ("d.parquet", as_csv(ROWS)),
            ("d.json", as_jsonl(ROWS)), ("d.json", b'{"prompt": "a", "completion": "b"}'),
            ("d.txt", as_jsonl(ROWS)), ("d.pkl", b"\x80\x04."), ("d.jsonl", as_csv(ROWS)),
        ]
    )  # fmt: skip


def wrong_columns(r: random.Random) -> tuple[str, bytes]:
    lines = as_csv(ROWS).decode().split("\n")
    at = r.randrange(1, 41)
    return r.choice(
        [
            ("d.csv", as_csv(ROWS).replace(b"prompt,completion", b"prompt,prompt")),
            ("d.csv", as_csv(ROWS).replace(b"prompt,completion", b"question,reply")),
            ("d.csv", as_csv(ROWS).replace(b"prompt,completion", b"prompt,")),
            ("d.csv", as_csv(ROWS).replace(b"prompt,completion", b"prompt,completion,more")),
            ("d.csv", "\n".join([*lines[:1], "only one field", *lines[1:]]).encode()),
            ("d.csv", "\n".join([*lines[:1], "a,b,c", *lines[1:]]).encode()),
            ("d.csv", "\n".join([*lines[: at * 2 % 40 + 1], '"open', *lines[41:]]).encode()),
        ]
    )


def twice_a_key(r: random.Random) -> tuple[str, bytes]:
    lines = as_jsonl(ROWS).splitlines(keepends=True)
    lines[r.randrange(20)] = b'{"prompt": "a", "prompt": "b", "completion": "c"}\n'
    return "d.jsonl", b"".join(lines)


def all_masked(r: random.Random) -> tuple[str, bytes]:
    rows: list[Any] = [dict(row) for row in ROWS]
    rows[r.randrange(20)]["prompt"] = "a long finding " * 60
    return "d.jsonl", as_jsonl(rows)


DATA_MUTATIONS: list[Callable[[random.Random], tuple[str, bytes]]] = [
    without_field, misspelt_field, wrong_field, wrong_row, cut_row, cut_list, bad_utf8, nothing,
    wrong_columns, twice_a_key, all_masked,
]  # fmt: skip
NAMES_A_LINE = (without_field, misspelt_field, wrong_field, wrong_row, cut_row, bad_utf8)


@pytest.mark.parametrize(
    ("name", "content"),
    [("d.jsonl", as_jsonl(ROWS)), ("d.csv", as_csv(ROWS)), ("d.json", json.dumps(ROWS).encode())],
)
def test_the_unmutated_data_are_accepted(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    code, out, err = answer(data_line(path))
    assert (code, err) == (0, "")
    assert sum(part["rows"] for part in json.loads(out)["parts"].values()) == 20


@settings(BUT, max_examples=DATA_FILES)
@given(mutate=st.sampled_from(DATA_MUTATIONS), r=SEEDS)
def test_every_mutated_data_file_is_refused(
    tmp_path: Path, mutate: Callable[[random.Random], tuple[str, bytes]], r: random.Random
) -> None:
    name, content = mutate(r)
    path = tmp_path / name
    path.write_bytes(content)
    try:
        err = refused(data_line(path))
    finally:
        path.unlink()
    assert name in err
    assert mutate not in NAMES_A_LINE or "line " in err


def data_line(path: Path) -> list[str]:
    return ["data", "--data", str(path), "--model", "pocket", "--max-length", "128", "--json"]


# Adapter folders


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with pocket's tokenizer."""
    return tiny_model(tmp_path_factory.mktemp("base"), hidden=16, layers=2)


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Models that the adapter was not made for: of other widths, depths and values."""
    make = tmp_path_factory.mktemp
    return [
        tiny_model(make("wide"), hidden=32, layers=2),
        tiny_model(make("shallow"), hidden=16, layers=1),
        tiny_model(make("deep"), hidden=16, layers=3),
    ]


def tiny_model(folder: Path, hidden: int, layers: int) -> Path:
    torch.manual_seed(0)
    vocabulary = json.loads((EMBEDDED["pocket"] / "config.json").read_text())["vocab_size"]
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=24, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
        tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EMBEDDED["pocket"] / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter of the tiny model, with values that are not zero."""
    model, _ = inlay.load(str(base))
    inlay.attach(model, inlay.LoRA(rank=2, alpha=4), targets=["q_proj", "down_proj"])
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_()
    return inlay.save_adapter(model, tmp_path_factory.mktemp("adapter") / "adapter")


def as_new(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write tensors as if they had been saved so: the recorded hash fits."""
    path = folder / "adapter_model.safetensors"
    save_file(tensors, path)
    extras = json.loads((folder / "inlay.json").read_text())
    extras["files"][path.name] = sha256_of(path)
    (folder / "inlay.json").write_text(json.dumps(extras))


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def flipped(folder: Path, r: random.Random) -> None:
    path = folder / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[r.randrange(len(content))] ^= 1 << r.randrange(8)
    path.write_bytes(content)


def truncated(folder: Path, r: random.Random) -> None:
    path = folder / r.choice(["adapter_model.safetensors", "adapter_config.json", "inlay.json"])
    content = path.read_bytes().rstrip()
    path.write_bytes(content[: r.randrange(len(content))])


def flipped_without_a_record(folder: Path, r: random.Random) -> None:
    (folder / "inlay.json").unlink()
    path = folder / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[:8] = struct.pack("<Q", r.choice([0, 1, 7, 2**20, 2**40, 2**63]))
    path.write_bytes(content)


def removed(folder: Path, r: random.Random) -> None:
    (folder / r.choice(["adapter_model.safetensors", "adapter_config.json"])).unlink()


def renamed_tensor(folder: Path, r: random.Random) -> None:
    tensors = tensors_of(folder)
    name = r.choice(sorted(tensors))
    new = r.choice(
        [
            name + "x",
            name.replace("layers.0", "layers.9") + "_",
            "q_proj",
            "transformer." + name[17:],
        ]
    )
    tensors[new] = tensors.pop(name)
    recorded_or_not(folder, tensors, r)


def dropped_tensor(folder: Path, r: random.Random) -> None:
    tensors = tensors_of(folder)
    del tensors[r.choice(sorted(tensors))]
    recorded_or_not(folder, tensors, r)


def extra_tensor(folder: Path, r: random.Random) -> None:
    tensors = tensors_of(folder)
    name = r.choice(sorted(tensors))
    tensors[r.choice(["stray", name.replace("lora_A", "lora_C"), name + ".scale"])] = torch.ones(2)
    if len(tensors) == len(tensors_of(folder)):
        tensors["stray"] = torch.ones(2)
    recorded_or_not(folder, tensors, r)


def reshaped_tensor(folder: Path, r: random.Random) -> None:
    tensors = tensors_of(folder)
    name = r.choice(sorted(tensors))
    t = tensors[name]
    shapes = [
        t.T.contiguous(),
        t[:1].clone(),
        torch.cat([t, t]),
        t.flatten(),
        t[None],
        t[:, :1].clone(),
    ]
    tensors[name] = r.choice([s for s in shapes if s.shape != t.shape])
    recorded_or_not(folder, tensors, r)


def not_finite(folder: Path, r: random.Random) -> None:
    tensors = tensors_of(folder)
    t = tensors[r.choice(sorted(tensors))]
    t.view(-1)[r.randrange(t.numel())] = r.choice([float("nan"), float("inf"), -float("inf")])
    recorded_or_not(folder, tensors, r)


def recorded_or_not(folder: Path, tensors: dict[str, torch.Tensor], r: random.Random) -> None:
    """Write the tensors as Inlay would have, or as a plain HF PEFT folder."""
    as_new(folder, tensors)
    if r.random() < 0.5:
        (folder / "inlay.json").unlink()


def changed_config(folder: Path, r: random.Random) -> None:
    """A plain HF PEFT folder with a configuration that does not fit its tensors, or is wrong."""
    (folder / "inlay.json").unlink()
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    key, value = r.choice(
        [
            ("r", 1), ("r", 4), ("r", 0), ("r", -2), ("r", "2"), ("r", 2.5), ("r", None), ("r", []),
            ("peft_type", "LOHA"), ("peft_type", "lora"), ("peft_type", None), ("peft_type", 3),
            ("target_modules", ["q_proj"]), ("target_modules", ["q_proj", "up_proj"]),
            ("target_modules", ["nowhere"]), ("target_modules", 3), ("target_modules", [3]),
            ("target_modules", "(["), ("lora_alpha", "4"), ("lora_alpha", None),
            ("lora_alpha", -1), ("lora_alpha", []), ("lora_dropout", 2), ("lora_dropout", "x"),
            ("bias", "some"), ("bias", 3), ("use_dora", True), ("rank_pattern", {"q_proj": 1}),
            ("rank_pattern", {"q_proj": "x"}), ("rank_pattern", 3), ("use_rslora", "yes"),
            ("layers_to_transform", [7]), ("modules_to_save", ["nothing"]),
            ("base_model_name_or_path", None), ("base_model_name_or_path", "no/where/else"),
            ("layer_replication", [[0, 2]]), ("made_up", 3), ("use_bdlora", {"a": 1}),
        ]
    )  # fmt: skip
    config[key] = value
    path.write_text(json.dumps(config))


def changed_record(folder: Path, r: random.Random) -> None:
    path = folder / "inlay.json"
    record = json.loads(path.read_text())
    change: dict[str, Any] = r.choice(
        [
            {"format": 99}, {"format": "1"}, {"format": None}, {"files": {}}, {"files": None},
            {"files": {"adapter_model.safetensors": "0" * 64}}, {"method": "nothing"},
            {"method": None}, {"method": "ia3"}, {"hyperparameters": None},
            {"hyperparameters": {"rank": 3}}, {"hyperparameters": {"rnk": 2}},
            {"hyperparameters": {"rank": "2"}}, {"placement": None}, {"placement": {"x": 1}},
            {"placement": {"targets": ["nowhere"]}}, {"placement": {"targets": ["q_proj"]}},
        ]
    )  # fmt: skip
    path.write_text(json.dumps(record | change))


def not_json(folder: Path, r: random.Random) -> None:
    path = folder / r.choice(["adapter_config.json", "inlay.json"])
    bad = [b"", b"[]", b"3", b"null", b"\xff\xfe", b"{", b"{'r': 2}", b'"LORA"', b"[" * 9000]
    path.write_bytes(r.choice(bad))


def pickled(folder: Path, r: random.Random) -> None:
    weights = folder / "adapter_model.safetensors"
    tensors = tensors_of(folder)
    weights.unlink()
    if r.random() < 0.5:
        torch.save(tensors, folder / "adapter_model.bin")
    else:
        torch.save(tensors, weights, _use_new_zipfile_serialization=r.random() < 0.5)
        if r.random() < 0.5:
            (folder / "inlay.json").unlink()


ADAPTER_MUTATIONS: list[Callable[[Path, random.Random], None]] = [
    flipped, truncated, flipped_without_a_record, removed, renamed_tensor, dropped_tensor,
    extra_tensor, reshaped_tensor, not_finite, changed_config, changed_config, changed_config,
    changed_record, not_json, pickled,
]  # fmt: skip


def generate_line(folder: Path) -> list[str]:
    return ["generate", "--adapter", str(folder), "--prompt", "The", "--generate-tokens", "1"]


def test_the_unmutated_adapter_is_accepted(adapter: Path, tmp_path: Path) -> None:
    code, out, err = answer(generate_line(adapter))
    assert (code, err) == (0, "")
    assert out
    plain = copied(adapter, tmp_path / "plain")
    (plain / "inlay.json").unlink()
    assert answer(generate_line(plain)) == (0, out, "")


@pytest.mark.slow
@settings(BUT, max_examples=ADAPTERS)
@given(mutate=st.sampled_from(ADAPTER_MUTATIONS), r=SEEDS)
def test_every_mutated_adapter_is_refused(
    adapter: Path,
    tmp_path: Path,
    mutate: Callable[[Path, random.Random], None],
    r: random.Random,
) -> None:
    folder = copied(adapter, tmp_path / "adapter")
    mutate(folder, r)
    before = contents(tmp_path)
    refused(generate_line(folder))
    assert contents(tmp_path) == before


def test_an_adapter_for_another_base_is_refused(
    adapter: Path, others: list[Path], tmp_path: Path
) -> None:
    for number, other in enumerate(others):
        folder = copied(adapter, tmp_path / str(number))
        for name in ("adapter_config.json", "inlay.json"):
            config = json.loads((folder / name).read_text())
            if name == "inlay.json":
                config["base"]["model"] = str(other)
            else:
                config["base_model_name_or_path"] = str(other)
            (folder / name).write_text(json.dumps(config))
        refused(generate_line(folder))
        (folder / "inlay.json").unlink()
        if number != 2:  # without a record, HF PEFT's layout fits a base with more layers alike
            refused(generate_line(folder))


def copied(folder: Path, to: Path) -> Path:
    shutil.rmtree(to, ignore_errors=True)
    return Path(shutil.copytree(folder, to))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(walk(folder)) if p.is_file()}


def walk(folder: Path) -> Iterator[Path]:
    return folder.rglob("*")
