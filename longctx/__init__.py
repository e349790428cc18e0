"""longctx: upload a long document once, ask it anything for the price of the question.

    from longctx import LLM

Names below are loaded when they are first used, so that importing the package costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

from longctx.version import __version__

if TYPE_CHECKING:
    from longctx.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
    from longctx.llm import LLM, Answer, AsyncDocument, AsyncLLM, Document
    from longctx.request import SamplingParams

_HOMES = {
    "LLM": "longctx.llm",
    "Answer": "longctx.llm",
    "AsyncLLM": "longctx.llm",
    "AsyncDocument": "longctx.llm",
    "Document": "longctx.llm",
    "SamplingParams": "longctx.request",
    "EngineConfig": "longctx.config",
    "ModelConfig": "longctx.config",
    "CacheConfig": "longctx.config",
    "SchedulerConfig": "longctx.config",
}

__all__ = [
    "LLM",
    "Answer",
    "AsyncDocument",
    "AsyncLLM",
    "CacheConfig",
    "Document",
    "EngineConfig",
    "ModelConfig",
    "SamplingParams",
    "SchedulerConfig",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'longctx' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
