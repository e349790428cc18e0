"""Streaming text is the text: same characters, none of them halved, cut at the first stop."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from longctx.text.detokenizer import TextStream
from longctx.text.tokenizer import Tokenizer
from tests.support.tiny_tokenizer import write_tokenizer

VOCAB_SIZE = 400


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, vocab_size=VOCAB_SIZE)
    return Tokenizer(folder)


@pytest.fixture(scope="module")
def byte_fallback(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """As Llama 2's: words with U+2581, and a token per byte for everything else."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words += ["\u2581", "a", "b", "\u2581a", "ab", "\u2581ab", "."]
    merges = [("\u2581", "a"), ("a", "b"), ("\u2581a", "b")]
    backend = Backend(
        models.BPE(
            {word: i for i, word in enumerate(words)},
            merges,
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    folder = tmp_path_factory.mktemp("byte_fallback")
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return Tokenizer(folder)


def streamed(tokenizer: Tokenizer, ids: list[int], stop: tuple[str, ...] = ()) -> list[str]:
    stream = TextStream(tokenizer, stop=stop)
    deltas = []
    for token_id in ids:
        delta = stream.push(token_id)
        deltas.append(delta.text)
        if delta.stopped_by is not None:
            assert delta.stopped_by in stop
            return deltas
    return [*deltas, stream.finish()]


def cut(text: str, stop: tuple[str, ...]) -> str:
    """The text before the stop string that is complete first."""
    found = [(text.find(word) + len(word), text.find(word)) for word in stop if word in text]
    return text[: min(found)[1]] if found else text


token_ids = st.lists(st.integers(0, VOCAB_SIZE + 3), max_size=80)
stops = st.lists(st.text("ab \ufffdeé.", min_size=1, max_size=3), max_size=3).map(tuple)


@given(ids=token_ids, stop=stops)
@settings(max_examples=200, deadline=None)
@example(ids=[200] * 100, stop=())
def test_streamed_random_tokens_equal_decoding_them_at_once(tokenizer, ids, stop):
    assert "".join(streamed(tokenizer, ids, stop)) == cut(tokenizer.decode(ids), stop)


@given(text=st.text(max_size=60), stop=stops, data=st.data())
@settings(max_examples=150, deadline=None)
def test_streamed_text_is_cut_at_a_stop_string_taken_from_it(tokenizer, text, stop, data):
    if text:
        begin = data.draw(st.integers(0, len(text) - 1))
        stop = (*stop, text[begin : data.draw(st.integers(begin + 1, len(text)))])
    assert "".join(streamed(tokenizer, tokenizer.encode(text), stop)) == cut(text, stop)


@given(text=st.text(st.characters(exclude_characters="\u2581", exclude_categories=["Cs"])))
@settings(max_examples=150, deadline=None)
def test_byte_fallback_tokens_stream_the_text_they_came_from(byte_fallback, text):
    assert "".join(streamed(byte_fallback, byte_fallback.encode(text))) == text


@given(text=st.text("a😀é你\u200d🏽", max_size=30))
@settings(deadline=None)
def test_no_delta_holds_half_a_character(tokenizer, text):
    assert all("\ufffd" not in delta for delta in streamed(tokenizer, tokenizer.encode(text)))


def test_an_unfinished_character_comes_out_at_the_end(tokenizer):
    ids = tokenizer.encode("ok 😀")
    stream = TextStream(tokenizer, stop=())
    assert "".join(stream.push(token_id).text for token_id in ids[:-1]) == "ok "
    assert stream.finish() == "\ufffd"


def test_text_that_may_become_a_stop_string_is_held_back_until_it_is_not(tokenizer):
    stream = TextStream(tokenizer, stop=("###",))
    (mark,), (other,) = tokenizer.encode("#"), tokenizer.encode("x")
    assert [stream.push(mark).text, stream.push(mark).text] == ["", ""]
    assert stream.push(other).text == "##x"
    assert stream.push(mark).text == ""
    assert stream.finish() == "#"


def test_a_stop_string_names_itself_and_nothing_follows_it(tokenizer):
    stream = TextStream(tokenizer, stop=("zz", "b"))
    results = [stream.push(token_id) for token_id in tokenizer.encode("a b c")]
    assert "".join(delta.text for delta in results) == "a "
    assert next(delta.stopped_by for delta in results if delta.stopped_by) == "b"
    assert stream.finish() == ""


def test_special_tokens_are_skipped(tokenizer):
    (eos,) = tokenizer.eos_token_ids
    ids = tokenizer.encode("a")
    assert "".join(streamed(tokenizer, [eos, *ids, eos, *ids])) == "aa"


def test_special_tokens_that_are_to_be_shown_are_named_in_their_place(tokenizer):
    (eos,) = tokenizer.eos_token_ids
    (mark,) = tokenizer.encode("#")
    emoji = tokenizer.encode("😀")
    stream = TextStream(tokenizer, stop=("#</s>#",), shown=(eos,)).another()
    ids = [mark, eos, *tokenizer.encode("a"), *emoji[:-1], eos, *emoji, mark, eos, mark]
    deltas = [stream.push(token_id) for token_id in ids]
    text = "".join(delta.text for delta in deltas)
    assert text == "#</s>a\ufffd</s>😀" and deltas[-1].stopped_by == "#</s>#"
    assert deltas[0].text == deltas[1].text == ""  # they may become the stop string


@pytest.mark.parametrize("kind", ["words", "stray bytes", "one emoji"])
def test_a_token_decodes_few_tokens_however_long_the_answer(tokenizer, kind, monkeypatch):
    stray = next(i for i in range(VOCAB_SIZE) if tokenizer.decode([i]) == "\ufffd")
    ids = {
        "words": tokenizer.encode("The harbour of the old town. " * 300),
        "stray bytes": [stray] * 3000,
        "one emoji": tokenizer.encode("😀" * 750),
    }[kind]
    decoded = 0
    decode = tokenizer.decode

    def counting(window):
        nonlocal decoded
        decoded += len(window)
        return decode(window)

    monkeypatch.setattr(tokenizer, "decode", counting)
    streamed(tokenizer, ids)
    assert decoded < 40 * len(ids)
