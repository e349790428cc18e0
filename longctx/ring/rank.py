"""One rank: its copy of the model, its pools, and the steps that the leader tells it."""

import time
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compress.shape import BLOCK_TOKENS
from longctx.attention.registry import BACKENDS
from longctx.kv.layout import Layout
from longctx.kv.memory import KVMemory, layer_codecs
from longctx.model.call_recorder import CallRecorder, RecordedCall
from longctx.model.loader import LoadedModel
from longctx.model.spec import ModelSpec
from longctx.ring.attention import RankAttention
from longctx.ring.link import measure
from longctx.ring.step import NONE, RankStep, Rows
from longctx.ring.transport import Transport

LEADER = 0
RATE_ROWS, RATE_BLOCKS = 64, 16  # of the attention that is timed at the start
MOST_TILE_BLOCKS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class RingMemory:
    """What the leader settles for all ranks: their pools are alike, page for page."""

    ranks: int
    codec: str
    backend: str
    pool_bytes: int  # of packed pages, on each rank
    step_blocks: int
    own_blocks: int  # of one step, that a rank computes for others to keep
    tile_blocks: int  # that travel at once

    @classmethod
    def of(
        cls,
        spec: ModelSpec,
        *,
        ranks: int,
        codec: str,
        backend: str,
        pool_bytes: int,
        step_blocks: int,
        batch_blocks: int,
    ) -> "RingMemory":
        """`batch_blocks`: the most that a step computes from their first row to their last."""
        codecs = layer_codecs(spec.layers, dtype=spec.dtype, codec=codec)
        block_bytes = sum(each.page_bytes for each in codecs)
        return cls(
            ranks=ranks,
            codec=codec,
            backend=backend,
            pool_bytes=pool_bytes,
            step_blocks=step_blocks,
            # Of B >= R blocks a rank computes two runs of at most B / 2R, rounded up.
            own_blocks=2 * batch_blocks // ranks,
            tile_blocks=max(1, min(MOST_TILE_BLOCKS, pool_bytes // block_bytes // 32)),
        )

    @property
    def staging_blocks(self) -> int:
        """Pages through which blocks pass: own ones, a tile that is attended, one that comes."""
        return self.own_blocks + 2 * self.tile_blocks

    def memory(self, spec: ModelSpec) -> KVMemory:
        """The pools of a rank that keeps no books."""
        return KVMemory(
            spec.layers,
            dtype=spec.dtype,
            device=spec.device,
            codec=self.codec,
            pool_bytes=self.pool_bytes,
            step_blocks=self.step_blocks,
            staging_blocks=self.staging_blocks,
        )


class Rank:
    def __init__(
        self,
        model: LoadedModel,
        ring: RingMemory,
        transport: Transport,
        memory: KVMemory | None = None,
    ) -> None:
        """All ranks are made at the same time: they measure how fast they reach each other.

        `memory`: the leader's own.
        """
        self.model = model
        self.memory = ring.memory(model.spec) if memory is None else memory
        self.transport = transport
        self._backend = BACKENDS[ring.backend](self.memory)
        self._calls = _layer_calls(model)
        self.pairs_per_second = self._attention_rate()
        self.link = measure(transport, model.spec.device)
        self.waited_seconds = 0.0  # in attention, for other ranks, ever

    @torch.inference_mode()
    def run(self, step: RankStep) -> Tensor | None:
        """Logits [drawing chunks, vocab], float32, at the leader. Raises PeerLost."""
        for source, target in step.copies.tolist():
            for pool in self.memory.raw.pages:
                pool[target] = pool[source]
        if len(step.fresh_pages):
            self.memory.clear_raw(self._tensor(step.fresh_pages))
        attention = RankAttention(step, self.memory, self._backend, self.transport, self._calls)
        logits = torch.empty(0, self.model.spec.vocab_size, device=self.model.spec.device)
        if len(step.token_ids):
            logits = self.model.forward(
                self._tensor(step.token_ids),
                self._tensor(step.positions),
                attention,
                self._tensor(step.logits_rows),
            )
        else:
            for layer in sorted(self.memory.group_of):
                attention.serve(layer)
        self.waited_seconds += attention.waited_seconds
        return self._gather(step, logits)

    @torch.inference_mode()
    def _attention_rate(self) -> float:
        """Rows times keys of one layer that this rank attends in a second, measured."""
        layer = self.memory.groups[0].layers[0]  # one that sees everything, if any does
        recorded = self._calls[layer]
        entries = Layout().table(RATE_BLOCKS)  # all on page 0, which is all zeros
        rows = Rows(0, RATE_ROWS, RATE_BLOCKS * BLOCK_TOKENS, 0, NONE, RATE_BLOCKS, entries)
        plan = self._backend.plan([rows.chunk(0)], 0)
        query = recorded.query.new_zeros(RATE_ROWS, *recorded.query.shape[1:])
        times = []
        for _ in range(3):
            began = time.perf_counter()
            out, _ = self._backend.attend(recorded.call, query, plan)
            out[:1].cpu()  # a GPU is done
            times.append(time.perf_counter() - began)
        return RATE_ROWS * RATE_BLOCKS * BLOCK_TOKENS / min(times)

    def _gather(self, step: RankStep, logits: Tensor) -> Tensor | None:
        """All ranks' logits, at the leader, in the order of the chunks."""
        if self.transport.rank != LEADER:
            sends = [(LEADER, logits.contiguous())] if len(logits) else []
            self.transport.begin(sends, ()).wait()
            return None
        counts = [len(places) for places in step.logits_of]
        gathered = logits.new_empty(sum(counts), logits.shape[1])
        parts = torch.split(gathered, counts)
        parts[LEADER].copy_(logits)
        receives = [(r, part) for r, part in enumerate(parts) if r != LEADER and len(part)]
        self.transport.begin((), receives).wait()
        ordered = torch.empty_like(gathered)
        for places, part in zip(step.logits_of, parts, strict=True):
            ordered[self._tensor(places)] = part
        return ordered

    def _tensor(self, array: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(array).to(self.model.spec.device, non_blocking=True)


def _layer_calls(model: LoadedModel) -> list[RecordedCall]:
    """How each layer calls its attention, seen with one token: a rank without rows needs it too."""
    recorder = CallRecorder()
    one = torch.zeros(1, dtype=torch.int64, device=model.spec.device)
    model.forward(one, one, recorder, one)
    return recorder.calls
