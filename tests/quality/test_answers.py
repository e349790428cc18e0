"""Answers drawn with a draft are those that the exact pass draws alone, in fewer of its steps."""

import pytest
import torch
from torch import Tensor

from compress.shape import BLOCK_TOKENS
from longctx.attention.torch_backend import TorchAttention
from longctx.config import ModelConfig
from longctx.embedded import model_path
from longctx.model.exact import exact_twin
from longctx.model.loader import LoadedModel, load_model
from longctx.quality.answers import Answer, draw_answers
from longctx.quality.replay import Replay
from longctx.text.tokenizer import Tokenizer
from tests.support.recorded_engine import some_ids

TOKENS = 24


@pytest.fixture(scope="module")
def probe() -> tuple[LoadedModel, Tokenizer]:
    folder = model_path("probe")
    return load_model(ModelConfig(dtype="bfloat16"), folder), Tokenizer(folder)


class Counted(Replay):
    """A cache that knows how many times it was fed, and how many sequences are in it."""

    def __init__(self, model: LoadedModel, tokenizer: Tokenizer, codec: str = "raw") -> None:
        super().__init__(
            model,
            tokenizer,
            TorchAttention,
            codec=codec,
            blocks=24,
            sequences=8,
            chunk_tokens=8 * BLOCK_TOKENS,
        )
        self.steps = 0

    def feed(self, *args: object) -> list[Tensor]:
        self.steps += 1
        return super().feed(*args)  # type: ignore[arg-type]

    @property
    def held(self) -> int:
        return self._memory.raw.held


def asked() -> list[Answer]:
    """Prompts of several lengths: within a block, at its end and beyond."""
    return [
        Answer(some_ids(length, length), TOKENS, seed=n)
        for n, length in enumerate((BLOCK_TOKENS - 3, BLOCK_TOKENS, 2 * BLOCK_TOKENS + 9))
    ]


def never(_: int) -> bool:
    return False


@pytest.mark.parametrize("codec", ["raw", "int4"])
def test_a_draft_changes_no_token(probe: tuple[LoadedModel, Tokenizer], codec: str) -> None:
    model, tokenizer = probe
    exact, alone = Counted(exact_twin(model), tokenizer), Counted(exact_twin(model), tokenizer)
    draft = Counted(model, tokenizer, codec)
    drafted, drawn = asked(), asked()
    draw_answers(drafted, exact, draft, eos=(), enough=never)
    draw_answers(drawn, alone, None, eos=(), enough=never)
    for one, other in zip(drafted, drawn, strict=True):
        assert one.spoken == other.spoken and len(one.spoken) == TOKENS
        torch.testing.assert_close(torch.cat(one.rows), torch.cat(other.rows), atol=1e-4, rtol=1e-4)
    assert alone.steps == TOKENS
    assert exact.steps < TOKENS / 2
    assert exact.held == draft.held == alone.held == 0


def test_a_draft_that_is_always_wrong_costs_steps_and_no_token(
    probe: tuple[LoadedModel, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = probe
    drawn, drafted = asked(), asked()
    draw_answers(drawn, Counted(exact_twin(model), tokenizer), None, eos=(), enough=never)
    draft = Counted(model, tokenizer)
    told = Counted.feed
    monkeypatch.setattr(draft, "feed", lambda *args: [-rows for rows in told(draft, *args)])
    exact = Counted(exact_twin(model), tokenizer)
    draw_answers(drafted, exact, draft, eos=(), enough=never)
    assert [each.spoken for each in drafted] == [each.spoken for each in drawn]
    assert exact.steps <= TOKENS


def test_an_answer_ends_with_its_text_and_all_of_them_when_there_is_enough(
    probe: tuple[LoadedModel, Tokenizer],
) -> None:
    model, tokenizer = probe
    whole = asked()
    draw_answers(whole, Counted(exact_twin(model), tokenizer), None, eos=(), enough=never)
    last = whole[1].spoken[5]
    ended = asked()
    draw_answers(
        ended,
        Counted(exact_twin(model), tokenizer),
        Counted(model, tokenizer),
        eos=(last,),
        enough=never,
    )
    for one, other in zip(ended, whole, strict=True):
        said = other.spoken
        assert one.spoken == (said[: said.index(last) + 1] if last in said else said)
    stopped = asked()
    draw_answers(
        stopped,
        Counted(exact_twin(model), tokenizer),
        Counted(model, tokenizer),
        eos=(),
        enough=lambda tokens: tokens >= 12,
    )
    assert 12 <= sum(len(each.spoken) for each in stopped) < 3 * TOKENS
