"""How many kernels a step launches on a GPU, counted on a CPU with Triton's kernels interpreted.

A launch is an operation of torch that computes or copies, or a kernel of ours. What transformers
launches for a layer is counted beside what the cache and its attention do.
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

pytest.importorskip("triton", reason="pip install triton, to test the kernels for GPUs")
with pytest.MonkeyPatch.context() as patch:  # Triton's decorators read it, when they are used
    patch.setenv("TRITON_INTERPRET", "1")
    from longctx.attention import cuda_backend
    from longctx.attention.cuda_backend import CUDAAttention

# numpy, which interprets, warns of NaN and infinity where a GPU does not
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")

LAYERS = 3  # of the tiny model
# Of one layer and step: two writes of new rows, sealing, attention, the merging of its parts, and
# the rounding of what comes out. A last layer that skips rows fills those with zeros first.
MOST_OF_DECODE, MOST_OF_PREFILL = 6, 8

# What only makes a view, or memory that is written later
VIEWS = {
    *("view", "_unsafe_view", "reshape", "transpose", "permute", "expand", "select", "slice", "t"),
    *("unsqueeze", "squeeze", "split", "split_with_sizes", "unbind", "alias", "detach", "chunk"),
    *("as_strided", "unflatten", "_reshape_alias", "empty", "new_empty", "empty_like", "narrow"),
    *("empty_strided", "lift_fresh", "_local_scalar_dense", "numpy_T", "resolve_conj"),
}


@dataclass
class Launches:
    ours: Counter[str] = field(default_factory=Counter)
    others: Counter[str] = field(default_factory=Counter)  # transformers', sampling and uploads

    def per_layer(self) -> float:
        return self.ours.total() / LAYERS


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
    monkeypatch.setattr(loader, "_kernels_for", lambda *_: None)  # those of CPUs take many in one
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
