"""Outputs that wait for a slow reader: joined, and nothing of them lost or out of order."""

import asyncio
from collections.abc import Sequence
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from longctx.errors import EngineDied, LongctxError
from longctx.process.output_queue import OutputQueue
from longctx.request import FinishReason, Progress, RequestOutput, TokenLogprob, Usage

PROGRESS = Progress(total=8, cache=0, processed=4, time_ms=1.0)


def step(number: int, *, index: int = 0, told: bool = False) -> RequestOutput:
    """Output of one decode step; `told`: with log-probabilities."""
    logprobs = (TokenLogprob(token_id=number, logprob=-1.0),) if told else ()
    return RequestOutput(
        request_id="r", index=index, token_ids=(number,), text=f"{number} ", logprobs=logprobs
    )


def taken(items: Sequence[RequestOutput | LongctxError]) -> list[RequestOutput | LongctxError]:
    """What a reader gets who comes when all of it waits."""

    async def take() -> list[RequestOutput | LongctxError]:
        outputs, got = OutputQueue(), list[RequestOutput | LongctxError]()
        for item in items:
            outputs.put(item)
        ends = items[-1]
        while not got or not (got[-1] is ends or _ends(got[-1])):
            got.append(await outputs.get())
        return got

    return asyncio.run(take())


def _ends(item: RequestOutput | LongctxError) -> bool:
    return isinstance(item, LongctxError) or item.finished


def end(index: int = 0, *, finished: bool = True) -> RequestOutput:
    usage = (
        Usage(prompt_tokens=8, cached_tokens=0, completion_tokens=2, computed_tokens=8)
        if finished
        else None
    )
    return RequestOutput(
        request_id="r",
        index=index,
        token_ids=(9,),
        text="9 ",
        finish_reason=FinishReason.LENGTH,
        finished=finished,
        usage=usage,
    )


def test_what_waits_comes_as_one_after_the_first_token() -> None:
    first, output = taken([step(1, told=True), step(2, told=True), step(3, told=True), end()])
    assert first == step(1, told=True)
    assert isinstance(output, RequestOutput)
    assert (output.token_ids, output.text) == ((2, 3, 9), "2 3 9 ")
    assert [each.token_id for each in output.logprobs] == [2, 3]
    assert output.finish_reason is FinishReason.LENGTH and output.usage is not None


def test_an_error_comes_after_the_answer_so_far() -> None:
    error = EngineDied("gone")
    assert taken([step(1), step(2), step(3), error])[2:] == [error]


def test_progress_and_prompt_logprobs_stay_alone() -> None:
    progress = RequestOutput(request_id="r", progress=PROGRESS)
    prompt = RequestOutput(
        request_id="r", prompt_logprobs=(TokenLogprob(token_id=1, logprob=None),)
    )
    outputs = [progress, progress, prompt, step(1), end()]
    assert taken(outputs) == outputs


@given(st.lists(st.tuples(st.integers(0, 2), st.booleans()), max_size=30))
def test_choices_keep_their_tokens_in_order(steps: list[tuple[int, bool]]) -> None:
    """Steps of three choices, some of which end the choice, joined only within a choice."""
    over = set[int]()
    items = list[RequestOutput]()
    for number, (index, ends) in enumerate(steps):
        if index in over:
            continue
        items.append(end(index, finished=False) if ends else step(number, index=index))
        if ends:
            over.add(index)
    items.append(end(3))
    got = [item for item in taken(items) if isinstance(item, RequestOutput)]
    for index in range(4):
        before = [each for each in items if each.index == index]
        after = [each for each in got if each.index == index]
        for told in (before, after):
            assert all(each.finish_reason is None for each in told[:-1])
        tokens = [[token for each in told for token in each.token_ids] for told in (before, after)]
        assert tokens[0] == tokens[1]
        assert "".join(each.text for each in before) == "".join(each.text for each in after)
    first = [next(each for each in got if each.index == index) for index in {o.index for o in got}]
    for one, other in pairwise(got):
        assert one.index != other.index or one.finish_reason is not None or one in first


def test_a_reader_that_waits_gets_what_comes_next() -> None:
    async def wait() -> RequestOutput | LongctxError:
        outputs = OutputQueue()
        reading = asyncio.create_task(outputs.get())
        await asyncio.sleep(0)
        outputs.put(step(1))
        return await reading

    assert asyncio.run(wait()) == step(1)
