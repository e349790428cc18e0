import asyncio
import sqlite3
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from api.files.document_store import DocumentRecord, DocumentStore
from longctx.errors import LongctxError


def document(name: str, tenant: str = "t", purpose: str = "user_data") -> DocumentRecord:
    return DocumentRecord(
        id=name,
        tenant=tenant,
        filename=f"{name}.txt",
        purpose=purpose,
        bytes=3,
        created_at=1,
        sha256="00",
        system="be brief",
        date="2025-01-02",
    )


def with_store(path: Path, work: Callable[[DocumentStore], Coroutine[Any, Any, Any]]) -> Any:
    async def main() -> Any:
        store = DocumentStore(path)
        try:
            await store.open()
            return await work(store)
        finally:
            await store.close()

    return asyncio.run(main())


def test_documents_outlive_the_store_object(tmp_path: Path) -> None:
    counted = replace(document("a"), tokens=7, fingerprint="f")

    async def write(store: DocumentStore) -> None:
        await store.save(document("a"))
        await store.save(document("b"))
        await store.save(counted)
        await store.save(document("c"))
        await store.remove("b")

    with_store(tmp_path / "db", write)
    assert with_store(tmp_path / "db", lambda store: store.all()) == [counted, document("c")]


def test_pages_go_either_way_and_show_only_the_tenants_own(tmp_path: Path) -> None:
    async def work(store: DocumentStore) -> list[str]:
        for name in "abcd":
            await store.save(document(name))
        await store.save(document("x", tenant="other"))
        await store.save(document("e", purpose="assistants"))
        pages = []
        for order, after, limit in (
            ("asc", None, 2),
            ("asc", "b", 9),
            ("desc", None, 2),
            ("desc", "b", 9),
        ):
            page = await store.page("t", purpose=None, order=order, after=after, limit=limit)  # type: ignore[arg-type]
            pages.append("".join(found.id for found in page))
        page = await store.page("t", purpose="assistants", order="asc", after=None, limit=9)
        return [*pages, "".join(found.id for found in page)]

    assert with_store(tmp_path / "db", work) == ["ab", "cde", "ed", "a", "e"]


def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    (tmp_path / "db").write_text("this is no database, it is only text" * 100)
    with pytest.raises(LongctxError, match="move it away"):
        with_store(tmp_path / "db", lambda store: store.all())


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    database = sqlite3.connect(tmp_path / "db")
    database.execute("PRAGMA user_version = 99")
    database.close()
    with pytest.raises(LongctxError, match="newer longctx"):
        with_store(tmp_path / "db", lambda store: store.all())
