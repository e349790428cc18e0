"""Documents and modules while the engine comes and goes: what is computed, and what is given up."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from api.background import ingest
from api.background.store_dir import StoreDir
from api.files.document import Document
from api.files.document_library import DocumentLibrary
from api.files.document_store import DocumentRecord, DocumentStore
from api.stored_prompts.module_keeper import ModuleKeeper, StoredModules
from longctx.errors import DocumentMissing, EngineDied, InvalidRequest
from longctx.process.client import Closing
from longctx.request import Erasure, FinishReason, Piece, Request, RequestOutput
from tests.support.waiting import eventually, patient


class MortalEngine:
    """As a client: it dies of some prompts, and knows nothing when it is back."""

    def __init__(self) -> None:
        self.state = "ready"
        self.info = SimpleNamespace(
            fingerprint="f", limits=SimpleNamespace(longest_tokens=10**9, cure="")
        )
        self.known: set[str] = set()
        self.deadly: dict[str, int] = {}  # how often each is the end of it
        self.stored: set[str] = set()  # on disk: closed documents leave it if they are registered
        self.calls: list[str] = []
        self.restarts = 0
        self.closing, self.may_close = asyncio.Event(), asyncio.Event()
        self.may_close.set()
        self.on_restart: Callable[[], Awaitable[None]]

    async def open_document(self, document_id: str, tokens: Path, *, keep: Request) -> None:
        self._check()
        if not tokens.exists():
            raise InvalidRequest("cannot be read")
        assert [s.document_id for s in keep.segments] == [None, document_id]
        self.known.add(document_id)
        self.calls.append(f"open {document_id}")

    async def close_document(self, document_id: str) -> Closing:
        self._check()
        self.closing.set()
        await self.may_close.wait()
        if document_id in self.known:
            self.known.remove(document_id)
            self.stored.discard(document_id)
        self.calls.append(f"close {document_id}")
        return self._closing()

    async def open_module(
        self,
        module_id: str,
        pieces: Sequence[Piece],
        *,
        keep: Request,
        sources: tuple[str, ...] = (),
    ) -> None:
        self._check()
        self.known.add(module_id)
        self.calls.append(f"open {module_id}")

    async def close_module(self, module_id: str) -> Closing:
        self._check()
        self.known.discard(module_id)
        self.calls.append(f"close {module_id}")
        return self._closing()

    def _closing(self) -> Closing:
        end: asyncio.Future[Erasure | None] = asyncio.get_running_loop().create_future()
        end.set_result(Erasure())
        return Closing(Erasure(), end)

    async def generate(self, request: Request) -> AsyncGenerator[RequestOutput, None]:
        self._check()
        name = request.segments[-1].document_id or request.segments[-1].encodes
        assert name is not None
        if name not in self.known:
            raise DocumentMissing(f"{name} is not open")
        if self.deadly.get(name, 0) > 0:
            self.deadly[name] -= 1
            self.die()
            raise EngineDied(f"died of {name}")
        self.stored.add(name)
        yield RequestOutput(
            request_id=request.request_id, finish_reason=FinishReason.LENGTH, finished=True
        )

    def die(self) -> None:
        self.state = "restarting"
        self.known.clear()
        self._restarting = asyncio.ensure_future(self._restart())

    async def _restart(self) -> None:
        await asyncio.sleep(0.02)
        self.state = "ready"
        self.restarts += 1
        await self.on_restart()

    def _check(self) -> None:
        if self.state != "ready":
            raise EngineDied(f"the engine is {self.state}")


class Ids(set[str]):
    """As a table of ids of modules."""

    async def note_kept(self, name: str) -> None:
        self.add(name)

    async def forget_kept(self, name: str) -> None:
        self.discard(name)

    async def kept(self) -> list[str]:
        return list(self)


class SlowTokenizer:
    def __init__(self) -> None:
        self.may_go_on = asyncio.Event()

    async def tokenize(self, text: Path, tokens: Path, **_: Any) -> int:
        if text.read_text() == "long":
            await self.may_go_on.wait()
        tokens.write_bytes(bytes(40))
        return 10


class Bench:
    def __init__(self, folder: Path) -> None:
        self.folder = StoreDir(folder)
        self.store = DocumentStore(self.folder.database)
        self.engine: Any = MortalEngine()
        self.tokenizer: Any = SlowTokenizer()
        prompts: Any = SimpleNamespace(document_prefix=lambda *_, **__: (1, 2))
        self.library = DocumentLibrary(
            self.folder, self.store, self.tokenizer, prompts, self.engine
        )
        self.engine.on_restart = self.library.reopen

    async def upload(self, document_id: str, text: str) -> Document:
        upload = self.folder.new_upload_path()
        upload.write_text(text)
        record = DocumentRecord(
            id=document_id,
            tenant="t",
            filename=document_id,
            purpose="user_data",
            bytes=len(text),
            created_at=0,
            sha256="",
            system=None,
            date="",
        )
        return await self.library.add(record, upload)

    async def until(self, document: Document, state: str) -> None:
        await eventually(lambda: self.library.state(document) == state)

    async def close(self) -> None:
        await self.library.close()
        await self.store.close()
        self.folder.close()


def on_bench(folder: Path, test: Callable[[Bench], Awaitable[None]]) -> None:
    async def run() -> None:
        bench = Bench(folder)
        await bench.store.open()
        try:
            await asyncio.wait_for(test(bench), patient())
        finally:
            await bench.close()

    asyncio.run(run())


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingest, "RETRY_SECONDS", 0.005)


def test_a_document_waits_behind_another_after_a_crash_and_is_computed(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        bench.engine.deadly["a"] = 1
        short = await bench.upload("a", "short")
        long = await bench.upload("b", "long")
        await eventually(lambda: not bench.engine.deadly["a"] and bench.engine.state == "ready")
        await asyncio.sleep(0.1)  # many retries: the engine is back, and knows nothing yet
        assert bench.library.state(short) == "queued"
        bench.tokenizer.may_go_on.set()
        await bench.until(short, "ready")
        await bench.until(long, "ready")

    on_bench(tmp_path, test)


def test_a_document_that_the_engine_always_dies_of_is_given_up(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        bench.engine.deadly["a"] = 100
        deadly = await bench.upload("a", "short")
        await bench.until(deadly, "error")
        assert deadly.error == "computing it failed 3 times, at last because: died of a"
        other = await bench.upload("b", "short")
        await bench.until(other, "ready")
        bench.engine.die()
        await bench.until(other, "queued")
        await bench.until(other, "ready")
        assert bench.engine.deadly["a"] == 97

    on_bench(tmp_path, test)


def test_crashes_are_counted_from_the_last_time_that_all_went_well(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        entry = await bench.upload("a", "short")
        for _ in range(3):
            await bench.until(entry, "ready")
            bench.engine.deadly["a"] = 2
            bench.engine.die()
            await eventually(lambda: bench.engine.deadly["a"] == 0)
        await bench.until(entry, "ready")

    on_bench(tmp_path, test)


@pytest.mark.parametrize(("crashes", "state"), [(2, "ready"), (3, "error")])
def test_modules_are_encoded_again_after_crashes_until_there_are_too_many(
    tmp_path: Path, crashes: int, state: str
) -> None:
    async def test(bench: Bench) -> None:
        keeper = ModuleKeeper(bench.engine, Ids())
        bench.engine.on_restart = keeper.reopen
        bench.engine.deadly["n"] = crashes

        async def prepare() -> list[tuple[str, tuple[Piece, ...]]]:
            return [("m", ()), ("n", ())]

        modules = StoredModules(id="k", salt="t", prepare=prepare)
        keeper.keep(modules)
        await eventually(lambda: keeper.state(modules) == state)
        assert bench.engine.deadly["n"] == 0
        await keeper.close()

    on_bench(tmp_path, test)


@pytest.mark.parametrize("opened", [True, False])
def test_modules_that_are_dropped_while_the_engine_is_away_leave_the_tiers_later(
    tmp_path: Path, opened: bool
) -> None:
    async def test(bench: Bench) -> None:
        keeper = ModuleKeeper(bench.engine, Ids())
        bench.engine.on_restart = keeper.reopen

        async def prepare() -> list[tuple[str, tuple[Piece, ...]]]:
            return [("m", ())]

        modules = StoredModules(id="k", salt="t", prepare=prepare)
        if opened:
            keeper.keep(modules)
            await eventually(lambda: keeper.state(modules) == "ready")
        bench.engine.die()
        if not opened:
            keeper.keep(modules)
        bench.engine.calls.clear()
        await keeper.drop(modules)
        await eventually(lambda: bench.engine.calls == ["open m", "close m", "close k"])
        await keeper.close()

    on_bench(tmp_path, test)


def files(bench: Bench) -> list[str]:
    return sorted(path.name for path in (bench.folder.path / "documents").iterdir())


async def two_ready(bench: Bench) -> tuple[Document, Document]:
    entries = await bench.upload("a", "short"), await bench.upload("b", "short")
    for entry in entries:
        await bench.until(entry, "ready")
    bench.engine.calls.clear()
    return entries


def test_what_is_stored_of_a_deleted_document_is_dropped_once_the_engine_is_back(
    tmp_path: Path,
) -> None:
    async def test(bench: Bench) -> None:
        first, second = await two_ready(bench)
        bench.engine.die()
        await bench.library.remove(first)
        assert list(bench.library.documents()) == [second]
        assert await bench.store.all() == [second.record]
        assert files(bench) == ["a.tokens", "b.tokens", "b.txt"]
        await eventually(lambda: bench.engine.stored == {"b"})
        # Others come first: they may share blocks with it.
        assert bench.engine.calls == ["open b", "open a", "close a"]
        await eventually(lambda: files(bench) == ["b.tokens", "b.txt"])
        assert await bench.store.deleted() == []

    on_bench(tmp_path, test)


def test_what_is_stored_of_a_deleted_document_is_dropped_by_the_next_server_if_need_be(
    tmp_path: Path,
) -> None:
    async def end(bench: Bench) -> None:
        first, _ = await two_ready(bench)
        bench.engine.state = "restarting"
        await bench.library.remove(first)

    async def begin(bench: Bench) -> None:
        bench.engine.stored = {"a", "b"}
        await bench.library.open()
        assert [entry.record.id for entry in bench.library.documents()] == ["b"]
        page = await bench.store.page("t", purpose=None, order="asc", after=None, limit=9)
        assert [document.id for document in page] == ["b"]
        await eventually(lambda: bench.engine.stored == {"b"})
        await eventually(lambda: files(bench) == ["b.tokens", "b.txt"])
        assert await bench.store.deleted() == []

    on_bench(tmp_path, end)
    on_bench(tmp_path, begin)


def test_a_document_deleted_while_it_waits_to_be_opened_again_is_dropped_in_its_turn(
    tmp_path: Path,
) -> None:
    async def test(bench: Bench) -> None:
        first, _ = await two_ready(bench)
        long = await bench.upload("c", "long")
        await bench.until(long, "processing")
        bench.engine.die()
        await eventually(lambda: bench.engine.restarts == 1)
        await bench.library.remove(first)
        assert bench.engine.stored == {"a", "b"}
        bench.tokenizer.may_go_on.set()
        await eventually(
            lambda: bench.engine.stored >= {"b", "c"} and "a" not in bench.engine.stored
        )
        await bench.until(long, "ready")

    on_bench(tmp_path, test)


def test_a_document_that_the_engine_knows_is_dropped_at_once(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        first, _ = await two_ready(bench)
        await bench.library.remove(first)
        assert bench.engine.calls == ["close a"] and bench.engine.stored == {"b"}
        assert files(bench) == ["b.tokens", "b.txt"]
        unread = await bench.upload("c", "long")
        await bench.library.remove(unread)
        assert files(bench) == ["b.tokens", "b.txt"]
        assert await bench.store.deleted() == []

    on_bench(tmp_path, test)


def test_a_deletion_at_work_ends_before_the_library_does(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        first, _ = await two_ready(bench)
        bench.engine.die()
        await bench.library.remove(first)  # it waits for the engine
        bench.engine.may_close.clear()
        await bench.engine.closing.wait()
        ending = asyncio.ensure_future(bench.library.close())
        await asyncio.sleep(0)
        asyncio.get_running_loop().call_later(0.05, bench.engine.may_close.set)
        await ending
        assert bench.engine.stored == {"b"}
        assert files(bench) == ["b.tokens", "b.txt"]
        assert await bench.store.deleted() == []

    on_bench(tmp_path, test)
