"""The tokenizer of a GGUF file gives the tokens that the model's own tokenizer gives."""

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.errors import ModelRefused
from longctx.text.tokenizer import Tokenizer
from tests.support.tiny_gguf import add_key, tokenizer_keys
from tests.support.tiny_tokenizer import SPECIAL_TOKENS, write_tokenizer

TEXTS = st.text(max_size=60) | st.text("aehrt 019'\n<|user>/s", max_size=60)
SPACE = "\u2581"
PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
WORDS = [*"theraonsi", SPACE, "th", "he", "the", SPACE + "t", SPACE + "the", "an", "on", "er", "re"]


def write(path: Path, keys: dict[str, Any], architecture: str = "llama") -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in keys.items():
        add_key(writer, f"tokenizer.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def pair(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Tokenizer]:
    """The tokenizer of a folder, and that of a file made of it."""
    path = write(tmp_path_factory.mktemp("file") / "model.gguf", tokenizer_keys(folder))
    return Tokenizer(folder), Tokenizer(path)


@settings(deadline=None, max_examples=200)
@given(text=TEXTS)
def test_a_byte_level_vocabulary_gives_the_folders_tokens(
    pair: tuple[Tokenizer, Tokenizer], text: str
) -> None:
    plain, own = pair
    assert own.encode(text) == plain.encode(text)
    assert own.encode(text, continues=True) == plain.encode(text, continues=True)
    assert own.encode_template(text) == plain.encode_template(text)
    assert own.encode_completion(text) == plain.encode_completion(text)
    assert own.decode(own.encode(text)) == text


def test_template_special_tokens_and_ends_are_the_files(pair: tuple[Tokenizer, Tokenizer]) -> None:
    plain, own = pair
    messages = [{"role": "user", "content": "Which ship?"}]
    assert own.render(messages) == plain.render(messages)
    assert own.special_token_strings == set(SPECIAL_TOKENS)
    assert own.eos_token_ids == plain.eos_token_ids
    assert (own.bos_token_id, own.vocab_size) == (plain.bos_token_id, plain.vocab_size)


def test_the_end_of_a_turn_ends_an_answer_too(folder: Path, tmp_path: Path) -> None:
    keys = tokenizer_keys(folder) | {"ggml.eot_token_id": 3}
    assert Tokenizer(write(tmp_path / "a.gguf", keys)).eos_token_ids == {1, 3}


def test_smollm_has_each_digit_alone(folder: Path, tmp_path: Path) -> None:
    keys = tokenizer_keys(folder)
    keys["ggml.tokens"] = [*keys["ggml.tokens"], "90"]
    keys["ggml.token_type"] = [*keys["ggml.token_type"], 1]
    keys["ggml.merges"] = ["9 0", *keys["ggml.merges"]]
    together, alone = (
        Tokenizer(write(tmp_path / f"{rule}.gguf", keys | {"ggml.pre": rule}))
        for rule in ("gpt-2", "smollm")
    )
    assert len(together.encode("90")) == 1
    assert len(alone.encode("90")) == 2


def sentence_piece_keys() -> dict[str, Any]:
    tokens = PIECES + WORDS
    return {
        "ggml.model": "llama",
        "ggml.tokens": tokens,
        "ggml.scores": [-float((7 * number) % 31) for number in range(len(tokens))],
        "ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * len(WORDS)],
        "ggml.bos_token_id": 1,
        "ggml.eos_token_id": 2,
        "ggml.unknown_token_id": 0,
    }


def merged(text: str, keys: dict[str, Any]) -> list[str]:
    """The slow twin: of all neighbors that are a token together, the best become one, in turns."""
    scores = dict(zip(keys["ggml.tokens"], keys["ggml.scores"], strict=True))
    parts = list(SPACE + text.replace(" ", SPACE)) if text else []
    while True:
        joined = [
            (-scores[left + right], at)
            for at, (left, right) in enumerate(pairwise(parts))
            if left + right in WORDS
        ]
        if not joined:
            break
        _, at = min(joined)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return [
        piece
        for part in parts
        for piece in ([part] if part in WORDS else [f"<0x{byte:02X}>" for byte in part.encode()])
    ]


@pytest.fixture(scope="module")
def sentence_piece(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("file") / "model.gguf"
    return Tokenizer(write(path, sentence_piece_keys()))


@settings(deadline=None, max_examples=200)
@given(text=st.text("thera onsié", max_size=40))
def test_a_vocabulary_with_scores_is_merged_best_first(
    sentence_piece: Tokenizer, text: str
) -> None:
    keys = sentence_piece_keys()
    ids = sentence_piece.encode(text)
    assert [keys["ggml.tokens"][token] for token in ids] == merged(text, keys)
    assert sentence_piece.decode(ids) == text
    assert sentence_piece.encode_completion(text)[:1] == [1]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ggml.pre": "new-rule"}, "split by the rule 'new-rule' (tokenizer.ggml.pre)"),
        ({"ggml.model": "rwkv"}, "a vocabulary of the kind 'rwkv' cannot be served"),
        ({"ggml.token_type": [1]}, "and 1 types"),
        ({"ggml.merges": ["no such"]}, "its vocabulary is not accepted"),
        ({"ggml.tokens": ["twice", "twice"]}, "2 tokens, 1 of them different"),
    ],
)
def test_what_cannot_be_read_exactly_is_refused_by_name(
    changes: dict[str, Any], words: str, folder: Path, tmp_path: Path
) -> None:
    path = write(tmp_path / "model.gguf", tokenizer_keys(folder) | changes)
    with pytest.raises(ModelRefused, match=re.escape(words)):
        Tokenizer(path)


def test_a_file_without_a_vocabulary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelRefused, match="has no vocabulary"):
        Tokenizer(write(tmp_path / "model.gguf", {"ggml.model": "gpt2", "ggml.pre": "gpt-2"}))
