"""Modules and prompts made of them: what they mean, whatever the model, level or neighbor."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.request import Piece, Request, Segment
from tests.conftest import ModelFolders
from tests.support.assembled import (
    MODULES,
    DenseModel,
    assert_equals_dense_pass,
    encode,
    literal,
    prompt,
    reused,
    with_modules,
)
from tests.support.recorded_engine import RecordedEngine, build_engine, some_ids

ARCHITECTURES = ("llama", "qwen3", "gemma2", "gemma3_text", "smollm3", "glm4", "olmo2", "cohere2")


# -- positions and cuts -----------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", "torch", "auto"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_text_with_gaps_and_cuts_equals_a_dense_pass_at_these_positions(
    architecture: str, backend: str, model_folders: ModelFolders
) -> None:
    folder = model_folders(architecture)
    model = DenseModel(folder)
    requests = [
        prompt(
            "gaps", literal(70, 1), literal(30, 2, 100), literal(5, 3, 131), literal(90, 4, 400)
        ),
        prompt("begins late", literal(9, 5, 300), literal(3, 6, 303 + 64)),
        prompt("cuts", literal(70, 1), literal(10, 2, cut=True), literal(64, 3, cut=True)),
        prompt("a window away", literal(100, 7), literal(1, 8, 120), literal(1, 9, 124)),
    ]
    for max_batch_tokens in (17, 96, 512):
        engine = build_engine(folder, backend=backend, max_batch_tokens=max_batch_tokens)
        engine.finish(*requests)
        assert_equals_dense_pass(engine, model, {}, *requests)
        engine.assert_idle()


# -- modules ----------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_assembled_prompts_equal_a_dense_pass(
    architecture: str, model_folders: ModelFolders
) -> None:
    folder = model_folders(architecture)
    model = DenseModel(folder)
    requests = [
        prompt("one", reused("a"), literal(9, 1)),
        prompt("alone", reused("d")),
        prompt("argument", reused("b", 0), literal(7, 2, 165), reused("b", 1), literal(5, 3)),
        prompt(
            "all",
            *(reused(m, p) for m, p in (("a", 0), ("b", 0), ("b", 1), ("c", 0))),
            reused("d", 0),
            literal(70, 4),
        ),
        prompt(
            "linked",
            reused("a", link=16),
            reused("b", 0, link=16),
            literal(3, 5, 170),
            reused("b", 1),
            reused("d", link=64),
            literal(4, 6, 400),
        ),
        prompt("opening", literal(30, 7), reused("b", 0, link=100), reused("b", 1, link=3)),
        prompt("exact", reused("a", link=None), reused("c", link=None), literal(6, 8)),
        prompt("few", literal(1, 9), reused("c", 0), literal(1, 9)),
    ]
    for max_batch_tokens in (40, 512):
        engine = with_modules(build_engine(folder, max_batch_tokens=max_batch_tokens), MODULES)
        engine.finish(encode("a"), encode("b"))
        engine.finish(*requests)
        assert_equals_dense_pass(engine, model, MODULES, *requests)
        engine.assert_idle()


def logits_of(engine: RecordedEngine, *requests: Request) -> list[list[torch.Tensor]]:
    """Return all rows of logits that each request sampled from, in order."""
    engine.finish(*requests)
    assert not any(engine.answered[request.request_id].errors for request in requests)
    return [
        [row for _, row in sorted(engine.logits[request.request_id, 0].items())]
        for request in requests
    ]


def assert_equal_rows(a: list[torch.Tensor], b: list[torch.Tensor], tolerance: float) -> None:
    assert len(a) == len(b) > 0
    for one, other in zip(a, b, strict=True):
        assert float((one - other).abs().max()) < tolerance


SIX = ("llama", "qwen3", "gemma3_text", "smollm3", "glm4", "olmo2")


@pytest.mark.parametrize("codec", ["raw", "bf16", "int8", "int4"])
@pytest.mark.parametrize("architecture", SIX)
def test_levels_meet_where_they_say_the_same(
    architecture: str, codec: str, model_folders: ModelFolders
) -> None:
    """One module without a gap: modular is exact. A link as long as the module: exact too."""
    engine = build_engine(model_folders(architecture), codec=codec, pool_gib=0.05)
    modules = {
        "first": [Piece(token_ids=some_ids(150, 1), position=0)],
        "second": [Piece(token_ids=some_ids(70, 2), position=150)],
    }
    with_modules(engine, modules)
    engine.finish(encode("first"), encode("second"))
    question = literal(11, 3)
    modular, exact, linked, both, all_linked = logits_of(
        engine,
        prompt("modular", reused("first"), question),
        prompt("exact", reused("first", link=None), question, salt="apart"),
        prompt("linked", reused("first", link=150), question, salt="again"),
        prompt("both", *(reused(m, link=None) for m in modules), question, salt="apart"),
        prompt("all linked", *(reused(m, link=1000) for m in modules), question),
    )
    assert_equal_rows(modular, exact, 1e-4)
    assert_equal_rows(linked, exact, 1e-4)
    assert_equal_rows(all_linked, both, 1e-4)
    assert engine.answered["modular"].counts.reused_tokens == 150
    assert engine.answered["exact"].counts.reused_tokens == 0
    assert engine.answered["exact"].counts.cached_tokens == 0
    engine.assert_idle()


@pytest.mark.parametrize("codec", ["raw", "int4"])
@pytest.mark.parametrize("architecture", SIX)
def test_a_scaffold_is_its_members_encoded_together(
    architecture: str, codec: str, model_folders: ModelFolders
) -> None:
    engine = build_engine(model_folders(architecture), codec=codec, pool_gib=0.05)
    members = [
        Piece(token_ids=some_ids(100, 1), position=0),
        Piece(token_ids=some_ids(30, 2), position=100),
        Piece(token_ids=some_ids(64, 3), position=150),
    ]
    with_modules(engine, {"scaffold": members})
    question = literal(11, 4)
    reusing, computing = logits_of(
        engine,
        prompt("reusing", *(reused("scaffold", i) for i in range(3)), question),
        prompt(
            "computing",
            *(reused("scaffold", i, link=None) for i in range(3)),
            question,
            salt="apart",
        ),
    )
    assert_equal_rows(reusing, computing, 1e-4)
    assert engine.answered["reusing"].counts.cached_tokens == 194


def test_reuse_computes_only_what_is_new(llama: Path) -> None:
    engine = with_modules(build_engine(llama), MODULES)
    engine.finish(encode("a"), encode("b"))
    before = engine.runner.computed_tokens
    (answered,) = engine.finish(
        prompt("p", reused("a"), reused("b", link=16), literal(7, 1), max_tokens=1)
    )
    assert engine.runner.computed_tokens - before == 16 + 7
    assert answered.counts.prompt_tokens == 100 + 65 + 7
    assert answered.counts.cached_tokens == answered.counts.reused_tokens == 100 + 65 - 16
    assert answered.counts.linked_tokens == 16
    assert answered.counts.computed_tokens == 23
    assert answered.progress[-1].processed == answered.progress[-1].total == 172


def test_an_explanation_tells_what_is_reused_from_what_is_computed(llama: Path) -> None:
    engine = with_modules(build_engine(llama), MODULES)
    segments = reused("a", link=16), reused("d"), literal(70, 1)
    explanations = []
    for name in ("first", "again"):
        request = replace(prompt(name, *segments), explain=True)
        (answered,) = engine.finish(request)
        told = answered.counts.explanation
        assert told is not None
        assert (told.prompt_tokens, told.reused_tokens, told.linked_tokens) == (298, 212, 16)
        assert told.found_tokens["device"] + 212 == answered.counts.cached_tokens
        explanations.append(told)
    first, again = explanations
    assert first.reason == "never_seen" and again.reason == "below_block"
    assert (first.found_tokens["device"], again.found_tokens["device"]) == (0, 16 + 64)
    assert first.detail.startswith(
        "212 tokens are used as they were encoded elsewhere (2 of its parts were not on the device "
        "and came first), and 16 of the same parts are computed in context; of the rest, found up "
        "to token 0; what follows was never seen"
    )
    assert "came first" not in again.detail


def test_a_module_that_was_never_encoded_is_encoded_when_it_is_needed(llama: Path) -> None:
    engine = with_modules(build_engine(llama), MODULES)
    request = prompt("p", reused("a"), reused("d"), literal(7, 1))
    engine.finish(request)
    assert_equals_dense_pass(engine, DenseModel(llama), MODULES, request)
    assert set(engine.answered) == {"p"}, "the engine's own requests are nobody's business"


@st.composite
def schemas(draw: st.DrawFn) -> tuple[dict[str, list[Piece]], list[Segment]]:
    """Modules of any shape, and a prompt of some of their pieces with text between them."""
    modules: dict[str, list[Piece]] = {}
    for number in range(draw(st.integers(1, 3))):
        pieces, position = [], draw(st.integers(0, 40))
        for _ in range(draw(st.integers(1, 3))):
            token_ids = some_ids(draw(st.integers(1, 90)), draw(st.integers(0, 10_000)))
            pieces.append(Piece(token_ids=token_ids, position=position))
            position += len(token_ids) + draw(st.integers(0, 20))
        modules[f"m{number}"] = pieces
    segments: list[Segment] = []
    position = 0
    for _ in range(draw(st.integers(1, 6))):
        if draw(st.booleans()):
            gap = draw(st.none() | st.integers(0, 50))
            token_ids = some_ids(draw(st.integers(1, 80)), draw(st.integers(0, 10_000)))
            at = None if gap is None else position + gap
            cut = draw(st.booleans())
            segments.append(Segment(token_ids=token_ids, position=at, cut=cut))
            position += len(token_ids) + (gap or 0)
        else:
            module_id = draw(st.sampled_from(sorted(modules)))
            number = draw(st.integers(0, len(modules[module_id]) - 1))
            piece = modules[module_id][number]
            at = draw(st.integers(position, position + 30))
            if piece.position >= position and draw(st.booleans()):
                at = piece.position
            link = draw(st.sampled_from([None, 0, 0, 1, 16, 64, 100]))
            segments.append(reused(module_id, number, link=link, position=at))
            position = at + len(piece.token_ids)
    return modules, segments


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_any_prompt_of_any_modules_equals_a_dense_pass(
    architecture: str, model_folders: ModelFolders
) -> None:
    folder = model_folders(architecture)
    model = DenseModel(folder)
    engines = [
        build_engine(folder, backend=backend, max_batch_tokens=max_batch_tokens, pool_gib=0.05)
        for backend, max_batch_tokens in (("auto", 512), ("torch", 70))
    ]

    numbers = itertools.count()

    @settings(max_examples=12, deadline=None, database=None)
    @given(schema=schemas())
    def equals(schema: tuple[dict[str, list[Piece]], list[Segment]]) -> None:
        modules, segments = schema
        request = prompt(f"{next(numbers)}", *segments, max_tokens=2)
        for engine in engines:
            with_modules(engine, modules)
            engine.finish(request)
            assert_equals_dense_pass(engine, model, modules, request, tolerance=5e-4)
            for module_id in modules:
                engine.close_module(module_id)

    equals()
    for engine in engines:
        engine.assert_idle()


# -- what may be shared -----------------------------------------------------------------------


def test_what_follows_equal_modules_is_shared_only_after_equal_beginnings(llama: Path) -> None:
    """The blocks after a module depend on everything before it, though its own do not."""
    engine = with_modules(build_engine(llama), MODULES)
    tail = literal(130, 1)
    requests = [
        prompt("after a", reused("a"), reused("d"), tail),
        prompt("after c", reused("c"), reused("d"), tail),
        prompt("linked", reused("a"), reused("d", link=8), tail),
        prompt("text", literal(4, 9), reused("d"), tail),
        prompt("other text", literal(4, 8), reused("d"), tail),
        prompt("alone", reused("d"), tail),
    ]
    model = DenseModel(llama)
    for request in requests:
        (answered,) = engine.finish(request)
        assert answered.counts.cached_tokens == answered.counts.reused_tokens, request.request_id
    assert_equals_dense_pass(engine, model, MODULES, *requests)
    engine.logits.clear()
    again = [prompt(f"{request.request_id} again", *request.segments) for request in requests]
    for request, answered in zip(again, engine.finish(*again), strict=True):
        found = answered.counts.cached_tokens - answered.counts.reused_tokens
        assert found >= 128, request.request_id
    assert_equals_dense_pass(engine, model, MODULES, *again)
    engine.assert_idle()


def test_a_plain_hash_chain_would_have_served_wrong_blocks(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test above would fail if what follows a module were named after its last block alone."""
    monkeypatch.setattr(
        "longctx.kv.layout.after_reused", lambda before, *, last, begin, end, position: last
    )
    engine = with_modules(build_engine(llama), MODULES)
    tail = literal(130, 1)
    engine.finish(prompt("after a", reused("a"), reused("d"), tail))
    wrong = prompt("after c", reused("c"), reused("d"), tail)
    engine.finish(wrong)
    with pytest.raises(AssertionError):
        assert_equals_dense_pass(engine, DenseModel(llama), MODULES, wrong)


def test_what_a_module_leaves_is_the_ordinary_prefix_where_nothing_differs(llama: Path) -> None:
    engine = with_modules(build_engine(llama), MODULES)
    tail = literal(130, 1)
    engine.finish(prompt("reused", reused("a"), tail))
    (exact,) = engine.finish(prompt("exact", reused("a", link=None), tail))
    assert exact.counts.cached_tokens == 100 + 128


def test_another_tenant_shares_nothing(llama: Path) -> None:
    engine = with_modules(build_engine(llama), MODULES)
    segments = reused("a"), literal(70, 1)
    engine.finish(prompt("mine", *segments, salt="one"))
    before = engine.runner.computed_tokens
    engine.finish(prompt("yours", *segments, salt="two", max_tokens=1))
    assert engine.runner.computed_tokens - before == 170
