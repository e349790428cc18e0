"""The part of the demo that asks a model which speaks."""

import base64
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from rich.console import Console

from longctx.demo import chat_model
from longctx.model.named import PACKAGED, packaged_path
from longctx.text.tokenizer import Tokenizer

FOUND = packaged_path(PACKAGED["smollm2"])


class Asked:
    """Answers every question with its number, and keeps what it was asked."""

    def __init__(self) -> None:
        self.contents: list[Any] = []
        self.starts = 0

    @contextmanager
    def served(self) -> Iterator["Asked"]:
        self.starts += 1
        yield self

    def ask(self, content: Any, *, max_tokens: int, show: bool) -> int:
        assert show and max_tokens == chat_model.ANSWER_TOKENS
        self.contents.append(content)
        return len(self.contents)


def test_the_first_question_is_asked_cold_warm_and_restored() -> None:
    asked = Asked()
    shown: list[int] = []
    times = chat_model.show_chat_model(Console(quiet=True), asked.served, show=shown.append)
    assert times == (1, 2, 5) and shown == [1, 2, 3, 4, 5] and asked.starts == 2
    first, *others = chat_model.QUESTIONS
    assert [content[1]["text"] for content in asked.contents] == [first, first, *others, first]
    files = {content[0]["file"]["file_data"] for content in asked.contents}
    (data,) = (file.partition("base64,")[2] for file in files)
    assert base64.b64decode(data).decode() == chat_model.page()


@pytest.mark.smollm2
@pytest.mark.skipif(FOUND is None, reason=f"SmolLM2 is absent: {PACKAGED['smollm2'].install}")
def test_the_page_is_long_and_fits_the_models_context() -> None:
    assert FOUND is not None
    assert 6000 <= len(Tokenizer(FOUND).encode(chat_model.page())) <= 8000
