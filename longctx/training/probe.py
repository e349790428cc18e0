"""The probe: a small Llama with ordinary rotary attention in every layer, to tell good KV from bad.

It is a plain language model of code and documentation. Two sequences in five repeat themselves,
random tokens and text, so that it learns to copy from far back and a damaged cache shows.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

from longctx.embedded import model_path
from longctx.engine_info import Damage
from longctx.quality.damage import DamageMeter, compare
from longctx.training import corpus
from longctx.training.loop import Trainee, computes_in_half, save_checkpoint
from longctx.training.rounding import ROUNDINGS
from longctx.training.tokenizer import BOS, EOS, PAD, SPECIALS

SEQUENCE_TOKENS = 384
ROWS = 5
MAX_TOKENS = 4096


def probe_config(vocabulary: int = 2048) -> LlamaConfig:
    """1.25M parameters; grouped-query attention with heads of 64, as in models people serve."""
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=MAX_TOKENS,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        pad_token_id=SPECIALS.index(PAD),
        bos_token_id=SPECIALS.index(BOS),
        eos_token_id=SPECIALS.index(EOS),
    )


def new_probe(seed: int) -> LlamaForCausalLM:
    """Make a model with random weights, whose layers add little at first."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(probe_config())
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2 and "embed" not in name:
                nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    weight.mul_(0.3)
        model.model.embed_tokens.weight.normal_(std=0.05)
    return model


def batch(text: np.ndarray, seed: int, step: int) -> tuple[Tensor, list[int]]:
    """Make token ids [ROWS, SEQUENCE_TOKENS + 1], and the periods of the first two rows.

    These two repeat: the first is random tokens, the second text. Half of all text rows start
    with `<s>`.
    """
    rng = np.random.default_rng([seed, step])
    rows = np.zeros((ROWS, SEQUENCE_TOKENS + 1), np.int64)
    for row in rows:
        start = int(rng.integers(len(text) - len(row)))
        row[:] = text[start : start + len(row)]
        if rng.random() < 0.5:
            row[0] = SPECIALS.index(BOS)
    periods = [int(period) for period in rng.integers(8, SEQUENCE_TOKENS // 3, 2)]
    rows[0] = np.resize(rng.integers(len(SPECIALS), 2048, periods[0]), SEQUENCE_TOKENS + 1)
    rows[1] = np.resize(rows[1, : periods[1]].copy(), SEQUENCE_TOKENS + 1)
    return torch.from_numpy(rows), periods


def rate_at(step: int, steps: int) -> float:
    """Compute the multiplier of the learning rate: warm-up, constant, then a straight decay."""
    return min(1.0, (step + 1) / 60, max(0.01, (steps - step) / (0.4 * steps)))


def train_probe(args: argparse.Namespace, text: np.ndarray) -> None:
    """Train or resume probe; writes `probe.pt` into the work folder."""
    model = new_probe(args.seed).to(args.device)
    trainee = Trainee(model, adam_rate=4e-3, average_decay=0.99, rate=args.rate)
    checkpoint = args.work / "probe.pt"
    step = 0
    if checkpoint.exists():
        state: dict[str, Any] = torch.load(checkpoint, weights_only=False, map_location=args.device)
        trainee.load_state(state)
        step = state["step"]
    losses: list[tuple[float, float]] = []  # of text, and of copying
    begun = time.monotonic()
    while step < args.steps:
        trainee.set_rates(rate_at(step, args.steps))
        each = _token_losses(model, *batch(text, args.seed, step), args.device)
        trainee.descend(each.mean(), step)
        losses.append((float(each[2:].detach().mean()), float(each[0, -100:].detach().mean())))
        step += 1
        if step % 50 == 0:
            prose, copied = np.mean(losses, axis=0)
            seconds = (time.monotonic() - begun) / len(losses)
            print(f"step {step} text {prose:.3f} copying {copied:.3f} {seconds:.3f} s", flush=True)
            losses, begun = [], time.monotonic()
        if step % args.save_every == 0 or step == args.steps:
            save_checkpoint(trainee.state() | {"step": step}, checkpoint)


def _token_losses(model: LlamaForCausalLM, ids: Tensor, periods: list[int], device: str) -> Tensor:
    """Nats [ROWS, SEQUENCE_TOKENS] of each next token; 0 where nobody could know it."""
    ids = ids.to(device)
    with torch.autocast(device, torch.bfloat16, enabled=computes_in_half(device)):
        logits = model(ids[:, :-1], use_cache=False).logits
    each = F.cross_entropy(logits.float().transpose(1, 2), ids[:, 1:], reduction="none")
    can_know = torch.ones_like(each)
    for row, period in enumerate(periods):
        can_know[row, :period] = 0.0  # what repeats later is not known the first time
    return each * can_know


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeScore:
    """Bits per character of unseen text, and nats per token of a random sequence seen again."""

    bits_per_character: float
    repeated_nats: float
    first_nats: float
    tokens: int


@torch.no_grad()
def score(folder: Path, *, rows: int = 64, tokens: int = 512) -> ProbeScore:
    """Score a folder on Python's standard library, which training never reads."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = corpus.stdlib_text(1, rows * tokens * 4)
    encoding = tokenizer.encode(text, add_special_tokens=False)
    nats, characters = 0.0, 0
    for row in range(rows):
        span = slice(row * tokens, (row + 1) * tokens)
        ids = torch.tensor([[SPECIALS.index(BOS), *encoding.ids[span]]])
        offsets = encoding.offsets[span]
        nats += float(F.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="sum"))
        characters += offsets[-1][1] - offsets[0][0]
    generator = torch.Generator().manual_seed(5)
    once = torch.randint(len(SPECIALS), 2048, (8, 128), generator=generator)
    twice = torch.cat((once, once), dim=1)
    each = F.cross_entropy(model(twice[:, :-1]).logits.mT, twice[:, 1:], reduction="none")
    return ProbeScore(
        bits_per_character=nats / math.log(2) / characters,
        repeated_nats=float(each[:, 132:].mean()),
        first_nats=float(each[:, :120].mean()),
        tokens=rows * tokens,
    )


@torch.no_grad()
def damage(folder: Path, *, rows: int = 24, tokens: int = 512) -> dict[str, Damage]:
    """Measure the damage of int8, int4 and a bad 2-bit codec on unseen text.

    Unlike the quality gate this needs no engine, and it rounds a row's own block too.
    """
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    count = rows * tokens + 1
    ids = tokenizer.encode(corpus.stdlib_text(2, 4 * count), add_special_tokens=False).ids
    inputs = torch.tensor(ids[: rows * tokens]).view(rows, tokens)
    targets = torch.tensor(ids[1:count]).view(rows, tokens)
    inputs[:, 0] = SPECIALS.index(BOS)
    exact = _logits(folder, "raw", inputs)
    meters = {codec: DamageMeter() for codec in ("int8", "int4", "int2")}
    for codec, meter in meters.items():
        for of_row in zip(exact, _logits(folder, codec, inputs), targets, strict=True):
            meter.add(compare(*of_row))
    found = {codec: meter.damage() for codec, meter in meters.items()}
    return {codec: each for codec, each in found.items() if each is not None}


def _logits(folder: Path, codec: str, inputs: Tensor) -> Tensor:
    """Compute logits [rows, tokens, vocabulary] with every key and value rounded by `codec`."""

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **options: Any
    ) -> tuple[Tensor, None]:
        key, value = ROUNDINGS[codec](key, value)
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register(f"rounded_{codec}", attend)
    model = LlamaForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=f"rounded_{codec}"
    )
    return torch.cat([model(row[None]).logits for row in inputs])


if __name__ == "__main__":
    probe = model_path("probe")
    print(score(probe))
    for codec, cost in damage(probe).items():
        print(codec, cost)
