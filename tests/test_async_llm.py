"""The library for asyncio: many questions at once, streams, and those who leave."""

import asyncio
from collections.abc import Coroutine
from contextlib import aclosing
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from longctx.errors import DocumentMissing, InvalidRequest, LongctxError, ModelRefused
from longctx.llm import LLM, AsyncLLM, Message
from longctx.request import FinishReason, SamplingParams
from tests.support.made_documents import pdf
from tests.support.recorded_engine import engine_config
from tests.support.waiting import eventually, patient

TEXT = "The name of the ship is Meridian, and her captain is Ana Ruiz. " * 20
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
LONG = SamplingParams(temperature=0.0, max_tokens=900, ignore_eos=True)
QUESTIONS = ["What is the name of the ship?", "Who is her captain?", "Where is she?"]


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, patient()))


def test_questions_at_once_are_computed_together_and_answered_as_one_by_one(llama: Path) -> None:
    with LLM(llama, engine_config()) as llm:
        plain = llm.document_from_text(TEXT)
        expected = [plain.ask(question, GREEDY).token_ids for question in QUESTIONS]

    async def ask() -> None:
        async with AsyncLLM(llama, engine_config()) as llm:
            document = await llm.document_from_text(TEXT)
            before = llm._llm.engine.stats().steps
            asked = (document.ask(question, GREEDY) for question in QUESTIONS)
            answers = await asyncio.gather(*asked)
            steps = llm._llm.engine.stats().steps - before
            assert [answer.token_ids for answer in answers] == expected
            assert all(answer.usage.cached_tokens >= document.tokens - 64 for answer in answers)
            assert steps < 12 * len(QUESTIONS)
            pieces = [text async for text in document.stream(QUESTIONS[0], GREEDY)]
            assert "".join(pieces) == answers[0].text and len(pieces) > 1
            (answer,) = [await llm.generate("The harbour", GREEDY)]
            assert answer.finish_reason is FinishReason.LENGTH

    run(ask())


def test_a_document_of_any_format_is_read_and_forgotten(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "ship.pdf").write_bytes(pdf("The name of the ship is Meridian."))
    (tmp_path / "binary").write_bytes(bytes(range(256)))

    async def ask() -> None:
        async with AsyncLLM(llama, engine_config()) as llm:
            document = await llm.document(tmp_path / "ship.pdf", system="Be brief.")
            assert document.tokens > 5
            await document.ask("Which ship?", GREEDY)
            await document.close()
            with pytest.raises(DocumentMissing):
                await document.ask("Which ship?", GREEDY)
            with pytest.raises(InvalidRequest, match="binary"):
                await llm.document(tmp_path / "binary")

    run(ask())


def test_who_leaves_ends_the_request_and_nobody_else_notices(llama: Path) -> None:
    async def ask() -> None:
        async with AsyncLLM(llama, engine_config()) as llm:
            engine = llm._llm.engine
            message = [Message("user", ("Tell a tale.",))]
            other = asyncio.create_task(llm.chat(message, GREEDY))
            async with aclosing(llm.stream(message, LONG)) as texts:
                async for _ in texts:
                    break
            cancelled = asyncio.create_task(llm.chat(message, LONG))
            await asyncio.sleep(0)
            cancelled.cancel()
            with pytest.raises(asyncio.CancelledError):
                await cancelled
            assert len((await other).token_ids) == 12
            await eventually(lambda: not engine.has_work and not llm._streams)

    run(ask())


def test_closing_ends_what_is_asked_and_refuses_what_comes_later(llama: Path) -> None:
    async def ask() -> None:
        llm = AsyncLLM(llama, engine_config())
        message = [Message("user", ("Tell a tale.",))]
        texts = llm.stream(message, LONG)
        await anext(texts)
        await llm.close()
        with pytest.raises(LongctxError, match="closed before the answer was complete"):
            async for _ in texts:
                pass
        with pytest.raises(LongctxError, match="the engine is closed"):
            await llm.chat(message)
        await llm.close()

    run(ask())


def test_errors_come_to_who_asked(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelRefused):
        AsyncLLM(tmp_path)

    async def ask() -> None:
        async with AsyncLLM(llama, engine_config()) as llm:
            with pytest.raises(InvalidRequest):
                await llm.generate("word " * 5000, GREEDY)
            with (
                mock.patch.object(llm._llm.engine, "step", side_effect=RuntimeError("torn")),
                pytest.raises(LongctxError, match="torn"),
            ):
                await llm.generate("A reader", GREEDY)

    run(ask())
