"""Runs one forward pass: the model computes, and the KV cache and attention are ours."""

from collections.abc import Sequence as Items
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from longctx.attention.backend import AttentionBackend
from longctx.attention.merge import merge_sink
from longctx.engine.batch import Batch
from longctx.engine.scheduler import Chunk
from longctx.engine.stats import StepSeconds
from longctx.engine_stats import RingStats
from longctx.kv.memory import KVMemory
from longctx.model.layer_attention import AttentionCall, KernelPlan, KernelStep, NothingLeft, Place
from longctx.model.loader import LoadedModel


class Runner(Protocol):
    """Computes chunks whose pages have been allocated; called by the engine's thread alone."""

    @property
    def computed_tokens(self) -> int:
        """Rows that went through the model since the runner was made."""
        ...

    def run_chunks(self, chunks: Items[Chunk]) -> Tensor:
        """Return logits [`Chunk.logits_rows` of each in turn, vocab], float32; the KV is in the
        pools then."""
        ...

    @property
    def seconds(self) -> StepSeconds | None:
        """Where the time of `run_chunks` went; None where it goes to other processes too."""
        ...

    def ring_stats(self) -> RingStats | None:
        """Return what the ranks have counted; None for a runner that is alone."""
        ...


class ModelRunner:
    """The `Runner` of one rank: builds a batch, and calls the model with attention over the pools.

    Pages of the chunks must have been allocated. A subclass that overrides `run` sees every batch.
    Only the engine's thread calls it.
    """

    def __init__(self, model: LoadedModel, memory: KVMemory, backend: AttentionBackend) -> None:
        self.model = model
        self._memory = memory
        self.backend = backend
        self.computed_tokens = 0  # rows that went through the model, ever
        self.seconds = StepSeconds()
        self._alone: dict[int, AttentionCall] = {}  # calls whose results are merged with nothing

    def run_chunks(self, chunks: Items[Chunk]) -> Tensor:
        """Build the batch of some chunks, whose pages have been allocated, and `run` it."""
        batch = Batch.build(chunks, device=self._memory.device)
        self.seconds.lap("batch")
        return self.run(batch)

    def ring_stats(self) -> None:
        return None

    @torch.inference_mode()
    def run(self, batch: Batch) -> Tensor:
        """Return logits [`logits_rows`, vocab], float32; the batch's KV is in the pools then."""
        step = _StepAttention(batch, self._memory, self.backend, self.seconds, self._alone)
        self._memory.clear_raw(batch.fresh_pages)
        self.seconds.lap("batch")
        logits = self.model.forward(batch.token_ids, batch.positions, step, batch.logits_rows)
        self.computed_tokens += len(batch.token_ids)
        if self._memory.device.type == "cuda":
            # Only launched until now, which is what would be timed. Copies may go on beside it.
            torch.cuda.current_stream(self._memory.device).synchronize()
        self.seconds.lap("layers")
        self.seconds.move("layers", "attention", step.kernel_seconds)
        return logits


class _StepAttention:
    """The `LayerAttention` of one step, which each of the model's layers calls once.

    It writes the new keys and values, seals the blocks that are full, and attends. Where no logits
    are wanted, the pass ends with the keys and values of the last layer: most of an ingestion's
    steps compute no more than those.
    """

    def __init__(
        self,
        batch: Batch,
        memory: KVMemory,
        backend: AttentionBackend,
        seconds: StepSeconds,
        alone: dict[int, AttentionCall],
    ) -> None:
        self._seconds = seconds
        self._alone = alone
        self._batch = batch
        self._memory = memory
        self._backend = backend
        groups = range(len(memory.groups))
        self._plans = [backend.plan(batch.chunks, group) for group in groups]
        self._last_layer = max(memory.group_of)
        # In the last layer only the rows of `logits_rows` need attention; all need K and V.
        group = memory.group_of[self._last_layer]
        decodes = len(batch.logits_rows) == len(batch.token_ids)  # so they are all rows, in order
        self._last_plan = self._plans[group] if decodes else backend.plan(batch.last_chunks, group)
        self._kernel_step: KernelStep | None = None
        if decodes and not batch.sealed_blocks:  # then attention is all that there is to do
            plans = [plan for plan in self._plans if isinstance(plan, KernelPlan)]
            if len(plans) == len(self._plans):
                group_of = memory.group_of.items()
                self._kernel_step = KernelStep({layer: plans[group] for layer, group in group_of})
        self._placed = -1  # the layer whose keys and values are there

    @property
    def kernel_seconds(self) -> float:
        """The seconds of attention that kernels called by themselves."""
        return 0.0 if self._kernel_step is None else self._kernel_step.seconds

    def place(self, layer: int) -> Place:
        self._placed = layer
        return Place(self._memory.raw_rows(layer), self._batch.slots)

    def by_kernels(self) -> KernelStep | None:
        return self._kernel_step

    def attend(self, call: AttentionCall, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, memory, seconds = self._batch, self._memory, self._seconds
        seconds.lap("layers")
        layer = call.layer
        group = memory.group_of[layer]
        if self._placed != layer:
            memory.write(layer, batch.slots, key, value)
            seconds.lap("write")
        if batch.sealed_blocks:
            self._backend.seal(layer, batch.sealed_raw, batch.sealed_packed[group])
            seconds.lap("seal")
        if layer == self._last_layer and not len(batch.logits_rows):
            raise NothingLeft
        plan = self._last_plan if layer == self._last_layer else self._plans[group]
        if call.sinks is None:
            # Made once for a layer, which calls in the same way in every step
            call = self._alone.get(layer) or self._alone.setdefault(
                layer, replace(call, merged=False)
            )
        out, lse = self._backend.attend(call, query, plan)
        if call.sinks is not None:
            out, lse = merge_sink(out, lse, call.sinks)
        if out.dtype != query.dtype:
            out = out.to(query.dtype)
        seconds.lap("attention")
        return out
