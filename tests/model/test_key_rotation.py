"""How each kind of model turns its keys is found, and checked against keys encoded in place."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from longctx.model.hf_attention import ATTENTION, register_attention
from longctx.model.key_rotation import find_relocation
from longctx.model.layer_attention import AttentionCall
from longctx.model.loader import LoadedModel
from tests.support.assembled import (
    MODULES,
    DenseModel,
    assert_equals_dense_pass,
    literal,
    prompt,
    reused,
    with_modules,
)
from tests.support.plain_attention import load, some_tokens
from tests.support.recorded_engine import build_engine
from tests.support.tiny_models import BASE, OWN, ROPE_VARIANTS, write_model
from tests.support.tiny_tokenizer import write_tokenizer

LONG = {"max_position_embeddings": 20_000}

# Name -> (architecture, configuration, and for each layer: pairs that turn, neighbors or not).
FOUND: dict[str, tuple[str, dict[str, Any], list[tuple[int, bool] | None]]] = {
    "plain": ("llama", {}, [(8, False)] * 3),
    "partial, by halves": ("gpt_neox", {"rotary_pct": 0.5}, [(4, False)] * 3),
    "partial, phi": ("phi", {"partial_rotary_factor": 0.5}, [(4, False)] * 3),
    "partial, of neighbors": ("glm4", {}, [(4, True)] * 3),
    "of neighbors, and layers without": ("cohere2", {}, [(8, True), None] * 2),
    "layers without": ("smollm3", {}, [(8, False)] * 3 + [None]),
    "complex numbers": (
        "llama4_text",
        {
            "num_hidden_layers": 4,
            "no_rope_layers": [1, 1, 1, 0],
            "intermediate_size_mlp": 128,
            "floor_scale": 40_000,
            "attention_chunk_size": 40_000,
        },
        [(8, True)] * 3 + [None],
    ),
    "two frequencies": ("gemma3_text", {}, [(8, False)] * 4),
    "normalized keys": ("qwen3", {}, [(8, False)] * 3),
    "experts, YaRN": ("gpt_oss", {}, [(8, False)] * 4),
    **{
        name: (*ROPE_VARIANTS[name], [(8, False)] * 3)
        for name in ("linear", "llama3", "yarn", "longrope")
    },
}


class Keys:
    """A `LayerAttention` that keeps every layer's keys, and lets no token see another."""

    def __init__(self) -> None:
        self.of_layer: list[Tensor] = []  # each [tokens, kv_heads, head_dim]

    def place(self, layer: int) -> None:
        return None

    def by_kernels(self) -> None:
        return None

    def attend(self, call: AttentionCall, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        self.of_layer.append(key)
        return value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)


def keys_at(model: LoadedModel, tokens: Tensor, position: int) -> list[Tensor]:
    keys = Keys()
    positions = torch.full((len(tokens),), position)
    model.forward(tokens, positions, keys, torch.tensor([0]))
    return keys.of_layer


@pytest.mark.parametrize("name", list(FOUND))
def test_turned_keys_are_those_encoded_in_place(tmp_path: Path, name: str) -> None:
    architecture, options, expected = FOUND[name]
    model = load(write_model(tmp_path, architecture, **LONG | options))
    relocation = model.spec.relocation
    assert relocation.shiftable, relocation.reason
    rotations = relocation.rotations
    assert expected == [r and (len(r.frequencies), r.interleaved) for r in rotations]
    tokens = some_tokens(8, seed=3)
    for begin, end in ((0, 7), (5_000, 5_500), (0, 10_000), (10_000, 17)):
        pairs = zip(keys_at(model, tokens, begin), keys_at(model, tokens, end), strict=True)
        for rotation, (encoded, in_place) in zip(rotations, pairs, strict=True):
            moved = encoded
            if rotation is not None:
                moved = rotation.turn(encoded, *rotation.turns(torch.tensor([end - begin])))
            # Angles in float32 are off by 6e-8 of themselves: 0.0006 at position 10,000.
            assert (moved - in_place).norm() <= 1e-3 * in_place.norm()


def test_layer_groups_turn_at_their_own_frequencies(tmp_path: Path) -> None:
    rotations = load(write_model(tmp_path, "gemma3_text", **LONG)).spec.relocation.rotations
    assert rotations[0] == rotations[2] != rotations[1] == rotations[3]


def test_bfloat16_keys_are_told_apart_too(tmp_path: Path) -> None:
    model = load(write_model(tmp_path, "glm4", **LONG), dtype="bfloat16")
    assert model.spec.relocation.shiftable, model.spec.relocation.reason


def test_learned_positions_are_not_shiftable(tmp_path: Path) -> None:
    relocation = load(write_model(tmp_path, "gpt2")).spec.relocation
    assert not relocation.shiftable and not relocation.rotations
    assert "hidden states" in relocation.reason


@pytest.mark.parametrize(
    ("architecture", "rope"),
    [
        ("phi3", ROPE_VARIANTS["longrope"][1]),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}}),
    ],
)
def test_rotations_that_depend_on_length_are_not_shiftable(
    architecture: str, rope: dict[str, Any]
) -> None:
    """As transformers computes them; the server pins the first kind and refuses the second."""
    settings = CONFIG_MAPPING[architecture](**(BASE | OWN[architecture] | rope))
    register_attention()
    model: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(settings)](settings)
    model.set_attn_implementation(ATTENTION)
    with torch.inference_mode():
        relocation = find_relocation(
            model.eval(), vocab_size=settings.vocab_size, max_context=20_000
        )
    assert not relocation.shiftable
    assert "depends on the length of the context" in relocation.reason


def test_a_context_too_short_to_tell_is_not_shiftable(tmp_path: Path) -> None:
    relocation = load(write_model(tmp_path, "llama"), max_context=20).spec.relocation
    assert not relocation.shiftable
    assert "too short" in relocation.reason


@pytest.mark.parametrize("name", ["linear", "llama3", "yarn", "partial, phi", "two frequencies"])
def test_modules_that_moved_far_equal_a_dense_pass(tmp_path: Path, name: str) -> None:
    architecture, options, _ = FOUND[name]
    write_tokenizer(write_model(tmp_path, architecture, **LONG | options))
    requests = [
        prompt(
            "far",
            literal(70, 1),
            reused("a", position=9_000),
            literal(30, 2),
            reused("d", position=9_300, link=5),
            literal(4, 3),
        ),
        prompt("near", reused("d"), reused("a", position=400), literal(9, 4)),
    ]
    engine = build_engine(tmp_path, codec="raw", max_batch_tokens=64)
    with_modules(engine, MODULES)
    engine.finish(*requests)
    assert_equals_dense_pass(engine, DenseModel(tmp_path), MODULES, *requests, tolerance=2e-3)
