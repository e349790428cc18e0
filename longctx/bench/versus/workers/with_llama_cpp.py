"""llama.cpp by its Python bindings: keys and values in 16 bits, flash attention, greedy."""

import ctypes
import time
from pathlib import Path
from typing import Any

import llama_cpp

STATE = "state.bin"
SEQUENCE = 0  # the bindings use no other


class Contender:
    """One model with one sequence, whose longest common prefix with the next prompt is reused."""

    def __init__(self, model: str, threads: int, context: int) -> None:
        self._llama: Any = llama_cpp.Llama(
            model_path=model,
            n_ctx=context,
            n_threads=threads,
            n_threads_batch=threads,
            flash_attn=True,
            verbose=False,
        )
        self.about = {
            "engine": f"llama.cpp (llama-cpp-python {llama_cpp.__version__})",
            "kv": "f16",
            "keeps": True,
            "saves": True,
        }

    def answer(self, prompt: list[int], new_tokens: int) -> dict[str, Any]:
        """Decode greedily; return the tokens and when each was known, seconds from the call."""
        began = time.perf_counter()
        token_ids: list[int] = []
        seconds: list[float] = []
        for token in self._llama.generate(prompt, temp=0.0, repeat_penalty=1.0):
            seconds.append(time.perf_counter() - began)
            token_ids.append(int(token))
            if len(token_ids) == new_tokens:
                break
        return {"token_ids": token_ids, "seconds": seconds}

    def save(self, folder: str) -> int:
        """Write the sequence's state as llama.cpp's server saves a slot; return its bytes."""
        count = self._llama.n_tokens
        token_ids = (ctypes.c_int32 * count)(*map(int, self._llama.input_ids[:count]))
        path = Path(folder) / STATE
        written = llama_cpp.llama_state_seq_save_file(
            self._llama.ctx, str(path).encode(), SEQUENCE, token_ids, count
        )
        if not written:
            raise OSError(f"llama.cpp did not write {path}")
        return path.stat().st_size

    def restore(self, folder: str) -> float:
        """Read the state back; return the seconds that it took."""
        path = Path(folder) / STATE
        room = self._llama.n_ctx()
        token_ids, count = (ctypes.c_int32 * room)(), ctypes.c_size_t(0)
        began = time.perf_counter()
        read = llama_cpp.llama_state_seq_load_file(
            self._llama.ctx, str(path).encode(), SEQUENCE, token_ids, room, ctypes.byref(count)
        )
        if not read:
            raise OSError(f"llama.cpp did not read {path}")
        self._llama.input_ids[: count.value] = token_ids[: count.value]
        self._llama.n_tokens = count.value
        return time.perf_counter() - began
