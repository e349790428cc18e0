"""The engine process: asked like an engine, outlived when it dies, never left behind."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longctx.config import CacheConfig, EngineConfig, ModelConfig
from longctx.errors import ContextTooLong, DocumentMissing, EngineDied, InvalidRequest, ModelRefused
from longctx.process.client import EngineClient
from longctx.process.launcher import Child
from longctx.request import FinishReason, Piece, Request, RequestOutput
from prompt_cache.level import EXACT, MODULAR
from tests.support.assembled import MODULES, encode, literal, prompt, reused, with_modules
from tests.support.recorded_engine import ask, build_engine, engine_config, some_ids
from tests.support.waiting import patient, wait_for

HANGING_SECONDS = 120.0  # what no test of an engine process takes on an idle machine

Run = Callable[[Coroutine[Any, Any, None]], None]


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """Runs a test in a loop that several tests share, as they share a client."""
    with asyncio.Runner() as runner:
        yield lambda test: runner.run(asyncio.wait_for(test, patient(HANGING_SECONDS)))


@pytest.fixture(scope="module")
def client(run: Run, llama: Path) -> Iterator[EngineClient]:
    client = EngineClient(config_of(llama, max_batch_tokens=64, max_sequences=4))

    async def start() -> None:
        await client.start()

    run(start())
    yield client
    run(client.stop())


def config_of(folder: Path, **options: Any) -> EngineConfig:
    config = engine_config(**options)
    model = type(config.model)(model=folder, threads=1)
    return type(config)(model=model, cache=config.cache, scheduler=config.scheduler)


@asynccontextmanager
async def started(folder: Path, **options: Any) -> AsyncIterator[EngineClient]:
    client = EngineClient(config_of(folder, **options))
    await client.start()
    try:
        yield client
    finally:
        await client.stop()


async def collect(client: EngineClient, request: Request) -> list[RequestOutput]:
    return [output async for output in client.generate(request)]


def tokens_of(outputs: list[RequestOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    while not await condition():
        await asyncio.sleep(0.02)


def process_of(client: EngineClient) -> subprocess.Popen[bytes]:
    assert isinstance(client.processes, Child) and client.processes.process is not None
    return client.processes.process


def alive(pid: int) -> bool:
    """A zombie has ended: only its parent has not asked yet."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_the_process_answers_as_an_engine_of_ones_own(
    run: Run, client: EngineClient, llama: Path
) -> None:
    requests = [
        ask("greedy", some_ids(200, 0), max_tokens=20),
        ask("drawn", some_ids(90, 1), max_tokens=20, temperature=1.0, seed=3, n=2),
    ]
    expected = build_engine(llama).finish(*requests)

    async def test() -> None:
        assert client.state == "ready" and client.info.vocab_size == 512
        greedy, drawn = await asyncio.gather(*(collect(client, r) for r in requests))
        assert tokens_of(greedy) == expected[0].answer
        for index in range(2):
            own = [output for output in drawn if output.index == index]
            assert tokens_of(own) == expected[1].tokens[index]
        for outputs, answered in zip((greedy, drawn), expected, strict=True):
            assert [output.finished for output in outputs].count(True) == 1
            assert outputs[-1].finished and outputs[-1].usage == answered.usage

    run(test())


def test_documents_are_opened_asked_and_closed(
    run: Run, client: EngineClient, tmp_path: Path
) -> None:
    file = tmp_path / "tokens"
    np.array(some_ids(500, 0), dtype="<i4").tofile(file)
    (tmp_path / "empty").touch()

    async def test() -> None:
        await client.open_document("d", file)
        await collect(client, ask("read", "d", max_tokens=0))
        outputs = await collect(client, ask("question", "d", some_ids(5, 1)))
        assert outputs[-1].usage is not None and outputs[-1].usage.cached_tokens == 448
        await client.close_document("d")
        stats = await client.stats()
        assert stats.documents_open == stats.groups[0].blocks_in_use == 0
        with pytest.raises(DocumentMissing, match="d is not open"):
            await collect(client, ask("late", "d"))
        with pytest.raises(InvalidRequest, match="cannot be read"):
            await client.open_document("e", tmp_path / "empty")
        with pytest.raises(InvalidRequest, match="cannot be read"):
            await client.open_document("e", tmp_path / "missing")

    run(test())


def test_modules_are_opened_encoded_borrowed_and_closed(
    run: Run, client: EngineClient, llama: Path
) -> None:
    engine = with_modules(build_engine(llama, max_batch_tokens=64, max_sequences=4), MODULES)
    request = prompt("q", reused("a"), literal(7, 1), reused("d"), literal(5, 2))
    (expected,) = engine.finish(request)

    async def test() -> None:
        for module_id, pieces in MODULES.items():
            await client.open_module(module_id, pieces)
        await collect(client, encode("a"))
        outputs = await collect(client, request)
        assert tokens_of(outputs) == expected.answer
        assert outputs[-1].usage == expected.counts
        states = await client.module_states(["a", "b", "nobody"])
        assert set(states) == {"a", "b"}
        assert (states["a"].tokens, states["a"].hits, states["a"].tier) == (100, 1, "device")
        assert (states["b"].blocks, states["b"].hits, states["b"].tier) == (3, 0, "none")
        with pytest.raises(InvalidRequest, match="is empty"):
            await client.open_module("x", [Piece(token_ids=(), position=0)])
        for module_id in MODULES:
            await client.close_module(module_id)
        with pytest.raises(DocumentMissing, match="module a is not open"):
            await collect(client, request)

    run(test())


def test_refusals_cross_the_border_with_their_kind_and_field(
    run: Run, client: EngineClient
) -> None:
    async def test() -> None:
        with pytest.raises(ContextTooLong, match="limit of 2048") as refused:
            await collect(client, ask("a", some_ids(2048, 0)))
        assert refused.value.param == "messages"
        with pytest.raises(InvalidRequest, match="vocabulary"):
            await collect(client, ask("b", (600,)))
        assert (await client.stats()).requests_running == 0

    run(test())


def test_an_id_in_use_is_refused_and_its_first_request_goes_on(
    run: Run, client: EngineClient
) -> None:
    async def test() -> None:
        first = asyncio.create_task(collect(client, ask("same", (5, 6), max_tokens=50)))
        await asyncio.sleep(0)
        with pytest.raises(InvalidRequest, match="same is in use"):
            await collect(client, ask("same", (7,)))
        assert len(tokens_of(await first)) == 50

    run(test())


def test_closing_the_iterator_ends_the_request_at_once(run: Run, client: EngineClient) -> None:
    async def test() -> None:

        async def busy() -> int:
            stats = await client.stats()
            return stats.requests_running + stats.requests_waiting

        async with aclosing(client.generate(ask("a", (5, 6), max_tokens=2000))) as outputs:
            async for output in outputs:
                if output.token_ids:
                    break
            assert await busy() == 1
        assert await busy() == 0
        # Also in the middle of a prompt, and before anything came at all.
        prompt = some_ids(1900, 0)
        async with aclosing(client.generate(ask("b", prompt, max_tokens=2))) as outputs:
            assert (await anext(outputs)).progress is not None
        before = (await client.stats()).computed_tokens
        assert await busy() == 0
        task = asyncio.create_task(collect(client, ask("c", prompt, max_tokens=2)))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert await busy() == 0
        computed = (await client.stats()).computed_tokens - before
        assert computed < len(prompt) / 4  # a few steps of 64, until the process heard of it

    run(test())


def test_a_killed_process_ends_its_requests_and_is_replaced(run: Run, client: EngineClient) -> None:
    async def test() -> None:
        restarts = []

        async def note() -> None:
            restarts.append(await client.stats())  # the new process answers already

        client.on_restart = note
        request = ask("a", some_ids(20, 0), max_tokens=5)
        expected = tokens_of(await collect(client, request))
        running = [
            asyncio.create_task(collect(client, ask(f"{i}", (5, i + 6), max_tokens=2000)))
            for i in range(3)
        ]

        async def all_run() -> bool:
            return (await client.stats()).requests_running == len(running)

        await until(all_run)
        old = process_of(client).pid
        os.kill(old, signal.SIGKILL)
        for outputs in await asyncio.gather(*running):
            assert outputs[-1].finished
            assert outputs[-1].finish_reason is FinishReason.ERROR
            assert "ended with code -9" in str(outputs[-1].error)
        if client.state != "ready":
            with pytest.raises(EngineDied, match="try again"):
                await collect(client, request)

        async def ready() -> bool:
            return bool(restarts)

        await until(ready)
        assert process_of(client).pid != old
        assert tokens_of(await collect(client, request)) == expected

    run(test())


def test_draining_takes_nothing_new_and_lets_answers_finish_until_the_deadline(
    run: Run, llama: Path
) -> None:
    async def test() -> None:
        async with started(llama, pool_gib=0.5) as client:
            began = time.monotonic()
            await collect(client, ask("measured", (5, 8), max_tokens=50))
            seconds = time.monotonic() - began  # the endless one takes 40 times as long
            short = asyncio.create_task(collect(client, ask("a", (5, 6), max_tokens=50)))
            endless = asyncio.create_task(collect(client, ask("b", (5, 7), max_tokens=2000)))
            await asyncio.sleep(0.02)
            drain = asyncio.create_task(client.drain(15 * seconds))
            await asyncio.sleep(0)
            with pytest.raises(EngineDied, match="draining"):
                await collect(client, ask("late", (5,)))
            outputs = await short
            assert outputs[-1].finish_reason is FinishReason.LENGTH
            assert len(tokens_of(outputs)) == 50
            await drain
            outputs = await endless
            assert outputs[-1].finish_reason is FinishReason.ERROR
            assert "shutting down" in str(outputs[-1].error)
            assert client.state == "stopped"
            assert process_of(client).returncode == 0

    run(test())


def test_a_folder_that_cannot_be_served_is_refused_with_its_reason(
    run: Run, tmp_path: Path
) -> None:
    async def test() -> None:
        client = EngineClient(config_of(tmp_path))
        with pytest.raises(ModelRefused, match=str(tmp_path)):
            await client.start()
        assert not alive(process_of(client).pid)
        await client.stop()

    run(test())


def test_two_clients_live_in_one_loop(run: Run, client: EngineClient, gemma3: Path) -> None:
    async def test() -> None:
        async with started(gemma3, codec="int8") as other:
            request = ask("a", some_ids(30, 0), max_tokens=5)
            answers = await asyncio.gather(collect(client, request), collect(other, request))
            assert tokens_of(answers[0]) != tokens_of(answers[1])
            assert (client.info.kv_codec, other.info.kv_codec) == ("raw", "int8")

    run(test())


def test_a_start_that_measures_says_how_far_it_is(run: Run, llama: Path, tmp_path: Path) -> None:
    async def test() -> None:
        steps: list[str] = []
        model = ModelConfig(model=llama, threads=1, attention_backend="torch")
        cache = CacheConfig(kv_codec="int8", device_pool_gib=0.03)
        client = EngineClient(EngineConfig(model=model, cache=cache), cache_dir=tmp_path)
        client.on_loading = steps.append
        await client.start()
        await client.stop()
        assert steps and all(step.startswith("measuring what KV codec int8") for step in steps)

    run(test())


PARENT = """
import asyncio, sys
from pathlib import Path
from longctx.process.client import EngineClient
from longctx.config import CacheConfig, EngineConfig, ModelConfig

async def main():
    model = ModelConfig(model=Path(sys.argv[1]), threads=1)
    cache = CacheConfig(kv_codec="raw", device_pool_gib=0.03)
    client = EngineClient(EngineConfig(model=model, cache=cache))
    await client.start()
    print(client.processes.process.pid, flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


def test_the_engine_process_ends_when_its_parent_is_killed(llama: Path) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(llama)], stdout=subprocess.PIPE, text=True
    )
    with parent:
        assert parent.stdout is not None
        engine = int(parent.stdout.readline())
        assert alive(engine)
        parent.kill()
        wait_for(lambda: not alive(engine))


def test_a_level_is_judged_by_the_engine_process(client: EngineClient, run: Run) -> None:
    async def test() -> None:
        assert (await client.judge_level(EXACT)).passed
        verdict = await client.judge_level(MODULAR)
        assert verdict.level == "modular" and "KL" in verdict.reason
        assert await client.judge_level(MODULAR) == verdict

    run(test())
