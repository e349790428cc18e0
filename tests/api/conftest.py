from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.api.live_server import LiveServer
from tests.support.tiny_models import write_model
from tests.support.tiny_tokenizer import write_tokenizer


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with 32k positions, so that there is something to wait for."""
    folder = tmp_path_factory.mktemp("model")
    write_model(folder, num_hidden_layers=2, max_position_embeddings=32_768)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="package")
def server(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with LiveServer(model_folder, tmp_path_factory.mktemp("store")) as running:
        yield running


@pytest.fixture
def client(server: LiveServer) -> Iterator[openai.OpenAI]:
    with server.openai() as connected:
        yield connected
