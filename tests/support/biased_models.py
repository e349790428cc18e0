"""The embedded probe as a Qwen2 model whose keys have a large bias in a few dims, as Qwen2's have.

It speaks as well as the probe: the pair of dims of a query that meets a biased pair of a key has
been made small, or is in one dim only, so that what the bias adds to a score is of the order of the
score. Some of the biased dims turn many times within a block, some hardly at all.
"""

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from longctx.embedded import model_path

SHARED = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
    "tie_word_embeddings",
    "rms_norm_eps",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "rope_parameters",
)
LAYERS = (0, 1, 3)
SLOW_PAIRS, TURNING_PAIRS = (30, 31), (12, 20)  # of 32: the angle per position falls with each


def write_biased_probe(folder: Path, bias: float) -> Path:
    """Write a folder with its tokenizer; with a bias of 0 it is what the others compare with."""
    source_folder = model_path("probe")
    source = AutoModelForCausalLM.from_pretrained(source_folder, dtype=torch.float32)
    config = Qwen2Config(**{name: getattr(source.config, name) for name in SHARED})
    model: Any = Qwen2ForCausalLM(config).float()
    model.load_state_dict(source.state_dict(), strict=False)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for index, layer in enumerate(model.model.layers):
            attention = layer.self_attn
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
                projection.bias.zero_()
            if index in LAYERS:
                _bias(attention, config, bias, generator)
    model.bfloat16().save_pretrained(folder)
    for file in source_folder.iterdir():
        if file.name.startswith(("tokenizer", "generation", "chat")):
            shutil.copy(file, folder / file.name)
    return folder


def _bias(attention: Any, config: Any, bias: float, generator: torch.Generator) -> None:
    """Add from 1/3 to 3 times `bias`, of either sign, to a dim of some pairs of each key."""
    heads, kv_heads, dims = (
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
    )
    queries = attention.q_proj.weight.view(heads, dims, -1)
    keys = attention.k_proj.bias.view(kv_heads, dims)
    for pair in (*SLOW_PAIRS, *TURNING_PAIRS):
        queries[:, pair + dims // 2] = 0
        if pair in TURNING_PAIRS:
            queries[:, pair] *= 0.01
        size = 3 ** (2 * torch.rand(kv_heads, generator=generator) - 1)
        sign = torch.where(torch.rand(kv_heads, generator=generator) < 0.5, -1.0, 1.0)
        keys[:, pair] = sign * size * bias
