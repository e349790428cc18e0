"""The embedded retrieval model finds facts in modules, at whatever position and level.

It has layers with a window and layers without positions beside rotary ones, so all kinds of layers
take part.
"""

from collections.abc import Iterator

import pytest

from longctx.bench.haystack import Planted, haystacks
from longctx.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from longctx.llm import LLM
from longctx.request import Piece, SamplingParams, Segment
from longctx.text.chat_template import ChatPrompts, FilePart, Message

GREEDY = SamplingParams(temperature=0.0, max_tokens=24)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    config = EngineConfig(
        model=ModelConfig(threads=1),
        cache=CacheConfig(kv_codec="int8", force_codec=True, device_pool_gib=0.1),
        scheduler=SchedulerConfig(max_sequences=4),
    )
    with LLM(config=config) as llm:
        yield llm


@pytest.mark.parametrize("link_tokens", [None, 16, 0])
def test_facts_in_modules_are_found_in_any_order(llm: LLM, link_tokens: int | None) -> None:
    prompts, encode = ChatPrompts(llm.engine.tokenizer), llm.engine.tokenizer.encode
    position = len(prompts.document_prefix(None))
    modules: dict[str, tuple[int, Planted]] = {}
    for seed in range(3):
        (stack,) = haystacks(
            300,
            [50.0],
            questions=1,
            kind="number",
            distractor_count=1,
            seed=seed,
            tokenizer=llm.engine.tokenizer,
        )
        token_ids = tuple(encode(f"{stack.text}\n\n"))
        module_id = llm.open_module([Piece(token_ids=token_ids, position=position)])
        modules[module_id] = len(token_ids), stack.planted[0]
    for order in (list(modules), list(reversed(modules))):
        for _, planted in modules.values():
            question = Message("user", (FilePart("", ""), planted.needle.question))
            opening, _, closing = prompts.render([question])
            segments, position = [opening], len(opening.token_ids)
            for module_id in order:
                segments.append(
                    Segment(module_id=module_id, position=position, link_tokens=link_tokens)
                )
                position += modules[module_id][0]
            answer = llm.answer([*segments, closing], GREEDY)
            assert planted.needle.answer in answer.text, (order, answer.text)
