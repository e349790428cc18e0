"""All layers of a step that decodes in one call: bit by bit what they compute one by one."""

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from longctx.config import ModelConfig
from longctx.engine.model_runner import _StepAttention
from longctx.model.loader import load_model
from tests.conftest import ModelFolders
from tests.support.recorded_engine import RecordedEngine, ask, build_engine, some_ids
from tests.support.tiny_models import write_model

_kernels = pytest.importorskip("longctx.kernels._kernels")

from longctx.model.cpu_layers import FusedLayer  # noqa: E402
from longctx.model.few_rows import LayerStack, stack_layers  # noqa: E402

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


def test_attention_is_told_apart_from_what_is_around_it(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in steps that do nothing else: kernels say how long their attention took."""
    engine = build_engine(llama, dtype="float32")
    counted = Counted(monkeypatch)
    engine.submit(ask("a", some_ids(70, 1), max_tokens=50))
    while not counted.steps:
        engine.take_step()
    seconds = engine.runner.seconds
    assert seconds is not None
    before = dict(seconds.totals)
    for _ in range(20):  # block 1 is not full before token 128
        engine.take_step()
    assert counted.steps == 21
    spent = {part: total - before[part] for part, total in seconds.totals.items()}
    assert spent["attention"] > 0 and spent["layers"] > 0


class Between(nn.Module):
    """A layer of which something is done to what it is given."""

    def __init__(self, layer: nn.Module, *, angles: bool) -> None:
        super().__init__()
        self.layer = layer
        self._angles = angles

    def forward(
        self, rows: Tensor, *, position_embeddings: tuple[Tensor, Tensor], **others: Any
    ) -> Any:
        if self._angles:
            position_embeddings = (position_embeddings[0], position_embeddings[1].clone())
        else:
            rows = rows.clone()
        return self.layer(rows, position_embeddings=position_embeddings, **others)


@pytest.mark.parametrize("angles", [False, True], ids=["rows", "angles"])
def test_where_something_happens_between_layers_there_is_no_stack(
    angles: bool, tmp_path: Path
) -> None:
    model = load_model(ModelConfig(device="cpu", dtype="float32"), write_model(tmp_path))
    transformer: Any = model.transformer
    layers = [each for each in transformer.modules() if isinstance(each, FusedLayer)]
    vocab_size = model.spec.vocab_size
    assert stack_layers(transformer, layers, vocab_size=vocab_size) is not None
    transformer.model.layers[1] = Between(layers[1], angles=angles)
    with torch.inference_mode():
        assert stack_layers(transformer, layers, vocab_size=vocab_size) is None


def test_rows_that_were_changed_between_layers_are_no_answer(llama: Path) -> None:
    engine = build_engine(llama, dtype="float32")
    transformer: Any = engine.model.transformer
    transformer.model.layers[1] = Between(transformer.model.layers[1], angles=False)
    (failed,) = engine.finish(ask("a", some_ids(30, 1), max_tokens=3))
    assert "something happened between the layers" in failed.errors[0]


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
