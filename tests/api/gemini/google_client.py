"""Google's own client of Gemini's API, against a server of ours."""

from typing import Any

import pytest

from tests.api.live_server import LiveServer
from tests.support.waiting import patient


def connect(server: LiveServer, key: str = "none", **options: Any) -> Any:
    """The client as users make it; tests that want it are skipped where it is not installed."""
    genai = pytest.importorskip("google.genai", reason="google-genai is not installed")
    options = {"base_url": server.url, "timeout": int(1000 * patient()), **options}
    return genai.Client(api_key=key, http_options=options)
