"""Documents keep to their length, and every needle is in one of them, where it should be."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from longctx.bench.haystack import TOKENS_PER_NEEDLE, Haystack, document, haystacks
from longctx.bench.retrieval.texts import TextFiller
from longctx.needles.ruler_tasks import Sentences
from tests.support.words import Words


def words(text: str) -> int:
    return len(text.split())


def planted(
    length: int, questions: int, distractors: int = 0, sentences: Sentences | None = None
) -> list[Haystack]:
    return list(
        haystacks(
            length,
            (0.0, 50.0, 100.0),
            questions=questions,
            kind="any",
            distractor_count=distractors,
            seed=3,
            tokenizer=Words(),
            sentences=sentences,
        )
    )


@pytest.mark.parametrize("length", [300, 2000])
def test_a_document_is_never_longer_than_asked(length: int) -> None:
    assert length * 0.8 < words(document(length, seed=1, count_tokens=words)) <= length
    for hay in planted(length, questions=2):
        assert words(hay.text) <= length


def test_every_depth_gets_its_questions() -> None:
    found = planted(700, questions=4)
    depths = Counter(each.depth for hay in found for each in hay.planted)
    assert depths == {0.0: 4, 50.0: 4, 100.0: 4}
    assert all(len(hay.planted) <= 700 // TOKENS_PER_NEEDLE for hay in found)


def test_needles_lie_at_their_depth() -> None:
    (hay,) = planted(4000, questions=3)
    for each in hay.planted:
        place = 100 * hay.text.index(each.needle.statement.strip()) / len(hay.text)
        assert abs(place - each.depth) < 15, each


def test_needles_are_placed_without_reading_the_text_for_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read: list[str] = []
    token_ends = Words.token_ends

    def recorded(self: Words, text: str) -> NDArray[np.int64]:
        read.append(text)
        return token_ends(self, text)

    monkeypatch.setattr(Words, "token_ends", recorded)
    for questions in (1, 9):
        read.clear()
        (hay,) = planted(4000, questions=questions)
        assert len(hay.planted) == 3 * questions
        assert len(read) == 2  # the filler, and the document


def test_no_question_has_two_answers() -> None:
    for hay in planted(1500, questions=2, distractors=1):
        keys = [(each.needle.attribute, each.needle.key) for each in hay.planted]
        assert len(set(keys)) == len(keys)


def test_the_same_seed_writes_the_same_documents() -> None:
    assert planted(700, questions=2) == planted(700, questions=2)


def test_a_haystack_may_be_of_the_users_own_words(tmp_path: Path) -> None:
    for number in range(3):
        text = " ".join(f"Word {number} and {each} stand here." for each in range(100))
        (tmp_path / f"{number}.txt").write_text(text)
    (hay,) = planted(2000, questions=3, sentences=TextFiller(tmp_path))
    assert 1900 < words(hay.text) <= 2000
    assert hay.text.count(" stand here.") > 250
    for each in hay.planted:
        place = 100 * hay.text.index(each.needle.statement.strip()) / len(hay.text)
        assert abs(place - each.depth) < 15, each
