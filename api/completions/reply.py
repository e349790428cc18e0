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

from api.completions.echo import with_prompts
from api.completions.generation import EnginePrompt, Generation
from api.completions.waiting import Waitable
from api.http.bodies import GenerationRequest
from api.http.errors import logger
from api.http.sse import EventStream, JSONObject, while_connected
from longctx.request import CacheExplanation, Progress, RequestOutput, TokenLogprob, Usage
from longctx.request import Request as EngineRequest


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


class PromptSource(Waitable):
    """Makes the prompts of one request, which may have to wait for documents.

    It is used in this order: `waiting`, `prompts`, and `on_answered` once the answer is complete.
    """

    def __init__(self) -> None:
        self.notes: JSONObject = {}  # for the answer's object `longctx`

    @property
    def prompt_cache(self) -> JSONObject:
        """The answer's object `prompt_cache`, which is left out when it is empty: how what the
        conversation begins with was used."""
        return {}

    async def prompts(self) -> list[EnginePrompt]:
        """Returns the prompts, when nothing is waited for. Raises what the client is told."""
        raise NotImplementedError

    async def on_answered(self) -> None:
        """Is called when all prompts have been answered. What it raises is logged."""


@dataclass(slots=True)
class UsageTotals:
    """Adds up the token counts of all prompts of one request."""

    prompt: int = 0
    cached: int = 0
    completion: int = 0
    computed: int = 0
    reused: int = 0
    linked: int = 0
    explanation: CacheExplanation | None = None

    def add(self, usage: Usage) -> None:
        self.prompt += usage.prompt_tokens
        self.cached += usage.cached_tokens
        self.completion += usage.completion_tokens
        self.computed += usage.computed_tokens
        self.reused += usage.reused_tokens
        self.linked += usage.linked_tokens
        self.explanation = usage.explanation

    def usage(self) -> JSONObject:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


@dataclass(slots=True)
class Reply:
    """Takes one HTTP request from its prompts to the answer. `respond` is called once."""

    generation: Generation
    response_format: ResponseFormat
    prompt_source: PromptSource
    wanted: GenerationRequest
    salt: str
    created: int = field(default_factory=lambda: int(time.time()))
    totals: UsageTotals = field(default_factory=UsageTotals)
    prompts: list[EnginePrompt] = field(default_factory=list)
    streamed_tokens: int = 0
    requests: list[EngineRequest] | None = None
    id: str = field(init=False)

    def __post_init__(self) -> None:
        self.id = f"{self.response_format.id_prefix}-{uuid.uuid4().hex}"

    async def respond(self, request: Request, *, ping_seconds: float) -> Response:
        """Returns the answer, whole or as a stream that has yet to begin."""
        self.wanted.sampling(0)  # a value out of range is refused before anything is waited for
        if not self.wanted.stream:
            return JSONResponse(await while_connected(request, self._whole()))
        if self.prompt_source.is_ready:  # what is wrong is then an error, not an event in a stream
            self.requests = await self._prepare()
        return EventStream(self._events(), ping_seconds=ping_seconds)

    async def _whole(self) -> JSONObject:
        choices: dict[int, Choice] = {}
        async with aclosing(self._outputs()) as outputs:
            async for output in outputs:
                if isinstance(output, RequestOutput):
                    _collect(choices, output)
        return self._body(
            self.response_format.whole_object,
            [self.response_format.whole(choices[index]) for index in sorted(choices)],
            usage=self.totals.usage(),
            longctx=self._longctx(),
            **self._prompt_cache(),
            **self._explanation(),
        )

    async def _events(self) -> AsyncGenerator[JSONObject, None]:
        choices: dict[int, Choice] = {}
        opened: set[int] = set()
        last: JSONObject | None = None  # held back: the very last one carries more
        async with aclosing(self._outputs()) as outputs:
            async for output in outputs:
                if last is not None:
                    yield last
                    last = None
                if isinstance(output, dict):
                    if self.wanted.return_progress:
                        yield self._chunk([self.response_format.delta(0, "")], longctx=output)
                    continue
                self.streamed_tokens += len(output.token_ids)
                has_news = bool(output.text or output.logprobs)
                if output.progress is not None and self.wanted.return_progress:
                    yield self._progress(output.index, output.progress)
                if output.index not in opened and (has_news or output.finish_reason):
                    opened.add(output.index)
                    if (first := self.response_format.first_delta(output.index)) is not None:
                        yield self._chunk([first])
                choice = _collect(choices, output)
                if has_news:
                    news = self.response_format.delta(output.index, output.text, output.logprobs)
                    yield self._chunk([news])
                if output.finish_reason is not None:
                    last = self._chunk([self.response_format.finish(choice)])
        told = self._explanation()
        if last is not None:
            yield {
                **last,
                "longctx": self._longctx(),
                **self._prompt_cache(),
                **({} if self.wanted.include_usage else told),
            }
        if self.wanted.include_usage:
            yield self._chunk([], usage=self.totals.usage(), **told)

    async def _outputs(self) -> AsyncGenerator[RequestOutput | JSONObject, None]:
        async with aclosing(self.prompt_source.waiting()) as news:
            async for item in news:
                yield item
        requests = self.requests or await self._prepare()
        outputs = self.generation.outputs(requests)
        if self.wanted.echoes:
            texts = [prompt.text for prompt in self.prompts]
            outputs = with_prompts(outputs, texts, choices=requests[0].sampling.n)
        async with aclosing(outputs):
            async for output in outputs:
                if output.usage is not None:
                    self.totals.add(output.usage)
                yield output
        try:
            await self.prompt_source.on_answered()
        except Exception as error:  # the answer is complete, and not to be taken back
            logger.error("keeping the prompt of %s failed", self.id, exc_info=error)

    async def _prepare(self) -> list[EngineRequest]:
        self.prompts = await self.prompt_source.prompts()
        return self.generation.requests(self.prompts, self.wanted, self.salt)

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
        prompt = sum(prompt.tokens for prompt in self.prompts)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self.streamed_tokens,
            "total_tokens": prompt + self.streamed_tokens,
        }

    def _body(self, kind: str, choices: list[JSONObject], **more: Any) -> JSONObject:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.generation.served_name,
            "system_fingerprint": f"fp_{self.generation.engine.info.fingerprint[:12]}",
            "choices": choices,
            **({} if self.wanted.tier is None else {"service_tier": self.wanted.tier}),
            **more,
        }

    def _longctx(self) -> JSONObject:
        return {"computed_tokens": self.totals.computed, **self.prompt_source.notes}

    def _prompt_cache(self) -> JSONObject:
        told = self.prompt_source.prompt_cache
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


def _collect(choices: dict[int, Choice], output: RequestOutput) -> Choice:
    choice = choices.setdefault(output.index, Choice(output.index))
    if output.text:
        choice.texts.append(output.text)
    choice.logprobs += output.logprobs
    if output.finish_reason is not None:
        choice.finish_reason = output.finish_reason.value
        choice.stop_reason = output.stop_reason
    return choice
