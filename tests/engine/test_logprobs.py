"""Log-probabilities against those of eager transformers, over all of a prompt and its answer."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from longctx.engine import logprobs as module
from longctx.engine.logprobs import score
from longctx.engine.sampler import SamplingError
from longctx.errors import InvalidRequest
from longctx.request import FinishReason, Request, RequestOutput, Segment, TokenLogprob
from tests.support.recorded_engine import (
    Eager,
    RecordedEngine,
    ask,
    build_engine,
    some_ids,
)
from tests.support.tiny_models import write_model
from tests.support.tiny_tokenizer import write_tokenizer

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    write_tokenizer(folder)
    return write_model(folder)


@pytest.fixture(scope="module")
def eager(folder: Path) -> Eager:
    return Eager(folder)


@pytest.fixture
def engine(folder: Path) -> Iterator[RecordedEngine]:
    engine = build_engine(folder)
    yield engine
    engine.assert_idle()


def scored(request: Request, *, top: int = 3, **changes: Any) -> Request:
    sampling = replace(request.sampling, logprobs=top, prompt_logprobs=top, **changes)
    return replace(request, sampling=sampling)


def run(
    engine: RecordedEngine, request: Request
) -> tuple[list[int], list[TokenLogprob], list[TokenLogprob]]:
    """Return the tokens of choice 0, and what was told of the prompt and of them."""
    engine.submit(request)
    tokens: list[int] = []
    prompt: list[TokenLogprob] = []
    answer: list[TokenLogprob] = []
    while engine.has_work:
        for output in engine.step():
            if output.request_id == request.request_id and output.index == 0:
                assert not (tokens and output.prompt_logprobs), "the prompt comes first"
                tokens += output.token_ids
                prompt += output.prompt_logprobs
                answer += output.logprobs
                assert output.error is None
    return tokens, prompt, answer


def assert_true(told: list[TokenLogprob], tokens: list[int], rows: torch.Tensor) -> None:
    """Compare with log_softmax of `rows` [tokens, vocab], which came before each token."""
    assert [one.token_id for one in told] == tokens
    for one, row in zip(told, torch.log_softmax(rows, dim=1), strict=True):
        assert one.logprob is not None
        assert abs(one.logprob - float(row[one.token_id])) < TOLERANCE
        values = [value for _, value in one.likeliest]
        assert values == sorted(values, reverse=True)
        best = row.topk(len(values)).values.tolist()
        assert values == pytest.approx(best, abs=TOLERANCE)
        for token, value in one.likeliest:
            assert abs(value - float(row[token])) < TOLERANCE


@pytest.mark.parametrize("batch_tokens", [16, 96, 512])
def test_prompt_and_answer_are_scored_as_eager_transformers_does(
    folder: Path, eager: Eager, batch_tokens: int
) -> None:
    engine = build_engine(folder, max_batch_tokens=batch_tokens)
    ids = list(some_ids(200, seed=1))
    tokens, prompt, answer = run(engine, scored(ask("a", ids, max_tokens=5)))
    rows = eager.rows([*ids, *tokens])
    assert prompt[0] == TokenLogprob(token_id=ids[0], logprob=None)
    assert_true(prompt[1:], ids[1:], rows[: len(ids) - 1])
    assert_true(answer, tokens, rows[len(ids) - 1 : -1])
    engine.assert_idle()


def test_sampling_changes_no_log_probability(engine: RecordedEngine, eager: Eager) -> None:
    ids = list(some_ids(30, seed=2))
    request = scored(
        ask("a", ids, max_tokens=6, temperature=2.0, seed=3),
        top_k=5,
        logit_bias={7: 50.0, 9: -50.0},
        presence_penalty=1.5,
        repetition_penalty=2.0,
    )
    tokens, _, answer = run(engine, request)
    assert_true(answer, tokens, eager.rows([*ids, *tokens])[len(ids) - 1 : -1])


def test_what_a_cache_has_of_a_scored_prompt_is_computed_again(engine: RecordedEngine) -> None:
    ids = some_ids(300, seed=4)
    first = run(engine, scored(ask("first", ids, max_tokens=3)))
    again = run(engine, scored(ask("again", ids, max_tokens=3)))
    assert again == first
    assert engine.answered["again"].finished == 0  # nothing of it went around `run`
    (plain,) = engine.finish(ask("plain", ids, max_tokens=3))
    assert plain.counts.cached_tokens == 256  # and what scoring computed is found
    assert plain.answer == first[0]
    computed = engine.runner.computed_tokens
    run(engine, scored(ask("third", ids, max_tokens=1)))
    assert engine.runner.computed_tokens == computed + 300


def test_answers_alone_are_scored_from_what_a_cache_has(engine: RecordedEngine) -> None:
    ids = some_ids(300, seed=4)
    tokens, _, told = run(engine, scored(ask("first", ids, max_tokens=3)))
    request = ask("again", ids, max_tokens=3)
    request = replace(request, sampling=replace(request.sampling, logprobs=3))
    computed = engine.runner.computed_tokens
    again, prompt, told_again = run(engine, request)
    assert (again, prompt) == (tokens, [])
    for one, other in zip(told, told_again, strict=True):
        assert (one.token_id, one.logprob) == (
            other.token_id,
            pytest.approx(other.logprob, abs=1e-4),
        )
    assert engine.runner.computed_tokens == computed + 300 - 256 + 2


def test_no_step_has_more_rows_of_logits_than_are_allowed(folder: Path) -> None:
    with mock.patch("longctx.engine.parts.SCORED_LOGITS", 1):
        engine = build_engine(folder)
    rows: list[int] = []
    run_chunks = engine.runner.inner.run_chunks

    def counted(chunks: Any) -> Any:
        logits = run_chunks(chunks)
        rows.append(len(logits))
        return logits

    with mock.patch.object(engine.runner.inner, "run_chunks", counted):
        for name in ("b", "c"):
            engine.submit(scored(ask(name, some_ids(250, seed=6), max_tokens=1)))
        _, prompt, _ = run(engine, scored(ask("a", some_ids(250, seed=5), max_tokens=1)))
    assert len(prompt) == 250
    assert max(rows) <= 64 + 2 and sum(rows) >= 750  # 64 that are scored, and who decodes


def test_a_prompt_alone_is_scored_and_nothing_is_waited_for(engine: RecordedEngine) -> None:
    ids = list(some_ids(70, seed=7))
    tokens, prompt, answer = run(engine, scored(ask("a", ids, max_tokens=0)))
    assert (tokens, answer) == ([], [])
    assert [one.token_id for one in prompt] == ids


def test_a_preempted_prompt_is_told_of_once(folder: Path, eager: Eager) -> None:
    engine = build_engine(folder, max_batch_tokens=48)
    ids = list(some_ids(400, seed=8))
    step = engine.step

    def interrupted() -> list[RequestOutput]:
        outputs = step()
        running = engine.scheduler.running
        if engine.preemptions < 4 and running and running[0].blocks.computed > 48:
            engine.scheduler.preempt(running[0])
        return outputs

    with mock.patch.object(engine, "step", interrupted):
        tokens, prompt, _ = run(engine, scored(ask("a", ids, max_tokens=2)))
    assert engine.preemptions == 4
    assert prompt[0].logprob is None
    assert_true(prompt[1:], ids[1:], eager.rows([*ids, *tokens])[: len(ids) - 1])
    engine.assert_idle()


def test_choices_are_scored_each_by_its_own_tokens(engine: RecordedEngine, eager: Eager) -> None:
    ids = list(some_ids(40, seed=10))
    request = scored(ask("a", ids, max_tokens=4, temperature=1.5, seed=1, n=3))
    engine.submit(request)
    tokens: dict[int, list[int]] = {index: [] for index in range(3)}
    told: dict[int, list[TokenLogprob]] = {index: [] for index in range(3)}
    while engine.has_work:
        for output in engine.step():
            tokens[output.index] += output.token_ids
            told[output.index] += output.logprobs
    assert len({tuple(each) for each in tokens.values()}) > 1
    for index in range(3):
        rows = eager.rows([*ids, *tokens[index]])
        assert_true(told[index], tokens[index], rows[len(ids) - 1 : -1])


def test_logits_that_are_no_numbers_end_that_request_alone(folder: Path) -> None:
    engine = build_engine(folder)
    run_chunks = engine.runner.run_chunks

    def broken(chunks: Any) -> Any:
        logits = run_chunks(chunks).clone()
        counts = [chunk.logits_rows for chunk in chunks]
        for chunk, rows in zip(chunks, torch.split(logits, counts), strict=True):
            if chunk.sequence.scores_prompt:
                rows[3] = float("nan")
        return logits

    with mock.patch.object(engine.runner, "run_chunks", broken):
        bad, good = engine.finish(
            scored(ask("bad", some_ids(30, seed=11), max_tokens=2)),
            ask("good", some_ids(30, seed=12), max_tokens=2),
        )
    assert bad.reason is FinishReason.ERROR and "no usable logits" in bad.errors[0]
    assert good.reason is FinishReason.LENGTH
    engine.assert_idle()


def test_reused_text_cannot_be_scored(engine: RecordedEngine) -> None:
    request = Request(
        request_id="a",
        segments=(Segment(token_ids=(5, 6)), Segment(token_ids=(7,), cut=True)),
        sampling=scored(ask("b", (1,))).sampling,
    )
    with pytest.raises(InvalidRequest, match="has no log-probabilities"):
        engine.submit(request)


@pytest.mark.parametrize("top", [0, 1, 20])
def test_slices_of_rows_say_what_all_at_once_say(top: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(150, 40, generator=generator)
    logits[:, 5] = logits[:, 7]  # equals: the smaller id first
    tokens = torch.randint(0, 40, (150,), generator=generator).tolist()
    with mock.patch.object(module, "ROWS_AT_ONCE", 1000):
        at_once = score(logits, tokens, top)
    assert score(logits, tokens, top) == at_once
    assert all(len(one.likeliest) == top for one in at_once)
    for one in at_once:
        names = [token for token, _ in one.likeliest]
        if 7 in names and 5 in names:
            assert names.index(5) < names.index(7)


def test_a_row_without_probabilities_is_an_error() -> None:
    with pytest.raises(SamplingError, match="no usable logits"):
        score(torch.full((1, 4), float("-inf")), [0], 0)
