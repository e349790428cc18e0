"""How many kernels a step launches on a GPU, counted on a CPU with Triton's kernels interpreted.

A launch is an operation of torch that computes or copies, or a kernel of ours. What a model's
layers launch is counted beside what the cache and its attention do, and beside what a step takes
whatever the layers: embedding, angles, logits, sampling, uploads.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from longctx.attention.registry import BACKENDS
from longctx.bench.measured_engine import MeasuredEngine
from longctx.config import CacheConfig, EngineConfig, ModelConfig
from longctx.engine.model_runner import _StepAttention
from longctx.model import loader
from longctx.request import Request, SamplingParams, Segment
from tests.support.tiny_models import write_model
from tests.support.tiny_tokenizer import write_tokenizer

pytest.importorskip("triton", reason="pip install triton, to test the kernels for GPUs")
with pytest.MonkeyPatch.context() as patch:  # Triton's decorators read it, when they are used
    patch.setenv("TRITON_INTERPRET", "1")
    from longctx.attention import cuda_backend
    from longctx.attention.cuda_backend import CUDAAttention
    from longctx.kernels import triton_layers
    from longctx.model.gpu_layers import fuse_gpu_layers

# numpy, which interprets, warns of NaN and infinity where a GPU does not
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")

LAYERS = 3  # of the tiny model
# Of one layer and step: sealing, attention, and the merging of its parts; with a long chunk, also
# the decoding of pages, and zeros in the rows that a last layer skips.
MOST_OF_DECODE, MOST_OF_PREFILL = 4, 6
# Of a whole step of a model of 32 layers, and of one of its layers and a chunk
MOST_OF_STEP, MOST_OF_CHUNK = 400, 40

# What only makes a view, or memory that is written later
VIEWS = {
    *("view", "_unsafe_view", "reshape", "transpose", "permute", "expand", "select", "slice", "t"),
    *("unsqueeze", "squeeze", "split", "split_with_sizes", "unbind", "alias", "detach", "chunk"),
    *("as_strided", "unflatten", "_reshape_alias", "empty", "new_empty", "empty_like", "narrow"),
    *("empty_strided", "lift_fresh", "_local_scalar_dense", "numpy_T", "resolve_conj"),
    "resolve_neg",
}


@dataclass
class Launches:
    ours: Counter[str] = field(default_factory=Counter)
    others: Counter[str] = field(default_factory=Counter)  # transformers', sampling and uploads

    def per_layer(self) -> float:
        return self.ours.total() / LAYERS

    def total(self) -> int:
        return self.ours.total() + self.others.total()


class Counting(TorchDispatchMode):
    """Counts while it is entered; `inside` says that a layer's attention is at work."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Launches()
        self.inside = self.paused = False

    def count(self, name: str) -> None:
        (self.counts.ours if self.inside else self.counts.others)[name] += 1

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func._schema.name.split("::")[1]
        if name not in VIEWS and not self.paused:
            self.count(name)
        return func(*args, **(kwargs or {}))


class CountedKernel:
    def __init__(self, kernel: Any, name: str, counting: Counting) -> None:
        self._kernel, self._name, self._counting = kernel, name, counting

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            self._counting.count(self._name)
            self._counting.paused = True  # the interpreter has operations of its own
            try:
                self._kernel[grid](*args, **kwargs)
            finally:
                self._counting.paused = False

        return launch


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counting]:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setitem(BACKENDS, "cuda", CUDAAttention)
    made = Counting()
    for name in ("attend_tiles", "combine", "unpack"):
        kernel = getattr(cuda_backend.kernels, name)
        monkeypatch.setattr(cuda_backend.kernels, name, CountedKernel(kernel, name, made))
    sealing = CountedKernel(cuda_backend.seal_blocks, "seal_blocks", made)
    monkeypatch.setattr(cuda_backend, "seal_blocks", sealing)
    for name in ("rms_norm", "turn_heads", "gate_rows"):
        kernel = getattr(triton_layers, name)
        monkeypatch.setattr(triton_layers, name, CountedKernel(kernel, name, made))
    monkeypatch.setattr(loader, "_kernels_for", lambda *_: None)  # as on a GPU
    attend = _StepAttention.attend

    def counted(step: _StepAttention, *args: Any) -> Any:
        made.inside = True
        try:
            return attend(step, *args)
        finally:
            made.inside = False

    monkeypatch.setattr(_StepAttention, "attend", counted)
    yield made


def steps(counting: Counting, folder: Path, codec: str, context: int, new: int) -> list[Launches]:
    """Compute a prompt of so many tokens, of which all but `new` are planted, and three more."""
    config = EngineConfig(
        model=ModelConfig(model=folder, device="cpu", attention_backend="cuda", threads=1),
        cache=CacheConfig(kv_codec=codec, force_codec=True, device_pool_gib=0.05),
    )
    engine = MeasuredEngine(config, folder)
    tokens = tuple(3 + number % 500 for number in range(context))
    engine.plant(tokens[:-new])
    engine.submit(
        Request(
            request_id="r",
            segments=(Segment(token_ids=tokens),),
            sampling=SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True),
        )
    )
    counted = []
    while engine.has_work:
        counting.counts = Launches()
        with counting, torch.no_grad():
            engine.step()
        if counting.counts.ours:
            counted.append(counting.counts)
    return counted


@pytest.mark.parametrize("codec", ["raw", "int8", "int4"])
def test_a_step_launches_no_more_for_a_longer_context(
    counting: Counting, llama: Path, codec: str
) -> None:
    short = steps(counting, llama, codec, context=150, new=20)
    long = steps(counting, llama, codec, context=470, new=20)
    assert len(short) == len(long) == 4
    decoding = [step.others for step in (*short[1:], *long[1:])]
    assert decoding == decoding[:1] * 6
    assert all(step.per_layer() <= MOST_OF_PREFILL for step in (short[0], long[0]))
    assert all(step.per_layer() <= MOST_OF_DECODE for step in (*short[1:], *long[1:]))


def test_every_codec_launches_the_same_to_decode(counting: Counting, llama: Path) -> None:
    each = [steps(counting, llama, codec, context=200, new=5)[-1] for codec in ("raw", "int4")]
    assert each[0] == each[1]


def test_a_step_of_32_layers_takes_few_launches(
    counting: Counting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each layer adds as many: what 32 of them launch, follows from models of one and of two.

    Of the steps that decode, the second fills a block and seals it, the third begins another.
    """
    monkeypatch.setattr(loader, "_layer_fusing", lambda *_: fuse_gpu_layers)
    counted = []
    for layers in (1, 2):
        folder = write_model(tmp_path / str(layers), "llama", num_hidden_layers=layers)
        write_tokenizer(folder)
        counted.append(steps(counting, folder, "int4", context=446, new=10))
    one, two = ([step.total() for step in each] for each in counted)
    assert len(one) == len(two) == 4
    layer = [more - less for less, more in zip(one, two, strict=True)]
    whole = [less + 31 * more for less, more in zip(one, layer, strict=True)]
    assert layer[0] <= MOST_OF_CHUNK, counted
    assert max(whole[1:]) <= MOST_OF_STEP, (layer, whole)
    assert "seal_blocks" in counted[0][2].ours
