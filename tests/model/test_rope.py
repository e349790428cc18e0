"""Rotary types stay exact beside other sequences, and the context length is what was asked for."""

import json
from pathlib import Path

import pytest

from longctx.errors import ModelRefused
from tests.support.plain_attention import (
    assert_equal_to_eager,
    eager_logits,
    edit_config,
    load,
    packed_logits,
    some_tokens,
)
from tests.support.tiny_models import ROPE_VARIANTS, write_model


@pytest.mark.parametrize("variant", [name for name in ROPE_VARIANTS if name != "longrope"])
def test_each_rotary_type_equals_eager_transformers(variant: str, tmp_path: Path) -> None:
    architecture, settings = ROPE_VARIANTS[variant]
    folder = write_model(tmp_path, architecture, **settings)
    assert_equal_to_eager(folder, load(folder))


def longrope_folder(folder: Path) -> Path:
    architecture, settings = ROPE_VARIANTS["longrope"]
    return write_model(folder, architecture, **settings)


def test_longrope_is_pinned_to_its_short_set_by_a_short_context(tmp_path: Path) -> None:
    folder = longrope_folder(tmp_path)
    model = load(folder, max_context=64)
    tokens = some_tokens(50, 0)
    (logits,) = packed_logits(model, [tokens])
    assert (logits - eager_logits(folder, tokens)).abs().max() < 1e-4


def test_longrope_is_pinned_to_its_long_set_by_a_long_context(tmp_path: Path) -> None:
    folder = longrope_folder(tmp_path)
    model = load(folder)
    long, short = some_tokens(80, 0), some_tokens(50, 1)
    (long_logits, short_logits) = packed_logits(model, [long, short])
    assert (long_logits - eager_logits(folder, long)).abs().max() < 1e-4
    assert (short_logits - eager_logits(folder, short)).abs().max() > 0.1  # the short set there
    rope = json.loads((folder / "config.json").read_text())["rope_parameters"]
    edit_config(folder, rope_parameters=rope | {"short_factor": rope["long_factor"]})
    assert (short_logits - eager_logits(folder, short)).abs().max() < 1e-4


@pytest.mark.parametrize("max_context", [64, None])
def test_a_long_neighbor_changes_no_longrope_logits(
    max_context: int | None, tmp_path: Path
) -> None:
    model = load(longrope_folder(tmp_path), max_context=max_context)
    short = some_tokens(20, 1)
    alone = packed_logits(model, [short])[0]
    beside = packed_logits(model, [some_tokens(max_context or 200, 0), short])[1]
    assert (alone - beside).abs().max() < 1e-4


def test_the_longrope_set_is_part_of_the_rope_identity(tmp_path: Path) -> None:
    folder = longrope_folder(tmp_path)
    short, shorter = load(folder, max_context=64), load(folder, max_context=40)
    long = load(folder, max_context=65)
    assert short.spec.rope_identity == shorter.spec.rope_identity != long.spec.rope_identity
    assert short.spec.fingerprint == long.spec.fingerprint


def test_the_context_is_the_trained_one_by_default(tmp_path: Path) -> None:
    assert load(write_model(tmp_path)).spec.max_context == 2048


def test_a_context_beyond_the_trained_one_needs_force(tmp_path: Path) -> None:
    folder = write_model(tmp_path)
    with pytest.raises(ModelRefused, match=r"beyond the 2048 tokens.*--force-context"):
        load(folder, max_context=2049)
    assert load(folder, max_context=2049, force_context=True).spec.max_context == 2049


def test_learned_positions_cannot_be_forced(tmp_path: Path) -> None:
    folder = write_model(tmp_path, "gpt2")
    with pytest.raises(ModelRefused, match="512 learned positions"):
        load(folder, max_context=513, force_context=True)


def test_a_context_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_context=0"):
        load(write_model(tmp_path), max_context=0)


@pytest.mark.parametrize("max_context", [1, 2, 5])
def test_a_context_of_a_few_tokens_is_served(max_context: int, tmp_path: Path) -> None:
    assert load(write_model(tmp_path), max_context=max_context).spec.max_context == max_context


def test_a_yarn_override_extends_the_context_and_equals_the_same_config(tmp_path: Path) -> None:
    folder = write_model(tmp_path, max_position_embeddings=64)
    plain = load(folder)
    model = load(folder, rope_override='{"rope_type": "yarn", "factor": 4.0}')
    assert (plain.spec.max_context, model.spec.max_context) == (64, 256)
    assert plain.spec.rope_identity != model.spec.rope_identity
    parameters = {
        "rope_theta": 10000.0,
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    assert_equal_to_eager(edit_config(folder, rope_parameters=parameters), model)


def test_an_override_may_choose_one_layer_type(tmp_path: Path) -> None:
    folder = write_model(tmp_path, "gemma3_text")
    override = {"full_attention": {"rope_type": "linear", "factor": 2.0}}
    model = load(folder, rope_override=json.dumps(override))
    assert model.spec.max_context == 4096
    parameters = json.loads((folder / "config.json").read_text())["rope_parameters"]
    parameters["full_attention"] |= override["full_attention"]
    assert_equal_to_eager(edit_config(folder, rope_parameters=parameters), model)


@pytest.mark.parametrize(
    ("architecture", "override", "reason"),
    [
        ("llama", "{", "not valid JSON"),
        ("llama", "[]", "must be a JSON object"),
        ("llama", '{"rope_type": "yarn"}', "needs a factor"),
        ("llama", '{"rope_type": "nonsense"}', "nonsense"),
        ("llama", '{"rope_type": "longrope", "factor": 2.0}', "needs long_factor"),
        ("llama", '{"rope_type": "linear", "factor": "two"}', "needs a factor"),
        ("llama", '{"rope_type": "dynamic", "factor": 2.0}', "longest sequence"),
        ("gemma3_text", '{"rope_type": "linear", "factor": 2.0}', "per layer type"),
        ("gpt2", '{"rope_type": "linear", "factor": 2.0}', "no rotary positions"),
    ],
)
def test_an_override_that_makes_no_sense_is_refused(
    architecture: str, override: str, reason: str, tmp_path: Path
) -> None:
    folder = write_model(tmp_path, architecture)
    with pytest.raises(ModelRefused, match=reason):
        load(folder, rope_override=override)
