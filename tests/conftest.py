"""One thread, Triton interpreted, and model folders that several test files share.

With TRITON_INTERPRET=0 kernels are compiled, for a GPU: `make gpu-test`.
"""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch

with pytest.MonkeyPatch.context() as _patch, suppress(ImportError):
    _patch.setenv(
        "TRITON_INTERPRET", os.environ.get("TRITON_INTERPRET", "1")
    )  # which counts when it is first imported
    import triton  # noqa: F401

from tests.support.tiny_models import write_model
from tests.support.tiny_tokenizer import write_tokenizer

ModelFolders = Callable[[str], Path]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tiny tensors: on a busy machine a second thread is mostly waited for."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory: pytest.TempPathFactory) -> ModelFolders:
    """Architecture -> a tiny random model of it, with a tokenizer."""
    folders: dict[str, Path] = {}

    def folder_of(architecture: str) -> Path:
        if architecture not in folders:
            folders[architecture] = write_model(tmp_path_factory.mktemp(architecture), architecture)
            write_tokenizer(folders[architecture])
        return folders[architecture]

    return folder_of


@pytest.fixture(scope="session")
def llama(model_folders: ModelFolders) -> Path:
    return model_folders("llama")


@pytest.fixture(scope="session")
def gemma3(model_folders: ModelFolders) -> Path:
    """Global layers beside sliding windows of 24 tokens."""
    return model_folders("gemma3_text")
