"""Modules among others: shared, moved, evicted, restored, closed; never computed twice at once."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from compress.shape import BLOCK_TOKENS
from longctx.errors import ContextTooLong, DocumentMissing, InvalidRequest
from longctx.request import FinishReason, Piece, Request, Segment
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
from tests.support.recorded_engine import (
    RecordedEngine,
    ask,
    build_engine,
    engine_config,
    gib_of_blocks,
    some_ids,
)

FAMILY = ("llama", "gemma3_text", "smollm3", "glm4")


def durable_engine(folder: Path, store: Path, **options: object) -> RecordedEngine:
    config = engine_config(**options)  # type: ignore[arg-type]
    cache = replace(config.cache, kv_dir=store, disk_cap_gib=1.0)
    return RecordedEngine(replace(config, cache=cache), folder)


# -- shared -----------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_fifty_requests_at_different_places_hold_one_copy(
    architecture: str, model_folders: ModelFolders
) -> None:
    folder = model_folders(architecture)
    engine = build_engine(folder, max_sequences=50, pool_gib=0.05)
    modules = {"m": [Piece(token_ids=some_ids(500, 1), position=0)]}
    with_modules(engine, modules)
    engine.finish(encode("m"))
    requests = [
        prompt(f"{i}", literal(3, i), reused("m", position=7 * i + 3), literal(2, i))
        for i in range(50)
    ]
    for request in requests:
        engine.submit(request)
    engine.take_step()
    assert len(engine.scheduler.running) == 50
    held = engine.memory.packed[0].held
    # Eight blocks of the module, and for each request the short one before it.
    assert held == 8 + 50, held
    engine.finish()
    assert_equals_dense_pass(
        engine, DenseModel(folder), modules, requests[0], requests[17], requests[49]
    )
    engine.assert_idle()


def test_requests_that_need_the_same_module_wait_for_one_computation(llama: Path) -> None:
    engine = with_modules(build_engine(llama, max_batch_tokens=40), MODULES)
    requests = [prompt(f"{i}", reused("d"), literal(1, i), max_tokens=1) for i in range(6)]
    engine.finish(*requests)
    assert engine.runner.computed_tokens == 128 + 6
    assert_equals_dense_pass(engine, DenseModel(llama), MODULES, *requests)
    engine.assert_idle()


def test_the_choices_of_a_request_share_what_it_borrows(llama: Path) -> None:
    engine = with_modules(build_engine(llama), MODULES)
    request = prompt("p", reused("a"), literal(5, 1), reused("d"), literal(3, 2), n=3)
    (answered,) = engine.finish(request)
    assert answered.tokens[0] == answered.tokens[1] == answered.tokens[2]
    assert_equals_dense_pass(engine, DenseModel(llama), MODULES, request)
    engine.assert_idle()


# -- moved ------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["raw", "int8"])
@pytest.mark.parametrize("architecture", FAMILY)
def test_pieces_stand_in_any_order_and_place(
    architecture: str, codec: str, model_folders: ModelFolders
) -> None:
    folder = model_folders(architecture)
    requests = [
        prompt("moved", literal(9, 1), reused("a", position=9), literal(4, 2)),
        prompt(
            "turned round",
            reused("d", position=0),
            reused("a", position=128, link=5),
            literal(4, 3, 300),
            reused("b", 1, position=310),
            literal(66, 4),
        ),
        prompt("twice", reused("a"), reused("a", position=100), literal(4, 5)),
        prompt("far", reused("c", position=1500), literal(2, 5)),
    ]
    for backend in ("torch", "auto"):
        engine = build_engine(folder, codec=codec, backend=backend, max_batch_tokens=64)
        with_modules(engine, MODULES)
        engine.finish(*requests)
        tolerance = 5e-4 if codec == "raw" else 0.7
        assert_equals_dense_pass(
            engine, DenseModel(folder), MODULES, *requests, tolerance=tolerance
        )
        engine.assert_idle()


def test_a_model_whose_keys_cannot_be_turned_uses_modules_where_they_were_encoded(
    model_folders: ModelFolders,
) -> None:
    folder = model_folders("gpt2")
    engine = with_modules(build_engine(folder), MODULES)
    request = prompt("q", reused("a"), reused("b", link=9), literal(5, 1, 300))
    engine.finish(request)
    assert_equals_dense_pass(engine, DenseModel(folder), MODULES, request)
    with pytest.raises(InvalidRequest, match="another position than it was encoded at"):
        engine.submit(prompt("moved", reused("a", position=1), literal(5, 1)))
    engine.assert_idle()


@pytest.mark.parametrize("architecture", FAMILY)
def test_documents_are_reused_after_any_text_and_in_any_order(
    architecture: str, model_folders: ModelFolders
) -> None:
    folder = model_folders(architecture)
    engine = build_engine(folder, pool_gib=0.05)
    opening = some_ids(7, 1)
    texts = {"x": some_ids(300, 2), "y": some_ids(200, 3), "z": some_ids(30, 4)}
    for name, token_ids in texts.items():
        engine.open_document(name, np.array(token_ids, dtype=np.int32))
        engine.finish(ask(f"read {name}", opening, name, max_tokens=0))
    before = engine.runner.computed_tokens
    system, question = literal(20, 5), literal(6, 6)
    reused = [Segment(document_id=name, link_tokens=0) for name in ("y", "x", "z")]
    request = prompt("q", system, *reused, question, max_tokens=1)
    (answered,) = engine.finish(request)
    # Rows of the blocks that the documents filled, after the 7 tokens before them.
    assert answered.counts.reused_tokens == (192 - 7) + (256 - 7) + 0
    assert engine.runner.computed_tokens - before == 556 - answered.counts.reused_tokens
    documents = {name: (opening, token_ids) for name, token_ids in texts.items()}
    assert_equals_dense_pass(engine, DenseModel(folder), {}, request, documents=documents)
    linked = [Segment(document_id=name, link_tokens=16) for name in ("z", "y")]
    request = prompt("linked", system, *linked, question)
    engine.finish(request)
    assert_equals_dense_pass(engine, DenseModel(folder), {}, request, documents=documents)
    engine.close_document("x")
    with pytest.raises(DocumentMissing, match="document x is not open"):
        engine.submit(prompt("gone", *reused, question))
    engine.assert_idle()


def test_a_document_that_was_never_read_cannot_be_reused(llama: Path) -> None:
    engine = build_engine(llama)
    engine.open_document("x", np.array(some_ids(100, 1), dtype=np.int32))
    with pytest.raises(InvalidRequest, match="has not been ingested"):
        engine.submit(prompt("q", Segment(document_id="x", link_tokens=0), literal(3, 1)))


# -- kept and lost ----------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_modules_come_back_from_disk(
    architecture: str, model_folders: ModelFolders, tmp_path: Path
) -> None:
    folder = model_folders(architecture)
    request = prompt(
        "q",
        reused("a"),
        reused("b", 0),
        literal(4, 1, 170),
        reused("b", 1),
        reused("d", position=300),
        literal(5, 2),
    )
    first = with_modules(durable_engine(folder, tmp_path), MODULES)
    first.finish(*(encode(module_id) for module_id in MODULES))
    assert first.durable_changes()["b"] == 85
    states = first.module_states(MODULES)
    assert {states[m].durable_tokens for m in ("a", "b")} == {100, 85}
    assert {state.tier for state in states.values()} == {"device"}
    first.close(flush_seconds=10)

    second = with_modules(durable_engine(folder, tmp_path), MODULES)
    second.finish(*(encode(module_id) for module_id in MODULES))
    assert second.runner.computed_tokens == 0
    assert {state.tier for state in second.module_states(MODULES).values()} == {"disk"}
    second.finish(request)
    assert second.runner.computed_tokens == 4 + 5 + 3
    assert_equals_dense_pass(second, DenseModel(folder), MODULES, request)
    assert second.module_states(["a"])["a"].hits == 1
    second.close(flush_seconds=10)


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_evicted_modules_are_encoded_again(architecture: str, model_folders: ModelFolders) -> None:
    folder = model_folders(architecture)
    layers = 3 if architecture == "llama" else 4
    engine = build_engine(folder, pool_gib=gib_of_blocks(14, layers), max_sequences=2)
    modules = {f"m{i}": [Piece(token_ids=some_ids(150, i), position=0)] for i in range(6)}
    with_modules(engine, modules)
    requests = [
        prompt(
            f"{i}",
            reused(f"m{i % 6}"),
            reused(f"m{(2 * i + 1) % 6}", position=150),
            literal(5, i),
        )
        for i in range(12)
    ]
    engine.finish(*requests)
    assert engine.cache.resident_prefixes.freed > 0, "the pool is too large to show anything"
    assert_equals_dense_pass(engine, DenseModel(folder), modules, *requests)
    engine.assert_idle()


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_preemption_changes_nothing(architecture: str, model_folders: ModelFolders) -> None:
    folder = model_folders(architecture)
    layers = 3 if architecture == "llama" else 4
    engine = build_engine(folder, pool_gib=gib_of_blocks(13, layers), max_batch_tokens=96)
    with_modules(engine, MODULES)
    requests = [
        prompt(
            f"{i}",
            literal(10 * i + 1, i),
            reused("a", position=10 * i + 1),
            literal(70, 5),
            max_tokens=200,
        )
        for i in range(4)
    ]
    engine.finish(*requests)
    assert engine.preemptions > 0, "the pool is too large to show anything"
    assert_equals_dense_pass(engine, DenseModel(folder), MODULES, *requests)
    engine.assert_idle()


def test_an_answer_without_a_limit_takes_what_is_left_beside_what_is_reused(
    model_folders: ModelFolders,
) -> None:
    """A client that names no limit is not told that it asked for too much."""
    engine = with_modules(build_engine(model_folders("llama"), pool_gib=gib_of_blocks(13)), MODULES)
    parts = (literal(10, 1), reused("a", position=10), literal(70, 5))
    (answer,) = engine.finish(prompt("most", *parts, max_tokens=None))
    assert answer.reasons[0] == [FinishReason.LENGTH]
    room = len(answer.tokens[0])
    assert 8 * BLOCK_TOKENS < room < 13 * BLOCK_TOKENS
    with pytest.raises(ContextTooLong, match="with what it reuses takes 14 blocks"):
        engine.submit(prompt("more", *parts, max_tokens=room + 1))
    (plain,) = engine.finish(prompt("plain", literal(70, 6), max_tokens=None))
    assert len(plain.tokens[0]) == 13 * BLOCK_TOKENS - 70
    engine.assert_idle()


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_modules_that_do_not_fit_together_come_from_disk_by_turns(
    architecture: str, model_folders: ModelFolders, tmp_path: Path
) -> None:
    folder = model_folders(architecture)
    layers = 3 if architecture == "llama" else 4
    engine = durable_engine(folder, tmp_path, pool_gib=gib_of_blocks(14, layers), max_sequences=3)
    modules = {f"m{i}": [Piece(token_ids=some_ids(190, i), position=0)] for i in range(6)}
    with_modules(engine, modules)
    engine.finish(*(encode(module_id) for module_id in modules))
    before = engine.runner.computed_tokens
    requests = [
        prompt(
            f"{i}",
            reused(f"m{i % 6}", link=16 * (i % 2)),
            reused(f"m{(i + 2) % 6}", position=190),
            literal(5, i),
            max_tokens=1,
        )
        for i in range(8)
    ]
    engine.finish(*requests)
    # No module is computed again. The linked beginning of the last one is that of the second, if
    # that is still there: who goes first depends on what the device has.
    assert engine.runner.computed_tokens - before in (8 * 5 + 3 * 16, 8 * 5 + 4 * 16)
    assert engine.stats().tiers["disk"].hits > 0
    assert_equals_dense_pass(engine, DenseModel(folder), modules, *requests)
    while engine.has_transfers:
        engine.step()
    engine.assert_idle()
    engine.close(flush_seconds=10)


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_a_module_whose_file_is_gone_is_encoded_again(
    architecture: str, model_folders: ModelFolders, tmp_path: Path
) -> None:
    folder = model_folders(architecture)
    first = with_modules(durable_engine(folder, tmp_path), MODULES)
    first.finish(encode("a"), encode("d"))
    first.close(flush_seconds=10)
    for file in list(tmp_path.glob("*.kv"))[::2]:
        file.unlink()
    second = with_modules(durable_engine(folder, tmp_path), MODULES)
    request = prompt("q", reused("a"), reused("d"), literal(5, 2))
    second.finish(encode("a"), request)
    assert_equals_dense_pass(second, DenseModel(folder), MODULES, request)
    second.close(flush_seconds=10)


# -- given up ---------------------------------------------------------------------------------


def test_aborts_leave_nothing_behind(llama: Path) -> None:
    requests = [
        prompt("one", reused("a"), literal(80, 1), reused("d"), literal(80, 2)),
        prompt("two", reused("d"), literal(80, 1), reused("d", position=500), literal(9, 2)),
    ]
    for steps in range(8):
        engine = with_modules(build_engine(llama, max_batch_tokens=40), MODULES)
        for request in requests:
            engine.submit(request)
        for _ in range(steps):
            engine.take_step()
        for request in requests:
            engine.abort(request.request_id)
        engine.finish()
        assert engine.answered["one"].reason is FinishReason.ABORT
        engine.assert_idle()


def test_a_module_that_is_closed_serves_those_who_have_it(llama: Path) -> None:
    engine = with_modules(build_engine(llama), MODULES)
    request = prompt("q", reused("a"), literal(5, 1), max_tokens=20)
    engine.submit(request)
    while not engine.answered["q"].answer:
        engine.take_step()
    engine.close_module("a")
    with pytest.raises(DocumentMissing, match="module a is not open"):
        engine.submit(prompt("late", reused("a"), literal(5, 1)))
    engine.finish()
    assert_equals_dense_pass(engine, DenseModel(llama), MODULES, request)
    engine.assert_idle()


def test_who_waits_for_a_module_that_is_closed_hears_of_it(llama: Path) -> None:
    engine = with_modules(build_engine(llama, max_batch_tokens=40), MODULES)
    engine.submit(prompt("q", reused("d"), literal(5, 1)))
    engine.take_step()
    engine.close_module("d")
    (answered,) = engine.finish(prompt("other", literal(3, 1)))
    assert answered.reason is FinishReason.LENGTH
    assert engine.answered["q"].reason is FinishReason.ERROR
    assert "d was closed while a request waited" in engine.answered["q"].errors[0]
    engine.assert_idle()


def test_a_module_that_says_something_else_now_is_not_confused_with_the_old_one(
    llama: Path,
) -> None:
    engine = with_modules(build_engine(llama), MODULES)
    engine.finish(prompt("old", reused("a"), literal(5, 1)))
    new = {"a": [Piece(token_ids=some_ids(100, 99), position=0)]}
    with_modules(engine, new)
    request = prompt("new", reused("a"), literal(5, 1))
    engine.finish(request)
    assert_equals_dense_pass(engine, DenseModel(llama), new, request)
    engine.assert_idle()


# -- refused ----------------------------------------------------------------------------------


def test_what_cannot_be_is_refused(llama: Path) -> None:
    engine = with_modules(build_engine(llama, pool_gib=gib_of_blocks(20)), MODULES)
    too_much = [Piece(token_ids=some_ids(21 * 64, 1), position=0)]
    cases: list[tuple[type[Exception], str, Request]] = [
        (DocumentMissing, "module nobody is not open", prompt("q", reused("nobody"))),
        (InvalidRequest, "pieces 0 to 1, not 2", prompt("q", reused("b", 2), literal(1, 1))),
        (
            InvalidRequest,
            "begin at position 100, but what comes before it ends at 213",
            prompt("q", reused("c"), reused("b"), literal(1, 1)),
        ),
        (InvalidRequest, "alone", prompt("q", Segment(encodes="a"), literal(1, 1))),
        (ContextTooLong, "limit", prompt("q", literal(9, 1, 2047))),
    ]
    for error, message, request in cases:
        with pytest.raises(error, match=message):
            engine.submit(request)
    with pytest.raises(ContextTooLong, match="the device holds 20"):
        engine.open_module("large", too_much)
    with pytest.raises(InvalidRequest, match="is empty"):
        engine.open_module("x", [Piece(token_ids=(), position=0)])
    with pytest.raises(InvalidRequest, match="before the end of what precedes it"):
        overlapping = [Piece(token_ids=(5, 6), position=0), Piece(token_ids=(5,), position=1)]
        engine.open_module("x", overlapping)
    assert not engine.has_work


def test_many_who_want_different_modules_do_not_take_them_from_each_other(llama: Path) -> None:
    """Ten modules on a device that holds three: none is computed again and again."""
    engine = build_engine(llama, pool_gib=gib_of_blocks(12), max_sequences=4, max_batch_tokens=96)
    modules = {f"m{i}": [Piece(token_ids=some_ids(180, i), position=0)] for i in range(10)}
    with_modules(engine, modules)
    requests = [
        prompt(f"{i}", reused(f"m{i}"), reused(f"m{(i + 5) % 10}", position=180), literal(3, i))
        for i in range(10)
    ]
    answered = engine.finish(*requests)
    assert all(each.reason is FinishReason.LENGTH for each in answered)
    assert engine.runner.computed_tokens < 3 * 10 * 2 * 180
    assert_equals_dense_pass(engine, DenseModel(llama), modules, requests[3], requests[9])
    engine.assert_idle()
