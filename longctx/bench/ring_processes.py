"""Ranks that are processes against threads of one process: a long prefill, on the same cores.

`RANKS` ranks with one thread each against one engine with as many threads. Both read the same
prompt piece by piece, in turns, so that a machine that gets slower for a while slows both.
"""

import asyncio
import random
import time
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from longctx.bench.random_model import SIZES, VOCABULARY, write_random_llama
from longctx.bench.report import Parameter, Result
from longctx.client import EngineClient
from longctx.config import CacheConfig, EngineConfig, ModelConfig, RingConfig
from longctx.request import Request, SamplingParams, Segment

RANKS = 2
PIECE_TOKENS = 2048
POOL_GIB = 4.0  # of one engine; each of many ranks has its share


@dataclass(frozen=True, slots=True)
class Piece:
    """What reading the tokens before `end` that no earlier piece had took."""

    end: int
    ranks_seconds: float
    threads_seconds: float
    sent_bytes: float  # by all ranks together


async def compare(
    folder: Path, *, model_size: str, tokens: int, codec: str, seed: int
) -> list[Piece]:
    """`folder` takes the model. Prompts of random tokens, so nothing of them is cached before."""
    write_random_llama(folder, SIZES[model_size], seed=seed)
    chance = random.Random(seed)
    prompt = [chance.randrange(VOCABULARY) for _ in range(tokens)]
    pieces = []
    async with AsyncExitStack() as stack:
        ranks, threads = [
            await stack.enter_async_context(started_engine(folder, codec, ranks=count, cores=RANKS))
            for count in (RANKS, 1)
        ]
        for engine in (ranks, threads):
            await read_prompt(engine, [chance.randrange(VOCABULARY) for _ in range(PIECE_TOKENS)])
        for end in range(PIECE_TOKENS, tokens + 1, PIECE_TOKENS):
            before = (await ranks.stats())["ring_sent_bytes_total"]
            seconds = await read_prompt(ranks, prompt[:end])
            sent = (await ranks.stats())["ring_sent_bytes_total"] - before
            pieces.append(Piece(end, seconds, await read_prompt(threads, prompt[:end]), sent))
    return pieces


@asynccontextmanager
async def started_engine(
    folder: Path, codec: str, *, ranks: int, cores: int
) -> AsyncGenerator[EngineClient, None]:
    """An engine over so many processes, which share so many cores."""
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
    """Seconds until the first token of an answer."""
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


def processes_against_threads(
    *, model_size: str, tokens: int, codec: str, seed: int
) -> list[Result]:
    """The whole prefill, and what ranks sent for it; then each piece of it."""
    with TemporaryDirectory() as folder:
        pieces = asyncio.run(
            compare(Path(folder), model_size=model_size, tokens=tokens, codec=codec, seed=seed)
        )
    shared: dict[str, Parameter] = {
        "model": model_size,
        "kv_codec": codec,
        "ranks": RANKS,
        "threads_per_rank": 1,
        "transport": "gloo",
    }
    whole = Piece(
        tokens,
        sum(piece.ranks_seconds for piece in pieces),
        sum(piece.threads_seconds for piece in pieces),
        sum(piece.sent_bytes for piece in pieces),
    )
    results = []
    for metric, piece in (
        ("prefill", whole),
        *(("prefill_piece", piece) for piece in pieces),
    ):
        parameters = {**shared, "tokens": piece.end}
        results.append(
            Result(
                metric=f"{metric}_seconds",
                value=piece.ranks_seconds,
                unit="s",
                parameters=parameters,
                baseline=f"1 process, {RANKS} threads",
                baseline_value=piece.threads_seconds,
            )
        )
        results.append(
            Result(
                metric=f"{metric}_sent_bytes",
                value=piece.sent_bytes,
                unit="B",
                parameters=parameters,
            )
        )
    return results
