"""What following a grammar costs a small chat model's decode, with its vocabulary of 49,152 tokens.

`pytest -m slow -s tests/engine/test_grammar_cost.py` prints the figures.
"""

import json
from dataclasses import replace
from statistics import median

import pytest

from longctx.bench.timing import Stopwatch
from longctx.model.named import PACKAGED, packaged_path
from longctx.request import SamplingParams, Segment
from longctx.text.grammar import json_grammar
from tests.support.recorded_engine import build_engine

FOUND = packaged_path(PACKAGED["smollm2"])
ROUNDS = 15
TOKENS = 64
SCHEMAS = {
    "any object": {"type": "object"},
    "records": {
        "type": "array",
        "minItems": 100,
        "items": {
            "type": "object",
            "properties": {
                "name": {"type": "string"},
                "kind": {"enum": ["brig", "sloop", "barque"]},
                "masts": {"type": "integer", "minimum": 1, "maximum": 5},
                "home": {"anyOf": [{"type": "string"}, {"type": "null"}]},
            },
            "required": ["name", "kind", "masts", "home"],
            "additionalProperties": False,
        },
    },
}


@pytest.mark.slow
@pytest.mark.smollm2
@pytest.mark.skipif(FOUND is None, reason=f"SmolLM2 is absent: {PACKAGED['smollm2'].install}")
def test_a_grammar_costs_little_of_decode() -> None:
    assert FOUND is not None
    engine = build_engine(FOUND, pool_gib=0.2)
    stopwatch = Stopwatch(engine)
    prompt = (Segment(token_ids=tuple(engine.tokenizer.encode("The ships, as JSON:\n"))),)
    free = SamplingParams(max_tokens=TOKENS, temperature=1.0, seed=1, ignore_eos=True)
    wanted = {"free": free} | {
        name: replace(free, grammar=json_grammar(schema, strict=True, param="schema"))
        for name, schema in SCHEMAS.items()
    }
    for sampling in wanted.values():  # what is made once: the grammar, the vocabulary's table
        stopwatch.ask(prompt, sampling)
    seconds: dict[str, list[float]] = {name: [] for name in wanted}
    for _ in range(ROUNDS):
        for name, sampling in wanted.items():
            answer = stopwatch.ask(prompt, sampling)
            if name == "free" or len(answer.token_ids) > TOKENS // 2:
                gaps = zip(answer.token_seconds, answer.token_seconds[1:], strict=False)
                seconds[name].append(median(after - before for before, after in gaps))
    engine.close()
    ratios = {
        name: median(a / b for a, b in zip(taken, seconds["free"], strict=False))
        for name, taken in seconds.items()
        if taken
    }
    told = {name: f"{1000 * median(taken):.2f} ms" for name, taken in seconds.items() if taken}
    print(json.dumps({"token": told, "ratio": ratios}, indent=1))
    assert ratios["records"] < 1.15, ratios
