"""What has expired is let go of, whatever befalls that."""

import asyncio
import logging
import time
from collections.abc import Iterator

import pytest

from api.background import expiry
from api.background.expiry import Expiry
from tests.support.waiting import eventually


def test_what_cannot_be_let_go_is_tried_again_and_holds_nothing_else_up(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(expiry, "CHECK_SECONDS", 0.02)
    deadlines = {"stuck": time.time() - 1, "free": time.time() - 1, "later": time.time() + 0.05}
    tried: list[str] = []

    def known() -> Iterator[tuple[float, str]]:
        return ((deadline, name) for name, deadline in deadlines.items())

    async def expire(name: str) -> None:
        tried.append(name)
        if name == "stuck" and tried.count(name) < 5:
            raise OSError("database or disk is full")
        del deadlines[name]

    async def run() -> None:
        expiring = Expiry(known, expire)
        expiring.start()
        await eventually(lambda: not deadlines)
        await expiring.close()

    with caplog.at_level(logging.ERROR):
        asyncio.run(run())
    assert tried[:2] == ["stuck", "free"]
    assert (tried.count("stuck"), tried.count("free"), tried.count("later")) == (5, 1, 1)
    assert "database or disk is full" in caplog.text
