"""Reads a long text once and answers questions on it, with plain torch: needle without the engine.

Only the last layer looks further back than 64 tokens, so reading is linear in the text: three
sliding layers, and keys and values for the last. Results equal the transformers forward in float32
to 1e-4 (tested).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import SmolLM3ForCausalLM

from longctx.training.model import local_layers
from longctx.training.rounding import ROUNDINGS
from longctx.training.tokenizer import ASSISTANT, BOS, EOS, SPECIALS, USER

REACH_TOKENS = 192  # the text that a token knows before itself: three windows of 63 tokens
CHUNK_TOKENS = 8192
KEYS_AT_ONCE = 32_768


@dataclass(slots=True)
class Memory:
    """Keys and values [kv_heads, tokens, head_dim] of the last layer; `tail` has the last ids."""

    keys: Tensor
    values: Tensor
    tail: list[int]

    @property
    def tokens(self) -> int:
        """The number of tokens that were read."""
        return self.keys.shape[1]


class Reader:
    """The needle model and its tokenizer, in float32 on the CPU: `read` a text, then `answer`."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        model = SmolLM3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.model = model.train(False)
        self.last = self.model.model.layers[-1]

    def encode(self, text: str) -> list[int]:
        """Encode the text, without any special token."""
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def document(self, text: str) -> list[int]:
        """Encode `<s>`, the text, and the line end that the chat template puts after it."""
        return [SPECIALS.index(BOS), *self.encode(text), *self.encode("\n")]

    def question(self, text: str) -> list[int]:
        """Encode a user's turn, and the token that begins the answer."""
        return [SPECIALS.index(USER), *self.encode(text), SPECIALS.index(ASSISTANT)]

    @torch.no_grad()
    def read(self, ids: Sequence[int], codec: str = "raw") -> Memory:
        """Compute keys and values of every token, in time linear in their number."""
        keys, values = [], []
        for begin in range(0, len(ids), CHUNK_TOKENS):
            known = min(begin, REACH_TOKENS)
            chunk = list(ids[begin - known : begin + CHUNK_TOKENS])
            padded = chunk + [0] * (-len(chunk) % 64)
            hidden = local_layers(self.model, torch.tensor([padded]), begin - known)
            key, value = self._keys_values(hidden[0, known : len(chunk)])
            key, value = ROUNDINGS[codec](key, value)
            keys.append(key)
            values.append(value)
        return Memory(torch.cat(keys, 1), torch.cat(values, 1), list(ids[-REACH_TOKENS:]))

    @torch.no_grad()
    def answer(
        self, memory: Memory, questions: Sequence[Sequence[int]], max_new_tokens: int = 56
    ) -> list[list[int]]:
        """Answer greedily, without end tokens; every question comes directly after the text."""
        answers: list[list[int]] = [[] for _ in questions]
        live = list(range(len(questions)))
        for _ in range(max_new_tokens):
            rows = [[*memory.tail, *questions[i], *answers[i]] for i in live]
            tokens = self.logits(memory, rows, len(memory.tail)).argmax(-1).tolist()
            for i, token in zip(live, tokens, strict=True):
                answers[i].append(token)
            live = [i for i in live if answers[i][-1] != SPECIALS.index(EOS)]
            if not live:
                break
        return [[t for t in answer if t != SPECIALS.index(EOS)] for answer in answers]

    @torch.no_grad()
    def logits(self, memory: Memory, rows: list[list[int]], known: int) -> Tensor:
        """Compute next-token logits [rows, vocabulary]; memory has `known` ids of each row."""
        longest = max(map(len, rows))
        width = longest + -longest % 64
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        hidden = local_layers(self.model, ids, memory.tokens - known)
        ends = torch.tensor([len(row) for row in rows])
        here = torch.arange(len(rows)), ends - 1
        attention = self.last.self_attn
        residual = hidden[here]
        query = attention.q_proj(self.last.input_layernorm(residual)).view(-1, 2, 2, 64) / 8
        query = query.permute(1, 0, 2, 3)  # [kv_heads, rows, group, head_dim]
        own = [self._keys_values(hidden[i, known:end]) for i, end in enumerate(ends.tolist())]
        near = [
            torch.stack([_attend(query[:, i], key, value) for i, (key, value) in enumerate(own)], 1)
        ]
        flat = query.reshape(2, -1, 64)
        far = [
            _attend(
                flat, memory.keys[:, i : i + KEYS_AT_ONCE], memory.values[:, i : i + KEYS_AT_ONCE]
            ).view(2, len(rows), 2, 65)
            for i in range(0, memory.tokens, KEYS_AT_ONCE)
        ]
        parts = torch.stack(near + far)  # [parts, kv_heads, rows, group, head_dim + 1]
        weights = parts[..., -1:].softmax(0)
        mixed = (parts[..., :-1] * weights).sum(0).permute(1, 0, 2, 3).reshape(len(rows), 256)
        hidden = residual + attention.o_proj(mixed)
        hidden = hidden + self.last.mlp(self.last.post_attention_layernorm(hidden))
        return cast(Tensor, self.model.lm_head(self.model.model.norm(hidden)))

    def _keys_values(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Map [tokens, hidden] to keys and values [kv_heads, tokens, head_dim]."""
        attention, x = self.last.self_attn, self.last.input_layernorm(hidden)
        key, value = attention.k_proj(x).view(-1, 2, 64), attention.v_proj(x).view(-1, 2, 64)
        return key.transpose(0, 1).contiguous(), value.transpose(0, 1).contiguous()


def _attend(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attend; the last element is the log-sum-exp: [kv_heads, queries, head_dim + 1]."""
    scores = query @ keys.transpose(1, 2)
    lse = scores.logsumexp(-1, keepdim=True)
    return torch.cat(((scores - lse).exp_() @ values, lse), dim=-1)
