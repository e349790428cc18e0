"""Asks the engine: from the prompts of one HTTP request to the outputs of all of them.

Read `Generation.outputs` first. `reply.py` makes the answer of them.
"""

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace

from api.http.account import current_account
from api.http.bodies import GenerationRequest
from api.http.errors import ApiError
from api.metrics import HTTPMetrics
from longctx.errors import ContextTooLong, EngineDied, InvalidRequest
from longctx.process.client import EngineClient
from longctx.request import (
    FinishReason,
    Request,
    RequestOutput,
    SamplingParams,
    Segment,
)
from longctx.text.tool_forms import ToolForm


@dataclass(frozen=True, slots=True, kw_only=True)
class EnginePrompt:
    """A prompt as the engine takes it.

    `tokens` counts those of its documents and modules too, `gap_tokens` the positions between
    modules that it leaves out.
    """

    segments: tuple[Segment, ...]
    tokens: int
    gap_tokens: int = 0
    text: str = ""  # of a prompt that is echoed
    sources: tuple[str, ...] = ()  # as in `Request`


class Generation:
    """Makes requests for the engine and merges their outputs. It has no state of a request."""

    def __init__(
        self,
        engine: EngineClient,
        served_name: str,
        *,
        aliases: Sequence[str] = (),
        tool_form: ToolForm | None = None,
        metrics: HTTPMetrics,
    ) -> None:
        """`aliases` are other names of the model, which requests may use; `tool_form` is how it
        calls tools. What answers take is told to `metrics`."""
        self.engine = engine
        self.served_name = served_name
        self.names = tuple(dict.fromkeys((served_name, *aliases)))
        self.tool_form = tool_form
        self._metrics = metrics

    def check_model(self, name: str | None) -> None:
        """Raises ApiError 404 for a model that is not this server's."""
        if name is not None and name not in self.names:
            known = ", ".join(map(repr, self.names))
            raise ApiError(
                404,
                f"there is no model {name!r}; this server has {known}",
                param="model",
                code="model_not_found",
            )

    def requests(
        self, prompts: Sequence[EnginePrompt], wanted: GenerationRequest, salt: str
    ) -> list[Request]:
        """Makes one request for each prompt. An answer of no stated length gets what is
        usual, or what is left.

        Raises ContextTooLong when a prompt, or it and its answer, do not fit, and InvalidRequest
        for a value out of range.
        """
        name = uuid.uuid4().hex
        return [
            Request(
                request_id=f"{name}-{number}",
                segments=prompt.segments,
                sampling=self._sampling(wanted, prompt.tokens + prompt.gap_tokens),
                request_class=wanted.request_class,
                salt=salt,
                explain=wanted.cache_explain,
                in_memory=wanted.in_memory,
                sources=prompt.sources,
            )
            for number, prompt in enumerate(prompts)
        ]

    def sampling(self, wanted: GenerationRequest, max_tokens: int | None) -> SamplingParams:
        """Returns what the engine is asked for. Raises InvalidRequest for a value out of range."""
        return wanted.sampling(max_tokens, self.tool_form)

    async def outputs(self, requests: Sequence[Request]) -> AsyncGenerator[RequestOutput, None]:
        """Yields the outputs of all requests as they come, with choices numbered over all of them:
        with n = 2, those of the second request are 2 and 3.

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

    def _sampling(self, wanted: GenerationRequest, prompt_tokens: int) -> SamplingParams:
        limits = self.engine.info.limits
        limit = limits.longest_tokens
        if prompt_tokens == 0:
            raise InvalidRequest("the prompt has no tokens; write something", param="prompt")
        if prompt_tokens >= limit:
            raise ContextTooLong(
                f"the prompt has {prompt_tokens} tokens, the limit is {limit} together with the "
                f"answer; shorten the prompt or {limits.cure}"
            )
        answer_tokens = wanted.answer_tokens
        room = limits.answer_tokens(prompt_tokens)
        usual = wanted.usual_answer_tokens
        if answer_tokens is None and usual is not None:
            answer_tokens = min(room, usual)
        if answer_tokens is not None and answer_tokens > room:
            raise ContextTooLong(
                f"the prompt has {prompt_tokens} tokens and the answer may have {answer_tokens}, "
                f"the limit is {limit} together; ask for at most {room}, shorten the prompt or "
                f"{limits.cure}",
                param=wanted.answer_tokens_field,
            )
        return self.sampling(wanted, answer_tokens)

    async def _one(
        self, request: Request, *, first_choice: int
    ) -> AsyncGenerator[RequestOutput, None]:
        question = current_account().begin(request.request_id)
        try:
            async with aclosing(self.engine.generate(request)) as outputs:
                async for output in outputs:
                    if (waited := question.note(output)) is not None:
                        self._metrics.tokens(*waited, count=len(output.token_ids))
                    if output.error_param is not None:
                        raise InvalidRequest(output.error or "", param=output.error_param)
                    if output.finish_reason is FinishReason.ERROR:
                        raise self._failure(output.error or "the engine failed")
                    if first_choice:
                        output = replace(output, index=first_choice + output.index)
                    yield output
        finally:
            question.ended = time.perf_counter()
            self._metrics.answered(question)

    def _failure(self, reason: str) -> Exception:
        if self.engine.state == "ready":
            return ApiError(500, reason, code="engine_error")
        return EngineDied(reason)


async def _merge(
    streams: Sequence[AsyncGenerator[RequestOutput, None]],
) -> AsyncGenerator[RequestOutput, None]:
    """Yields the outputs of all streams as they come. The first exception ends all of them."""
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
