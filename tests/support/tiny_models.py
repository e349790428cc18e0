"""Writes tiny random Hugging Face folders, one per architecture, so that no test downloads.

The weights have a standard deviation of 0.2: at the usual 0.02 attention is nearly uniform and a
wrong key goes unnoticed.
"""

from pathlib import Path
from typing import Any

import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

VOCAB_SIZE = 512
HEAD_DIM = 16

BASE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": HEAD_DIM,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 2048,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
WINDOWED = {"sliding_window": 24, "num_hidden_layers": 4}
ALTERNATING = ["sliding_attention", "full_attention"] * 2
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}

OWN: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": 24},
    "gemma2": {
        **WINDOWED,
        "layer_types": ALTERNATING,
        "query_pre_attn_scalar": 16,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 8.0,
    },
    "gemma3_text": {**WINDOWED, "layer_types": ALTERNATING, "query_pre_attn_scalar": 16},
    "cohere2": {**WINDOWED, "layer_types": ALTERNATING},
    "smollm3": {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0]},
    "phi3": {},
    "granite": {"attention_multiplier": 0.2},
    "olmo2": {},
    "glm4": {"partial_rotary_factor": 0.5},
    "exaone4": {**WINDOWED, "layer_types": ALTERNATING},
    "gpt_neox": {"rotary_pct": 0.25},
    "gpt2": {
        "n_embd": 64,
        "n_head": 4,
        "n_layer": 3,
        "n_positions": 512,
        "vocab_size": VOCAB_SIZE,
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": 1,
    },
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "mixtral": EXPERTS,
    "starcoder2": {"sliding_window": 24},
    "gpt_oss": {
        **WINDOWED,
        **EXPERTS,
        "layer_types": ALTERNATING,
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 32.0,
            "original_max_position_embeddings": 64,
        },
    },
}
ARCHITECTURES: tuple[str, ...] = tuple(OWN)

# Name -> (architecture, configuration). Each is a rotary type that is served.
ROPE_VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "default": ("llama", {}),
    "linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0}}),
    "llama3": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "yarn": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "longrope": (
        "phi3",
        {
            "original_max_position_embeddings": 64,
            "rope_parameters": {
                "rope_type": "longrope",
                "short_factor": [1.0 + 0.05 * index for index in range(HEAD_DIM // 2)],
                "long_factor": [1.0 + 2.0 * index for index in range(HEAD_DIM // 2)],
            },
        },
    ),
    "partial": ("gpt_neox", {"rotary_pct": 0.5}),
}


def write_model(
    folder: Path, architecture: str = "llama", *, seed: int = 0, **overrides: Any
) -> Path:
    """Write a float32 safetensors folder without a tokenizer; `overrides` go into its config."""
    config_class = CONFIG_MAPPING[architecture]
    derived = {name for name in BASE if isinstance(getattr(config_class, name, None), property)}
    base = {} if architecture == "gpt2" else {k: v for k, v in BASE.items() if k not in derived}
    config = config_class(**(base | OWN.get(architecture, {}) | overrides))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        model = model_class(config)
        for name, tensor in model.named_parameters():
            if name.endswith("sinks"):  # transformers leaves them as they come
                torch.nn.init.normal_(tensor)
    model.save_pretrained(folder)
    return folder
