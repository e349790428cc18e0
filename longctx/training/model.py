"""The needle model: its configuration, first weights, and a forward pass made for training.

Three layers slide over 64 tokens; the last one is global and has no positions, so it does not
matter where, or how far away, a fact is. Training uses that: the documents of a batch are one
memory that every question of the batch searches, and only answer tokens query it.

[rows, tokens] are separate texts; `memory` are the tokens of all document rows, flattened. The
first weights of the last layer are copy heads: "find the token that looks like me, and copy it".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import SmolLM3Config, SmolLM3ForCausalLM

from longctx.training.tokenizer import BOS, EOS, PAD, SPECIALS

WINDOW_TOKENS = 64
MAX_TOKENS = 1_048_576
LAYERS = 4
WIDTH = 192


def needle_config(vocabulary: int = 2048) -> SmolLM3Config:
    """Configure needle. Which layer slides is explicit: the class's defaults are others."""
    return SmolLM3Config(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        intermediate_size=512,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,  # type: ignore[call-arg]  # a field the class takes as an extra
        max_position_embeddings=MAX_TOKENS,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        use_sliding_window=True,
        sliding_window=WINDOW_TOKENS,
        layer_types=["sliding_attention"] * 3 + ["full_attention"],
        no_rope_layers=[1, 1, 1, 0],
        tie_word_embeddings=True,
        pad_token_id=SPECIALS.index(PAD),
        bos_token_id=SPECIALS.index(BOS),
        eos_token_id=SPECIALS.index(EOS),
    )


def new_needle(seed: int) -> SmolLM3ForCausalLM:
    """Make a model with random weights, and copy heads in the last layer."""
    torch.manual_seed(seed)
    model = SmolLM3ForCausalLM(needle_config())
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2 and "embed" not in name:
                nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    weight.mul_(0.5)
        model.model.embed_tokens.weight.normal_(std=0.3)
        last = model.model.layers[-1].self_attn
        key = last.k_proj.weight.view(2, 64, WIDTH)
        last.q_proj.weight.copy_(key.repeat_interleave(2, dim=0).reshape(256, WIDTH))
        nn.init.orthogonal_(last.v_proj.weight)
        value = last.v_proj.weight.view(2, 64, WIDTH).repeat_interleave(
            2, dim=0
        )  # [heads, 64, WIDTH]
        last.o_proj.weight.copy_(value.reshape(256, WIDTH).T / 2)
    return model


@dataclass(slots=True)
class Batch:
    """Documents, questions, and what a question may look at.

    documents [document_rows, document_tokens], questions [question_rows, question_tokens];
    for each of the `answers` supervised positions: its question row and column, the token that
    must follow, and the place in memory it is to be copied from (-1: none); `memory_bias`
    [question_rows, memory] and `own_bias` [question_rows, question_tokens] are added to the last
    layer's scores: a large negative number hides, a positive one imitates more filler.
    """

    documents: Tensor
    questions: Tensor
    answer_row: Tensor
    answer_column: Tensor
    answer_token: Tensor
    answer_place: Tensor
    memory_bias: Tensor
    own_bias: Tensor
    first_position: int = 0


@dataclass(slots=True)
class Scores:
    """What `forward` computes at the supervised positions.

    `logits` [answers, vocabulary]. `found` [answers] is the attention of the first query head of
    each key head on the right place, `ahead` [answers] that of the second one on the place after
    it, both means over key heads. `weights` [answers, heads, memory], detached, are for mining
    filler.
    """

    logits: Tensor
    found: Tensor
    ahead: Tensor
    weights: Tensor


def forward(model: SmolLM3ForCausalLM, batch: Batch, *, noise_steps: int = 0) -> Scores:
    """Compute logits and attention at the supervised positions.

    `noise_steps` = 15 adds noise of the size of int4 rounding to the last layer's keys and values.
    """
    documents = local_layers(model, batch.documents, batch.first_position)
    questions = local_layers(model, batch.questions, batch.first_position)
    last = model.model.layers[-1]
    attention = last.self_attn
    own = last.input_layernorm(questions)  # [question_rows, question_tokens, hidden]
    read = torch.cat((last.input_layernorm(documents).flatten(0, 1), own.flatten(0, 1)))
    keys = _noisy(attention.k_proj(read).view(-1, 2, 64), noise_steps)  # [keys, kv_heads, 64]
    values = _noisy(attention.v_proj(read).view(-1, 2, 64), noise_steps)

    row, column = batch.answer_row, batch.answer_column
    residual = questions[row, column]  # [answers, hidden]
    query = attention.q_proj(own[row, column]).view(-1, 2, 2, 64) * 64**-0.5  # kv head, group
    answers, memory = query.shape[0], batch.documents.numel()
    stacked = query.permute(1, 0, 2, 3).reshape(2, answers * 2, 64)
    scores = torch.bmm(stacked, keys.permute(1, 2, 0)).view(2, answers, 2, -1).float()
    scores = scores + _bias(batch)[None, :, None]
    weights = scores.softmax(-1).to(values.dtype)  # [kv_heads, answers, group, keys]
    mixed = torch.bmm(weights.view(2, answers * 2, -1), values.transpose(0, 1))
    mixed = mixed.view(2, answers, 2, 64)
    hidden = residual + attention.o_proj(mixed.permute(1, 0, 2, 3).reshape(answers, 256))
    hidden = hidden + last.mlp(last.post_attention_layernorm(hidden))
    logits = model.lm_head(model.model.norm(hidden))
    place, each = batch.answer_place.clamp_min(0), torch.arange(answers, device=row.device)
    after = (place + 1).clamp_max(memory - 1)
    found = weights[:, each, 0, place].float().mean(0)
    ahead = weights[:, each, 1, after].float().mean(0)
    spread = weights[..., :memory].detach().permute(1, 0, 2, 3).flatten(1, 2)
    return Scores(logits=logits, found=found, ahead=ahead, weights=spread)


def _bias(batch: Batch) -> Tensor:
    """Make the bias [answers, memory + question tokens] of the last layer's scores.

    A question sees the memory as `memory_bias` says, and of all question rows its own, up to
    itself.
    """
    row, column = batch.answer_row, batch.answer_column
    question_rows, tokens = batch.questions.shape
    steps = torch.arange(question_rows * tokens, device=row.device)
    begin = (row * tokens)[:, None]
    seen = (steps >= begin) & (steps <= begin + column[:, None])
    own = torch.where(seen, batch.own_bias.flatten(), -1e9)
    return torch.cat((batch.memory_bias[row], own), dim=-1)


def local_layers(model: SmolLM3ForCausalLM, tokens: Tensor, first_position: int = 0) -> Tensor:
    """Run all layers but the last on [rows, tokens]: [rows, tokens, hidden]; tokens % 64 == 0."""
    hidden = model.model.embed_tokens(tokens)
    positions = torch.arange(tokens.shape[1], device=tokens.device)[None] + first_position
    cosine, sine = model.model.rotary_emb(hidden.float(), positions)
    for layer in list(model.model.layers)[:-1]:
        hidden = local_layer(layer, hidden, cosine, sine)
    return cast(Tensor, hidden)


def local_layer(layer: Any, hidden: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Run one sliding layer, 64 queries against their own 64 keys and the 64 before."""
    attention = layer.self_attn
    x = layer.input_layernorm(hidden)
    rows, tokens, _ = x.shape
    blocks = tokens // WINDOW_TOKENS
    query = _rotate(attention.q_proj(x).view(rows, tokens, 4, 64), cosine, sine)
    key = _rotate(attention.k_proj(x).view(rows, tokens, 2, 64), cosine, sine)
    value = attention.v_proj(x).view(rows, tokens, 2, 64)
    query = query.view(rows, blocks, 64, 2, 2, 64).permute(0, 1, 3, 4, 2, 5)
    query = query.reshape(rows * blocks, 2, 128, 64)  # two heads share a key head
    key, value = (_with_block_before(t, blocks) for t in (key, value))
    scores = query @ key.transpose(-1, -2) * 64**-0.5  # [rows * blocks, 2, 128, 128]
    scores = scores.view(rows, blocks, 2, 2, 64, 128) + _window_mask(blocks, x.device, scores.dtype)
    mixed = scores.float().softmax(-1).to(value.dtype).view(rows * blocks, 2, 128, 128) @ value
    mixed = mixed.view(rows, blocks, 2, 2, 64, 64).permute(0, 1, 4, 2, 3, 5)
    hidden = hidden + attention.o_proj(mixed.reshape(rows, tokens, 256))
    return cast(Tensor, hidden + layer.mlp(layer.post_attention_layernorm(hidden)))


def _with_block_before(states: Tensor, blocks: int) -> Tensor:
    """Join each block with the one before it.

    Maps [rows, tokens, 2, 64] to [rows * blocks, 2, 128, 64].
    """
    rows = states.shape[0]
    states = states.view(rows, blocks, 64, 2, 64)
    before = F.pad(states, (0, 0, 0, 0, 0, 0, 1, 0))[:, :-1]
    return torch.cat((before, states), dim=2).permute(0, 1, 3, 2, 4).reshape(-1, 2, 128, 64)


def _window_mask(blocks: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Make a mask [blocks, 1, 1, 64, 128]: 0 where 0 <= query - key < 64 and the key exists.

    Elsewhere it is -1e9.
    """
    distance = torch.arange(64, device=device)[:, None] + 64 - torch.arange(128, device=device)
    seen = ((distance >= 0) & (distance < WINDOW_TOKENS)).expand(blocks, 64, 128).clone()
    seen[0, :, :64] = False
    return torch.where(seen, 0.0, -1e9).to(dtype)[:, None, None]


def _rotate(states: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Apply rotary positions as Hugging Face does, to states [rows, tokens, heads, 64]."""
    cosine, sine = cosine[:, :, None].to(states.dtype), sine[:, :, None].to(states.dtype)
    first, second = states.chunk(2, dim=-1)
    return states * cosine + torch.cat((-second, first), dim=-1) * sine


def _noisy(states: Tensor, steps: int) -> Tensor:
    """Add uniform noise of one rounding step, where `steps` steps are a head's range."""
    if not steps:
        return states
    low, high = states.detach().aminmax(dim=-1, keepdim=True)
    return states + (torch.rand_like(states) - 0.5) * (high - low) / steps
