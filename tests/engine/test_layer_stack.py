"""All layers of a step that decodes in one call: bit by bit what they compute one by one."""

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from longctx.config import ModelConfig
from longctx.engine.model_runner import _StepAttention
from longctx.model.loader import load_model
from tests.conftest import ModelFolders
from tests.support.recorded_engine import RecordedEngine, ask, build_engine, some_ids
from tests.support.tiny_models import write_model

_kernels = pytest.importorskip("longctx.kernels._kernels")

from longctx.model.cpu_layers import FusedLayer  # noqa: E402
from longctx.model.few_rows import LayerStack  # noqa: E402

ANSWER_TOKENS = 80  # more than a block, so that steps that seal one are among them


class Counted:
    """Counts the steps that a stack computed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps = 0
        through = LayerStack._through

        def counted(stack: LayerStack, *arguments: Any) -> Tensor:
            self.steps += 1
            return through(stack, *arguments)

        monkeypatch.setattr(LayerStack, "_through", counted)


def answered(engine: RecordedEngine) -> dict[tuple[str, int], dict[int, Tensor]]:
    """Answers of several lengths of prompts, which come and end at different times."""
    requests = [
        ask(f"r{length}", some_ids(length, length), max_tokens=ANSWER_TOKENS + length % 7, n=n)
        for length, n in ((3, 1), (60, 2), (150, 1), (333, 1))
    ]
    engine.finish(*requests)
    return engine.logits


@pytest.mark.parametrize(
    ("architecture", "codec"),
    [
        ("llama", "int8"),
        ("qwen2", "int4"),
        ("qwen3", "bf16"),
        ("mistral", "raw"),
        ("phi3", "int8"),
        ("smollm3", "int8"),
        ("llama", "int4"),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_stack_computes_what_its_layers_do(
    architecture: str,
    codec: str,
    dtype: Literal["float32", "bfloat16"],
    model_folders: ModelFolders,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = model_folders(architecture)
    counted = Counted(monkeypatch)
    found = answered(build_engine(folder, codec=codec, dtype=dtype))
    if dtype == "float32" or _kernels.bfloat16_sets():
        assert counted.steps >= ANSWER_TOKENS - 2  # in a step that seals, each layer computes
    else:  # rows are widened for each product
        assert counted.steps == 0
    with monkeypatch.context() as patched:
        patched.setattr(_StepAttention, "by_kernels", lambda step: None)
        steps = counted.steps
        wanted = answered(build_engine(folder, codec=codec, dtype=dtype))
        assert counted.steps == steps
    assert found.keys() == wanted.keys()
    for name, rows in wanted.items():
        assert rows.keys() == found[name].keys()
        for length, row in rows.items():
            assert torch.equal(found[name][length], row), (name, length)


def test_attention_is_told_apart_from_what_is_around_it(llama: Path) -> None:
    engine = build_engine(llama, dtype="float32")
    engine.finish(ask("a", some_ids(100, 1), max_tokens=50))
    seconds = engine.runner.seconds
    assert seconds is not None
    before = dict(seconds.totals)
    engine.finish(ask("b", some_ids(100, 1), max_tokens=50))
    spent = {part: total - before[part] for part, total in seconds.totals.items()}
    assert spent["attention"] > 0 and spent["layers"] > 0


@pytest.mark.parametrize("architecture", ["gemma3_text", "olmo2", "granite", "gpt2", "mixtral"])
def test_where_more_happens_between_layers_there_is_no_stack(
    architecture: str, tmp_path: Path
) -> None:
    """Those of granite scale what they add, and others have parts that are not recognized."""
    overrides = {"residual_multiplier": 0.7} if architecture == "granite" else {}
    folder = write_model(tmp_path, architecture, **overrides)
    model = load_model(ModelConfig(device="cpu", dtype="float32"), folder)
    assert not [
        each
        for each in model.transformer.modules()
        if isinstance(each, FusedLayer) and each.stack is not None
    ]


def test_an_activation_that_fails_is_the_steps_error(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = build_engine(llama, dtype="float32")
    engine.finish(ask("a", some_ids(30, 1), max_tokens=3))

    def fails(gate: Tensor) -> Tensor:
        raise RuntimeError("no activation")

    layers = [each for each in engine.model.transformer.modules() if isinstance(each, FusedLayer)]
    parts = layers[1].few_rows
    assert parts is not None
    monkeypatch.setattr(parts, "activation", fails)
    (failed,) = engine.finish(ask("b", some_ids(30, 1), max_tokens=3))
    assert "no activation" in failed.errors[0]
    monkeypatch.undo()
    (whole,) = engine.finish(ask("c", some_ids(30, 1), max_tokens=3))
    assert whole.answer == engine.answered["a"].answer
