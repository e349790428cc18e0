"""The configuration of a GGUF file's model, as transformers has it.

Only architectures and keys are taken whose meaning is known: a key that is passed over could be
what makes a model right. Each entry of `ARCHITECTURES` says what its models have beside what all
have. Read `gguf_settings`.
"""

from collections.abc import Callable
from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from longctx.errors import ModelRefused
from longctx.model.gguf_file import GgufFile

# Keys that change nothing in what a decoder computes.
HARMLESS = (
    "vocab_size",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
    "attention.causal",
    "tensor_data_layout",
)
FREQUENCY_FACTORS = "rope_freqs.weight"
LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"
# As llama.cpp has it: the largest Gemmas scale queries by the width of the model, not of a head.
GEMMA2_LARGEST_LAYERS, GEMMA3_LARGEST_LAYERS = 46, 62
GEMMA_LOCAL_ROPE_BASE = 10_000.0
GEMMA3_PATTERN = 6


def gguf_settings(file: GgufFile) -> Any:
    """Make the transformers configuration of the model in `file`; raises ModelRefused.

    Where the file says nothing of a key, the architecture's default holds.
    """
    if file.architecture not in ARCHITECTURES:
        raise ModelRefused(
            f"{file.path}: models of the architecture {file.architecture!r} cannot be served from "
            f"GGUF, only {', '.join(ARCHITECTURES)}; use the model's Hugging Face folder"
        )
    model_type, own = ARCHITECTURES[file.architecture]
    keys = _Keys(file)
    values = _common(keys) | own(keys)
    keys.check_all_read()
    model_type = values.pop("model_type", model_type)
    try:
        return CONFIG_MAPPING[model_type](**values)
    except Exception as error:  # validators of each architecture raise what they like
        raise ModelRefused(f"{file.path}: its configuration is not accepted: {error}") from error


class _Keys:
    """The keys of one architecture, which notes what was read."""

    def __init__(self, file: GgufFile) -> None:
        self.file = file
        prefix = f"{file.architecture}."
        self._own = {
            key.removeprefix(prefix): value
            for key, value in file.metadata.items()
            if key.startswith(prefix)
        }
        self._read = set(HARMLESS)

    def number(self, key: str, default: Any = None) -> Any:
        """A number; without a default it has to be there. Raises ModelRefused."""
        self._read.add(key)
        value = self._own.get(key, default)
        if value is None or not isinstance(value, int | float) or isinstance(value, bool):
            raise ModelRefused(
                f"{self.file.path}: {self.file.architecture}.{key} is {value!r}, where a number "
                "belongs; convert the model again"
            )
        return value

    def has(self, key: str) -> bool:
        return key in self._own

    def text(self, key: str, default: str) -> str:
        self._read.add(key)
        return str(self._own.get(key, default))

    def check_all_read(self) -> None:
        """Raises ModelRefused for a key that nobody asked for."""
        for key, value in self._own.items():
            if key not in self._read:
                raise ModelRefused(
                    f"{self.file.path} states {self.file.architecture}.{key} = {value}, which "
                    "longctx does not know; it could not be served exactly"
                )


def _common(keys: _Keys) -> dict[str, Any]:
    tensors, metadata = keys.file.tensors, keys.file.metadata
    if "token_embd.weight" not in tensors:
        raise ModelRefused(f"{keys.file.path}: the tensor token_embd.weight is missing")
    heads, hidden = keys.number("attention.head_count"), keys.number("embedding_length")
    head_dim = keys.number("attention.key_length", hidden // heads if heads else 0)
    if keys.number("attention.value_length", head_dim) != head_dim:
        raise ModelRefused(f"{keys.file.path}: keys and values have different widths")
    ids = {
        name: metadata.get(f"tokenizer.ggml.{key}")
        for name, key in (("bos_token_id", "bos_token_id"), ("pad_token_id", "padding_token_id"))
    }
    return {
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "hidden_size": hidden,
        "intermediate_size": keys.number("feed_forward_length"),
        "num_hidden_layers": keys.number("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.number("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": keys.number("context_length"),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in tensors,
        "eos_token_id": sorted(gguf_end_tokens(keys.file)) or None,
        **ids,
    }


def gguf_end_tokens(file: GgufFile) -> frozenset[int]:
    """The tokens that end an answer: of a text, of a turn, of a message."""
    found = [file.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    return frozenset(each for each in found if isinstance(each, int))


def _llama(keys: _Keys) -> dict[str, Any]:
    tensors = keys.file.tensors
    values: dict[str, Any] = {"rope_parameters": _rope(keys)}
    if keys.has("attention.sliding_window"):  # Mistral's models are of this architecture too
        return values | {"model_type": "mistral"} | _window(keys)
    values["attention_bias"] = "blk.0.attn_q.bias" in tensors
    values["mlp_bias"] = "blk.0.ffn_up.bias" in tensors
    return values


def _mistral(keys: _Keys) -> dict[str, Any]:
    return {"rope_parameters": _rope(keys)} | _window(keys)


def _qwen2(keys: _Keys) -> dict[str, Any]:
    return {"rope_parameters": _rope(keys)}


def _phi3(keys: _Keys) -> dict[str, Any]:
    rope = _rope(keys, partial=True)
    original = keys.text("rope.scaling.original_context_length", "")
    return {
        "rope_parameters": rope,
        **({"original_max_position_embeddings": int(original)} if original else {}),
        **_window(keys),
    }


def _gemma2(keys: _Keys) -> dict[str, Any]:
    return {
        "rope_parameters": _rope(keys),
        "query_pre_attn_scalar": _gemma_scale(keys, GEMMA2_LARGEST_LAYERS),
        "attn_logit_softcapping": keys.number("attn_logit_softcapping"),
        "final_logit_softcapping": keys.number("final_logit_softcapping"),
        **_window(keys),
    }


def _gemma3(keys: _Keys) -> dict[str, Any]:
    local = keys.number("rope.freq_base_swa", GEMMA_LOCAL_ROPE_BASE)
    values = {
        "rope_parameters": {
            "full_attention": _rope(keys),
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        },
        "query_pre_attn_scalar": _gemma_scale(keys, GEMMA3_LARGEST_LAYERS),
        "sliding_window_pattern": keys.number("attention.sliding_window_pattern", GEMMA3_PATTERN),
        **_window(keys),
    }
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if keys.has(name):
            values[name] = keys.number(name)
    return values


ARCHITECTURES: dict[str, tuple[str, Callable[[_Keys], dict[str, Any]]]] = {
    "llama": ("llama", _llama),
    "mistral": ("mistral", _mistral),
    "qwen2": ("qwen2", _qwen2),
    "qwen3": ("qwen3", _qwen2),
    "gemma2": ("gemma2", _gemma2),
    "gemma3": ("gemma3_text", _gemma3),
    "phi3": ("phi3", _phi3),
}


def _gemma_scale(keys: _Keys, largest_layers: int) -> int:
    heads, hidden = keys.number("attention.head_count"), keys.number("embedding_length")
    if keys.number("block_count") == largest_layers:
        return int(hidden // heads)
    return int(keys.number("attention.key_length", hidden // heads))


def _window(keys: _Keys) -> dict[str, Any]:
    window = keys.number("attention.sliding_window", 0)
    return {"sliding_window": window or None}


def _rope(keys: _Keys, *, partial: bool = False) -> dict[str, Any]:
    """Make the rotary parameters; raises ModelRefused for a scaling that is not known."""
    heads, hidden = keys.number("attention.head_count"), keys.number("embedding_length")
    head_dim = keys.number("attention.key_length", hidden // heads)
    turned = keys.number("rope.dimension_count", head_dim)
    rope: dict[str, Any] = {"rope_theta": keys.number("rope.freq_base", 10_000.0)}
    if turned != head_dim:
        if not partial:
            raise ModelRefused(
                f"{keys.file.path} turns {turned} of {head_dim} dimensions of a head"
            )
        rope["partial_rotary_factor"] = turned / head_dim
    kind = keys.text("rope.scaling.type", "none")
    factor = keys.number("rope.scaling.factor", 1.0)
    attention = keys.number("rope.scaling.attn_factor", 0.0)
    tensors = keys.file.tensors
    if LONG_FACTORS in tensors or SHORT_FACTORS in tensors:
        kind = "longrope"
    if FREQUENCY_FACTORS in tensors and kind != "none":
        raise ModelRefused(f"{keys.file.path} has both {FREQUENCY_FACTORS} and {kind} scaling")
    if FREQUENCY_FACTORS in tensors:
        # Llama 3.1's scaling, written out: LongRoPE with one set of factors computes the same.
        return rope | _long_rope(keys, FREQUENCY_FACTORS, FREQUENCY_FACTORS, 1.0)
    if kind == "longrope":
        return rope | _long_rope(keys, LONG_FACTORS, SHORT_FACTORS, attention)
    if attention not in (0.0, 1.0):
        raise ModelRefused(f"{keys.file.path}: an attention factor of {attention} with {kind} rope")
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return rope | {"rope_type": "default"}
    if kind == "linear":
        return rope | {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        original = keys.number("rope.scaling.original_context_length")
        return rope | {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": original,
            "beta_fast": keys.number("rope.scaling.yarn_beta_fast", 32.0),
            "beta_slow": keys.number("rope.scaling.yarn_beta_slow", 1.0),
        }
    raise ModelRefused(f"{keys.file.path}: rotary scaling of the type {kind!r} is not known")


def _long_rope(keys: _Keys, long: str, short: str, attention: float) -> dict[str, Any]:
    tensors = keys.file.tensors
    missing = [name for name in (long, short) if name not in tensors]
    if missing:
        raise ModelRefused(f"{keys.file.path}: the tensor {missing[0]} is missing")
    original = keys.number("rope.scaling.original_context_length", keys.number("context_length"))
    return {
        "rope_type": "longrope",
        "long_factor": tensors[long].values().tolist(),
        "short_factor": tensors[short].values().tolist(),
        "original_max_position_embeddings": original,
        **({"attention_factor": attention} if attention else {}),
    }
