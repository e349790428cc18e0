"""A model small enough to measure in a second; it puts documents first, as the embedded one."""

from pathlib import Path

import pytest

from tests.support.tiny_models import write_model
from tests.support.tiny_tokenizer import DOCUMENTS_FIRST_TEMPLATE, write_tokenizer


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench") / "tiny"
    write_model(folder, num_hidden_layers=1, max_position_embeddings=40_960)
    write_tokenizer(folder, chat_template=DOCUMENTS_FIRST_TEMPLATE)
    return folder
