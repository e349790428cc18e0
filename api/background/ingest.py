"""Has the engine compute a text that is to be kept, and tries again when the engine dies of it."""

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

ATTEMPTS = 3  # a text that ends the engine this often is given up
RETRY_SECONDS = 0.5


@dataclass(slots=True)
class Failures:
    """Counts how often the engine failed at a text since that was last computed. It outlives a call
    of `ingest`, which is made anew for each engine."""

    count: int = 0


def ingest_request(name: str, segments: tuple[Segment, ...], *, salt: str) -> Request:
    """Makes the request that computes a prompt to be kept and answers nothing."""
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
    """Sees an ingest request through; returns whether it is computed and stored.

    False means that the server is going down, or that the engine does not know (any more) the
    document or module to be computed: whoever opens that in the engine begins again. Raises
    LongctxError where it can never be computed, or the engine failed at it ATTEMPTS times. Each
    attempt has an id of its own, which begins with the request's.
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
    """Asks once; returns whether the request reached its end."""
    ended = False
    async with aclosing(engine.generate(request)) as outputs:
        async for output in outputs:
            if output.progress is not None:
                on_progress(output.progress)
            if output.finish_reason is FinishReason.ERROR:
                raise EngineDied(output.error or "the engine failed")
            ended |= output.finish_reason is FinishReason.LENGTH
    return ended
