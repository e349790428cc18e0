"""A Llama with random weights, as the ordinary folder that any engine loads.

For speed only: what it answers means nothing, and damage to its KV would not show.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 32_000
MAX_TOKENS = 65_536


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """The shape of a model. A `large` one is bfloat16, with the same weights in each layer."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int
    vocabulary: int = VOCABULARY
    max_tokens: int = MAX_TOKENS
    large: bool = False

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def weights_read(self) -> int:
        """How many weights a decoded token reads: all but the embeddings of other tokens."""
        heads = 2 * self.heads + 2 * self.kv_heads
        layer = self.hidden * (heads * self.head_dim + 3 * self.mlp + 2)
        return self.layers * layer + self.hidden * (self.vocabulary + 2)


# Heads of 64, as in the small models that people serve; the last is Llama 3.1's shape
SIZES = {
    "100m": Size(hidden=768, layers=12, heads=12, kv_heads=4, mlp=2048),
    "213m": Size(hidden=1024, layers=16, heads=16, kv_heads=4, mlp=2816),
    "8b": Size(
        hidden=4096,
        layers=32,
        heads=32,
        kv_heads=8,
        mlp=14_336,
        vocabulary=128_256,
        max_tokens=1 << 20,
        large=True,
    ),
}


def write_random_llama(folder: Path, size: Size, *, seed: int) -> None:
    """Writes float32 safetensors and a tokenizer with one word per id; there is no end token."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(_config(size))
    model.save_pretrained(folder)
    _write_tokenizer(folder, size)


def write_large_llama(folder: Path, size: Size, *, seed: int) -> None:
    """Writes bfloat16 safetensors, a file for each layer, which are never in memory together.

    All layers have the weights of the first: drawing those of 8 billion would take minutes.
    """
    config = _config(size)
    config.architectures, config.dtype = ["LlamaForCausalLM"], torch.bfloat16
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: each.shape for name, each in LlamaForCausalLM(config).state_dict().items()}
    generator = torch.Generator().manual_seed(seed)
    first = "model.layers.0."
    layer = {name: _drawn(shapes[name], generator) for name in shapes if name.startswith(first)}
    others = {name: _drawn(shapes[name], generator) for name in shapes if ".layers." not in name}
    files = {"others.safetensors": others} | {
        f"layer-{number}.safetensors": {
            name.replace(first, f"model.layers.{number}."): weight for name, weight in layer.items()
        }
        for number in range(size.layers)
    }
    for name, weights in files.items():
        save_file(weights, folder / name, metadata={"format": "pt"})
    places = {weight: name for name, weights in files.items() for weight in weights}
    assert places.keys() == shapes.keys()
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    _write_tokenizer(folder, size)


def _config(size: Size) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.mlp,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        head_dim=size.head_dim,
        max_position_embeddings=size.max_tokens,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )


def _drawn(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Draws a matrix as transformers does; a norm's scales are 1."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)


def _write_tokenizer(folder: Path, size: Size) -> None:
    words = Tokenizer(models.WordLevel({f"w{id}": id for id in range(size.vocabulary)}, "w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer: Any = PreTrainedTokenizerFast  # its constructor has no types
    tokenizer(tokenizer_object=words).save_pretrained(folder)
