from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.api.gemini.google_client import connect
from tests.api.live_server import LiveServer
from tests.support.tiny_models import write_model
from tests.support.tiny_tokenizer import write_tokenizer
from tests.support.tool_templates import HERMES_TEMPLATE


@pytest.fixture(scope="session")
def hermes_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model whose chat template knows tools."""
    folder = tmp_path_factory.mktemp("hermes")
    write_model(folder, num_hidden_layers=1, max_position_embeddings=16_384)
    write_tokenizer(folder, chat_template=HERMES_TEMPLATE)
    return folder


@pytest.fixture(scope="package")
def server(hermes_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """One whose streams have a ping before almost every piece."""
    store = tmp_path_factory.mktemp("store")
    settings: dict[str, Any] = {"cache": {"kv_dir": store / "kv"}, "ping_seconds": 0.005}
    with LiveServer(hermes_folder, store, alias=("org/second",), **settings) as running:
        yield running


@pytest.fixture
def gemini(server: LiveServer) -> Any:
    """The client, of a server without the files of other tests."""
    client = connect(server)
    for file in client.files.list():
        client.files.delete(name=file.name)
    return client
