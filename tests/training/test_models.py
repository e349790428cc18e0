"""The model code: training's forward, the streaming reader and transformers agree; folders load."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    SmolLM3ForCausalLM,
)

from longctx.embedded import MODELS, model_path
from longctx.needles import generator
from longctx.needles.grammar import sentence
from longctx.needles.values import Words
from longctx.training import corpus, export
from longctx.training import tokenizer as tokenizers
from longctx.training.batches import Batches, Shape
from longctx.training.evaluate import Trial, depth_trend, wilson
from longctx.training.model import WIDTH, Batch, forward, needle_config, new_needle
from longctx.training.muon import orthogonal
from longctx.training.probe import damage, score
from longctx.training.reader import Reader
from longctx.training.rounding import ROUNDINGS
from longctx.training.train import Lessons, rate_at
from longctx.training.widen import widen


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    import random

    rng, words = random.Random(1), Words(heldout=None)
    return tokenizers.train((sentence(rng, words) for _ in range(4000)), 2048)


@pytest.fixture(scope="module")
def folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("needle")
    tokenizers.save(
        tokenizer, base / "tokenizer", template=tokenizers.NEEDLE_TEMPLATE, max_tokens=1 << 20
    )
    export.write(new_needle(3), base / "tokenizer", base / "model")
    return base / "model"


@pytest.fixture(scope="module")
def auto(folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def reader(folder: Path) -> Reader:
    return Reader(folder)


def random_ids(tokens: int) -> torch.Tensor:
    return torch.randint(6, 2000, (1, tokens), generator=torch.Generator().manual_seed(1))


def test_an_unknown_model_is_named_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="choose one of needle, probe"):
        model_path("thimble")
    assert model_path() == model_path("needle")


def test_importing_the_package_and_the_generator_loads_no_torch() -> None:
    code = (
        "import sys, longctx.needles.generator\n"
        "sys.exit(bool({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("after", [1, 70, 200])
def test_the_reader_equals_transformers(reader: Reader, after: int) -> None:
    ids = random_ids(700)[:, : 500 + after]
    with torch.no_grad():
        wanted = reader.model(ids).logits[0, -1]
    memory = reader.read(ids[0, :500].tolist())
    got = reader.logits(memory, [memory.tail + ids[0, 500:].tolist()], len(memory.tail))[0]
    assert (got - wanted).abs().max() < 1e-4


def test_the_training_forward_equals_transformers(reader: Reader) -> None:
    ids, columns = random_ids(192), torch.arange(192)
    batch = Batch(
        documents=torch.zeros(1, 64, dtype=torch.long),
        questions=ids,
        answer_row=torch.zeros_like(columns),
        answer_column=columns,
        answer_token=columns,
        answer_place=torch.zeros_like(columns),
        memory_bias=torch.full((1, 64), -1e9),
        own_bias=torch.zeros(1, 192),
    )
    with torch.no_grad():
        difference = forward(reader.model, batch).logits - reader.model(ids).logits[0]
    assert difference.abs().max() < 1e-4


def test_codecs_lose_less_with_more_bits() -> None:
    keys, values = torch.randn(2, 2, 50, 64, generator=torch.Generator().manual_seed(2))
    errors = {
        name: float((rounding(keys, values)[0] - keys).abs().max())
        for name, rounding in ROUNDINGS.items()
    }
    assert errors["raw"] == 0 < errors["int8"] < 0.02 < errors["int4"] < errors["int2"]


def test_the_template_puts_documents_first_and_nothing_before_them(
    auto: PreTrainedTokenizerBase,
) -> None:
    def render(system: str, question: str, title: str) -> str:
        return str(
            auto.apply_chat_template(
                [{"role": "system", "content": system}, {"role": "user", "content": question}],
                documents=[{"title": title, "text": "The text."}],
                add_generation_prompt=True,
                tokenize=False,
            )
        )

    first, second = render("Be brief.", "Who?", "a"), render("Be long.", "What is it?", "b")
    assert first == "<s>The text.\n<|system|>Be brief.<|user|>Who?<|assistant|>"
    assert second.startswith("<s>The text.\n<|system|>Be long.")


def test_the_template_takes_parts_and_earlier_answers_and_refuses_tools(
    auto: PreTrainedTokenizerBase,
) -> None:
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "A?"}]},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "B?"},
    ]
    text = auto.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == "<s><|user|>A?<|assistant|>1</s><|user|>B?<|assistant|>"
    with pytest.raises(Exception, match="roles are"):
        auto.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


def test_digits_are_tokens_of_their_own_and_text_survives(tokenizer: Tokenizer) -> None:
    text = "Café 7421, naïve — \t日本 🎉\n\n  x = [1];"
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids) == text
    assert {"7", "4", "2", "1"} < set(tokenizer.encode("7421").tokens)
    assert tokenizer.encode("x").ids[0] == tokenizers.SPECIALS.index("<s>")


def test_every_supervised_token_is_the_next_of_its_row(tokenizer: Tokenizer) -> None:
    filler = np.array(tokenizer.encode(" ".join(["The road was long."] * 900)).ids, np.uint16)
    batch = Batches(tokenizer, filler, (), seed=4).make(9, Shape(groups=2))
    rows, columns = batch.answer_row, batch.answer_column
    following = batch.questions[rows, (columns + 1).clamp_max(127)]
    # a question of which only the first token is asked is followed by the next, or by nothing
    asked_whole = (following > tokenizers.SPECIALS.index("<|assistant|>")) & (columns < 127)
    assert (following == batch.answer_token)[asked_whole].all()
    assert asked_whole.float().mean() > 0.5
    assert (batch.answer_token == tokenizers.SPECIALS.index("</s>")).sum() >= 4
    placed = batch.answer_place >= 0
    ended = batch.answer_token == tokenizers.SPECIALS.index("</s>")
    copied = batch.documents.flatten()[batch.answer_place] == batch.answer_token
    assert copied[placed & ~ended].all()
    assert placed[ended].float().mean() > 0.7  # what follows the value shows that it ends
    assert placed.float().mean() > 0.5
    hidden = batch.memory_bias < -1e8
    assert hidden[0, 1024:].all() and not hidden[0, :1024].any()


def test_lessons_move_on_only_when_learned() -> None:
    lessons = Lessons()
    for _ in range(300):
        lessons.learned(0.2)
    assert lessons.number == 0
    for _ in range(2000):
        lessons.learned(0.95)
    assert lessons.number == len(Lessons.PLAN) - 1
    assert rate_at(0, 1000) < 0.02 and rate_at(200, 1000) == 1 and rate_at(999, 1000) == 0.01


def test_an_orthogonal_update_has_singular_values_near_one() -> None:
    update = torch.randn(2, 96, 32, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonal(update))
    assert values.min() > 0.6 and values.max() < 1.3


def test_wilson_brackets_the_share() -> None:
    low, high = wilson(99, 100)
    assert 0.94 < low < 0.99 < high <= 1


def trial(depth: float, right: bool) -> Trial:
    return Trial(wanted=("1",), got="1" if right else "2", depth=depth, kind="number", question="")


def test_a_change_of_accuracy_with_depth_is_noticed_and_chance_is_not() -> None:
    depths = [i / 200 for i in range(200)]
    falling = [trial(d, d < 0.6 or i % 3 == 0) for i, d in enumerate(depths)]
    even = [trial(d, i % 10 != 0) for i, d in enumerate(depths)]
    assert depth_trend([falling]) < 0.001 < 0.3 < depth_trend([even])
    assert depth_trend([even, falling]) < 0.01
    assert depth_trend([[trial(0.2, True), trial(0.7, True)]]) == 1


@pytest.mark.parametrize("width", [64, 160])
def test_a_widened_model_computes_what_the_narrow_one_did(width: int) -> None:
    narrow = new_needle(5)
    weights = {
        name: weight[tuple(slice(width if size == WIDTH else None) for size in weight.shape)]
        for name, weight in narrow.named_parameters()
    }
    config = needle_config()
    config.hidden_size = width
    small = SmolLM3ForCausalLM(config)
    small.load_state_dict(weights, strict=False)
    wide = new_needle(6)
    widen(wide, weights)
    ids = random_ids(90)
    with torch.no_grad():
        assert (wide(ids).logits - small(ids).logits).abs().max() < 1e-3
        assert (wide(ids).logits - narrow(ids).logits).abs().max() > 0.1


def test_evaluation_text_is_not_training_text() -> None:
    assert len(corpus.stdlib_text(0, 300_000)) == 300_000
    assert corpus.STDLIB.search("/usr/lib/python3.11/json/decoder.py")
    assert not corpus.STDLIB.search("/usr/lib/python3.11/site-packages/numpy/core.py")


@pytest.mark.parametrize("name", MODELS)
def test_shipped_folders_load_without_remote_code(name: str) -> None:
    path = model_path(name)
    model = AutoModelForCausalLM.from_pretrained(path)
    shipped = AutoTokenizer.from_pretrained(path)
    assert len(shipped) == model.config.vocab_size
    assert model.dtype == torch.bfloat16
    generation = json.loads((path / "generation_config.json").read_text())
    assert generation["eos_token_id"] == shipped.eos_token_id == model.config.eos_token_id
    assert (path / "model.safetensors").stat().st_size < 6e6
    assert "longctx" in (path / "README.md").read_text()


def test_the_needle_folder_says_which_layer_is_global() -> None:
    config = json.loads((model_path("needle") / "config.json").read_text())
    assert config["layer_types"] == ["sliding_attention"] * 3 + ["full_attention"]
    assert config["no_rope_layers"] == [1, 1, 1, 0]
    assert config["use_sliding_window"] and config["sliding_window"] == 64


def test_needle_finds_a_needle_at_each_depth_in_a_small_text() -> None:
    reader = Reader(model_path("needle"))
    text = generator.haystack(1500, seed=3, count_tokens=lambda t: len(reader.encode(t)))
    found = 0
    needles = [generator.needle(seed, kind="number") for seed in range(10)]
    depths = [(i + 0.5) / 10 for i in range(10)]
    mixed = generator.insert(text, [needle.statement for needle in needles], depths)
    memory = reader.read(reader.document(mixed))
    answers = reader.answer(memory, [reader.question(needle.question) for needle in needles])
    for needle, ids in zip(needles, answers, strict=True):
        found += reader.tokenizer.decode(ids) == needle.answer
    assert found >= 9


def test_the_probe_models_text_below_two_bits_a_character_and_copies() -> None:
    result = score(model_path("probe"), rows=8, tokens=384)
    assert result.bits_per_character < 2.0
    assert result.repeated_nats < result.first_nats / 2


def test_the_probe_tells_codecs_apart() -> None:
    int8, int4, int2 = damage(model_path("probe"), rows=8, tokens=256).values()
    assert int8.kl + int8.kl_error < int4.kl - int4.kl_error
    assert int4.kl + int4.kl_error < int2.kl - int2.kl_error
    assert int8.flips < int4.flips < int2.flips
