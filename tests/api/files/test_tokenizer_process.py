import array
import asyncio
import os
import signal
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from api.files.tokenizer_process import PIECE_CHARACTERS, TokenizationFailed, TokenizerProcess, cut
from longctx.text.tokenizer import Tokenizer
from tests.api.live_server import start_tokenizer_process
from tests.support.tiny_tokenizer import write_tokenizer
from tests.support.waiting import patient, wait_for

Run = Callable[[Callable[[TokenizerProcess], Coroutine[Any, Any, Any]]], Any]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return Tokenizer(folder)


@pytest.fixture
def with_process(tokenizer: Tokenizer) -> Run:
    def run(work: Callable[[TokenizerProcess], Coroutine[Any, Any, Any]]) -> Any:
        async def main() -> Any:
            process = start_tokenizer_process(tokenizer)
            try:
                return await asyncio.wait_for(work(process), patient())
            finally:
                await process.close()

        return asyncio.run(main())

    return run


def ids_in(path: Path) -> list[int]:
    ids = array.array("i")
    ids.frombytes(path.read_bytes())
    return ids.tolist()


def test_tokens_are_those_of_the_text_without_its_byte_order_mark(
    with_process: Run, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    text, tokens = tmp_path / "text", tmp_path / "tokens"
    text.write_text("\ufeffGröße </s> <|user|>\r\nend")
    count = with_process(lambda process: process.tokenize(text, tokens, continues=False))
    assert ids_in(tokens) == tokenizer.encode("Größe </s> <|user|>\r\nend")
    assert count == len(ids_in(tokens))


def test_a_text_of_several_pieces_has_the_tokens_of_the_whole(
    with_process: Run, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("api.files.tokenizer_process.PIECE_CHARACTERS", 1 << 14)
    text, tokens = tmp_path / "text", tmp_path / "tokens"
    whole = "The harbour of the old town. Größe\n  indented, and so on\n\n" * 2000
    assert len(whole) > 6 << 14
    text.write_text(whole)
    seen: list[int] = []
    with_process(
        lambda process: process.tokenize(text, tokens, continues=False, on_progress=seen.append)
    )
    assert ids_in(tokens) == tokenizer.encode(whole)
    assert len(seen) > 3 and seen == sorted(seen) and seen[-1] == text.stat().st_size


def test_pieces_end_after_a_line_or_before_a_space_or_anywhere() -> None:
    size = PIECE_CHARACTERS
    assert cut("a" * (size - 10) + "\n" + "b" * size) == size - 9
    assert cut("a" * (size - 10) + " " + "b" * size) == size - 10
    assert cut("a" * 2 * size) == size


def test_a_cancelled_document_is_given_up_and_the_next_one_is_read(
    with_process: Run, tmp_path: Path
) -> None:
    long, short = tmp_path / "long", tmp_path / "short"
    long.write_text("many words " * 1_000_000)
    short.write_text("few words")

    async def work(process: TokenizerProcess) -> int:
        begun = asyncio.Event()
        first = asyncio.ensure_future(
            process.tokenize(
                long,
                tmp_path / "long.tokens",
                continues=False,
                on_progress=lambda read_bytes: begun.set(),
            )
        )
        await begun.wait()
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        return await process.tokenize(short, tmp_path / "short.tokens", continues=False)

    assert with_process(work) > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["long", "short", "short.tokens"]


class HeldTokenizer:
    """Every text is three tokens, once `gate` exists; it makes `waiting` when it is asked."""

    def __init__(self, folder: Path) -> None:
        self.gate, self.waiting = folder / "gate", folder / "waiting"

    def encode(self, text: str, *, continues: bool) -> list[int]:
        self.waiting.touch()
        wait_for(self.gate.exists)
        return [1, 2, 3]


@pytest.mark.parametrize("known", [True, False], ids=["known", "not yet known"])
def test_a_cancelled_process_that_ends_its_work_all_the_same_leaves_no_tokens(
    known: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The signal comes too late: the process has already all its tokens, and only then dies."""
    held: Any = HeldTokenizer(tmp_path)
    text, tokens = tmp_path / "document.txt", tmp_path / "document.tokens"
    text.write_text("words")

    async def work() -> None:
        process = start_tokenizer_process(held)
        try:
            begun = asyncio.ensure_future(process.tokenize(text, tokens, continues=False))
            while not held.waiting.exists():
                await asyncio.sleep(0)
            if known:
                await asyncio.sleep(0.1)  # its id has arrived
            monkeypatch.setattr(os, "kill", lambda pid, number: None)
            asyncio.get_running_loop().call_later(0.1, held.gate.touch)
            begun.cancel()
            with pytest.raises(asyncio.CancelledError):
                await begun
            text.unlink()  # as a deletion does next
            tokens.unlink(missing_ok=True)
            assert not list(tmp_path.glob("document.*"))
            # The process takes one text after the other: the first one has ended by now.
            text.write_text("other words")
            assert await process.tokenize(text, tmp_path / "next.tokens", continues=False) == 3
            assert list(tmp_path.glob("document.*")) == [text]
        finally:
            monkeypatch.undo()
            await process.close()

    asyncio.run(asyncio.wait_for(work(), patient()))


def test_the_process_takes_only_what_others_leave(tokenizer: Tokenizer) -> None:
    process = TokenizerProcess(tokenizer)
    try:
        wait_for(lambda: os.getpriority(os.PRIO_PROCESS, process.zygote_pid) == 19)
    finally:
        asyncio.run(process.close())


def test_a_process_that_dies_is_an_error_that_says_how(
    with_process: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("api.files.tokenizer_process.CPU_SECONDS", 1)
    monkeypatch.setattr("api.files.tokenizer_process.CPU_SECONDS_PER_MIB", 0)
    text = tmp_path / "text"
    text.write_text("a long story, " * 1_000_000)
    with pytest.raises(TokenizationFailed, match="more than 1 s of CPU; upload it in parts"):
        with_process(lambda process: process.tokenize(text, tmp_path / "tokens", continues=False))


def test_too_little_memory_is_an_error_that_says_so(
    with_process: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("api.files.tokenizer_process.DATA_BYTES", 100 << 20)
    monkeypatch.setattr(
        "api.files.tokenizer_process.PIECE_CHARACTERS", 1 << 24
    )  # more than what is free in a heap
    text = tmp_path / "text"
    text.write_text("a long story, " * 1_000_000)
    with pytest.raises(TokenizationFailed, match="GiB"):
        with_process(lambda process: process.tokenize(text, tmp_path / "tokens", continues=False))


def test_the_end_of_the_zygote_is_an_error_and_not_a_hang(
    with_process: Run, tmp_path: Path
) -> None:
    text = tmp_path / "text"
    text.write_text("words")

    async def work(process: TokenizerProcess) -> None:
        os.kill(process.zygote_pid, signal.SIGKILL)
        with pytest.raises(TokenizationFailed, match="restart the server"):
            await process.tokenize(text, tmp_path / "tokens", continues=False)

    with_process(work)
