"""A prompt over virtual ranks, chunk by chunk: what is sent, and what the formula says.

Virtual ranks are threads that share this machine's cores: bytes and balance are exact, times only
show what the split adds.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from compress.shape import BLOCK_TOKENS
from longctx.config import EngineConfig
from longctx.engine.engine import Engine
from longctx.engine.parts import EngineParts
from longctx.open_engine import engine_parts
from longctx.request import Request, SamplingParams, Segment
from longctx.ring.comm_cost import new_pages_sent
from longctx.ring.placement import count_owned, is_zigzag, owner, split_chunk
from longctx.ring.runner import RingRunner
from longctx.ring.virtual import VirtualRanks

MOST_STEP_MS = 60_000.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """One chunk. `balance` is rows times keys of the busiest rank in one layer, by the mean."""

    end: int
    seconds: float
    sent_bytes: int  # by all ranks, in all layers
    formula_bytes: int
    balance: float


def chunks(
    config: EngineConfig, folder: Path, count: int, prompt: tuple[int, ...]
) -> Iterator[Chunk]:
    """Reads the prompt over `count` ranks, which share the threads, in steps of any duration."""
    ranks = None if count == 1 else VirtualRanks(count)
    threads = config.model.threads or torch.get_num_threads()
    config = replace(
        config,
        model=replace(config.model, threads=max(1, threads // count)),
        # Chunks that a slow machine makes shorter would send other bytes
        scheduler=replace(config.scheduler, target_step_ms=MOST_STEP_MS),
    )
    prefill = _WatchedPrefill(engine_parts(config, folder, ranks=ranks))
    try:
        yield from prefill.chunks(prompt)
    finally:
        prefill.engine.close()
        torch.set_num_threads(threads)


class _WatchedPrefill:
    """An engine that reads one prompt and notes what each of its steps sent."""

    def __init__(self, parts: EngineParts) -> None:
        self.engine = Engine(parts)
        self._memory, self._runner = parts.memory, parts.runner
        self._layers = len(parts.model.spec.layers)

    def chunks(self, prompt: tuple[int, ...]) -> Iterator[Chunk]:
        self.engine.submit(
            Request(
                request_id="prompt",
                segments=(Segment(token_ids=prompt),),
                sampling=SamplingParams(max_tokens=0),
            )
        )
        end = 0
        while self.engine.has_work:
            begin, sent_before = end, self._sent_bytes()
            began = time.perf_counter()
            self.engine.step()
            seconds = time.perf_counter() - began
            end = self._runner.computed_tokens
            if end > begin:
                formula_bytes, balance = self._expected(begin, end)
                yield Chunk(
                    end=end,
                    seconds=seconds,
                    sent_bytes=self._sent_bytes() - sent_before,
                    formula_bytes=formula_bytes,
                    balance=balance,
                )

    def _sent_bytes(self) -> int:
        runner = self._runner
        if not isinstance(runner, RingRunner):
            return 0
        assert isinstance(runner.ranks, VirtualRanks)
        return sum(transport.bytes_sent for transport in runner.ranks.transports)

    def _expected(self, begin: int, end: int) -> tuple[int, float]:
        """Returns the bytes by the formulas of `longctx.ring.comm_cost`, and the cut's balance."""
        runner = self._runner
        if not isinstance(runner, RingRunner):
            return 0, 1.0
        ranks = runner.ranks.size
        assert is_zigzag(begin, end, ranks), "chunks are as large as ranks need them"
        cut = split_chunk(begin, end, ranks)
        rows, pairs = [0] * ranks, [0.0] * ranks
        for part in cut:
            rows[part.rank] += part.rows
            pairs[part.rank] += part.rows * (part.begin - begin + part.rows / 2)
        past = count_owned(0, begin // BLOCK_TOKENS, ranks)
        is_pass_q, cost = runner.planner.choose_passing(rows, past)
        for rank in range(ranks):
            own = (end - begin) * past[rank] * BLOCK_TOKENS if is_pass_q else rows[rank] * begin
            pairs[rank] += own
        page_bytes = self._memory.packed[0].page_bytes[0]
        layer_bytes = new_pages_sent(cut, ranks) * page_bytes + sum(cost.bytes_sent)
        # In the last layer no row's logits are wanted: blocks only go where they stay.
        moved = sum(
            owner(block, ranks) != part.rank for part in cut for block in part.sealed_blocks
        )
        total = (self._layers - 1) * layer_bytes + moved * page_bytes
        return total, max(pairs) / (sum(pairs) / ranks)
