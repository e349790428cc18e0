"""The Llama of random weights as a GGUF file, for engines that read nothing else.

Its vocabulary has one token per id and the 256 bytes, so that every reader accepts it. The folder
that it is made of is written anew with the same numbers, where they are not quantized.
"""

import json
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as TensorType
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel

from longctx.bench.random_model import MAX_TOKENS, VOCABULARY, Size, write_random_llama

LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
FILE_TYPES = {
    TensorType.F32: "ALL_F32",
    TensorType.BF16: "MOSTLY_BF16",
    TensorType.Q8_0: "MOSTLY_Q8_0",
    TensorType.Q4_0: "MOSTLY_Q4_0",
    TensorType.Q4_1: "MOSTLY_Q4_1",
}
WORD, CONTROL = 1, 3  # types of tokens: an ordinary one, and a special one


def write_random_gguf(folder: Path, size: Size, weights: str, *, seed: int) -> tuple[Path, Path]:
    """Write the model into `folder`; return the GGUF file and a folder for transformers.

    Matrices are of the type `weights`; where that is f32 or bf16, both have the same numbers, else
    the second is the GGUF file again.
    """
    plain = folder / "model"
    write_random_llama(plain, size, seed=seed)
    kind = TensorType[weights.upper()]
    tensors = load_file(plain / "model.safetensors")
    if kind == TensorType.BF16:
        tensors = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
        save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
        _say_type(plain / "config.json")
    path = folder / f"random-{weights}.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[kind]])
    _add_keys(writer, size)
    for name, tensor in tensors.items():
        values = tensor.float().numpy()
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            values = _pairs_together(values, size.heads if "q_proj" in name else size.kv_heads)
        values = np.ascontiguousarray(values)
        own = TensorType.F32 if values.ndim == 1 else kind
        writer.add_tensor(_gguf_name(name), gguf.quantize(values, own), raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, plain if kind in (TensorType.F32, TensorType.BF16) else path


def _add_keys(writer: gguf.GGUFWriter, size: Size) -> None:
    head_dim = size.hidden // size.heads
    writer.add_context_length(MAX_TOKENS)
    writer.add_block_count(size.layers)
    writer.add_embedding_length(size.hidden)
    writer.add_feed_forward_length(size.mlp)
    writer.add_head_count(size.heads)
    writer.add_head_count_kv(size.kv_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    tokens = ["<s>", "</s>", *sorted(ByteLevel.alphabet()), "aa"]
    tokens += [f"w{number}" for number in range(len(tokens), VOCABULARY)]
    writer.add_token_list(tokens)
    writer.add_token_types([CONTROL] * 2 + [WORD] * (VOCABULARY - 2))
    writer.add_token_merges(["a a"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(False)


def _say_type(config: Path) -> None:
    """Have the folder say that its weights are bfloat16."""
    said = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps(said | {"dtype": "bfloat16"}, indent=1), encoding="utf-8")


def _pairs_together(values: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Order rows as llama.cpp has them: what rotary positions turn together is side by side."""
    split = values.reshape(heads, 2, values.shape[0] // heads // 2, -1)
    return split.swapaxes(1, 2).reshape(values.shape)


def _gguf_name(name: str) -> str:
    module, _, kind = name.rpartition(".")
    if module in TOP:
        return f"{TOP[module]}.{kind}"
    layer, _, rest = module.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{LAYER[rest]}.{kind}"
