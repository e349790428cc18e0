"""What a layer is, found by watching it; what cannot be served exactly is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from longctx.errors import ModelRefused
from longctx.model import probe
from tests.support.plain_attention import assert_equal_to_eager, load
from tests.support.tiny_models import HEAD_DIM, VOCAB_SIZE, write_model


def test_the_layers_are_what_the_model_does(tmp_path: Path) -> None:
    spec = load(write_model(tmp_path, "gemma3_text")).spec
    assert [layer.window for layer in spec.layers] == [24, None, 24, None]
    assert {(layer.heads, layer.kv_heads, layer.head_dim) for layer in spec.layers} == {
        (4, 2, HEAD_DIM)
    }
    assert (spec.architecture, spec.vocab_size) == ("gemma3_text", VOCAB_SIZE)
    assert spec.max_context == 2048


def test_a_window_that_only_the_mask_knows_is_found(tmp_path: Path) -> None:
    folder = write_model(tmp_path, "phimoe", sliding_window=24, num_local_experts=4)
    model = load(folder)
    assert [layer.window for layer in model.spec.layers] == [24] * 3
    assert_equal_to_eager(folder, model)


def test_a_window_as_long_as_the_context_is_none(tmp_path: Path) -> None:
    spec = load(write_model(tmp_path, "mistral"), max_context=24).spec
    assert [layer.window for layer in spec.layers] == [None] * 3


MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
REFUSALS: dict[str, tuple[str, dict[str, Any], str]] = {
    "mamba": ("mamba", {}, "only 0 of 3 layers"),
    "rwkv": ("rwkv", {"attention_hidden_size": 64}, "only 0 of 3 layers"),
    "ALiBi in bloom": ("bloom", {}, "only 0 of 3 layers"),
    "ALiBi in falcon": ("falcon", {"alibi": True}, "only attentions of its own"),
    "mamba beside attention layers": (
        "bamba",
        {
            "mamba_n_heads": 8,
            "mamba_d_head": 16,
            "mamba_n_groups": 1,
            "attn_layer_indices": [1],
        },
        "only 1 of 3 layers",
    ),
    "mamba within attention layers": (
        "falcon_h1",
        {
            "mamba_d_ssm": 64,
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_n_groups": 1,
            "mamba_d_state": 16,
        },
        "from token to token besides attention",
    ),
    "latent attention": (
        "deepseek_v3",
        {
            **MOE,
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 8,
            "v_head_dim": 16,
            "head_dim": 8,
        },
        "24, 24 and 16",
    ),
    "keys shared across layers": (
        "gemma4_text",
        {
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 2,
            "global_head_dim": 16,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCAB_SIZE,
        },
        "layer 2 shares its keys",
    ),
    "two attentions in a layer": ("diffllama", {}, "not once for each layer"),
    "a mask with values": ("doge", {}, "neither causal nor a sliding window"),
    "chunked attention": (
        "llama4_text",
        {"num_local_experts": 2, "intermediate_size_mlp": 64, "attention_chunk_size": 64},
        "chunks of 64 tokens; start with --max-context 64",
    ),
    "scaling by place in the row": (
        "llama4_text",
        {
            "num_local_experts": 2,
            "intermediate_size_mlp": 64,
            "attention_chunk_size": 16384,
            "max_position_embeddings": 16384,
        },
        "--max-context 8191",
    ),
    "dynamic NTK": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
        "'dynamic' makes keys depend",
    ),
    "narrow heads": ("llama", {"head_dim": 4}, "head_dim of 4; it must be 8 to 256"),
    "wide heads": ("llama", {"head_dim": 512}, "head_dim of 512; it must be 8 to 256"),
}


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "qwen3", "mistral"])
def test_no_mask_is_asked_beyond_the_row(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU such a read is an assert in the kernel, after which nothing works any more."""
    code, beyond = probe._mask_code, []

    def asked(sees: Any, local_size: int | None) -> int:
        def watched(*indices: Any) -> Any:
            try:
                return sees(*indices)
            except IndexError:
                beyond.append(indices)
                raise

        return code(watched, local_size)

    monkeypatch.setattr(probe, "_mask_code", asked)
    load(write_model(tmp_path, architecture))
    assert not beyond


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_served_exactly_is_refused(case: str, tmp_path: Path) -> None:
    architecture, settings, reason = REFUSALS[case]
    folder = write_model(tmp_path, architecture, **settings)
    with pytest.raises(ModelRefused, match=reason):
        load(folder)


def test_chunked_attention_within_one_chunk_is_served(tmp_path: Path) -> None:
    folder = write_model(
        tmp_path,
        "llama4_text",
        num_local_experts=2,
        intermediate_size_mlp=64,
        attention_chunk_size=128,
    )
    model = load(folder, max_context=128)
    assert [layer.window for layer in model.spec.layers] == [None] * 3
    assert_equal_to_eager(folder, model)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"model_type": "t5"}, "encoder-decoder"),
        ({"model_type": "gemma3", "text_config": {}, "vision_config": {}}, "images or sound"),
        ({"model_type": "clip_text_model"}, "no language model"),
        ({"model_type": "nobody_knows"}, "'nobody_knows' is unknown to transformers"),
        ({"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}, "never run"),
        ({"model_type": None}, "unknown to transformers"),
        ({"model_type": "bloom"}, "no max_position_embeddings"),
        ({"model_type": "llama", "hidden_size": "many"}, "not accepted by transformers"),
    ],
)
def test_what_is_no_text_decoder_is_refused(
    settings: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    folder = write_model(tmp_path)
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelRefused, match=reason):
        load(folder)
