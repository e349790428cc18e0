"""An engine that finds random KV for any prompt and can tell where the time of its steps went."""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compress.shape import BLOCK_TOKENS
from longctx.attention.backend import AttentionBackend, AttentionPlan, ChunkRows
from longctx.bench.machine_rates import seconds_of, settle
from longctx.bench.random_pages import fill_pages
from longctx.config import EngineConfig
from longctx.engine.cost_model import CostModel
from longctx.engine.engine import Engine
from longctx.engine.input_processor import block_namespace
from longctx.engine.model_runner import ModelRunner
from longctx.engine.sampler import SamplingState, sample
from longctx.engine.scheduler import Scheduler
from longctx.kv.pool_indices import PoolIndices
from longctx.model.layer_attention import AttentionCall
from longctx.model.loader import LoadedModel
from longctx.open_engine import engine_parts
from longctx.request import Request, RequestOutput, SamplingParams
from offload.key import chain_keys

SAMPLE_TIMES = 9


@dataclass(frozen=True, slots=True, kw_only=True)
class Shares:
    """Shares of the time of some steps, together 1; `rest` is Python and the small operations."""

    attention: float
    linears: float
    sampling: float

    @property
    def rest(self) -> float:
        return max(0.0, 1.0 - self.attention - self.linears - self.sampling)

    def flat(self) -> dict[str, str | int | float | bool | None]:
        return {
            "attention_share": round(self.attention, 4),
            "linears_share": round(self.linears, 4),
            "sampling_share": round(self.sampling, 4),
            "rest_share": round(self.rest, 4),
        }

    def __str__(self) -> str:
        parts = (self.attention, self.linears, self.sampling, self.rest)
        return " ".join(f"{100 * part:.0f}" for part in parts)


@dataclass(slots=True)
class Profile:
    """The seconds of the steps so far, and where they went.

    On a GPU each part is waited for, so that it counts with its work and not with its launch: a
    profiled step is slower than others there.
    """

    device: torch.device
    decode_only: bool
    sampling_seconds: float  # of a step that samples one token
    steps: int = 0
    seconds: float = 0.0
    attention_seconds: float = 0.0
    linear_seconds: float = 0.0

    def now(self) -> float:
        """Return the time when all is done that the device was asked for."""
        settle(self.device)
        return time.perf_counter()

    def shares(self) -> Shares:
        assert self.steps, "nothing was computed"
        return Shares(
            attention=self.attention_seconds / self.seconds,
            linears=self.linear_seconds / self.seconds,
            sampling=self.steps * self.sampling_seconds / self.seconds,
        )


class MeasuredEngine:
    """An engine for one sequence at a time, used from one thread and by nobody else.

    `plant` a context, `submit` a request that begins with it, and `step` until nothing is left;
    `profile` tells where the time of the steps within it went.
    """

    def __init__(
        self, config: EngineConfig, model_folder: Path, *, scheduler: type[Scheduler] = Scheduler
    ) -> None:
        parts = engine_parts(config, model_folder)
        if scheduler is not Scheduler:
            device_type = parts.model.spec.device.type
            other = scheduler(
                config.scheduler,
                parts.cache,
                batch_tokens=parts.scheduler.batch_tokens,
                target_seconds=config.scheduler.target_seconds(device_type),
                cost=CostModel(),
            )
            parts = replace(parts, scheduler=other)
        assert isinstance(parts.runner, ModelRunner), "on one rank"
        self._parts, self._runner = parts, parts.runner
        self._engine = Engine(parts)
        self.info = parts.info
        self.batch_tokens = parts.scheduler.batch_tokens
        self._profile: Profile | None = None

    @property
    def has_work(self) -> bool:
        return self._engine.has_work

    def submit(self, request: Request) -> None:
        self._engine.submit(request)

    def abort(self, request_id: str) -> None:
        self._engine.abort(request_id)

    @property
    def scheduler(self) -> Scheduler:
        """Return the engine's scheduler: what it was asked and has learned."""
        return self._parts.scheduler

    @property
    def prediction_error(self) -> float | None:
        """The median relative error of the last predictions of how long a step takes."""
        return self._parts.scheduler.cost.median_error

    def plant(self, token_ids: Sequence[int]) -> None:
        """Fills blocks with random KV that a prompt which begins with these tokens finds.

        Raises ContextTooLong where the pool cannot hold them.
        """
        memory = self._parts.memory
        namespace = block_namespace(self._parts.model.spec, memory.codecs[0], salt="")
        ids = np.array(token_ids, dtype=np.int32)
        ids = ids[: len(ids) // BLOCK_TOKENS * BLOCK_TOKENS]
        keys = chain_keys(namespace, ids, first_position=0, block_tokens=BLOCK_TOKENS)
        pages = [pool.allocate(len(keys)) for pool in memory.packed]
        fill_pages(memory, pages)
        for pool, numbers in zip(memory.packed, pages, strict=True):
            for page, key in zip(numbers, keys, strict=True):
                pool.publish(page, key)
            pool.release(numbers)

    def step(self) -> list[RequestOutput]:
        profile = self._profile
        if profile is None or (profile.decode_only and not self._decodes):
            return self._engine.step()
        began = profile.now()
        runner = self._runner
        backend = runner.backend
        runner.backend = _TimedAttention(backend, profile)
        try:
            with ExitStack() as stack:
                for kind, name in _products(runner.model):
                    stack.enter_context(_timed_calls(kind, name, profile))
                outputs = self._engine.step()
        finally:
            runner.backend = backend
        profile.seconds += profile.now() - began
        profile.steps += 1
        return outputs

    @property
    def _decodes(self) -> bool:
        return any(sequence.decoding for sequence in self._parts.scheduler.running)

    @contextmanager
    def profile(self, *, decode_only: bool = False) -> Iterator[Profile]:
        """Yields a profile of the steps within; of `decode_only`, those that compute one token."""
        device = self._parts.model.spec.device
        self._profile = Profile(device, decode_only, self._sampling_seconds())
        try:
            yield self._profile
        finally:
            self._profile = None

    def _sampling_seconds(self) -> float:
        """Times one greedy choice by itself."""
        spec = self._parts.model.spec
        logits = torch.randn(1, spec.vocab_size, device=spec.device)
        state = SamplingState(
            SamplingParams(temperature=0.0),
            seed=0,
            prompt_token_ids=lambda: np.empty(0, dtype=np.int32),
        )
        work = partial(sample, logits, [state])
        return median(seconds_of(work, spec.device) for _ in range(SAMPLE_TIMES))


class _TimedAttention:
    """A backend that counts the seconds of its work on keys and values."""

    def __init__(self, backend: AttentionBackend, profile: Profile) -> None:
        self._backend = backend
        self._profile = profile

    def plan(self, chunks: Sequence[ChunkRows], group: int) -> AttentionPlan:
        return self._backend.plan(chunks, group)

    def seal(self, layer: int, raw: PoolIndices, packed: PoolIndices) -> None:
        began = self._profile.now()
        self._backend.seal(layer, raw, packed)
        self._profile.attention_seconds += self._profile.now() - began

    def attend(
        self, call: AttentionCall, query: Tensor, plan: AttentionPlan
    ) -> tuple[Tensor, Tensor]:
        began = self._profile.now()
        result = self._backend.attend(call, query, plan)
        self._profile.attention_seconds += self._profile.now() - began
        return result


def _products(model: LoadedModel) -> Iterator[tuple[Any, str]]:
    """Yield the classes and methods that compute linear layers: our kernels, or torch's modules."""
    kernels = sys.modules.get("longctx.kernels._kernels")
    if kernels is not None:
        yield kernels.PackedLinear, "forward"
        yield kernels.LinearGroup, "forward"
    yield from ((each, "__call__") for each in model.linear_types if issubclass(each, nn.Linear))


@contextmanager
def _timed_calls(kind: Any, name: str, profile: Profile) -> Iterator[None]:
    """Counts the seconds of all calls of a method of this class, in this process."""
    call, inherited = getattr(kind, name), name not in vars(kind)

    def timed(*inputs: Any, **options: Any) -> Any:
        began = profile.now()
        result = call(*inputs, **options)
        profile.linear_seconds += profile.now() - began
        return result

    setattr(kind, name, timed)
    try:
        yield
    finally:
        if inherited:
            delattr(kind, name)
        else:
            setattr(kind, name, call)
