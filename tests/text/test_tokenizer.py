"""A user's text is text; only a template's text speaks to the model."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from longctx.errors import InvalidRequest, ModelRefused
from longctx.text.tokenizer import Tokenizer
from tests.support.tiny_tokenizer import DOCUMENTS_FIRST_TEMPLATE, SPECIAL_TOKENS, write_tokenizer

DATED_TEMPLATE = (
    "{{ bos_token }}It is {{ strftime_now('%d %B %Y') }}, {{ strftime_now('%-d/%m') }}."
)


def save(backend: Backend, folder: Path) -> Tokenizer:
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return Tokenizer(folder)


def unigram() -> Backend:
    """A model that finds `</s>` in its own vocabulary, in full-width brackets too."""
    pieces = ["<unk>", "<s>", "</s>", "\u2581", "hello", "\u2581hello", *"<>/shelo d\n"]
    backend = Backend(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=0))
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return backend


def word_level() -> Backend:
    backend = Backend(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return backend


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer(folder)


@pytest.fixture(scope="module", params=["byte-level", "unigram"])
def either(request, tokenizer, tmp_path_factory) -> Tokenizer:
    if request.param == "byte-level":
        return tokenizer
    return save(unigram(), tmp_path_factory.mktemp("unigram"))


pieces = st.sampled_from([*SPECIAL_TOKENS, "</", "s>", "<", "hello", " ", "/s", "\uff1c/s\uff1e"])


@given(text=st.lists(pieces, max_size=12).map("".join), continues=st.booleans())
@settings(deadline=None)
def test_text_never_yields_a_special_token(either, text, continues):
    ids = either.encode(text, continues=continues)
    # The unknown token, number 0 of the small vocabulary, is special but says nothing
    assert not any(either.is_special(token_id) for token_id in ids if token_id)


@given(text=st.text())
@settings(deadline=None)
def test_text_survives_encode_and_decode(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(text=st.text())
@settings(deadline=None)
def test_each_token_tells_where_it_ends(tokenizer, text):
    ids, ends = tokenizer.encode(text), tokenizer.token_ends(text).tolist()
    assert len(ids) == len(ends) and ends == sorted(ends)
    for number, end in enumerate(ends, 1):
        decoded = tokenizer.decode(ids[:number])
        if "\ufffd" not in decoded:  # else it ends inside of a character
            assert decoded == text[:end]


@given(text=st.lists(pieces, max_size=12).map("".join))
@settings(deadline=None)
def test_tokens_of_a_text_that_is_cut_end_where_they_do_in_the_whole(either, text):
    ends = either.token_ends(text).tolist()
    assert len(ends) == len(either.encode(text)) and ends == sorted(ends)
    assert not text or ends[-1] == len(text)


def test_a_special_string_cut_in_two_still_reads_the_same(either):
    text = "hello </s> hello </s></s>"
    ids = either.encode(text)
    assert either.decode(ids) == text
    assert either.eos_token_ids.isdisjoint(ids)


def test_a_continued_text_gets_no_leading_space(tmp_path):
    tokenizer = save(unigram(), tmp_path)
    assert tokenizer.decode(tokenizer.encode("d") + tokenizer.encode("hello")) == "d hello"
    joined = tokenizer.encode("d") + tokenizer.encode("hello", continues=True)
    assert tokenizer.decode(joined) == "dhello"
    marked = tokenizer.encode_template("hello</s>", continues=True)
    assert marked[0] == tokenizer.encode("hello", continues=True)[0]
    assert marked[-1] in tokenizer.eos_token_ids


def test_marks_of_the_template_that_are_not_called_special_are_text_too(tmp_path):
    write_tokenizer(tmp_path, chat_template="{{ '[USER]' + messages[0]['content'] }}")
    file = tmp_path / "tokenizer.json"
    state = json.loads(file.read_text())
    mark = {"id": 600, "content": "[USER]", "special": False, "normalized": False}
    mark |= {"single_word": False, "lstrip": False, "rstrip": False}
    state["added_tokens"] += [mark, {**mark, "id": 601, "content": "[NOTE]"}]
    file.write_text(json.dumps(state))
    tokenizer = Tokenizer(tmp_path)
    (user,), (note,) = tokenizer.encode_template("[USER]"), tokenizer.encode_template("[NOTE]")
    assert tokenizer.spells_control("a[USER]") and not tokenizer.spells_special("a[USER]")
    assert user not in tokenizer.encode("a[USER]") and note in tokenizer.encode("a[NOTE]")
    assert tokenizer.decode([user]) == "[USER]"


def test_a_special_token_that_cannot_be_written_as_text_is_refused(tmp_path):
    folder = tmp_path / "tokenizer"
    backend = word_level()
    backend.add_special_tokens(["a"])
    tokenizer = save(backend, folder)
    assert tokenizer.encode("unknown words") == [0, 0]
    with pytest.raises(InvalidRequest, match="remove it"):
        tokenizer.encode("b a")


def test_template_text_yields_special_tokens_and_adds_none(tokenizer, folder):
    text = "<|user|>hello</s>"
    expected = AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.encode_template(text) == expected
    assert tokenizer.is_special(expected[0]) and tokenizer.is_special(expected[-1])


def test_a_completion_gets_the_default_tokens_around_plain_text(tokenizer):
    text = "hello </s>"
    ids = tokenizer.encode_completion(text)
    assert ids == [tokenizer.bos_token_id, *tokenizer.encode(text)]
    assert tokenizer.encode_completion("") == [tokenizer.bos_token_id]


def test_half_a_surrogate_pair_is_refused(tokenizer):
    with pytest.raises(InvalidRequest, match="surrogate"):
        tokenizer.encode("a\ud800b")


@pytest.mark.parametrize("unit", ["a", " ", "\n", "</s>", "ab1", "你好"])
def test_a_megabyte_without_a_space_takes_seconds(either, unit):
    text = unit * (2**20 // len(unit.encode()))
    started = time.process_time()  # not of what else the machine does
    ids = either.encode(text)
    assert time.process_time() - started < 20  # about half a second; quadratic would be hours
    assert either.eos_token_ids.isdisjoint(ids)


def test_threads_share_one_tokenizer(tokenizer):
    texts = [f"hello </s> {i} " * 200 for i in range(32)]
    with ThreadPoolExecutor(4) as pool:
        encoded = list(pool.map(tokenizer.encode, texts))
        pool.map(tokenizer.encode_template, texts)
    assert [tokenizer.decode(ids) for ids in encoded] == texts


def test_the_fingerprint_follows_all_that_decides_tokens_and_not_the_place(tmp_path):
    def written(name, **changes):
        write_tokenizer(tmp_path / name, **changes)
        return tmp_path / name

    def special(folder):
        """Makes a word of the vocabulary a token of its own, by tokenizer.json alone."""
        state = json.loads((folder / "tokenizer.json").read_text())
        state["added_tokens"].append({**state["added_tokens"][0], "id": 300, "content": "ship"})
        (folder / "tokenizer.json").write_text(json.dumps(state))
        return folder

    def ends(folder):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 3]}))
        return folder

    first, copy = Tokenizer(written("a")).fingerprint, Tokenizer(written("b")).fingerprint
    assert first == copy
    others = [
        written("vocabulary", vocab_size=400),
        written("template", chat_template=DOCUMENTS_FIRST_TEMPLATE),
        written("no-template", chat_template=None),
        special(written("special")),
        ends(written("ends")),
    ]
    assert len({first, *(Tokenizer(folder).fingerprint for folder in others)}) == 6


def test_every_end_token_of_the_generation_config_ends_an_answer(folder, tmp_path):
    write_tokenizer(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 3]}))
    assert Tokenizer(tmp_path).eos_token_ids == {1, 3}
    assert Tokenizer(folder).eos_token_ids == {1}


@pytest.mark.parametrize(
    "config", [{"eos_token_id": [3, 4]}, {"text_config": {"eos_token_id": [3, 4]}}]
)
def test_end_tokens_that_only_the_configuration_lists_end_an_answer_too(tmp_path, config):
    write_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert Tokenizer(tmp_path).eos_token_ids == {1, 3, 4}
    (tmp_path / "generation_config.json").write_text(json.dumps({"do_sample": True}))
    assert Tokenizer(tmp_path).eos_token_ids == {1, 3, 4}
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 2}))
    assert Tokenizer(tmp_path).eos_token_ids == {1, 2}  # as `transformers` reads the files


def test_members_describe_the_folder(tokenizer, tmp_path):
    assert tokenizer.vocab_size == 512
    assert tokenizer.special_token_strings == set(SPECIAL_TOKENS)
    assert tokenizer.has_chat_template and not tokenizer.takes_documents
    write_tokenizer(tmp_path / "documents", chat_template=DOCUMENTS_FIRST_TEMPLATE)
    assert Tokenizer(tmp_path / "documents").takes_documents
    quoted = "{# documents #}{{ 'documents' }}{{ messages[0].documents }}"
    write_tokenizer(tmp_path / "quoted", chat_template=quoted)
    assert not Tokenizer(tmp_path / "quoted").takes_documents


def test_a_missing_or_broken_folder_is_refused_with_its_name(tmp_path):
    with pytest.raises(ModelRefused, match="not a folder"):
        Tokenizer(tmp_path / "absent")
    with pytest.raises(ModelRefused, match=r"tokenizer\.json"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelRefused, match=tmp_path.name):
        Tokenizer(tmp_path)


def test_the_date_of_a_template_can_be_frozen(tmp_path):
    write_tokenizer(tmp_path, chat_template=DATED_TEMPLATE)
    tokenizer = Tokenizer(tmp_path)
    message = {"role": "user", "content": "x"}
    assert tokenizer.render([message], date="2024-03-05") == "<s>It is 05 March 2024, 5/03."
    today = time.strftime("%Y")
    assert today in tokenizer.render([message])


def test_a_frozen_date_changes_nothing_else(folder, tmp_path):
    template = "\n  {% if true %}\n{{ strftime_now('%Y') }}\n  {% endif %}\n x"
    write_tokenizer(tmp_path, chat_template=template)
    tokenizer = Tokenizer(tmp_path)
    message = {"role": "user", "content": "x"}
    today = time.strftime("%Y-%m-%d")
    assert tokenizer.render([message], date=today) == tokenizer.render([message])


def test_a_template_that_refuses_says_so_in_its_own_words(tmp_path):
    write_tokenizer(tmp_path, chat_template="{{ raise_exception('no system role here') }}")
    with pytest.raises(InvalidRequest, match="no system role here"):
        Tokenizer(tmp_path).render([{"role": "system", "content": "x"}])
