"""Writes a Hugging Face folder as a GGUF file, as llama.cpp does, and what it rounds to.

`gguf` can round to the simple types; blocks of the others are made at random.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as TensorType
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
GEMMA = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
K_TYPES = {  # where the scales of a block are, in halves of 16 bits
    TensorType.Q4_K: (0, 1),
    TensorType.Q5_K: (0, 1),
    TensorType.Q6_K: (104,),
}


def write_gguf(folder: Path, path: Path, kind: TensorType = TensorType.F32, **changes: Any) -> Path:
    """Write the model of `folder` to `path`; matrices are of `kind`.

    Beside it, `path.with_suffix("")` becomes a folder of the same model as it was rounded: the
    reference. `changes` are further keys of the file, or others in their place.
    """
    config = json.loads((folder / "config.json").read_text())
    exact = load_file(folder / "model.safetensors")
    model_type = {"gemma3_text": "gemma3", "mistral": "llama"}.get(
        config["model_type"], config["model_type"]
    )
    writer = gguf.GGUFWriter(path, model_type)
    for key, value in (model_keys(config) | changes).items():
        add_key(writer, f"{model_type}.{key}", value)
    if (folder / "tokenizer.json").is_file():
        for key, value in tokenizer_keys(folder).items():
            add_key(writer, f"tokenizer.{key}", value)
    rounded = {}
    generator = np.random.default_rng(0)
    for name, tensor in exact.items():
        rounded[name] = torch.from_numpy(
            _add_tensor(writer, name, tensor.float().numpy(), kind, config, generator)
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    reference = path.with_suffix("")
    shutil.copytree(folder, reference)
    save_file(rounded, reference / "model.safetensors", metadata={"format": "pt"})
    return path


def _add_tensor(
    writer: gguf.GGUFWriter,
    name: str,
    values: NDArray[np.float32],
    kind: TensorType,
    config: dict[str, Any],
    generator: np.random.Generator,
) -> NDArray[np.float32]:
    """Add one tensor in the file's form; returns its values in transformers' form."""
    own, target = name, gguf_name(name, config)
    turned = config["model_type"] in ("llama", "mistral") and (".q_proj" in own or ".k_proj" in own)
    heads = config["num_attention_heads" if ".q_proj" in own else "num_key_value_heads"]
    if turned:
        values = together(values, heads)
    if config["model_type"].startswith("gemma") and name.endswith("norm.weight"):
        values = values + 1
    if values.ndim == 1 or kind == TensorType.F32:
        data, kind = np.ascontiguousarray(values), TensorType.F32
    elif kind in K_TYPES:
        data = random_blocks(values.shape, kind, generator)
    else:
        data = gguf.quantize(np.ascontiguousarray(values), kind)
    writer.add_tensor(target, data, raw_dtype=kind)
    found = np.asarray(gguf.dequantize(data, kind), np.float32).reshape(values.shape)
    if config["model_type"].startswith("gemma") and name.endswith("norm.weight"):
        found = found - 1
    return np.ascontiguousarray(apart(found, heads) if turned else found)


def random_blocks(
    shape: tuple[int, ...], kind: TensorType, generator: np.random.Generator
) -> NDArray[np.uint8]:
    """Blocks of any codes, with scales near 0.01."""
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    count = shape[-1] // block
    data = generator.integers(0, 256, (*shape[:-1], count, block_bytes), np.uint8)
    low = 1e-5 if kind == TensorType.Q6_K else 1e-4  # its scales have a byte, the others six bits
    for half in K_TYPES[kind]:
        scale = generator.uniform(low, 3 * low, (*shape[:-1], count)).astype(np.float16)
        data.view(np.float16)[..., half] = scale
    return data.reshape(*shape[:-1], count * block_bytes)


def together(values: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Rows as llama.cpp has them: what turns together is side by side."""
    split = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return split.swapaxes(1, 2).reshape(values.shape)


def apart(values: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Rows as transformers has them: what turns together is half a head apart."""
    split = values.reshape(heads, values.shape[0] // heads // 2, 2, *values.shape[1:])
    return split.swapaxes(1, 2).reshape(values.shape)


def gguf_name(name: str, config: dict[str, Any]) -> str:
    names = LAYER | (GEMMA if config["model_type"].startswith("gemma") else {})
    module, _, kind = name.rpartition(".")
    if module in TOP:
        return f"{TOP[module]}.{kind}"
    layer, _, rest = module.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{names[rest]}.{kind}"


def model_keys(config: dict[str, Any]) -> dict[str, Any]:
    rope = config["rope_parameters"]
    rope = rope.get("full_attention", rope)
    keys = {
        "context_length": config["max_position_embeddings"],
        "block_count": config["num_hidden_layers"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "rope.freq_base": float(rope["rope_theta"]),
    }
    if config.get("head_dim"):
        keys |= {
            "attention.key_length": config["head_dim"],
            "attention.value_length": config["head_dim"],
        }
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if config.get(name):
            keys[name] = float(config[name])
    if config.get("sliding_window"):
        keys["attention.sliding_window"] = config["sliding_window"]
    return keys


def tokenizer_keys(folder: Path) -> dict[str, Any]:
    """The keys of a byte-level tokenizer that `write_tokenizer` has written."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = sorted(state["model"]["vocab"].items(), key=lambda entry: entry[1])
    special = {entry["content"] for entry in state["added_tokens"] if entry["special"]}
    return {
        "ggml.model": "gpt2",
        "ggml.pre": "gpt-2",
        "ggml.tokens": [token for token, _ in vocabulary],
        "ggml.token_type": [3 if token in special else 1 for token, _ in vocabulary],
        "ggml.merges": [" ".join(merge) for merge in state["model"]["merges"]],
        "ggml.bos_token_id": tokenizer.bos_token_id,
        "ggml.eos_token_id": tokenizer.eos_token_id,
        "ggml.add_bos_token": True,
        "chat_template": tokenizer.chat_template,
    }


def add_key(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
