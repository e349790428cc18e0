"""vLLM's engine on a CPU, in this process, with prefix caching, the model from its folder."""

import os
import time
from itertools import count
from typing import Any

# Read when vllm is imported. In a process of its own the engine would not know this one's threads.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")  # GiB
CORES = sorted(os.sched_getaffinity(0))


class Contender:
    """One engine that decodes greedily; the compute type is the checkpoint's, as vLLM chooses."""

    def __init__(self, model: str, threads: int, context: int) -> None:
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, CORES[:threads]))
        import vllm  # after the environment says how

        self._sampling: Any = vllm.SamplingParams
        self._engine = vllm.LLM(
            model=model,
            max_model_len=context,
            enable_prefix_caching=True,
            skip_tokenizer_init=True,
            max_num_seqs=1,
        ).llm_engine
        self._names = count()
        self.about = {
            "engine": f"vLLM {vllm.__version__}",
            "kv": "its own",
            "keeps": True,
            "saves": False,
        }

    def answer(self, prompt: list[int], new_tokens: int) -> dict[str, Any]:
        """Decode greedily; return the tokens and when each was known, seconds from the call."""
        sampling = self._sampling(
            max_tokens=new_tokens, temperature=0.0, ignore_eos=True, detokenize=False
        )
        began = time.perf_counter()
        request = {"prompt_token_ids": prompt}
        self._engine.add_request(str(next(self._names)), request, sampling)
        token_ids: list[int] = []
        seconds: list[float] = []
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                token_ids = list(output.outputs[0].token_ids)
                now = time.perf_counter() - began
                seconds += [now] * (len(token_ids) - len(seconds))
        return {"token_ids": token_ids, "seconds": seconds}
