"""An engine process that cannot be started again: tried for a while, then said."""

import asyncio
import errno
import os
import signal
import subprocess
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from longctx.errors import EngineDied
from longctx.process import client as client_module
from longctx.process.client import EngineClient
from tests.process.test_client import (
    HANGING_SECONDS,
    collect,
    config_of,
    process_of,
    started,
    tokens_of,
)
from tests.support.recorded_engine import ask
from tests.support.waiting import eventually, patient


def with_client(folder: Path, test: Callable[[EngineClient], Awaitable[None]]) -> None:
    async def run() -> None:
        async with started(folder, pool_gib=0.5) as client:
            await asyncio.wait_for(test(client), patient(HANGING_SECONDS))

    asyncio.run(run())


def test_a_restart_for_which_there_is_no_memory_is_tried_again(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(client: EngineClient) -> None:
        restarted = asyncio.Event()

        async def note() -> None:
            restarted.set()

        client.on_restart = note
        popen, refused = subprocess.Popen, []

        def once_without_memory(*words: Any, **options: Any) -> subprocess.Popen[bytes]:
            if not refused:
                refused.append(words)
                raise OSError(errno.ENOMEM, "Cannot allocate memory")
            return popen(*words, **options)

        monkeypatch.setattr(subprocess, "Popen", once_without_memory)
        os.kill(process_of(client).pid, signal.SIGKILL)
        await restarted.wait()
        assert refused and client.state == "ready"
        assert len(tokens_of(await collect(client, ask("a", (5, 6), max_tokens=5)))) == 5

    with_client(llama, test)


def test_an_engine_that_cannot_be_started_any_more_is_stopped_and_says_why(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_memory(*_: Any, **__: Any) -> subprocess.Popen[bytes]:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(client_module, "PAUSE_SECONDS", 0.001)

    async def test(client: EngineClient) -> None:
        with monkeypatch.context() as broken:
            broken.setattr(subprocess, "Popen", without_memory)
            os.kill(process_of(client).pid, signal.SIGKILL)
            await eventually(lambda: client.state == "stopped")
            with pytest.raises(EngineDied, match="stopped"):
                await client.stats()
            fresh = EngineClient(config_of(llama))
            with pytest.raises(EngineDied, match="Cannot allocate memory"):
                await fresh.start()
            await fresh.stop()

    with_client(llama, test)


def test_stopping_ends_the_process_whatever_has_failed_before(llama: Path) -> None:
    async def test(client: EngineClient) -> None:
        async def fail() -> None:
            raise RuntimeError("a bug of ours")

        client._watching = asyncio.create_task(fail())
        await client.stop()
        assert process_of(client).returncode is not None

    with_client(llama, test)
