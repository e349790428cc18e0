"""The engine process as asyncio sees it: start it, ask it, outlive it.

`EngineClient.generate` is one request. When the engine process dies, every request that it held
ends with an error, and a new process is started; nobody waits for ever.
"""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from longctx.config import CACHE_DIR, EngineConfig
from longctx.engine_info import EngineInfo
from longctx.engine_stats import EngineStats
from longctx.errors import EngineDied, InvalidRequest, LongctxError, ModelRefused
from longctx.ipc import protocol
from longctx.ipc.channel import HEADER, frame
from longctx.ipc.protocol import Command, Done, Event, decode_event, encode
from longctx.process.launcher import EngineProcesses, engine_processes
from longctx.request import (
    Erasure,
    FinishReason,
    LevelVerdict,
    ModuleState,
    Piece,
    Request,
    RequestOutput,
)
from longctx.ring.processes.heartbeat import LOADING_SILENCE_SECONDS, SILENCE_SECONDS
from offload.stats import Cleared
from prompt_cache.level import Level

RESTARTS = 5  # in a row that may fail before the last
PAUSE_SECONDS = 0.5  # after the first of them, then twice as long each time
LOOK_SECONDS = 0.5

State = Literal["starting", "ready", "restarting", "draining", "stopped"]


@dataclass(frozen=True, slots=True)
class Closing:
    """How far the erasure of a closed document or module is `now`, and what it comes to in the end.

    `end` is None where the engine died before that.
    """

    now: Erasure
    end: "asyncio.Future[Erasure | None]"


class EngineClient:
    """An engine in processes of its own, asked and outlived.

    `start` first; then every question, in any order and at the same time; at the end `drain`
    or `stop`. All of it belongs to one event loop: nothing here may be called from another
    thread. A question that the engine's death interrupts raises EngineDied, or is a request whose
    last output is an error; meanwhile another engine is started, of which `on_restart` is told:
    it has none of the documents and modules that were opened.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        cache_dir: Path = CACHE_DIR,
        processes: EngineProcesses | None = None,
    ) -> None:
        """`cache_dir`: as that of `open_engine`.

        `processes`: where the engine was launched already, with the same configuration.
        """
        self.config = config
        self.state: State = "starting"
        self.on_restart: Callable[[], Awaitable[None]] | None = None
        self.on_loading: Callable[[str], None] | None = None  # told of long steps of the loading
        self.durable_tokens: dict[str, int] = {}  # of each document, on stable storage
        self._info: EngineInfo | None = None
        self.restarts = 0
        self.processes = processes or engine_processes(config, cache_dir)
        self._started = False
        self._heard = 0.0  # when the engine said something, by the loop's clock
        self._silence_seconds = LOADING_SILENCE_SECONDS
        self._stopped_by: str | None = None  # why no other engine is started any more
        self._lost: str | None = None  # why the ranks are about to end, in their words
        self._watching: asyncio.Task[None] | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None
        self._restarted: asyncio.Future[None] | None = None  # held, or it might be collected
        self._requests: dict[str, asyncio.Queue[RequestOutput | LongctxError]] = {}
        self._calls: dict[int, asyncio.Future[Done]] = {}
        self._erasures: dict[str, list[asyncio.Future[Erasure | None]]] = {}  # by id
        self._tickets = itertools.count()

    @property
    def info(self) -> EngineInfo:
        assert self._info is not None, "not started"
        return self._info

    async def start(self) -> EngineInfo:
        """Start the engine's processes where nobody has, and wait until the model is loaded.

        Raises ModelRefused, or EngineDied if the process ends before it is ready.
        """
        if self.config.ring.ranks > 1:
            self._watching = asyncio.create_task(self._watch())
        reader = await self._spawn()
        self._reading = asyncio.create_task(self._read(reader))
        self.state = "ready"
        return self.info

    async def generate(self, request: Request) -> AsyncGenerator[RequestOutput, None]:
        """Yields the request's outputs; the last one is `finished`. Closing the iterator aborts it.

        The first step raises InvalidRequest, ContextTooLong, DocumentMissing, Overloaded or
        EngineDied where the request cannot be taken.
        """
        self._check_ready()
        if request.request_id in self._requests:
            raise InvalidRequest(f"request id {request.request_id} is in use", param="request_id")
        outputs: asyncio.Queue[RequestOutput | LongctxError] = asyncio.Queue()
        self._requests[request.request_id] = outputs
        over = False
        try:
            self._send(protocol.Submit(request))
            while not over:
                output = await outputs.get()
                if isinstance(output, LongctxError):
                    over = True
                    raise output
                over = output.finished
                yield output
        finally:
            self._requests.pop(request.request_id, None)
            if not over:
                self._send(protocol.Abort(request.request_id))

    async def open_document(
        self, document_id: str, tokens: Path, *, keep: Request | None = None
    ) -> None:
        """Make a document known: `tokens` is a file of little-endian int32 ids, kept in place.

        `keep` is that of `Engine.open_document`. Raises InvalidRequest where the file cannot be
        read.
        """
        await self._call(lambda ticket: protocol.OpenDocument(ticket, document_id, tokens, keep))

    async def close_document(self, document_id: str) -> "Closing":
        """Forget a document and erase what stems from it, as `Engine.close_document`."""
        return await self._close(
            document_id, lambda ticket: protocol.CloseDocument(ticket, document_id)
        )

    async def open_module(
        self,
        module_id: str,
        pieces: Sequence[Piece],
        *,
        keep: Request | None = None,
        sources: tuple[str, ...] = (),
    ) -> None:
        """Make a module known; `keep` and `sources` are those of `Engine.open_module`.

        Raises InvalidRequest or ContextTooLong.
        """
        await self._call(
            lambda ticket: protocol.OpenModule(ticket, module_id, tuple(pieces), keep, sources)
        )

    async def close_module(self, module_id: str) -> "Closing":
        """Forget a module and erase what stems from it, as `Engine.close_module`."""
        return await self._close(module_id, lambda ticket: protocol.CloseModule(ticket, module_id))

    async def module_states(self, module_ids: Sequence[str]) -> dict[str, ModuleState]:
        """Returns the states of those modules that are open, by their ids."""
        done = await self._call(lambda ticket: protocol.GetModules(ticket, tuple(module_ids)))
        assert done.modules is not None
        return done.modules

    async def judge_level(self, level: Level) -> LevelVerdict:
        """Says whether a level of exactness costs the model too much.

        It is measured the first time that anybody asks, beside what is served: about half a
        minute. Raises LongctxError where it cannot be measured.
        """
        done = await self._call(lambda ticket: protocol.JudgeLevel(ticket, level))
        assert done.level is not None
        return done.level

    async def stats(self) -> EngineStats:
        """Returns what the engine and its tiers hold now and have counted so far."""
        done = await self._call(protocol.GetStats)
        assert done.stats is not None
        return done.stats

    async def clear(self, tiers: tuple[str, ...]) -> dict[str, Cleared]:
        """Evict what `device` or `host` caches and nobody uses; returns how much that was."""
        done = await self._call(lambda ticket: protocol.Clear(ticket, tiers))
        assert done.cleared is not None
        return done.cleared

    async def drain(self, timeout_seconds: float) -> None:
        """Take nothing new, let what runs finish until the deadline, then stop the process."""
        self.state = "draining"
        deadline = asyncio.get_running_loop().time() + timeout_seconds
        while self._requests and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.02)
        await self.stop()

    async def stop(self) -> None:
        """End the process now; requests that still run end with an error."""
        self.state = "stopped"
        if not self._started:
            return
        self._started = False
        self._end_all("the server is shutting down")
        self._send(protocol.Stop())
        tasks = [task for task in (self._reading, self._watching) if task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)  # one that has failed does not keep the others alive
        if self._writer is not None:
            self._writer.close()
        await self.processes.stop()

    def _check_ready(self) -> None:
        if self.state != "ready":
            raise EngineDied(
                f"the engine is {self.state}" + (self._stopped_by or "; try again in a moment")
            )

    async def _close(self, owner: str, command: Callable[[int], Command]) -> "Closing":
        self.durable_tokens.pop(owner, None)
        end: asyncio.Future[Erasure | None] = asyncio.get_running_loop().create_future()
        waiting = self._erasures.setdefault(owner, [])
        waiting.append(end)
        try:
            erasure = (await self._call(command)).erasure
        except BaseException:
            if end in waiting:
                waiting.remove(end)
            raise
        assert erasure is not None
        if not erasure.waits or erasure.left:
            self._erased(owner, erasure)
        return Closing(erasure, end)

    def _erased(self, owner: str, erasure: Erasure | None) -> None:
        """Tell all who wait for the owner's erasure that it has ended; None: with the engine."""
        for end in self._erasures.pop(owner, ()):
            if not end.done():
                end.set_result(erasure)

    async def _call(self, command: Callable[[int], Command]) -> Done:
        self._check_ready()
        ticket = next(self._tickets)
        future: asyncio.Future[Done] = asyncio.get_running_loop().create_future()
        self._calls[ticket] = future
        try:
            self._send(command(ticket))
            done = await future
        finally:
            del self._calls[ticket]
        if done.fault is not None:
            raise done.fault.error()
        return done

    def _send(self, command: Command) -> None:
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(frame(encode(command)))

    async def _spawn(self) -> asyncio.StreamReader:
        """Open a new engine and wait until its model is loaded. Raises as `start` does."""
        self.durable_tokens.clear()
        self._started, self._lost = True, None
        self._silence_seconds = LOADING_SILENCE_SECONDS
        try:
            reader, self._writer = await asyncio.open_connection(sock=await self.processes.open())
        except OSError as error:
            raise EngineDied(f"no engine process could be started: {error.strerror}") from error
        loaded = await self._next_event(reader)
        while isinstance(loaded, protocol.Heartbeat | protocol.Loading):
            if isinstance(loaded, protocol.Loading) and self.on_loading is not None:
                self.on_loading(loaded.step)
            loaded = await self._next_event(reader)
        if isinstance(loaded, protocol.RanksLost):
            await self._reap()
            raise EngineDied(f"{loaded.reason}, while loading the model")
        if loaded is None:
            raise EngineDied(f"{await self._reap()} while loading the model")
        assert isinstance(loaded, protocol.Loaded), loaded
        if loaded.fault is not None:
            await self._reap()
            raise loaded.fault.error()
        assert loaded.info is not None
        if self._info is not None and loaded.info.fingerprint != self._info.fingerprint:
            await self._reap()
            raise ModelRefused(
                f"the files of {loaded.info.model_name} (weights, config.json or tokenizer) are "
                "others than when the server started; restart the server"
            )
        self._info = loaded.info
        self._silence_seconds = SILENCE_SECONDS
        return reader

    async def _next_event(self, reader: asyncio.StreamReader) -> Event | None:
        """Returns None when the process is gone."""
        try:
            header = await reader.readexactly(HEADER.size)
            body = await reader.readexactly(*HEADER.unpack(header))
            self._heard = asyncio.get_running_loop().time()
            return decode_event(body)
        except (asyncio.IncompleteReadError, ConnectionError):
            return None

    async def _read(self, reader: asyncio.StreamReader) -> None:
        """Hand out events until the process is gone; then start another."""
        while True:
            event = await self._next_event(reader)
            if event is not None:
                self._hand_out(event)
                continue
            self.state = "restarting"
            ended = await self._reap()
            self._end_all(f"{self._lost or ended}; it is being restarted")
            try:
                reader = await self._restart()
            except LongctxError as error:
                self.state = "stopped"
                self._stopped_by = f": it could not be restarted: {error}"
                self._end_all(f"the engine process could not be restarted: {error}")
                return
            self.state = "ready"
            if self.on_restart is not None:
                # In a task of its own: it calls the engine, whose answers are read here.
                self._restarted = asyncio.ensure_future(self.on_restart())

    async def _restart(self) -> asyncio.StreamReader:
        """Try several times: what ended the engine, such as a lack of memory, may last a while."""
        self.restarts += 1
        for restart in range(RESTARTS):
            with contextlib.suppress(EngineDied):
                return await self._spawn()
            await asyncio.sleep(PAUSE_SECONDS * 2**restart)
        return await self._spawn()

    async def _watch(self) -> None:
        """Kill an engine that hangs: it keeps its connection, so only its silence shows it."""
        loop = asyncio.get_running_loop()
        looked = self._heard = loop.time()
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            now = loop.time()
            if now - looked > 4 * LOOK_SECONDS or self._writer is None:
                self._heard = now  # this process was stopped itself, or there is no engine yet
            looked = now
            if now - self._heard > self._silence_seconds:
                self._heard = now
                self._lost = "rank 0 of the engine does not answer"
                self.processes.kill_unresponsive()

    def _hand_out(self, event: Event) -> None:
        match event:
            case protocol.Outputs():
                for output in event.outputs:
                    if output.request_id in self._requests:
                        self._requests[output.request_id].put_nowait(output)
            case protocol.Rejected():
                if event.request_id in self._requests:
                    self._requests[event.request_id].put_nowait(event.fault.error())
            case protocol.Durable():
                self.durable_tokens.update(event.documents)
            case protocol.Erased():
                for owner, erasure in event.erasures.items():
                    self._erased(owner, erasure)
            case Done():
                future = self._calls.get(event.ticket)
                if future is not None and not future.done():
                    future.set_result(event)
            case protocol.RanksLost():
                self._lost = event.reason
            case protocol.Heartbeat():
                pass
            case protocol.Loading() | protocol.Loaded() | protocol.RankJoined():
                raise AssertionError(f"a second {type(event).__name__}")

    def _end_all(self, reason: str) -> None:
        for request_id, outputs in self._requests.items():
            outputs.put_nowait(
                RequestOutput(
                    request_id=request_id,
                    finish_reason=FinishReason.ERROR,
                    finished=True,
                    error=reason,
                )
            )
        for future in self._calls.values():
            if not future.done():
                future.set_exception(EngineDied(reason))
        for owner in list(self._erasures):
            self._erased(owner, None)

    async def _reap(self) -> str:
        """Close the connection to a lost engine; returns which of its processes ended, in words."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        return await self.processes.reap()
