"""Answers one request: with one JSON body or server-sent events, in the format of its endpoint.

Beside OpenAI's fields an answer has an object `longctx`: `computed_tokens`, those the model really
computed for it, and what else is worth saying, such as why a document was computed again.
"""

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from api.completions.answering import Answering, UsageTotals
from api.http.bodies import GenerationRequest
from api.http.sse import EventStream, JSONObject, while_connected
from longctx.request import Progress, RequestOutput, TokenLogprob


@dataclass(slots=True)
class Choice:
    """Collects one answer."""

    index: int
    texts: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None

    @property
    def text(self) -> str:
        return "".join(self.texts)


class ResponseFormat(Protocol):
    """Says what chat and completions call things; each method makes one element of `choices`.

    `whole` is an element of an answer that is not streamed. A stream has, for each choice,
    `first_delta` unless that is None, a `delta` for each text, and `finish`. What a delta has of
    log-probabilities is told in the order of the tokens.
    """

    id_prefix: str
    whole_object: str
    chunk_object: str

    def whole(self, choice: Choice) -> JSONObject: ...
    def first_delta(self, index: int) -> JSONObject | None: ...
    def delta(self, index: int, text: str, logprobs: Sequence[TokenLogprob] = ()) -> JSONObject: ...
    def finish(self, choice: Choice) -> JSONObject: ...


@dataclass(slots=True)
class Reply:
    """Writes the answer to one HTTP request. `respond` is called once."""

    answering: Answering
    response_format: ResponseFormat
    created: int = field(default_factory=lambda: int(time.time()))
    streamed_tokens: int = 0
    id: str = field(init=False)

    def __post_init__(self) -> None:
        self.id = f"{self.response_format.id_prefix}-{uuid.uuid4().hex}"

    @property
    def wanted(self) -> GenerationRequest:
        return self.answering.wanted

    @property
    def totals(self) -> UsageTotals:
        return self.answering.totals

    async def respond(self, request: Request, *, ping_seconds: float) -> Response:
        """Returns the answer, whole or as a stream that has yet to begin."""
        self.answering.check()
        if not self.wanted.stream:
            return JSONResponse(await while_connected(request, self._whole()))
        await self.answering.prepare()
        return EventStream(self._events(), ping_seconds=ping_seconds)

    async def _whole(self) -> JSONObject:
        choices: dict[int, Choice] = {}
        async with aclosing(self.answering.outputs()) as outputs:
            async for output in outputs:
                if isinstance(output, RequestOutput):
                    collect(choices, output)
        return self._body(
            self.response_format.whole_object,
            [self.response_format.whole(choices[index]) for index in sorted(choices)],
            usage=self.totals.usage(),
            longctx=self._longctx(),
            **self._prompt_cache(),
            **self._explanation(),
        )

    async def _events(self) -> AsyncGenerator[JSONObject | list[JSONObject], None]:
        choices: dict[int, Choice] = {}
        opened: set[int] = set()
        held: list[JSONObject] = []  # the very last one carries more
        async with aclosing(self.answering.outputs()) as outputs:
            async for output in outputs:
                if held:
                    yield held
                    held = []
                if isinstance(output, dict):
                    if self.wanted.return_progress:
                        yield self._chunk([self.response_format.delta(0, "")], longctx=output)
                    continue
                chunks = self._chunks(output, choices, opened)
                if output.finish_reason is not None:
                    held = chunks
                elif chunks:
                    yield chunks
        told = self._explanation()
        if held:
            held[-1] |= {
                "longctx": self._longctx(),
                **self._prompt_cache(),
                **({} if self.wanted.include_usage else told),
            }
        if self.wanted.include_usage:
            held.append(self._chunk([], usage=self.totals.usage(), **told))
        if held:
            yield held

    def _chunks(
        self, output: RequestOutput, choices: dict[int, Choice], opened: set[int]
    ) -> list[JSONObject]:
        """Makes what an output is told in; `opened` are the choices that have begun."""
        chunks: list[JSONObject] = []
        self.streamed_tokens += len(output.token_ids)
        has_news = bool(output.text or output.logprobs)
        if output.progress is not None and self.wanted.return_progress:
            chunks.append(self._progress(output.index, output.progress))
        if output.index not in opened and (has_news or output.finish_reason):
            opened.add(output.index)
            if (first := self.response_format.first_delta(output.index)) is not None:
                chunks.append(self._chunk([first]))
        choice = collect(choices, output)
        if has_news:
            news = self.response_format.delta(output.index, output.text, output.logprobs)
            chunks.append(self._chunk([news]))
        if output.finish_reason is not None:
            chunks.append(self._chunk([self.response_format.finish(choice)]))
        return chunks

    def _progress(self, index: int, progress: Progress) -> JSONObject:
        told = {
            "total": progress.total,
            "cache": progress.cache,
            "processed": progress.processed,
            "time_ms": round(progress.time_ms),
            "rest_ms": None if progress.rest_ms is None else round(progress.rest_ms),
        }
        return self._chunk([self.response_format.delta(index, "")], prompt_progress=told)

    def _chunk(self, choices: list[JSONObject], **more: Any) -> JSONObject:
        if self.wanted.include_usage:
            more.setdefault("usage", self._usage_so_far() if self.wanted.counts_on else None)
        return self._body(self.response_format.chunk_object, choices, **more)

    def _usage_so_far(self) -> JSONObject:
        prompt = sum(prompt.tokens for prompt in self.answering.prompts)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self.streamed_tokens,
            "total_tokens": prompt + self.streamed_tokens,
        }

    def _body(self, kind: str, choices: list[JSONObject], **more: Any) -> JSONObject:
        generation = self.answering.generation
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": generation.served_name,
            "system_fingerprint": f"fp_{generation.engine.info.fingerprint[:12]}",
            "choices": choices,
            **({} if self.wanted.tier is None else {"service_tier": self.wanted.tier}),
            **more,
        }

    def _longctx(self) -> JSONObject:
        return {"computed_tokens": self.totals.computed, **self.answering.prompt_source.notes}

    def _prompt_cache(self) -> JSONObject:
        told = self.answering.prompt_source.prompt_cache
        if not told:
            return {}
        counts = {"borrowed_tokens": self.totals.reused, "linked_tokens": self.totals.linked}
        return {"prompt_cache": {**told, **counts}}

    def _explanation(self) -> JSONObject:
        """Tells why the cache had what it had, where that was asked for."""
        told = self.totals.explanation
        if told is None:
            return {}
        divergence = told.divergence
        return {
            "cache_explain": {
                "prompt_tokens": told.prompt_tokens,
                "matched_tokens": told.found_tokens,
                "waited_for_tokens": told.waited_tokens,
                "borrowed_tokens": told.reused_tokens,
                "linked_tokens": told.linked_tokens,
                "reason": told.reason,
                "detail": told.detail,
                "first_divergent_token": divergence and asdict(divergence),
            }
        }


def collect(choices: dict[int, Choice], output: RequestOutput) -> Choice:
    """Adds an output to its choice among `choices`, and returns that."""
    choice = choices.setdefault(output.index, Choice(output.index))
    if output.text:
        choice.texts.append(output.text)
    choice.logprobs += output.logprobs
    if output.finish_reason is not None:
        choice.finish_reason = output.finish_reason.value
        choice.stop_reason = output.stop_reason
    return choice
