"""One request, timed: straight into the engine in this process, without a server between."""

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from longctx.errors import LongctxError
from longctx.request import (
    FinishReason,
    Request,
    RequestClass,
    RequestOutput,
    SamplingParams,
    Segment,
    TokenLogprob,
    Usage,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedAnswer:
    """Times of one answer, in seconds since `submit` was called; `token_seconds` is per token."""

    text: str
    token_ids: tuple[int, ...]
    usage: Usage
    submit_seconds: float  # until `submit` returned
    token_seconds: tuple[float, ...]
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprob, ...] = ()

    @property
    def first_token_seconds(self) -> float:
        return self.token_seconds[0]

    @property
    def token_interval_seconds(self) -> float:
        """The mean time between tokens; an answer of one token has none."""
        return (self.token_seconds[-1] - self.token_seconds[0]) / (len(self.token_seconds) - 1)


class Stepped(Protocol):
    """What of an engine a stopwatch needs."""

    @property
    def has_work(self) -> bool: ...

    def submit(self, request: Request) -> None: ...

    def step(self) -> list[RequestOutput]: ...


class Stopwatch:
    """Runs requests one at a time on an engine that nobody else uses."""

    def __init__(self, engine: Stepped) -> None:
        self.engine = engine
        self._numbers: Iterator[int] = itertools.count()

    def ask(
        self,
        segments: tuple[Segment, ...],
        sampling: SamplingParams,
        *,
        salt: str = "",
        request_class: RequestClass = RequestClass.INTERACTIVE,
    ) -> TimedAnswer:
        """Runs one request to its end. Raises LongctxError where the engine refuses it or fails.

        What is cached of requests with another `salt` is not used.
        """
        request = Request(
            request_id=f"timed-{next(self._numbers)}",
            segments=segments,
            sampling=sampling,
            salt=salt,
            request_class=request_class,
        )
        text = ""
        token_ids: tuple[int, ...] = ()
        token_seconds: list[float] = []
        logprobs: list[TokenLogprob] = []
        usage: Usage | None = None
        reason: FinishReason | None = None
        began = time.perf_counter()
        self.engine.submit(request)
        submit_seconds = time.perf_counter() - began
        while self.engine.has_work:
            outputs = self.engine.step()
            now = time.perf_counter() - began
            for output in outputs:
                if output.finish_reason is FinishReason.ERROR:
                    raise LongctxError(output.error)
                text += output.text
                token_ids += output.token_ids
                logprobs += output.logprobs
                token_seconds += [now] * len(output.token_ids)
                usage = output.usage or usage
                reason = output.finish_reason or reason
        assert usage is not None, "a request ends with usage"
        assert token_seconds or sampling.max_tokens == 0, "and with a token, if it asks for one"
        assert reason is not None
        return TimedAnswer(
            text=text,
            token_ids=token_ids,
            usage=usage,
            submit_seconds=submit_seconds,
            token_seconds=tuple(token_seconds),
            finish_reason=reason,
            logprobs=tuple(logprobs),
        )
