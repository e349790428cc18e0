"""One response on its way: the object that clients get, and the events that lead to it."""

import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from api.completions.answering import Answering
from api.http.errors import ApiError, api_error, logger, renamed
from api.http.sse import JSONObject
from api.responses.bodies import ResponseRequest
from api.responses.question import NAMES
from api.responses.writer import ItemWriter
from longctx.request import RequestOutput

FAILURES = {429: "rate_limit_exceeded", 400: "invalid_prompt", 404: "invalid_prompt"}


@dataclass(slots=True)
class ResponseReply:
    """Answers one request. `whole` or `events` is called once."""

    id: str
    wanted: ResponseRequest
    answering: Answering
    writer: ItemWriter
    on_answered: Callable[[JSONObject], Awaitable[JSONObject]]  # stores it, and returns what it is
    created: int = field(default_factory=lambda: int(time.time()))
    finish_reason: str | None = None

    async def whole(self) -> JSONObject:
        """Returns the response once it is answered. Raises what the client is told."""
        async with aclosing(self._written()) as events:
            async for _ in events:
                pass
        return await self.on_answered(self._ended())

    async def events(self) -> AsyncGenerator[JSONObject, None]:
        """Yields the events of a stream, numbered. What fails before the first is raised."""
        number = 0
        try:
            async with aclosing(self._written()) as events:
                async for event in events:
                    if number == 0:
                        for kind in ("created", "in_progress"):
                            begun = {"response": self._object("in_progress", [])}
                            yield self._event(f"response.{kind}", number, **begun)
                            number += 1
                    if event is not None:
                        yield {**event, "sequence_number": number}
                        number += 1
            told = await self.on_answered(self._ended())
            yield self._event(f"response.{told['status']}", number, response=told)
        except Exception as error:
            if number == 0:
                raise
            failure = api_error(error)
            if failure is not error and failure.status == 500:
                logger.exception("a stream failed")
            yield self._event(
                "response.failed", number, response=self._failed(renamed(failure, NAMES))
            )

    async def _written(self) -> AsyncGenerator[JSONObject | None, None]:
        """Yields events, and None for news of what is waited for."""
        async with aclosing(self.answering.outputs()) as outputs:
            async for output in outputs:
                if isinstance(output, RequestOutput):
                    for event in self.writer.push(output):
                        yield event
                    if output.finish_reason is not None:
                        self.finish_reason = output.finish_reason.value
                yield None
        for event in self.writer.finish(complete=self.finish_reason != "length"):
            yield event

    def _event(self, kind: str, number: int, **more: Any) -> JSONObject:
        return {"type": kind, **more, "sequence_number": number}

    def _ended(self) -> JSONObject:
        cut = self.finish_reason == "length"
        return {
            **self._object("incomplete" if cut else "completed", self.writer.items),
            "completed_at": None if cut else int(time.time()),
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "usage": self._usage(),
            "longctx": {
                "computed_tokens": self.answering.totals.computed,
                **self.answering.prompt_source.notes,
            },
        }

    def _failed(self, error: ApiError) -> JSONObject:
        code = FAILURES.get(error.status, "server_error")
        told = {"code": code, "message": error.message}
        return {**self._object("failed", self.writer.items), "error": told}

    def _usage(self) -> JSONObject:
        totals = self.answering.totals
        return {
            "input_tokens": totals.prompt,
            "input_tokens_details": {
                "cached_tokens": totals.cached,
                "cache_write_tokens": self.answering.sealed_tokens,
            },
            "output_tokens": totals.completion,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": totals.prompt + totals.completion,
        }

    def _object(self, status: str, output: list[JSONObject]) -> JSONObject:
        wanted = self.wanted
        given = wanted.model_dump(by_alias=True, exclude_unset=True)
        asked = {name: value for name, value in (given.get("text") or {}).items() if value}
        text = {"format": {"type": "text"}, **asked}
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "background": False,
            "completed_at": None,
            "error": None,
            "incomplete_details": None,
            "instructions": wanted.instructions,
            "max_output_tokens": wanted.max_output_tokens,
            "max_tool_calls": None,
            "metadata": wanted.metadata or {},
            "model": self.answering.generation.served_name,
            "output": output,
            "parallel_tool_calls": wanted.parallel_tool_calls is not False,
            "previous_response_id": wanted.previous_response_id,
            "prompt_cache_key": wanted.prompt_cache_key,
            "prompt_cache_retention": wanted.prompt_cache_retention,
            "reasoning": {"effort": None, "summary": None},
            "safety_identifier": wanted.safety_identifier,
            "service_tier": self.answering.wanted.tier or "default",
            "store": wanted.is_stored,
            "temperature": 1.0 if wanted.temperature is None else wanted.temperature,
            "text": text,
            "tool_choice": given.get("tool_choice") or "auto",
            "tools": [
                {
                    "type": "function",
                    "name": tool.name,
                    "description": tool.description,
                    "parameters": tool.parameters,
                    "strict": bool(tool.strict),
                }
                for tool in wanted.tools or ()
            ],
            "top_logprobs": wanted.top_logprobs or 0,
            "top_p": 1.0 if wanted.top_p is None else wanted.top_p,
            "truncation": "disabled",
            "usage": None,
            "user": wanted.user,
        }
