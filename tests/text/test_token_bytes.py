"""What single tokens stand for, in the kinds of vocabularies that there are."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from longctx.text.tokenizer import Tokenizer
from tests.support.tiny_tokenizer import write_tokenizer


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("byte-level")
    write_tokenizer(folder)
    return Tokenizer(folder)


@pytest.fixture(scope="module")
def byte_fallback(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """As Llama 2's: words are marked by U+2581, and bytes stand in for what is unknown."""
    folder = tmp_path_factory.mktemp("byte-fallback")
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *"abc"]
    vocabulary = {piece: number for number, piece in enumerate([*pieces, "\u2581a"])}
    backend = Backend(
        models.BPE(
            vocabulary, [("\u2581", "a")], unk_token="<unk>", byte_fallback=True, fuse_unk=True
        )
    )
    backend.normalizer = normalizers.Replace(" ", "\u2581")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return Tokenizer(folder)


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_the_bytes_of_the_tokens_are_those_of_the_text(byte_level: Tokenizer, text: str) -> None:
    ids = byte_level.encode(text)
    assert b"".join(map(byte_level.token_bytes, ids)) == text.encode()


@given(text=st.text(alphabet="abc \u00e9\u4f60", max_size=40))
def test_and_so_with_marked_words_and_bytes(byte_fallback: Tokenizer, text: str) -> None:
    ids = byte_fallback.encode(text)
    assert b"".join(map(byte_fallback.token_bytes, ids)) == text.encode()


def test_a_special_token_is_its_name_and_an_unknown_id_is_nothing(byte_level: Tokenizer) -> None:
    assert byte_level.token_bytes(0) == b"<s>"
    assert byte_level.token_bytes(10**6) == b""
