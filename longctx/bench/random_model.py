"""A Llama with random weights, as the ordinary folder that any engine loads.

For speed only: what it answers means nothing, and damage to its KV would not show.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 32_000
MAX_TOKENS = 65_536


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int


# Heads of 64, as in the small models that people serve
SIZES = {
    "100m": Size(hidden=768, layers=12, heads=12, kv_heads=4, mlp=2048),
    "213m": Size(hidden=1024, layers=16, heads=16, kv_heads=4, mlp=2816),
}


def write_random_llama(folder: Path, size: Size, *, seed: int) -> None:
    """Writes float32 safetensors and a tokenizer with one word per id; there is no end token."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=size.hidden,
        intermediate_size=size.mlp,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        head_dim=size.hidden // size.heads,
        max_position_embeddings=MAX_TOKENS,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{id}": id for id in range(VOCABULARY)}, "w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer: Any = PreTrainedTokenizerFast  # its constructor has no types
    tokenizer(tokenizer_object=words).save_pretrained(folder)
