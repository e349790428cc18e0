"""An engine on a GPU answers as one on a CPU; needs what the engine imports, msgspec among it."""

import pytest
import torch

pytest.importorskip("msgspec", reason="pip install msgspec zstandard, to test the engine")
from longctx.config import CacheConfig, EngineConfig, ModelConfig
from longctx.llm import LLM

TEXT = "The lighthouse is white. The number of the boat is 4711. " + "It rains. " * 12


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("codec", ["raw", "int8", "int4"])
def test_a_question_is_answered_as_on_a_cpu(codec: str) -> None:
    answers = []
    for device in ("cpu", "cuda"):
        cache = CacheConfig(kv_codec=codec, force_codec=True, device_pool_gib=0.05)
        config = EngineConfig(model=ModelConfig(device=device), cache=cache)
        with LLM(config=config) as llm:
            answers.append(llm.document_from_text(TEXT).ask("What is the number of the boat?").text)
    assert answers[0] == answers[1]
