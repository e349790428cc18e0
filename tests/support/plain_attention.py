"""Computes attention as plainly as can be, and compares a loaded model with eager.

Everything is float32 and dense; the loop over sequences is what packing must equal.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from longctx.config import ModelConfig
from longctx.model.layer_attention import AttentionCall
from longctx.model.loader import LoadedModel, load_model
from longctx.model.spec import LayerSpec
from tests.support.tiny_models import VOCAB_SIZE

LENGTHS = (80, 23, 1, 40)  # packed; the longest exceeds the windows and the original contexts


class PlainAttention:
    """Attends within `lengths` packed sequences, in float32, by one loop over the sequences."""

    def __init__(self, layers: Sequence[LayerSpec], lengths: list[int]) -> None:
        self._layers = layers
        self._lengths = lengths
        self.calls: list[int] = []

    def place(self, layer: int) -> None:
        return None

    def by_kernels(self) -> None:
        return None

    def attend(self, call: AttentionCall, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        self.calls.append(call.layer)
        spec = self._layers[call.layer]
        group = spec.heads // spec.kv_heads
        outs = []
        for q, k, v in zip(
            *(torch.split(x.float(), self._lengths) for x in (query, key, value)), strict=True
        ):
            k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
            scores = torch.einsum("qhd,khd->hqk", q, k) * call.scaling
            if call.softcap is not None:
                scores = call.softcap * torch.tanh(scores / call.softcap)
            at = torch.arange(len(q))
            hidden = at[None] > at[:, None]
            if spec.window is not None:
                hidden = hidden | (at[None] <= at[:, None] - spec.window)
            scores = scores.masked_fill(hidden, float("-inf"))
            if call.sinks is not None:
                column = call.sinks.float()[:, None, None].expand(-1, len(q), 1)
                scores = torch.cat([scores, column], dim=-1)
            weights = torch.softmax(scores, dim=-1)[..., : len(q)]
            outs.append(torch.einsum("hqk,khd->qhd", weights, v))
        return torch.cat(outs).to(query.dtype)


def some_tokens(length: int, seed: int) -> Tensor:
    return torch.randint(3, VOCAB_SIZE, (length,), generator=torch.Generator().manual_seed(seed))


def packed_logits(model: LoadedModel, sequences: Sequence[Tensor]) -> list[Tensor]:
    lengths = [len(tokens) for tokens in sequences]
    positions = torch.cat([torch.arange(length) for length in lengths])
    logits = model.forward(
        torch.cat(list(sequences)),
        positions,
        PlainAttention(model.spec.layers, lengths),
        torch.arange(sum(lengths)),
    )
    return list(torch.split(logits, lengths))


def eager_logits(folder: Path, tokens: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=dtype
    )
    model.eval()
    with torch.inference_mode():
        logits: Tensor = model(tokens[None], use_cache=False).logits[0]
    return logits


def load(folder: Path, **options: Any) -> LoadedModel:
    return load_model(ModelConfig(**options), folder)


def edit_config(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def assert_equal_to_eager(
    folder: Path, model: LoadedModel, dtype: torch.dtype = torch.float32
) -> None:
    """Compare with an eager pass in `dtype`; float64 tells rounding of ours from that of both."""
    sequences = [some_tokens(length, seed) for seed, length in enumerate(LENGTHS)]
    for tokens, logits in zip(sequences, packed_logits(model, sequences), strict=True):
        assert (logits - eager_logits(folder, tokens, dtype)).abs().max() < 1e-4
