"""From checked prompts to the engine's outputs, for one HTTP request.

Read `Generation.outputs` first. `reply.py` puts them on the wire.
"""

import asyncio
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace

from api.errors import ApiError
from api.wire import Sampled
from longctx.client import EngineClient
from longctx.errors import ContextTooLong, EngineDied, InvalidRequest
from longctx.request import FinishReason, Request, RequestOutput, SamplingParams, Segment


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A prompt as the engine takes it. `tokens` counts its documents too."""

    segments: tuple[Segment, ...]
    tokens: int


class Generation:
    def __init__(self, engine: EngineClient, served_name: str) -> None:
        self.engine = engine
        self.served_name = served_name

    def check_model(self, name: str | None) -> None:
        """Raises ApiError 404 for a model that is not this server's."""
        if name is not None and name != self.served_name:
            raise ApiError(
                404,
                f"there is no model {name!r}; this server has {self.served_name!r}",
                param="model",
                code="model_not_found",
            )

    def requests(self, prompts: Sequence[Prompt], wanted: Sampled, salt: str) -> list[Request]:
        """One for each prompt. An answer of no stated length gets what the prompt leaves.

        Raises ContextTooLong when a prompt, or it and its answer, do not fit, and InvalidRequest
        for a value out of range.
        """
        name = uuid.uuid4().hex
        return [
            Request(
                request_id=f"{name}-{number}",
                segments=prompt.segments,
                sampling=self._sampling(wanted, prompt.tokens),
                salt=salt,
            )
            for number, prompt in enumerate(prompts)
        ]

    async def outputs(self, requests: Sequence[Request]) -> AsyncGenerator[RequestOutput, None]:
        """Events of all requests as they come; choice numbers run on from one to the next.

        Closing it aborts all of them. Raises what the engine raises, and ApiError or EngineDied
        when it fails during an answer.
        """
        streams = [
            self._one(request, first_choice=number * request.sampling.n)
            for number, request in enumerate(requests)
        ]
        merged = streams[0] if len(streams) == 1 else _merge(streams)
        async with aclosing(merged) as events:
            async for output in events:
                yield output

    def _sampling(self, wanted: Sampled, prompt_tokens: int) -> SamplingParams:
        info = self.engine.info
        limit = min(info.max_context_tokens, info.capacity_tokens)
        option = "--max-context" if limit == info.max_context_tokens else "--device-pool-gib"
        cure = f"shorten the prompt or start the server with a larger {option}"
        if prompt_tokens == 0:
            raise InvalidRequest("the prompt has no tokens; write something", param="prompt")
        if prompt_tokens >= limit:
            raise ContextTooLong(
                f"the prompt has {prompt_tokens} tokens, the limit is {limit} together with the "
                f"answer; {cure}"
            )
        answer_tokens = wanted.answer_tokens
        if answer_tokens is None:
            answer_tokens = limit - prompt_tokens
        if prompt_tokens + answer_tokens > limit:
            raise ContextTooLong(
                f"the prompt has {prompt_tokens} tokens and the answer may have {answer_tokens}, "
                f"the limit is {limit} together; ask for at most {limit - prompt_tokens} or {cure}",
                param="max_tokens",
            )
        return wanted.sampling(answer_tokens)

    async def _one(
        self, request: Request, *, first_choice: int
    ) -> AsyncGenerator[RequestOutput, None]:
        async with aclosing(self.engine.generate(request)) as outputs:
            async for output in outputs:
                if output.finish_reason is FinishReason.ERROR:
                    raise self._failure(output.error or "the engine failed")
                if first_choice:
                    output = replace(output, index=first_choice + output.index)
                yield output

    def _failure(self, reason: str) -> Exception:
        if self.engine.state == "ready":
            return ApiError(500, reason, code="engine_error")
        return EngineDied(reason)


async def _merge(
    streams: Sequence[AsyncGenerator[RequestOutput, None]],
) -> AsyncGenerator[RequestOutput, None]:
    """The events of all streams as they come. The first exception ends all of them."""
    queue: asyncio.Queue[RequestOutput | BaseException | None] = asyncio.Queue()

    async def pump(stream: AsyncGenerator[RequestOutput, None]) -> None:
        try:
            async with aclosing(stream):
                async for output in stream:
                    queue.put_nowait(output)
            queue.put_nowait(None)
        except Exception as error:
            queue.put_nowait(error)

    tasks = [asyncio.create_task(pump(stream)) for stream in streams]
    running = len(tasks)
    try:
        while running:
            match await queue.get():
                case None:
                    running -= 1
                case BaseException() as error:
                    raise error
                case output:
                    yield output
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
