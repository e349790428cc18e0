"""longctx itself, as a library, with the options of the command that measures it.

Run by `workers/worker.py`, as the adapters of other engines are.
"""

from pathlib import Path
from typing import Any

import longctx
from longctx.bench.options import read_configs
from longctx.bench.timing import Stopwatch
from longctx.config import EngineConfig
from longctx.llm import LLM
from longctx.request import SamplingParams, Segment


class Contender:
    """One engine; `options` is a file of its options."""

    def __init__(self, options: str) -> None:
        (config,) = read_configs("versus", (EngineConfig,), ["--config", options])
        self._kv_dir: Path | None = config.cache.kv_dir
        self._llm = LLM(config=config)
        self._stopwatch = Stopwatch(self._llm.engine)
        info = self._llm.engine.info
        self.about = {
            "engine": f"longctx {longctx.__version__}",
            "kv": info.kv_codec,
            "dtype": info.dtype,
            "backend": info.backend,
            "model": info.model_name,
            "vocab_size": info.vocab_size,
            "longest": info.limits.longest_tokens,
            "keeps": True,
            "saves": True,
        }

    def answer(self, prompt: list[int], new_tokens: int) -> dict[str, Any]:
        """Decode greedily; return the tokens and when each was known, seconds from the call."""
        sampling = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
        answer = self._stopwatch.ask((Segment(token_ids=tuple(prompt)),), sampling)
        return {"token_ids": list(answer.token_ids), "seconds": list(answer.token_seconds)}

    def save(self, folder: str) -> int:
        """End the engine, which has stored what it computed; return the bytes in its own folder."""
        self._llm.close()
        assert self._kv_dir is not None
        return sum(file.stat().st_size for file in self._kv_dir.rglob("*.kv"))

    def restore(self, folder: str) -> float:
        """Return 0: what is stored is found by the next prompt, whose time has it."""
        return 0.0
