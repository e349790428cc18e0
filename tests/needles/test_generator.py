"""The generator: known answers, disjoint halves, depths that hold, the same text every time."""

import random
import re

import pytest

from longctx.needles import generator, lexicon


def words_of(text: str) -> int:
    return len(text.split())


@pytest.mark.parametrize("kind", generator.KINDS)
def test_a_statement_has_key_before_value_and_the_question_has_the_key(kind: str) -> None:
    for seed in range(60):
        needle = generator.needle(seed, kind=kind)
        assert needle.answer in needle.statement
        assert needle.key.lower() in needle.statement.lower()
        assert needle.statement.lower().index(needle.key.lower()) < needle.statement.rindex(
            needle.answer
        )
        assert needle.key in needle.question
        assert needle.answer not in needle.question


def test_an_unknown_kind_names_the_kinds() -> None:
    with pytest.raises(ValueError, match="number, word"):
        generator.needle(0, kind="color")
    with pytest.raises(ValueError, match="niah_single_1"):
        generator.ruler("niah_single_9", 0)


def test_training_and_evaluation_share_no_value_and_no_key_word() -> None:
    listed = {*lexicon.ADJECTIVES, *lexicon.NOUNS, *lexicon.PLACES}
    seen: dict[bool, set[str]] = {True: set(), False: set()}
    values: dict[bool, set[str]] = {True: set(), False: set()}
    for heldout in (True, False):
        for seed in range(400):
            needle = generator.needle(seed, heldout=heldout)
            seen[heldout] |= listed.intersection(re.findall(r"[A-Za-z]+", needle.key))
            values[heldout].add(needle.answer)
    assert not seen[True] & seen[False]
    assert not values[True] & values[False]
    assert len(seen[True]) > 50 and len(seen[False]) > 150


def test_distractors_have_the_attribute_but_neither_the_key_nor_the_value() -> None:
    target = generator.needle(3, kind="number")
    others = generator.distractors(target, 8, seed=1)
    assert len({other.key for other in others} | {target.key}) == 9
    assert {other.attribute for other in others} == {target.attribute}
    assert target.answer not in {other.answer for other in others}


def test_the_same_seed_gives_the_same_text() -> None:
    assert generator.needle(5) == generator.needle(5)
    first, second = (generator.haystack(300, seed=9, count_tokens=words_of) for _ in range(2))
    assert first == second
    assert first != generator.haystack(300, seed=10, count_tokens=words_of)


@pytest.mark.parametrize("tokens", [40, 500, 3000])
def test_a_haystack_fills_its_budget_but_for_a_sentence(tokens: int) -> None:
    text = generator.haystack(tokens, seed=1, count_tokens=words_of)
    assert tokens - 40 < words_of(text) <= tokens


def test_a_haystack_is_varied() -> None:
    text = generator.haystack(20_000, seed=2, count_tokens=words_of)
    sentences = re.split(r"(?<=[.?!])\s", text)
    assert len(set(sentences)) > 0.97 * len(sentences)


@pytest.mark.parametrize("depth", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_a_needle_lies_at_its_depth_and_breaks_no_sentence(depth: float) -> None:
    text = generator.haystack(3000, seed=4, count_tokens=words_of)
    mixed = generator.insert(text, ["The code is 7421."], [depth])
    assert abs(mixed.index("The code is 7421.") / len(mixed) - depth) < 0.02
    assert mixed.replace("The code is 7421.", "").split() == text.split()
    before = mixed[: mixed.index("The code is 7421.")].rstrip()
    assert not before or before[-1] in '.!?"'


def test_needles_keep_their_order_of_depth() -> None:
    text = generator.haystack(500, seed=4, count_tokens=words_of)
    mixed = generator.insert(text, ["BBB.", "AAA.", "CCC."], [0.5, 0.0, 1.0])
    assert mixed.index("AAA") < mixed.index("BBB") < mixed.index("CCC")
    with pytest.raises(ValueError, match="depths"):
        generator.insert(text, ["A."], [1.5])


@pytest.mark.parametrize("task", generator.RULER_TASKS)
def test_ruler_cases_hold_what_they_ask_for(task: str) -> None:
    case = generator.ruler(task, 11)
    joined = " ".join(case.needles)
    assert all(f"is: {answer}." in joined for answer in case.answers)
    assert len(case.answers) == (4 if task in ("niah_multivalue", "niah_multiquery") else 1)
    assert len(case.needles) == (1 if task.startswith("niah_single") else 4)


def test_a_variant_asks_for_the_same_fact() -> None:
    needle = generator.needle(8, kind="place")
    questions = {generator.variant(needle, random.Random(i)).question for i in range(30)}
    assert len(questions) > 5
    assert all(needle.key in question for question in questions)


def test_a_list_item_keeps_its_line_end() -> None:
    mixed = generator.insert("One. Two. Three.", ["- code: 7\n"], [0.4])
    assert "- code: 7\n" in mixed
