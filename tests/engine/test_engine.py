"""What is computed once stays computed; whatever happens, every request ends exactly once."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from compress.shape import BLOCK_TOKENS
from longctx.errors import ContextTooLong, DocumentMissing, InvalidRequest, Overloaded
from longctx.request import FinishReason, Request, RequestClass
from tests.conftest import ModelFolders
from tests.support.recorded_engine import (
    Answered,
    RecordedEngine,
    ask,
    build_engine,
    gib_of_blocks,
    some_ids,
)
from tests.support.tiny_models import write_model
from tests.support.tiny_tokenizer import write_tokenizer


def array(token_ids: tuple[int, ...]) -> NDArray[np.int32]:
    return np.array(token_ids, dtype=np.int32)


@pytest.fixture(scope="module", params=["llama", "mistral", "gemma3_text", "smollm3"])
def long_window_folder(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Models whose windows, if they have any, are 64 tokens."""
    architecture: str = request.param
    windows = {"llama": {}, "smollm3": {"use_sliding_window": True, "sliding_window": 64}}
    options = windows.get(architecture, {"sliding_window": 64})
    folder = write_model(
        tmp_path_factory.mktemp(architecture),
        architecture,
        **options,
        max_position_embeddings=16384,
    )
    write_tokenizer(folder)
    return folder


# -- reuse ------------------------------------------------------------------------------------


def test_a_second_prompt_reuses_a_prefix_of_2000_tokens(long_window_folder: Path) -> None:
    engine = build_engine(long_window_folder)
    system = some_ids(2000, 0)
    engine.finish(ask("first", system, some_ids(50, 1)))
    (second,) = engine.finish(ask("second", system, some_ids(50, 2)))
    assert second.counts.cached_tokens >= 1920
    assert second.counts.computed_tokens <= 130 + 8


def test_a_prefix_is_reused_while_its_first_user_still_runs(long_window_folder: Path) -> None:
    engine = build_engine(long_window_folder)
    system = some_ids(2000, 0)
    requests = [
        ask("first", system, some_ids(9, 1), max_tokens=40),
        ask("second", system, some_ids(50, 2)),
    ]
    first, second = engine.finish(*requests)
    assert first.counts.cached_tokens == 0
    assert second.counts.cached_tokens >= 1920


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_identical_prompts_at_once_are_computed_once(
    architecture: str, model_folders: ModelFolders
) -> None:
    engine = build_engine(model_folders(architecture))
    prompt = some_ids(1000, 0)
    answered = engine.finish(*(ask(f"{i}", prompt, max_tokens=1) for i in range(3)))
    last_block = 1000 - 1000 // BLOCK_TOKENS * BLOCK_TOKENS
    assert engine.runner.computed_tokens == 1000 + 2 * last_block
    assert answered[0].answer == answered[1].answer == answered[2].answer


@pytest.mark.parametrize("length", [1, 63, 64, 65, 128, 129])
def test_a_hit_never_includes_the_block_of_the_last_token(llama: Path, length: int) -> None:
    engine = build_engine(llama)
    prompt = some_ids(length, 0)
    first, second = engine.finish(ask("a", prompt)), engine.finish(ask("b", prompt))
    assert second[0].counts.cached_tokens == (length - 1) // BLOCK_TOKENS * BLOCK_TOKENS
    assert first[0].answer == second[0].answer


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_a_retry_resumes_a_cancelled_prefill(
    architecture: str, model_folders: ModelFolders
) -> None:
    engine = build_engine(model_folders(architecture), max_batch_tokens=64)
    prompt = some_ids(1500, 0)
    engine.submit(ask("cancelled", prompt))
    for _ in range(18):
        engine.take_step()
    engine.abort("cancelled")
    (retry,) = engine.finish(ask("retry", prompt))
    assert engine.answered["cancelled"].reason is FinishReason.ABORT
    assert retry.counts.cached_tokens >= 1024  # windows are kept at the end of each extent
    engine.assert_idle()


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_a_cancelled_prefill_ends_at_once_and_its_retry_computes_only_the_rest(
    architecture: str, model_folders: ModelFolders
) -> None:
    engine = build_engine(model_folders(architecture), max_batch_tokens=64)
    prompt = some_ids(1500, 0)
    engine.submit(ask("cancelled", prompt))
    while engine.runner.computed_tokens < 1344:
        engine.take_step()
    engine.abort("cancelled")
    assert engine.memory.raw.held == 0
    engine.take_step()
    assert engine.answered["cancelled"].reason is FinishReason.ABORT
    assert engine.runner.computed_tokens == 1344, "a chunk of it came after its end"
    (retry,) = engine.finish(ask("retry", prompt, max_tokens=1))
    assert retry.counts.computed_tokens == 1500 - 1344
    engine.assert_idle()


def test_an_answer_and_its_prompt_are_the_prefix_of_the_next_turn(llama: Path) -> None:
    engine = build_engine(llama)
    prompt = some_ids(100, 0)
    (first,) = engine.finish(ask("first", prompt, max_tokens=60))
    (second,) = engine.finish(ask("second", prompt, first.answer, some_ids(20, 1)))
    assert second.counts.cached_tokens == 128


def test_tenants_with_different_salts_share_nothing(llama: Path) -> None:
    engine = build_engine(llama)
    engine.open_document("d", array(some_ids(300, 0)))
    prompt = some_ids(300, 1)
    for salt in ("one", "two", ""):
        (literal,) = engine.finish(ask(f"a {salt}", prompt, salt=salt))
        (document,) = engine.finish(ask(f"b {salt}", "d", some_ids(3, 2), salt=salt))
        assert literal.counts.cached_tokens == document.counts.cached_tokens == 0
    (again,) = engine.finish(ask("again", prompt, salt="two"))
    assert again.counts.cached_tokens == 256


# -- documents --------------------------------------------------------------------------------


def test_a_question_computes_little_of_its_document_again(long_window_folder: Path) -> None:
    engine = build_engine(long_window_folder)
    opening, question = some_ids(30, 1), some_ids(20, 2)
    for length in (640, 1000, 3001):
        name = f"d{length}"
        engine.open_document(name, array(some_ids(length, length)))
        read = ask(f"r{name}", opening, name, max_tokens=0, request_class=RequestClass.INGEST)
        engine.finish(read)
        for turn in range(2):
            before = engine.runner.computed_tokens
            (asked,) = engine.finish(ask(f"q{name}{turn}", opening, name, question, max_tokens=1))
            computed = engine.runner.computed_tokens - before
            assert computed <= 128 + len(question)
            assert asked.counts.computed_tokens == computed
            assert asked.counts.cached_tokens >= length - 64
    engine.assert_idle()


def test_a_question_joins_an_ingestion_and_makes_it_urgent(llama: Path) -> None:
    engine = build_engine(llama, max_batch_tokens=64, max_sequences=4)
    document = some_ids(1000, 0)
    engine.open_document("d", array(document))
    engine.submit(ask("read", "d", max_tokens=0, request_class=RequestClass.INGEST))
    engine.take_step()
    engine.submit(ask("question", "d", some_ids(10, 1), max_tokens=2))
    # A rival of the middle class with less work would go before any ingestion.
    engine.submit(ask("rival", some_ids(900, 2), request_class=RequestClass.BATCH))
    ended = []
    while engine.has_work:
        ended += [output.request_id for output in engine.take_step() if output.finished]
    assert ended.index("question") < ended.index("rival")
    assert engine.runner.computed_tokens <= 1000 + 10 + 64 + 2 + 900 + 8
    question = engine.answered["question"]
    assert question.counts.cached_tokens >= 960
    assert len(question.progress) > 10  # its caller saw the document being read


def test_two_documents_in_one_prompt_are_both_reused(long_window_folder: Path) -> None:
    engine = build_engine(long_window_folder)
    engine.open_document("a", array(some_ids(500, 0)))
    engine.open_document("b", array(some_ids(700, 1)))
    opening, between = some_ids(9, 2), some_ids(5, 3)
    engine.finish(ask("first", opening, "a", between, "b", some_ids(8, 4)))
    (second,) = engine.finish(ask("second", opening, "a", between, "b", some_ids(30, 5)))
    assert second.counts.cached_tokens >= 1200 - 64
    (only_a,) = engine.finish(ask("only a", opening, "a", some_ids(30, 6)))
    assert only_a.counts.cached_tokens >= 500 - 64
    engine.assert_idle()


def test_a_document_under_another_prefix_is_computed_for_it(llama: Path) -> None:
    engine = build_engine(llama)
    engine.open_document("d", array(some_ids(500, 0)))
    one, two = some_ids(10, 1), some_ids(70, 2)
    for opening in (one, two):
        (first,) = engine.finish(ask(f"f{len(opening)}", opening, "d", some_ids(3, 3)))
        assert first.counts.cached_tokens == 0
        (again,) = engine.finish(ask(f"a{len(opening)}", opening, "d", some_ids(5, 4)))
        assert again.counts.cached_tokens >= 448
    literal = ask("literal", one, some_ids(500, 0), some_ids(5, 5))
    assert engine.finish(literal)[0].counts.cached_tokens >= 448  # blocks are known by content


def test_closing_a_document_frees_its_blocks(long_window_folder: Path) -> None:
    engine = build_engine(long_window_folder)
    engine.open_document("d", array(some_ids(1000, 0)))
    engine.finish(ask("read", "d", max_tokens=0))
    assert engine.memory.packed[0].held > 0
    engine.close_document("d")
    assert all(pool.held == 0 for pool in engine.memory.packed)
    with pytest.raises(DocumentMissing, match="d is not open"):
        engine.submit(ask("late", "d"))


@pytest.mark.parametrize("steps", [1, 4, 12])
def test_closing_a_document_lets_running_questions_finish(llama: Path, steps: int) -> None:
    expected = ask_about_a_document(llama, close_after=None)
    assert ask_about_a_document(llama, close_after=steps) == expected


def ask_about_a_document(folder: Path, close_after: int | None) -> list[int]:
    engine = build_engine(folder, max_batch_tokens=96)
    engine.open_document("d", array(some_ids(300, 0)))
    engine.finish(ask("before", "d", some_ids(4, 3), max_tokens=1))
    engine.submit(ask("question", "d", some_ids(10, 1), max_tokens=20))
    for step in range(1000):
        if step == close_after:
            engine.close_document("d")
        if not engine.has_work:
            break
        engine.take_step()
    if close_after is not None:
        assert all(pool.held == 0 for pool in engine.memory.packed)
        assert len(engine.cache.prefixes) == 0
    return engine.answered["question"].answer


def test_a_document_closed_while_it_is_read_leaves_no_prefix(llama: Path) -> None:
    engine = build_engine(llama, max_batch_tokens=64)
    engine.open_document("d", array(some_ids(500, 0)))
    engine.submit(ask("read", "d", max_tokens=0))
    engine.take_step()
    engine.close_document("d")
    engine.finish()
    assert all(pool.held == 0 for pool in engine.memory.packed)


def test_a_document_id_may_come_back_with_another_text(llama: Path) -> None:
    other = some_ids(200, 7)
    question = some_ids(5, 1)
    expected = build_engine(llama).finish(ask("literal", other, question))[0].answer
    engine = build_engine(llama, max_batch_tokens=64)
    engine.open_document("d", array(some_ids(200, 0)))
    engine.submit(ask("read", "d", max_tokens=0))
    engine.take_step()
    engine.close_document("d")  # while it is being read
    engine.open_document("d", array(other))
    engine.finish()
    (answered,) = engine.finish(ask("question", "d", question))
    assert answered.answer == expected
    engine.open_document("d", array(some_ids(200, 0)))
    engine.open_document("d", array(other))  # without closing
    assert engine.finish(ask("once more", "d", question))[0].answer == expected


def test_a_document_that_fills_the_pool_can_be_read_twice(llama: Path) -> None:
    engine = build_engine(llama, pool_gib=gib_of_blocks(8))
    length = engine.info.capacity_tokens
    engine.open_document("d", array(some_ids(length, 0)))
    engine.finish(ask("once", "d", max_tokens=0))
    engine.finish(ask("twice", "d", max_tokens=0), steps=100)


def test_an_unused_document_makes_room_for_a_prompt_that_needs_it(llama: Path) -> None:
    engine = build_engine(llama, pool_gib=gib_of_blocks(10))
    engine.open_document("d", array(some_ids(400, 0)))
    engine.finish(ask("read", "d", max_tokens=0))
    engine.finish(ask("large", some_ids(engine.info.capacity_tokens - 10, 1), max_tokens=10))
    (question,) = engine.finish(ask("question", "d", some_ids(4, 2)))
    assert question.reason is FinishReason.LENGTH
    engine.assert_idle()


# -- what is refused, and how requests end ----------------------------------------------------


def test_what_can_never_be_answered_is_refused_at_once(llama: Path) -> None:
    engine = build_engine(llama, max_sequences=4, pool_gib=gib_of_blocks(8))
    with pytest.raises(ContextTooLong, match="raise --device-pool-gib"):
        engine.submit(ask("a", some_ids(600, 0)))
    roomy = build_engine(llama, max_sequences=4, pool_gib=gib_of_blocks(40))
    with pytest.raises(ContextTooLong, match=r"limit of 2048.*raise --max-context"):
        roomy.submit(ask("a", some_ids(2040, 0), max_tokens=9))
    with pytest.raises(InvalidRequest, match="empty"):
        engine.submit(ask("a"))
    with pytest.raises(InvalidRequest, match="outside the vocabulary of 512"):
        engine.submit(ask("a", (5, 512)))
    with pytest.raises(InvalidRequest, match="outside the vocabulary of 512"):
        engine.open_document("d", array((5, -1)))
    with pytest.raises(InvalidRequest, match="n=5 is more than the 4"):
        engine.submit(ask("a", (5,), n=5))
    with pytest.raises(DocumentMissing, match="d is not open"):
        engine.submit(ask("a", "d"))
    engine.assert_idle()
    engine.submit(ask("a", (5,)))
    with pytest.raises(InvalidRequest, match="in use"):
        engine.submit(ask("a", (6,)))


def test_more_waiting_requests_than_allowed_are_refused(llama: Path) -> None:
    engine = build_engine(llama, max_waiting=2)
    for name in "ab":
        engine.submit(ask(name, (5,)))
    with pytest.raises(Overloaded, match="--max-waiting"):
        engine.submit(ask("c", (5,)))
    assert [a.reason for a in engine.finish()] == []
    assert {name for name, answered in engine.answered.items() if answered.finished} == {"a", "b"}


def test_progress_only_rises_and_counts_the_cache(llama: Path) -> None:
    engine = build_engine(llama, max_batch_tokens=64)
    prompt = some_ids(500, 0)
    engine.submit(ask("a", prompt))
    engine.take_step()
    engine.submit(ask("b", prompt, some_ids(100, 1)))
    engine.finish()
    for name, total in (("a", 500), ("b", 600)):
        steps = engine.answered[name].progress
        processed = [step.processed for step in steps]
        assert processed == sorted(set(processed)) and processed[-1] <= total
        assert {step.total for step in steps} == {total}
    assert engine.answered["b"].progress[-1].cache == 448


def test_a_failing_step_ends_its_requests_and_no_others(llama: Path) -> None:
    engine = build_engine(llama, max_sequences=2)
    for name in "ab":
        engine.submit(ask(name, some_ids(100, ord(name)), n=1, max_tokens=20))
    engine.submit(ask("later", some_ids(100, 3)))
    for _ in range(3):
        engine.take_step()
    engine.runner.failures.append(RuntimeError("the device is on fire"))
    engine.finish()
    for name in "ab":
        assert engine.answered[name].reason is FinishReason.ERROR
        assert engine.answered[name].errors == ["RuntimeError: the device is on fire"]
    assert engine.answered["later"].reason is FinishReason.LENGTH
    engine.assert_idle()


def test_a_device_that_fails_ends_the_engine(llama: Path) -> None:
    """Whoever runs it ends the process and starts another: no later request could be served."""
    engine = build_engine(llama)
    engine.submit(ask("a", some_ids(100, 1)))
    engine.runner.failures.append(torch.AcceleratorError("an illegal memory access", 700))
    with pytest.raises(torch.AcceleratorError):
        engine.finish()


def test_nothing_of_a_failed_step_is_reused(llama: Path) -> None:
    prompt = some_ids(200, 0)
    expected = build_engine(llama).finish(ask("a", prompt))[0].answer
    engine = build_engine(llama, max_batch_tokens=128)
    engine.runner.failures.append(RuntimeError("once"))
    engine.finish(ask("a", prompt))
    (again,) = engine.finish(ask("b", prompt))
    assert again.counts.cached_tokens == 0
    assert again.answer == expected


ACTIONS = st.one_of(
    st.tuples(st.just("step"), st.integers(1, 6)),
    st.tuples(st.just("submit"), st.integers(1, 420)),
    st.tuples(st.just("submit"), st.integers(1, 420)),
    st.tuples(st.just("too long"), st.just(0)),
    st.tuples(st.just("abort"), st.integers(0, 30)),
    st.tuples(st.just("fail"), st.just(0)),
    st.tuples(st.just("close"), st.just(0)),
)


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "mistral"])
@settings(max_examples=10, deadline=None)
@given(actions=st.lists(ACTIONS, min_size=6, max_size=20), seed=st.integers(0, 1 << 16))
def test_every_request_ends_once_whatever_happens(
    architecture: str, model_folders: ModelFolders, actions: list[tuple[str, int]], seed: int
) -> None:
    random = np.random.default_rng(seed)
    layers = 3 if architecture == "llama" else 4
    engine = build_engine(
        model_folders(architecture),
        max_batch_tokens=64,
        max_sequences=5,
        pool_gib=gib_of_blocks(10, layers),
    )
    engine.open_document("d", array(some_ids(170, 0)))
    submitted = []
    for action, number in actions:
        match action:
            case "step":
                for _ in range(number):
                    engine.take_step()
            case "submit":
                submitted.append(f"{len(submitted)}")
                engine.submit(random_request(submitted[-1], number, random))
            case "too long":
                with pytest.raises(ContextTooLong):
                    engine.submit(ask("too long", some_ids(900, 0)))
            case "abort":
                engine.abort(f"{number}")
            case "fail":
                engine.runner.failures = [RuntimeError("injected")]
            case "close":
                engine.close_document("d")
                engine.open_document("d", array(some_ids(170, number)))
    engine.finish(steps=1500)
    for name in submitted:
        answered = engine.answered[name]
        assert answered.finished == 1
        assert all(len(reasons) == 1 for reasons in answered.reasons.values())
        assert len(answered.reasons) == answered_choices(answered)
    engine.assert_idle()


def random_request(name: str, length: int, random: np.random.Generator) -> Request:
    # Few seeds, so that prompts begin alike; the salt keeps n known to the test.
    return ask(
        name,
        *(["d"] if random.random() < 0.3 and length < 200 else []),
        some_ids(length, int(random.integers(3))),
        n=int(random.integers(1, 4)),
        max_tokens=int(random.integers(0, 60)),
        temperature=1.0,
        seed=int(random.integers(100)),
        request_class=RequestClass(int(random.integers(3))),
    )


def answered_choices(answered: Answered) -> int:
    """Choices that the outputs speak of: each index from 0 on."""
    return max(answered.reasons) + 1


# -- memory of windows ------------------------------------------------------------------------


def held_of_windows(engine: RecordedEngine) -> int:
    (group,) = [index for index, g in enumerate(engine.memory.groups) if g.window is not None]
    return engine.memory.packed[group].held


@pytest.mark.parametrize("architecture", ["gemma3_text", "mistral"])
def test_windows_in_use_do_not_grow_with_the_document(architecture: str, tmp_path: Path) -> None:
    folder = write_model(tmp_path, architecture, sliding_window=64, max_position_embeddings=16384)
    write_tokenizer(folder)
    engine = build_engine(folder, max_batch_tokens=128)
    most = {}
    for length in (1000, 6000):
        engine.open_document(f"{length}", array(some_ids(length, 0)))
        engine.submit(ask(f"{length}", f"{length}", max_tokens=0))
        most[length] = 0
        while engine.has_work:
            engine.take_step()
            most[length] = max(most[length], held_of_windows(engine))
        engine.close_document(f"{length}")
    assert most[1000] == most[6000] <= 128 // 64 + 3
    assert held_of_windows(engine) == 0
