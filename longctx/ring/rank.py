"""One rank: its copy of the model, its pools, and how it runs the steps that the leader plans."""

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.shape import BLOCK_TOKENS
from longctx.attention.registry import BACKENDS
from longctx.kv.layout import Layout
from longctx.kv.memory import KVMemory, layer_codecs
from longctx.kv.pool_indices import to_device
from longctx.model.call_recorder import CallRecorder, RecordedCall
from longctx.model.loader import LoadedModel
from longctx.model.spec import ModelSpec
from longctx.ring.attention import RankAttention
from longctx.ring.link import measure_link
from longctx.ring.step import NO_INDICES, GroupRows, RankStep
from longctx.ring.transport import Transport

LEADER = 0
RATE_ROWS, RATE_BLOCKS = 64, 16  # of the attention that is timed at the start
MAX_TILE_BLOCKS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class RingMemorySpec:
    """What the leader chooses for all ranks: their pools are alike, page for page."""

    ranks: int
    codec: str
    backend: str
    pool_bytes: int  # of packed pages, on each rank
    step_blocks: int
    foreign_blocks: int  # the most that a rank computes in a step and another rank owns
    tile_blocks: int  # the most that are sent to one rank at once

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
    ) -> "RingMemorySpec":
        """`batch_blocks`: the most blocks that one step computes whole.

        With 3 ranks and steps of at most 20 blocks `foreign_blocks` is 13: a rank computes two
        zigzag runs, of 3 or 4 blocks each if there are 20, and other ranks may own them all.
        """
        codecs = layer_codecs(spec.layers, dtype=spec.dtype, codec=codec)
        block_bytes = sum(each.page_bytes for each in codecs)
        return cls(
            ranks=ranks,
            codec=codec,
            backend=backend,
            pool_bytes=pool_bytes,
            step_blocks=step_blocks,
            # Of B >= R blocks a rank computes two runs of at most B / 2R, rounded up: together at
            # most 2B / R.
            foreign_blocks=2 * batch_blocks // ranks,
            tile_blocks=max(1, min(MAX_TILE_BLOCKS, pool_bytes // block_bytes // 32)),
        )

    @property
    def staging_blocks(self) -> int:
        """Pages through which blocks pass: foreign ones, and two tiles of those that arrive.

        One tile is attended while the other one arrives.
        """
        return self.foreign_blocks + 2 * self.tile_blocks

    def build_memory(self, spec: ModelSpec) -> KVMemory:
        """Make a follower's pools: it accounts for no pages, since the leader does."""
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
    """Runs the steps of one rank, the leader's or a follower's.

    It belongs to one thread. All ranks are constructed at the same time, and after that all run
    the same steps in the same order, since they wait for each other within each layer.
    """

    def __init__(
        self,
        model: LoadedModel,
        ring: RingMemorySpec,
        transport: Transport,
        memory: KVMemory | None = None,
    ) -> None:
        """Make the pools, and measure this rank's attention and the link between all ranks.

        `memory`: the leader's own, which accounts for the pages of all; None makes a follower's.
        Raises PeerLost.
        """
        self.model = model
        self.memory = ring.build_memory(model.spec) if memory is None else memory
        self.transport = transport
        self._backend = BACKENDS[ring.backend](self.memory)
        self._calls = _layer_calls(model)
        self.pairs_per_second = self._attention_rate()
        self.link = measure_link(transport, model.spec.device)
        self.wait_seconds = 0.0  # in attention, for other ranks, ever

    @torch.inference_mode()
    def run(self, step: RankStep) -> Tensor | None:
        """Run the step; return logits [sampled chunks, vocab], float32, at the leader.

        Followers return None. Raises PeerLost.
        """
        for source, target in step.copies.tolist():
            for pool in self.memory.raw.pages:
                pool[target] = pool[source]
        if len(step.fresh_pages):
            self.memory.clear_raw(to_device(step.fresh_pages, self.model.spec.device))
        attention = RankAttention(step, self.memory, self._backend, self.transport, self._calls)
        logits = torch.empty(0, self.model.spec.vocab_size, device=self.model.spec.device)
        if len(step.token_ids):
            logits = self.model.forward(
                to_device(step.token_ids, self.model.spec.device),
                to_device(step.positions, self.model.spec.device),
                attention,
                to_device(step.logits_rows, self.model.spec.device),
            )
        else:
            for layer in sorted(self.memory.group_of):
                attention.attend_without_rows(layer)
        self.wait_seconds += attention.wait_seconds
        return self._gather_logits(step, logits)

    @torch.inference_mode()
    def _attention_rate(self) -> float:
        """Measure how many rows times keys of one layer this rank attends in a second."""
        layer = self.memory.groups[0].layers[0]  # a global one, if there is any
        recorded = self._calls[layer]
        entries = Layout().table(RATE_BLOCKS)  # all on page 0, which is all zeros
        rows = GroupRows(
            row_begin=0,
            rows=RATE_ROWS,
            first_position=RATE_BLOCKS * BLOCK_TOKENS,
            own_row=0,
            own_pages=NO_INDICES,
            past_entries=RATE_BLOCKS,
            entries=entries,
        )
        plan = self._backend.plan([rows.chunk(0)], 0)
        query = recorded.query.new_zeros(RATE_ROWS, *recorded.query.shape[1:])
        times = []
        for _ in range(3):
            began = time.perf_counter()
            out, _ = self._backend.attend(recorded.call, query, plan)
            out[:1].cpu()  # waits until a GPU has finished
            times.append(time.perf_counter() - began)
        return RATE_ROWS * RATE_BLOCKS * BLOCK_TOKENS / min(times)

    def _gather_logits(self, step: RankStep, logits: Tensor) -> Tensor | None:
        """Send this rank's logits to the leader, which returns those of all ranks.

        They are in the order of the chunks. If rank 1 has rows 0 and 2 of the result and rank 0 has
        row 1, `step.result_rows` is [[1], [0, 2]].
        """
        if self.transport.rank != LEADER:
            sends = [(LEADER, logits.contiguous())] if len(logits) else []
            self.transport.begin(sends, ()).wait()
            return None
        counts = [len(rows) for rows in step.result_rows]
        gathered = logits.new_empty(sum(counts), logits.shape[1])
        parts = torch.split(gathered, counts)
        parts[LEADER].copy_(logits)
        receives = [(r, part) for r, part in enumerate(parts) if r != LEADER and len(part)]
        self.transport.begin((), receives).wait()
        ordered = torch.empty_like(gathered)
        for rows, part in zip(step.result_rows, parts, strict=True):
            ordered[to_device(rows, self.model.spec.device)] = part
        return ordered


def _layer_calls(model: LoadedModel) -> list[RecordedCall]:
    """Record how the model calls each layer's attention: a rank without rows needs it too."""
    recorder = CallRecorder()
    one = torch.zeros(1, dtype=torch.int64, device=model.spec.device)
    model.forward(one, one, recorder, one)
    return recorder.calls
