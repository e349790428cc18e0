"""What waits of one request between its engine and its reader: outputs, joined where it is slow.

An engine gives each request an output per step. A reader that cannot keep up finds what waits as
one: it has less to do for a token, the further behind it is. The first tokens of an answer come
alone: they show that it has begun, and when.
"""

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import replace

from longctx.errors import LongctxError
from longctx.request import RequestOutput


class OutputQueue:
    """Holds the outputs of one request for its one reader. It belongs to one event loop."""

    def __init__(self) -> None:
        self._waiting: deque[RequestOutput | LongctxError] = deque()
        self._came = asyncio.Event()
        self._begun: set[int] = set()  # choices of which tokens were taken

    def put(self, output: RequestOutput | LongctxError) -> None:
        self._waiting.append(output)
        self._came.set()

    async def get(self) -> RequestOutput | LongctxError:
        """Waits for an output; returns it together with those that wait and go on with it."""
        while not self._waiting:
            self._came.clear()
            await self._came.wait()
        first = self._waiting.popleft()
        if isinstance(first, LongctxError):
            return first
        if first.token_ids and first.index not in self._begun:
            self._begun.add(first.index)
            return first
        run = [first]
        while self._waiting:
            following = self._waiting[0]
            if isinstance(following, LongctxError) or not _goes_on(run[-1], following):
                break
            run.append(following)
            self._waiting.popleft()
        return joined(run)


def joined(run: Sequence[RequestOutput]) -> RequestOutput:
    """Returns what outputs of one choice say in turn as one output; only the last may end it."""
    if len(run) == 1:
        return run[0]
    return replace(
        run[-1],
        token_ids=tuple(token for output in run for token in output.token_ids),
        text="".join(output.text for output in run),
        logprobs=tuple(each for output in run for each in output.logprobs),
    )


def _goes_on(output: RequestOutput, following: RequestOutput) -> bool:
    """Says whether the second only adds to the answer that the first is a part of."""
    plain = output.progress is None and output.finish_reason is None and not output.prompt_logprobs
    adds = following.progress is None and not following.prompt_logprobs
    return plain and adds and output.index == following.index
