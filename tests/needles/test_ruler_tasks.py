"""RULER's prompts: as long as allowed, with everything that is asked for in them, and no more."""

import itertools
import json
import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longctx.needles.generator import RULER_NOISE
from longctx.needles.ruler_tasks import (
    TASKS,
    Draft,
    Passages,
    TooShort,
    draft,
    fit,
    generated_sentences,
    read_passages,
)

PASSAGES = Passages(
    texts=tuple(
        f"Passage {number} tells that the lake is {number} m deep." for number in range(50)
    ),
    questions=tuple(
        (number, f"How deep is lake {number}?", (f"{number} m", f"{number} metres"))
        for number in range(50)
    ),
)


def words(text: str) -> int:
    return len(text.split())


def drafted(task: str, seed: int = 0, tokens: int = 4000) -> Draft:
    return draft(
        task,
        random.Random(f"{task} {seed}"),
        tokens=tokens,
        sentences=generated_sentences,
        passages=PASSAGES,
    )


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("tokens", [1500, 2500])
def test_a_prompt_is_as_long_as_it_may_be(task: str, tokens: int) -> None:
    wanted = drafted(task, tokens=tokens)
    text = fit(wanted, tokens, words)
    assert words(text) <= tokens
    units = next(n for n in itertools.count(wanted.least) if wanted.build(n) == text)
    if units != wanted.most:  # a unit more may be less than a coded word
        longer = (wanted.build(n) for n in itertools.count(units + 1))
        assert words(next(other for other in longer if other != text)) > tokens


@given(st.integers(1, 3000), st.integers(1, 60), st.integers(0, 50), st.integers(0, 2000))
def test_fitting_finds_the_last_unit_that_fits(
    tokens: int, each: int, frame: int, most: int
) -> None:
    wanted = Draft(
        build=lambda units: "x" * (frame + each * units),
        least=0,
        most=most or None,
        answers=("x",),
        answer_prefix="",
    )
    if frame > tokens:
        with pytest.raises(TooShort, match=f"smallest prompt has {frame}"):
            fit(wanted, tokens, len)
        return
    expected = (tokens - frame) // each
    if most:
        expected = min(expected, most)
    assert len(fit(wanted, tokens, len)) == frame + each * expected


@pytest.mark.parametrize("task", TASKS)
def test_the_same_seed_writes_the_same_prompt(task: str) -> None:
    assert drafted(task, 3).build(200) == drafted(task, 3).build(200)
    assert drafted(task, 3).answers == drafted(task, 3).answers
    assert drafted(task, 3).build(200) != drafted(task, 4).build(200)


@pytest.mark.parametrize(
    ("task", "answers", "stated"),
    [
        ("niah_single_1", 1, 1),
        ("niah_single_2", 1, 1),
        ("niah_single_3", 1, 1),
        ("niah_multikey_1", 1, 4),
        ("niah_multikey_2", 1, 31),
        ("niah_multikey_3", 1, 31),
        ("niah_multivalue", 4, 4),
        ("niah_multiquery", 4, 4),
    ],
)
def test_needles_stand_in_the_text_once_and_are_asked_for(
    task: str, answers: int, stated: int
) -> None:
    wanted = drafted(task)
    text = wanted.build(30)
    assert len(set(wanted.answers)) == answers
    assert all(text.count(f" is: {answer}.") == 1 for answer in wanted.answers)
    assert text.count("One of the special magic ") == stated
    question = text.splitlines()[-1]
    for answer in wanted.answers:
        statement = text[: text.index(f" is: {answer}.")].rpartition(" for ")[2]
        assert statement in question and statement in wanted.answer_prefix
    assert (RULER_NOISE in text) == (task == "niah_single_1")


def test_variables_form_a_chain_in_reading_order_after_an_example() -> None:
    wanted = drafted("vt")
    text = wanted.build(40)
    example, asked = text.split("they are: ", 1)
    number = asked.rpartition("value ")[2].split()[0]
    names = list(wanted.answers)
    lines = [f"VAR {names[0]} = {number}"]
    lines += [f"VAR {b} = VAR {a}" for a, b in itertools.pairwise(names)]
    places = [asked.index(line) for line in lines]
    assert places == sorted(places)
    assert asked.count(RULER_NOISE) == 40 and example.count("VAR ") == 9
    assert not any(name in example for name in names)


def test_common_words_come_thirty_times_and_others_three() -> None:
    wanted = drafted("cwe")
    listed = wanted.build(50).rpartition("\n1. ")[2].split("\nQuestion")[0]
    counts = Counter(word for word in listed.split() if not word[0].isdigit())
    assert {word for word, count in counts.items() if count == 30} == set(wanted.answers)
    assert len(wanted.answers) == 10
    assert sorted(set(counts.values())) == [3, 30] and len(counts) == 60


@pytest.mark.parametrize("tokens", [1500, 20_000])
def test_the_three_most_frequent_coded_words_are_the_answers(tokens: int) -> None:
    wanted = drafted("fwe", tokens=tokens)
    for text in (wanted.build(wanted.least), fit(wanted, tokens, words)):
        coded = text.split("coded words. ")[1].split("\nQuestion")[0]
        ranked = Counter(coded.split()).most_common(5)
        assert ranked[0][0] == "..."
        assert tuple(word for word, _ in ranked[1:4]) == wanted.answers
        assert ranked[3][1] > ranked[4][1]


def test_a_question_has_its_passage_among_others(tmp_path: Path) -> None:
    file = tmp_path / "squad.json"
    answered = {"question": "How deep?", "answers": [{"text": "9 m"}, {"text": "9 m"}]}
    impossible = {"question": "How wide?", "answers": [], "is_impossible": True}
    paragraphs = [
        {"context": "The lake is 9 m deep.", "qas": [answered, impossible]},
        {"context": "The road is long.", "qas": []},
        {"context": "The hill is steep.", "qas": []},
    ]
    file.write_text(json.dumps({"data": [{"title": "t", "paragraphs": paragraphs}]}))
    read = read_passages(file)
    assert read.questions == ((0, "How deep?", ("9 m",)),)
    wanted = draft("qa", random.Random(1), tokens=100, sentences=generated_sentences, passages=read)
    text = fit(wanted, 1000, words)
    assert all(each["context"] in text for each in paragraphs)  # type: ignore[operator]
    assert text.endswith("Question: How deep?") and wanted.answers == ("9 m",)


@pytest.mark.parametrize("content", ["", "[]", '{"data": [{}]}', '{"data": []}'])
def test_a_file_of_another_format_is_named(tmp_path: Path, content: str) -> None:
    file = tmp_path / "other.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=r"other\.json"):
        read_passages(file)
