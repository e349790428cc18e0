"""A statement stands at the sentence end whose share of the model's tokens is the nearest."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.bench.haystack import haystacks
from longctx.embedded import model_path
from longctx.needles.placing import Tokens, nearest_ends, put, sentence_ends
from longctx.text.tokenizer import Tokenizer
from tests.support.tiny_tokenizer import write_tokenizer

STATEMENTS = ("The code of the old mill is 7421.", "- name of the ship: Meridian\n", "Größe: 9.")


@pytest.fixture(scope="module", params=["embedded", "tiny"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokens:
    if request.param == "embedded":
        return Tokenizer(model_path())
    folder = tmp_path_factory.mktemp("tiny")
    write_tokenizer(folder)
    return Tokenizer(folder)


# Sentences of very different lengths in tokens, so that shares of characters would mislead
sentences = st.builds(
    lambda words, end: " ".join(words) + end,
    st.lists(
        st.sampled_from(["the", "harbour", "4,512", "Größe", "x" * 30, "Straße", "is", "a.b"]),
        min_size=1,
        max_size=12,
    ),
    st.sampled_from([". ", "! ", '." ', "? ", ".\n\n", "\n", ".\n"]),
)
texts = st.lists(sentences, min_size=12, max_size=24).map("".join).map(str.strip)


@given(text=texts, statement=st.sampled_from(STATEMENTS), depth=st.floats(0, 1))
@settings(deadline=None)
def test_no_sentence_end_is_nearer_to_the_wanted_share_of_tokens(
    tokenizer: Tokens, text: str, statement: str, depth: float
) -> None:
    (place,) = nearest_ends(text, [statement], [depth], tokenizer)
    wanted = depth * len(tokenizer.encode(text))
    misses = {end: abs(len(tokenizer.encode(text[:end])) - wanted) for end in sentence_ends(text)}
    assert misses[place] == min(misses.values())
    mixed, (begin,) = put(text, [statement], [place])
    assert mixed[begin:].startswith(statement)
    assert mixed[:begin].rstrip(" ") == text[:place]
    rest = mixed[begin + len(statement) :]
    assert rest.split() == text[place:].split()


@given(text=texts)
@settings(deadline=None, max_examples=20)
def test_the_tokens_of_other_statements_count(tokenizer: Tokens, text: str) -> None:
    text = "\n\n".join([text] * 3)
    depths = [0.2, 0.5, 0.8]
    costs = [len(tokenizer.encode(each)) for each in STATEMENTS]
    total = len(tokenizer.encode(text)) + sum(costs)
    upto = {end: len(tokenizer.encode(text[:end])) for end in sentence_ends(text)}
    places = nearest_ends(text, STATEMENTS, depths, tokenizer)
    for number, place in enumerate(places):
        before = sum(costs[:number])
        wanted = depths[number] * (total - costs[number])
        misses = {end: abs(tokens + before - wanted) for end, tokens in upto.items()}
        assert misses[place] == min(misses.values())


def test_statements_at_one_place_stand_one_after_another(tokenizer: Tokens) -> None:
    text = "One long sentence without an end until here. And another one."
    places = nearest_ends(text, STATEMENTS, [0.5, 0.5, 0.5], tokenizer)
    mixed, begins = put(text, STATEMENTS, places)
    assert begins == sorted(begins)
    for begin, statement in zip(begins, STATEMENTS, strict=True):
        assert mixed[begin:].startswith(statement)


def test_headings_and_other_scripts_have_ends_too() -> None:
    text = 'A heading\n\nAa\u3002Bb\uff01 Mr. 3.5 (so.) "x." y\nz'
    ends = [text[:end] for end in sentence_ends(text)]
    tails = ["", "ding", "Aa\u3002", "Bb\uff01", " Mr.", "so.)", '"x."', "y", "z"]
    assert len(ends) == len(tails)
    assert all(end.endswith(tail) for end, tail in zip(ends, tails, strict=True))


@pytest.mark.parametrize("distractors", [0, 1])
def test_a_document_tells_the_token_that_each_needle_begins_at(
    tokenizer: Tokens, distractors: int
) -> None:
    (hay, *_) = haystacks(
        4000,
        (0.0, 50.0, 100.0),
        questions=3,
        kind="any",
        distractor_count=distractors,
        seed=5,
        tokenizer=tokenizer,
    )
    for each in hay.planted:
        begin = hay.text.index(each.needle.statement.strip(" "))
        assert each.begin_token == len(tokenizer.encode(hay.text[:begin].rstrip(" ")))
        # Half of the longest sentences, in pieces of the smaller vocabulary
        assert abs(each.begin_token - each.wanted_token) <= 40
    first, last = hay.planted[0], hay.planted[-1]
    assert first.begin_token == 0
    assert last.begin_token == last.wanted_token  # the rest comes before it
