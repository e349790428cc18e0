"""Text that is computed to be kept: one ingest request, seen through what may befall the engine."""

import asyncio
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass, replace

from longctx.errors import DocumentMissing, EngineDied, Overloaded
from longctx.process.client import EngineClient
from longctx.request import (
    FinishReason,
    Progress,
    Request,
    RequestClass,
    SamplingParams,
    Segment,
)

ATTEMPTS = 3  # what ends the engine this often is left alone
RETRY_SECONDS = 0.5


@dataclass(slots=True)
class Failures:
    """How often the engine failed at something since that was last computed. Outlives `ingest`,
    which begins anew with each engine."""

    count: int = 0


def ingest_request(name: str, segments: tuple[Segment, ...], *, salt: str) -> Request:
    """The request that computes a prompt to be kept."""
    return Request(
        request_id=name,
        segments=segments,
        sampling=SamplingParams(max_tokens=0),
        request_class=RequestClass.INGEST,
        salt=salt,
    )


async def ingest(
    engine: EngineClient,
    request: Request,
    *,
    failures: Failures,
    on_progress: Callable[[Progress], None],
) -> bool:
    """True when it is computed and stored; False when the server is going down, or the engine does
    not know (any more) what is to be computed: whoever opens it there begins again.

    Raises LongctxError where it can never be computed, or the engine failed at it ATTEMPTS times.
    The ids of what is asked begin with the request's.
    """
    while True:
        while engine.state in ("starting", "restarting"):
            await asyncio.sleep(RETRY_SECONDS)
        if engine.state != "ready":
            return False
        try:
            request_id = f"{request.request_id}-{failures.count}"
            return await _once(engine, replace(request, request_id=request_id), on_progress)
        except DocumentMissing:
            return False
        except Overloaded:
            pass
        except EngineDied as error:
            failures.count += 1
            if failures.count >= ATTEMPTS:
                raise EngineDied(
                    f"computing it failed {failures.count} times, at last because: {error}"
                ) from error
        await asyncio.sleep(RETRY_SECONDS)


async def _once(
    engine: EngineClient, request: Request, on_progress: Callable[[Progress], None]
) -> bool:
    """Whether it reached its end."""
    ended = False
    async with aclosing(engine.generate(request)) as outputs:
        async for output in outputs:
            if output.progress is not None:
                on_progress(output.progress)
            if output.finish_reason is FinishReason.ERROR:
                raise EngineDied(output.error or "the engine failed")
            ended |= output.finish_reason is FinishReason.LENGTH
    return ended
