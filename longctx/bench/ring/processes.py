"""Engines over one or many processes on the same cores, and how long they take to read a prompt."""

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

from longctx.config import CacheConfig, EngineConfig, KVCodec, ModelConfig, RingConfig
from longctx.process.client import EngineClient
from longctx.request import Request, SamplingParams, Segment

POOL_GIB = 4.0  # of one engine; each of many ranks has its share


@asynccontextmanager
async def started_engine(
    folder: Path, codec: KVCodec, *, ranks: int, cores: int
) -> AsyncGenerator[EngineClient, None]:
    """Yields an engine over so many processes, which share so many cores."""
    config = EngineConfig(
        model=ModelConfig(model=folder, device="cpu", threads=max(1, cores // ranks)),
        cache=CacheConfig(kv_codec=codec, force_codec=True, device_pool_gib=POOL_GIB / ranks),
        ring=RingConfig(ranks=ranks),
    )
    client = EngineClient(config)
    try:
        await client.start()
        yield client
    finally:
        await client.stop()


async def read_prompt(engine: EngineClient, prompt: list[int]) -> float:
    """Returns the seconds until the first token of an answer."""
    request = Request(
        request_id=f"{len(prompt)}-{time.monotonic_ns()}",
        segments=(Segment(token_ids=tuple(prompt)),),
        sampling=SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True),
    )
    began = time.perf_counter()
    async with aclosing(engine.generate(request)) as outputs:
        async for output in outputs:
            assert output.error is None, output.error
    return time.perf_counter() - began
