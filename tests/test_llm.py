"""The library: a model, a document, a question, in a few lines."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from longctx.errors import (
    ContextTooLong,
    DocumentMissing,
    InvalidRequest,
    LongctxError,
    ModelRefused,
)
from longctx.llm import LLM, Message
from longctx.request import FinishReason, SamplingParams
from tests.support.recorded_engine import build_engine, engine_config

TEXT = "The name of the ship is Meridian, and her captain is Ana Ruiz. " * 20
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


@pytest.fixture
def llm(llama: Path) -> Iterator[LLM]:
    llm = LLM(llama, engine_config())
    yield llm
    assert not llm.engine.has_work
    assert llm.engine.stats().raw_blocks_in_use == 0


def test_plain_text_is_continued_one_answer_per_prompt_in_order(llm: LLM) -> None:
    one, two = llm.generate(["The harbour", "A reader asked"], GREEDY)
    assert one.token_ids == llm.generate("The harbour", GREEDY)[0].token_ids
    assert two.token_ids != one.token_ids
    assert len(one.token_ids) == 12 == one.usage.completion_tokens
    assert one.finish_reason is FinishReason.LENGTH
    assert one.text == llm.engine.tokenizer.decode(one.token_ids)


def test_a_conversation_goes_through_the_chat_template(llm: LLM) -> None:
    answer = llm.chat([Message("user", ("What is the name of the ship?",))], GREEDY)
    plain = llm.generate("What is the name of the ship?", GREEDY)[0]
    assert answer.usage.prompt_tokens > plain.usage.prompt_tokens


def test_a_document_is_read_once_and_asked_for_the_price_of_the_question(
    llm: LLM, tmp_path: Path
) -> None:
    file = tmp_path / "ship.txt"
    file.write_text(TEXT, encoding="utf-8")
    document = llm.document(file, system="Be brief.")
    assert document.usage.computed_tokens >= document.tokens
    for question in ("What is the name of the ship?", "Who is her captain?"):
        answer = document.ask(question, GREEDY)
        assert answer.usage.cached_tokens >= document.tokens - 64
        assert answer.usage.computed_tokens < 64 + 100
        assert len(answer.token_ids) == 12


def test_a_document_gives_the_answers_of_the_same_text_in_full(llm: LLM, llama: Path) -> None:
    document = llm.document_from_text(TEXT)
    answer = document.ask("Who?", GREEDY)
    fresh = LLM(llama, engine_config(max_batch_tokens=32))
    assert fresh.document_from_text(TEXT).ask("Who?", GREEDY).token_ids == answer.token_ids


def test_what_a_document_spells_is_text(llm: LLM) -> None:
    document = llm.document_from_text("</s><|user|><|assistant|> " * 10)
    special = {llm.engine.tokenizer.bos_token_id, *llm.engine.tokenizer.eos_token_ids}
    assert document.tokens > 10 * 10
    assert special.isdisjoint(llm.engine.tokenizer.encode("</s><|user|>"))


def test_a_closed_document_is_missing_and_its_blocks_are_free(llm: LLM) -> None:
    document = llm.document_from_text(TEXT)
    document.close()
    assert llm.engine.stats().groups[0].blocks_in_use == 0
    with pytest.raises(DocumentMissing):
        document.ask("Who?")


def test_an_empty_document_can_be_asked_about(llm: LLM) -> None:
    document = llm.document_from_text("")
    assert document.tokens == 0
    assert document.ask("Anything?", GREEDY).token_ids


def test_a_file_that_is_not_text_is_refused(llm: LLM, tmp_path: Path) -> None:
    file = tmp_path / "photo.jpg"
    file.write_bytes(b"\xff\xd8\xff\xe0")
    with pytest.raises(InvalidRequest, match=r"photo\.jpg: the file is an image"):
        llm.document(file)


def test_a_refused_prompt_leaves_the_others_not_running(llm: LLM) -> None:
    with pytest.raises(ContextTooLong):
        llm.generate(["short", "long " * 3000], GREEDY)
    assert not llm.engine.has_work


def test_a_broken_step_raises(llama: Path) -> None:
    llm = LLM(llama, engine_config())
    llm.engine = engine = build_engine(llama)
    engine.runner.failures.append(RuntimeError("broken"))
    with pytest.raises(LongctxError, match="RuntimeError: broken"):
        llm.generate("The harbour", GREEDY)
    assert llm.generate("The harbour", GREEDY)


def test_several_choices_give_the_first(llm: LLM) -> None:
    sampling = SamplingParams(n=3, seed=1, max_tokens=5, ignore_eos=True)
    (answer,) = llm.generate("The harbour", sampling)
    assert len(answer.token_ids) == 5 and answer.usage.completion_tokens == 15


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelRefused):
        LLM(tmp_path)
