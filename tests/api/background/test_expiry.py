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
    monkeypatch.setattr(expiry, "LOOK_SECONDS", 0.02)
    moments = {"stuck": time.time() - 1, "free": time.time() - 1, "later": time.time() + 0.05}
    tried: list[str] = []

    def known() -> Iterator[tuple[float, str]]:
        return ((moment, name) for name, moment in moments.items())

    async def let_go(name: str) -> None:
        tried.append(name)
        if name == "stuck" and tried.count(name) < 5:
            raise OSError("database or disk is full")
        del moments[name]

    async def run() -> None:
        expiring = Expiry(known, let_go)
        expiring.start()
        await eventually(lambda: not moments)
        await expiring.close()

    with caplog.at_level(logging.ERROR):
        asyncio.run(run())
    assert tried[:2] == ["stuck", "free"]
    assert (tried.count("stuck"), tried.count("free"), tried.count("later")) == (5, 1, 1)
    assert "database or disk is full" in caplog.text
