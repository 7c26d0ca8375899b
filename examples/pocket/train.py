"""Train the pocket model on the CPU with Muon and AdamW.

    python examples/pocket/train.py --work /tmp/pocket --out src/inlay/model/pocket --minutes 45

The learning rate follows the share of ``--minutes`` (or of ``--steps``, which can be repeated
exactly) that is spent: a short warm-up, a plateau, then a linear fall to nothing. The last part
reads windows of 1024 tokens instead of 512. ``--resume`` goes on from the last checkpoint.
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

SEED = 20
TOKENS_PER_STEP, TOKENS_PER_PART = 8192, 4096
WARM, FALL, LONG = 0.02, 0.55, 0.93
MUON_RATE, ADAM_RATE = 0.02, 0.004


def load_tokens(work: Path, tokenizer: Path) -> Tensor:
    """The training documents in random order, each closed by the end token; kept on disk."""
    stored = work / "tokens.npy"
    if not stored.exists():
        coder = AutoTokenizer.from_pretrained(tokenizer)
        texts = [json.loads(line)["text"] for line in (work / "train.jsonl").open()]
        order = np.random.default_rng(SEED).permutation(len(texts))
        rows = coder([texts[i] for i in order], verbose=False)["input_ids"]
        np.save(stored, np.concatenate([np.array([*r, coder.eos_token_id], "u2") for r in rows]))
    return torch.from_numpy(np.load(stored).astype(np.int64))


def windows(tokens: Tensor, length: int, first: int) -> tuple[Tensor, Tensor]:
    """One step's windows and their next tokens, from token ``first`` of the endless stream."""
    at = torch.arange(first, first + TOKENS_PER_STEP + 1) % len(tokens)
    return tokens[at[:-1]].view(-1, length), tokens[at[1:]].view(-1, length)


def build(vocabulary: int) -> LlamaForCausalLM:
    """The untrained model."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
    )
    torch.manual_seed(SEED)
    return LlamaForCausalLM(config)


class Trainer:
    """fp32 weights with optimizers, and a bf16 copy of the hidden matrices that computes."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        self.model = model
        self.master = {n: p.detach().clone() for n, p in model.named_parameters()}
        model.model.layers.bfloat16()
        hidden = [p for p in self.master.values() if p.ndim == 2 and p is not self.table]
        gains = [p for p in self.master.values() if p.ndim == 1]
        self.muon = torch.optim.Muon(hidden, lr=MUON_RATE, momentum=0.95, weight_decay=0.05)
        self.adam = torch.optim.AdamW(
            [{"params": [self.table], "weight_decay": 0.01}, {"params": gains, "weight_decay": 0}],
            lr=ADAM_RATE,
            betas=(0.9, 0.95),
        )
        self.forward = torch.compile(self.loss, dynamic=False)

    @property
    def table(self) -> Tensor:
        """The tied embedding."""
        return self.master["model.embed_tokens.weight"]

    def loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        """A part's share of the mean next-token loss of one step."""
        table = self.model.model.embed_tokens.weight
        state = self.model.model(
            inputs_embeds=table[ids].bfloat16(), use_cache=False
        ).last_hidden_state
        logits = state.bfloat16() @ table.bfloat16().T
        total = cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum")
        return total / TOKENS_PER_STEP

    def step(self, ids: Tensor, targets: Tensor, rate: float) -> float:
        """One update at a share ``rate`` of the full learning rates."""
        loss = 0.0
        rows = TOKENS_PER_PART // ids.shape[1]
        for part, target in zip(ids.split(rows), targets.split(rows), strict=True):
            share = self.forward(part, target)
            share.backward()
            loss += share.item()
        for name, weight in self.model.named_parameters():
            self.master[name].grad = weight.grad.float()
            weight.grad = None
        torch.nn.utils.clip_grad_norm_([self.table], 1.0)
        for optimizer, full in ((self.muon, MUON_RATE), (self.adam, ADAM_RATE)):
            for group in optimizer.param_groups:
                group["lr"] = full * rate
            optimizer.step()
        self.copy_back()
        return loss

    @torch.no_grad()
    def copy_back(self) -> None:
        """Bring the computing weights up to date."""
        for name, weight in self.model.named_parameters():
            weight.copy_(self.master[name])

    def state(self) -> dict:
        """What a resumed run needs."""
        return {
            "master": self.master,
            "muon": self.muon.state_dict(),
            "adam": self.adam.state_dict(),
        }

    def restore(self, state: dict) -> None:
        """Take up a saved state."""
        for name, weight in state["master"].items():
            self.master[name].copy_(weight)
        self.muon.load_state_dict(state["muon"])
        self.adam.load_state_dict(state["adam"])
        self.copy_back()


def rate_at(progress: float) -> float:
    """Warm-up, plateau, linear fall to zero."""
    return min(1.0, progress / WARM + 0.01, max(0.0, (1 - progress) / (1 - FALL)))


def save(path: Path, content: dict) -> None:
    """Write a checkpoint so that a crash leaves either the old or the new one."""
    torch.save(content, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


def export(trainer: Trainer, out: Path) -> None:
    """Write the model as transformers reads it, in bf16."""
    model = build(trainer.table.shape[0]).bfloat16()
    model.load_state_dict(trainer.master, strict=False)
    model.tie_weights()
    model.generation_config = GenerationConfig(eos_token_id=0, pad_token_id=1)
    model.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)


def main() -> None:
    """Train, saving every few minutes, and export."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="holds the tokenizer already")
    parser.add_argument("--minutes", type=float, default=45.0)
    parser.add_argument("--steps", type=int, help="train for so many steps instead")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tokens = load_tokens(args.work, args.out)
    trainer, checkpoint = Trainer(build(4096)), args.work / "checkpoint.pt"
    before = (0, 0.0)
    if args.resume and checkpoint.exists():
        saved = torch.load(checkpoint)
        trainer.restore(saved["trainer"])
        before = (saved["steps"], saved["seconds"])
    for done, loss, spent, last in train(trainer, tokens, args, *before):
        if done % 20 == 0:
            speed = TOKENS_PER_STEP * done / spent
            print(f"{done} {spent:.0f}s loss {loss:.3f} {speed:.0f} tokens/s", flush=True)
        if done % 100 == 0 or last:
            content = {"trainer": trainer.state(), "steps": done, "seconds": spent}
            save(checkpoint, content)
        if last or done in {300, 900, 1500}:
            export(trainer, args.out)
    facts = {"seed": SEED, "steps": done, "seconds": round(spent), "threads": args.threads}
    facts |= {"tokens": done * TOKENS_PER_STEP, "corpus_tokens": len(tokens)}
    (args.work / "training.json").write_text(json.dumps(facts, indent=1) + "\n")


def train(
    trainer: Trainer, tokens: Tensor, args: argparse.Namespace, done: int, spent: float
) -> Iterator[tuple[int, float, float, bool]]:
    """Steps until the budget is spent: (steps, loss, seconds, whether it was the last)."""
    begun = time.monotonic() - spent
    last = False
    while not last:
        progress = done / args.steps if args.steps else spent / (60 * args.minutes)
        pair = windows(tokens, 1024 if progress > LONG else 512, done * TOKENS_PER_STEP)
        loss = trainer.step(*pair, rate_at(progress))
        done, spent = done + 1, time.monotonic() - begun
        last = done >= args.steps if args.steps else spent >= 60 * args.minutes
        yield done, loss, spent, last


if __name__ == "__main__":
    main()
