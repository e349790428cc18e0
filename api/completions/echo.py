"""Puts a prompt before its answer, as one more output of each of its choices."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace

from longctx.request import RequestOutput, TokenLogprob


async def with_prompts(
    outputs: AsyncGenerator[RequestOutput, None], texts: Sequence[str], *, choices: int
) -> AsyncGenerator[RequestOutput, None]:
    """Yields the outputs of several prompts, and before the first one of each choice its prompt.

    `texts`: the prompts; each has so many `choices`, which are numbered on from prompt to prompt.
    The log-probabilities of a prompt, where they come, are kept until its choices begin.
    """
    told: list[list[TokenLogprob]] = [[] for _ in texts]
    begun: set[int] = set()
    async with aclosing(outputs):
        async for output in outputs:
            number = output.index // choices
            if output.prompt_logprobs:
                told[number] += output.prompt_logprobs
                output = replace(output, prompt_logprobs=())
            begins = bool(output.token_ids) or output.finish_reason is not None
            if begins and output.index not in begun:
                begun.add(output.index)
                yield RequestOutput(
                    request_id=output.request_id,
                    index=output.index,
                    text=texts[number],
                    logprobs=tuple(told[number]),
                )
            yield output
