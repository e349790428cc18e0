"""OpenVINO GenAI on its paged cache with prefix caching, the model read from its GGUF file."""

import time
from typing import Any

import numpy
import openvino
import openvino_genai


class Contender:
    """One pipeline; the types of its cache and of its arithmetic are those that it chooses."""

    def __init__(self, model: str, threads: int, context: int) -> None:
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.enable_prefix_caching = True
        self._pipeline = openvino_genai.LLMPipeline(
            model, "CPU", scheduler_config=scheduler, INFERENCE_NUM_THREADS=threads
        )
        self.about = {
            "engine": f"openvino-genai {openvino_genai.__version__}",
            "kv": "its own",
            "keeps": True,
            "saves": False,
        }

    def answer(self, prompt: list[int], new_tokens: int) -> dict[str, Any]:
        """Decode greedily; return the tokens and when each was known, seconds from the call."""
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = new_tokens
        config.do_sample = False
        config.ignore_eos = True
        token_ids = openvino.Tensor(numpy.array([prompt], dtype=numpy.int64))
        mask = openvino.Tensor(numpy.ones((1, len(prompt)), dtype=numpy.int64))
        clock = _Clock()
        began = time.perf_counter()
        given = self._pipeline.generate(
            openvino_genai.TokenizedInputs(token_ids, mask), config, clock
        )
        return {
            "token_ids": [int(token) for token in given.tokens[0]],
            "seconds": [at - began for at in clock.at],
        }


class _Clock(openvino_genai.StreamerBase):  # type: ignore[misc]
    """A streamer that notes the time of each token."""

    def __init__(self) -> None:
        super().__init__()
        self.at: list[float] = []

    def write(self, tokens: Any) -> Any:
        now = time.perf_counter()
        self.at += [now] * (len(tokens) if isinstance(tokens, list) else 1)
        return openvino_genai.StreamingStatus.RUNNING

    def end(self) -> None:
        """Does nothing: there is nothing to flush."""
