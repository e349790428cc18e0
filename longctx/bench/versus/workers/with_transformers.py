"""transformers' own `generate`: SDPA attention, DynamicCache, greedy."""

import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.generation.streamers import BaseStreamer


class Contender:
    """One model from a folder, or from a GGUF file, which is then widened to `dtype`."""

    def __init__(
        self,
        model: str,
        threads: int,
        context: int,
        dtype: str = "float32",
        device: str = "cpu",
    ) -> None:
        torch.set_num_threads(threads)
        path = Path(model)
        where: dict[str, Any] = {"pretrained_model_name_or_path": path}
        if path.is_file():
            where = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
        loader: Any = transformers.AutoModelForCausalLM
        loaded = loader.from_pretrained(**where, dtype=getattr(torch, dtype), local_files_only=True)
        self._model = loaded.to(device).eval()
        self._model.generation_config.eos_token_id = None  # always all the tokens
        self.about = {
            "engine": f"transformers {transformers.__version__} (torch {torch.__version__})",
            "kv": dtype,
            "keeps": False,
            "saves": False,
        }

    def answer(self, prompt: list[int], new_tokens: int) -> dict[str, Any]:
        """Decode greedily; return the tokens and when each was known, seconds from the call."""
        token_ids = torch.tensor([prompt], device=self._model.device)
        clock = _Clock()
        began = time.perf_counter()
        output = self._model.generate(
            input_ids=token_ids,
            attention_mask=torch.ones_like(token_ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            use_cache=True,
            pad_token_id=0,
            streamer=clock,
        )
        return {
            "token_ids": output[0, len(prompt) :].tolist(),
            # generate hands over the prompt first
            "seconds": [at - began for at in clock.at[1:]],
        }


class _Clock(BaseStreamer):
    """A streamer that notes the time of each `put`: `generate` calls it once a token is known."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.at.append(time.perf_counter())

    def end(self) -> None:
        """Does nothing: there is nothing to flush."""
