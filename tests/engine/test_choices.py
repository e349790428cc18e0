"""The choices of one request share what is common, and each is what it would be alone."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from compress.shape import BLOCK_TOKENS
from longctx.engine.scheduler import Chunk
from longctx.errors import InvalidRequest
from longctx.request import FinishReason, Request, SamplingParams, Segment
from tests.support.recorded_engine import ask, build_engine, gib_of_blocks, some_ids
from tests.support.tiny_models import VOCAB_SIZE


def test_choices_share_the_prompt_and_each_equals_a_request_of_its_own(llama: Path) -> None:
    prompt = some_ids(300, 0)
    engine = build_engine(llama)
    # A batch of three rounds otherwise than one row alone, so in a long answer some number would
    # fall on the edge between two tokens. 24 tokens seal a block on the way.
    options = {"max_tokens": 24, "temperature": 1.0}
    engine.submit(ask("all", prompt, n=3, seed=5, **options))
    while len(engine.scheduler.running) < 3:
        engine.take_step()
    assert engine.memory.packed[0].held == 300 // BLOCK_TOKENS
    engine.finish()
    answered = engine.answered["all"]
    assert engine.runner.computed_tokens == 300 + 3 * 23
    for index in range(3):
        alone = build_engine(llama)
        (single,) = alone.finish(ask("one", prompt, seed=5 + index, **options))
        assert answered.tokens[index] == single.answer
        assert answered.texts[index] == single.texts[0]
    assert answered.counts.completion_tokens == 3 * 24
    assert len({tuple(tokens) for tokens in answered.tokens.values()}) == 3
    engine.assert_idle()


def test_choices_survive_preemption(llama: Path) -> None:
    prompt = some_ids(150, 0)
    options = {"max_tokens": 150, "temperature": 1.0, "n": 4, "seed": 5}
    (roomy,) = build_engine(llama).finish(ask("a", prompt, **options))
    engine = build_engine(llama, pool_gib=gib_of_blocks(9))
    (tight,) = engine.finish(ask("a", prompt, **options))
    assert engine.preemptions > 0
    assert tight.tokens == roomy.tokens
    engine.assert_idle()


def test_choices_without_an_answer_end_together(llama: Path) -> None:
    engine = build_engine(llama)
    (answered,) = engine.finish(ask("a", some_ids(100, 0), n=3, max_tokens=0))
    assert sorted(answered.reasons) == [0, 1, 2]
    assert all(reasons == [FinishReason.LENGTH] for reasons in answered.reasons.values())


def test_choices_that_cannot_be_sampled_end_once_each(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = build_engine(llama)
    compute = engine.runner.inner.run_chunks

    def overflow(chunks: Sequence[Chunk]) -> Tensor:
        return torch.full_like(compute(chunks), float("nan"))

    monkeypatch.setattr(engine.runner.inner, "run_chunks", overflow)
    (answered,) = engine.finish(ask("a", some_ids(9, 0), n=3))
    assert all(answered.reasons[index] == [FinishReason.ERROR] for index in range(3))
    engine.assert_idle()


@pytest.mark.parametrize("token_id", [-1, VOCAB_SIZE])
def test_a_bias_on_a_token_that_there_is_not_is_refused_at_once(llama: Path, token_id: int) -> None:
    engine = build_engine(llama)
    with pytest.raises(InvalidRequest, match="logit_bias"):
        sampling = SamplingParams(logit_bias={token_id: 1.0})
        segments = (Segment(token_ids=some_ids(9, 0)),)
        engine.submit(Request(request_id="a", segments=segments, sampling=sampling))
    engine.assert_idle()
