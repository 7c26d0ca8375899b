"""Measure the pocket model on the documents held out, and draw samples.

    python examples/pocket/evaluate.py --work /tmp/pocket --model src/inlay/model/pocket

Prints and writes ``result.json`` beside this script: bits per byte of the model, of a uniform
and of a unigram model over the same tokens, the sources, and three samples. Needs what
``corpus.py`` and ``train.py`` left below ``--work``.
"""

import argparse
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerFast as Coder

PROMPTS = [
    ("It was a fine morning in the spring, and", False),
    ("The server must be started before", False),
    ("Tom has 3 apples and buys 4 more. How many apples does he have?", True),
]
SETTINGS = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "max_new_tokens": 80}
SAMPLE_SEED = 1


def read_split(path: Path) -> list[dict[str, str]]:
    """The documents of a split, those with chat marks left out."""
    rows = [json.loads(line) for line in path.open()]
    return [row for row in rows if "<|" not in row["text"]]


def encode(coder: Coder, text: str) -> Tensor:
    """A document's tokens between two end tokens: the first is context, the last is predicted."""
    end = coder.eos_token_id
    return torch.tensor([end, *coder(text, verbose=False)["input_ids"], end])


@torch.inference_mode()
def model_bits(model: PreTrainedModel, tokens: Tensor, window: int) -> float:
    """Bits the model spends on a document, read in separate windows."""
    nats = 0.0
    for at in range(0, len(tokens) - 1, window):
        part = tokens[at : at + window + 1]
        logits = model(input_ids=part[None, :-1], use_cache=False).logits[0]
        nats += cross_entropy(logits.float(), part[1:], reduction="sum").item()
    return nats / math.log(2)


def unigram_costs(tokens: np.ndarray, size: int) -> Tensor:
    """Bits of every token under its add-one smoothed share of the training text."""
    counts = torch.from_numpy(np.bincount(tokens, minlength=size)).double() + 1
    return -torch.log2(counts / counts.sum())


def measure(model: PreTrainedModel, coder: Coder, rows: list[dict], train: np.ndarray) -> dict:
    """Bits per byte of the three models, in all and, for the trained one, by source."""
    costs = unigram_costs(train, len(coder))
    size, count = Counter[str](), Counter[str]()
    bits = Counter[str]()
    unigram = short = 0.0
    for row in rows:
        tokens, source = encode(coder, row["text"]), row["source"]
        size[source] += len(row["text"].encode())
        count[source] += len(tokens) - 1
        bits[source] += model_bits(model, tokens, model.config.max_position_embeddings)
        short += model_bits(model, tokens, 512)
        unigram += costs[tokens[1:]].sum().item()
    total = sum(size.values())
    return {
        "documents": len(rows),
        "bytes": total,
        "tokens": sum(count.values()),
        "bits_per_byte": {
            "model": round(sum(bits.values()) / total, 4),
            "model_windows_of_512": round(short / total, 4),
            "unigram_tokens": round(unigram / total, 4),
            "uniform_tokens": round(sum(count.values()) * math.log2(len(coder)) / total, 4),
            "uniform_bytes": 8.0,
        },
        "bytes_by_source": dict(sorted(size.items())),
        "by_source": {name: round(bits[name] / size[name], 4) for name in sorted(size)},
    }


def samples(model: PreTrainedModel, coder: Coder) -> list[dict[str, str]]:
    """What the model writes after each prompt."""
    drawn = []
    for prompt, chat in PROMPTS:
        text = prompt
        if chat:
            turn = [{"role": "user", "content": prompt}]
            text = coder.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        start = coder(text, return_tensors="pt")
        torch.manual_seed(SAMPLE_SEED)
        written = model.generate(**start, **SETTINGS)[0, start["input_ids"].shape[1] :]
        drawn.append({"prompt": text, "text": coder.decode(written, skip_special_tokens=True)})
    return drawn


def source_table(work: Path, tokens: np.ndarray, training: dict) -> list[dict]:
    """The table of sources with each one's training tokens, and how many of them were read."""
    names = [json.loads(line)["source"] for line in (work / "train.jsonl").open()]
    ends = np.flatnonzero(tokens == 0) + 1
    whole, once = Counter[str](), Counter[str]()
    order = np.random.default_rng(training["seed"]).permutation(len(names))
    for at, first, last in zip(order, [0, *ends[:-1]], ends, strict=True):
        whole[names[at]] += int(last - first)
        once[names[at]] += int(max(0, min(last, training["tokens"] % len(tokens)) - first))
    passes = training["tokens"] // len(tokens)
    return [
        row | {"train_tokens": whole[name], "read_tokens": passes * whole[name] + once[name]}
        for row in json.loads((work / "sources.json").read_text())
        for name in [row["source"]]
    ]


def main() -> None:
    """Measure, sample, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("result.json"))
    parser.add_argument("--limit", type=int, help="measure on so many documents only")
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    coder = AutoTokenizer.from_pretrained(args.model)
    rows = read_split(args.work / "valid.jsonl")[: args.limit]
    tokens = np.load(args.work / "tokens.npy")
    training = json.loads((args.work / "training.json").read_text())
    result = {
        "parameters": model.num_parameters(),
        "file_bytes": (args.model / "model.safetensors").stat().st_size,
        "training": training,
        "held_out": measure(model, coder, rows, tokens),
        "sample_settings": SETTINGS | {"seed": SAMPLE_SEED},
        "samples": samples(model, coder),
        "sources": source_table(args.work, tokens, training),
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["held_out"], indent=1))


if __name__ == "__main__":
    main()
