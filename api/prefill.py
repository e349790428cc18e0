"""Text that is computed to be kept: one ingest request, seen through what may befall the engine."""

import asyncio
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import replace

from longctx.client import EngineClient
from longctx.errors import DocumentMissing, EngineDied, Overloaded
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


async def prefill(
    engine: EngineClient,
    name: str,
    segments: tuple[Segment, ...],
    *,
    salt: str,
    on_progress: Callable[[Progress], None],
) -> bool:
    """True when it is computed and stored; False when the server is going down.

    Raises LongctxError where it can never be computed, or ended the engine ATTEMPTS times. `name`
    is the beginning of the request's.
    """
    request = Request(
        request_id=name,
        segments=segments,
        sampling=SamplingParams(max_tokens=0),
        request_class=RequestClass.INGEST,
        salt=salt,
    )
    reason = ""
    attempts = 0
    while attempts < ATTEMPTS:
        while engine.state in ("starting", "restarting"):
            await asyncio.sleep(RETRY_SECONDS)
        if engine.state != "ready":
            return False
        try:
            return await _once(
                engine, replace(request, request_id=f"{name}-{attempts}"), on_progress
            )
        except Overloaded:
            pass
        except (EngineDied, DocumentMissing) as error:
            attempts += 1
            reason = str(error)
        await asyncio.sleep(RETRY_SECONDS)
    raise EngineDied(f"computing it failed {ATTEMPTS} times, at last because: {reason}")


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
