"""An answer on the wire: one JSON body, or server-sent events, in the shape of either endpoint.

Beside OpenAI's fields an answer has an object `longctx`: `computed_tokens`, those the model really
computed for it, and what else is worth saying, such as why a document was computed again.
"""

import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from api.completions.generation import Generation, Prompt
from api.http.bodies import Sampled
from api.http.errors import logger
from api.http.sse import EventStream, while_connected
from longctx.request import CacheExplanation, Progress, RequestOutput, Usage
from longctx.request import Request as EngineRequest

Body = dict[str, Any]


@dataclass(slots=True)
class Choice:
    """One answer while it is collected."""

    index: int
    texts: list[str] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None

    @property
    def text(self) -> str:
        return "".join(self.texts)


class Shape(Protocol):
    """What chat and completions call things; each method makes one element of `choices`."""

    id_prefix: str
    whole_object: str
    chunk_object: str

    def whole(self, choice: Choice) -> Body: ...
    def opening(self, index: int) -> Body | None: ...
    def delta(self, index: int, text: str) -> Body: ...
    def finish(self, choice: Choice) -> Body: ...


class Preparation(Protocol):
    """Makes the prompts of one request, which may mean to wait for documents.

    `notes` are for the answer's object `longctx`; `prompt_cache` is an object of the answer, unless
    it is empty: how what it begins with was used.
    """

    notes: Body

    @property
    def prompt_cache(self) -> Body: ...

    @property
    def is_ready(self) -> bool:
        """Whether the prompts can be made without waiting."""
        ...

    def waiting(self) -> AsyncGenerator[Body, None]:
        """What is waited for, now and then, until the prompts can be made."""
        ...

    async def prompts(self) -> list[Prompt]: ...

    async def answered(self) -> None:
        """The prompts were read, and answered. What this raises is logged."""
        ...


@dataclass(slots=True)
class Tally:
    """Token counts over all prompts of one request."""

    prompt: int = 0
    cached: int = 0
    completion: int = 0
    computed: int = 0
    borrowed: int = 0
    linked: int = 0
    explanation: CacheExplanation | None = None

    def add(self, usage: Usage) -> None:
        self.prompt += usage.prompt_tokens
        self.cached += usage.cached_tokens
        self.completion += usage.completion_tokens
        self.computed += usage.computed_tokens
        self.borrowed += usage.borrowed_tokens
        self.linked += usage.linked_tokens
        self.explanation = usage.explanation

    def usage(self) -> Body:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


@dataclass(slots=True)
class Reply:
    """One HTTP request on its way from prompts to the wire."""

    generation: Generation
    shape: Shape
    preparation: Preparation
    wanted: Sampled
    salt: str
    created: int = field(default_factory=lambda: int(time.time()))
    tally: Tally = field(default_factory=Tally)
    requests: list[EngineRequest] | None = None
    id: str = field(init=False)

    def __post_init__(self) -> None:
        self.id = f"{self.shape.id_prefix}-{uuid.uuid4().hex}"

    async def respond(self, request: Request, *, ping_seconds: float) -> Response:
        self.wanted.sampling(0)  # a value out of range is refused before anything is waited for
        if not self.wanted.stream:
            return JSONResponse(await while_connected(request, self._whole()))
        if self.preparation.is_ready:  # what is wrong is then an error, not an event in a stream
            self.requests = await self._prepare()
        return EventStream(self._events(), ping_seconds=ping_seconds)

    async def _whole(self) -> Body:
        choices: dict[int, Choice] = {}
        async with aclosing(self._outputs()) as outputs:
            async for output in outputs:
                if isinstance(output, RequestOutput):
                    _collect(choices, output)
        return self._body(
            self.shape.whole_object,
            [self.shape.whole(choices[index]) for index in sorted(choices)],
            usage=self.tally.usage(),
            longctx=self._longctx(),
            **self._prompt_cache(),
            **self._explanation(),
        )

    async def _events(self) -> AsyncGenerator[Body, None]:
        choices: dict[int, Choice] = {}
        opened: set[int] = set()
        last: Body | None = None  # held back: the very last one carries more
        async with aclosing(self._outputs()) as outputs:
            async for output in outputs:
                if last is not None:
                    yield last
                    last = None
                if isinstance(output, dict):
                    if self.wanted.return_progress:
                        yield self._chunk([self.shape.delta(0, "")], longctx=output)
                    continue
                if output.progress is not None and self.wanted.return_progress:
                    yield self._progress(output.index, output.progress)
                if output.index not in opened and (output.text or output.finish_reason):
                    opened.add(output.index)
                    if (opening := self.shape.opening(output.index)) is not None:
                        yield self._chunk([opening])
                choice = _collect(choices, output)
                if output.text:
                    yield self._chunk([self.shape.delta(output.index, output.text)])
                if output.finish_reason is not None:
                    last = self._chunk([self.shape.finish(choice)])
        told = self._explanation()
        if last is not None:
            yield {
                **last,
                "longctx": self._longctx(),
                **self._prompt_cache(),
                **({} if self.wanted.include_usage else told),
            }
        if self.wanted.include_usage:
            yield self._chunk([], usage=self.tally.usage(), **told)

    async def _outputs(self) -> AsyncGenerator[RequestOutput | Body, None]:
        async with aclosing(self.preparation.waiting()) as news:
            async for item in news:
                yield item
        requests = self.requests or await self._prepare()
        async with aclosing(self.generation.outputs(requests)) as outputs:
            async for output in outputs:
                if output.usage is not None:
                    self.tally.add(output.usage)
                yield output
        try:
            await self.preparation.answered()
        except Exception as error:  # the answer is complete, and not to be taken back
            logger.error("keeping the prompt of %s failed", self.id, exc_info=error)

    async def _prepare(self) -> list[EngineRequest]:
        prompts = await self.preparation.prompts()
        return self.generation.requests(prompts, self.wanted, self.salt)

    def _progress(self, index: int, progress: Progress) -> Body:
        told = {
            "total": progress.total,
            "cache": progress.cache,
            "processed": progress.processed,
            "time_ms": round(progress.time_ms),
        }
        return self._chunk([self.shape.delta(index, "")], prompt_progress=told)

    def _chunk(self, choices: list[Body], **more: Any) -> Body:
        if self.wanted.include_usage:
            more.setdefault("usage", None)
        return self._body(self.shape.chunk_object, choices, **more)

    def _body(self, kind: str, choices: list[Body], **more: Any) -> Body:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.generation.served_name,
            "system_fingerprint": f"fp_{self.generation.engine.info.fingerprint[:12]}",
            "choices": choices,
            **more,
        }

    def _longctx(self) -> Body:
        return {"computed_tokens": self.tally.computed, **self.preparation.notes}

    def _prompt_cache(self) -> Body:
        told = self.preparation.prompt_cache
        if not told:
            return {}
        counts = {"borrowed_tokens": self.tally.borrowed, "linked_tokens": self.tally.linked}
        return {"prompt_cache": {**told, **counts}}

    def _explanation(self) -> Body:
        """Why the cache had what it had, where that was asked for."""
        told = self.tally.explanation
        if told is None:
            return {}
        divergence = told.divergence
        return {
            "cache_explain": {
                "prompt_tokens": told.prompt_tokens,
                "matched_tokens": told.found_tokens,
                "waited_for_tokens": told.waited_tokens,
                "borrowed_tokens": told.borrowed_tokens,
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
    if output.finish_reason is not None:
        choice.finish_reason = output.finish_reason.value
        choice.stop_reason = output.stop_reason
    return choice
