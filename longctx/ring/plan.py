"""From scheduled chunks to what each rank does: the leader's planning before every step.

Everything is decided here, once, from the leader's block tables; `step.py` describes the result.
Read `StepPlanner.plan` first.
"""

from collections.abc import Sequence as Items
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from compress.shape import BLOCK_TOKENS
from longctx.engine.scheduler import Chunk
from longctx.kv.block_entry import PAGE
from longctx.kv.block_table import BlockTable
from longctx.model.spec import ModelSpec
from longctx.ring.comm_cost import CommCost, RowBytes, pass_kv_cost, pass_q_cost, prefers_pass_q
from longctx.ring.exchange import Exchange, PastShards, SequenceShards
from longctx.ring.leader_memory import LeaderMemory
from longctx.ring.link import Link
from longctx.ring.placement import is_zigzag, split_chunk
from longctx.ring.rank import LEADER
from longctx.ring.step import NO_INDICES, GroupRows, GroupStep, RankStep, RemoteQueries, Round
from longctx.ring.step_builder import RankStepBuilder, RowSpan, as_indices


@dataclass(frozen=True, slots=True)
class _PlannedChunk:
    """A chunk split into spans of rows; `wanted` is its last row if logits are wanted, or none."""

    chunk: Chunk
    spans: list[RowSpan]
    wanted: list[RowSpan]


class _UnfinishedStep:
    """What is planned so far: a builder per rank, and what global layers exchange.

    In the model's last layer only wanted rows attend, so it has an exchange of its own.
    """

    def __init__(self, memory: LeaderMemory) -> None:
        ranks, groups = range(memory.ring.ranks), len(memory.groups)
        self.builders = [RankStepBuilder(groups) for _ in ranks]
        self.exchange, self.last_layer_exchange = Exchange(memory), Exchange(memory)
        self.result_rows: list[list[int]] = [[] for _ in ranks]
        self._sampled = 0

    def want_logits(self, span: RowSpan) -> None:
        """Ask for the logits of the span's one row, as the next row of the step's result."""
        self.builders[span.rank].logits_rows.append(span.row_begin)
        self.result_rows[span.rank].append(self._sampled)
        self._sampled += 1


class StepPlanner:
    """Plans steps over all ranks.

    It reads the leader's block tables and takes the raw page copies that `LeaderMemory` has
    collected, so it belongs to the engine's thread: call `plan` once per step, after the pages of
    all chunks have been allocated and before `computed` of their sequences advances.
    """

    def __init__(
        self, memory: LeaderMemory, spec: ModelSpec, link: Link, pairs_per_second: float
    ) -> None:
        """`pairs_per_second`: rows times keys that a rank attends in one layer, as measured."""
        self._memory = memory
        self._ring = memory.ring
        # Most steps complete no block of a sequence, so its shards of the past stay the same.
        self._pasts: WeakKeyDictionary[BlockTable, PastShards] = WeakKeyDictionary()
        self.link, self.pairs_per_second = link, pairs_per_second
        self._last_group = memory.group_of[len(spec.layers) - 1]
        self._has_global_layers = memory.groups[0].window is None
        if self._has_global_layers:
            layers = memory.groups[0].layers
            self._page_bytes = sum(memory.packed[0].page_bytes) // len(layers)
            widest = max((spec.layers[layer] for layer in layers), key=lambda each: each.heads)
            self._row_bytes = RowBytes.of(
                widest.heads, widest.head_dim, query_bytes=spec.dtype.itemsize
            )

    def plan(self, chunks: Items[Chunk]) -> list[RankStep]:
        """Return what each rank does; the result's logits are in the order of the chunks."""
        step = _UnfinishedStep(self._memory)
        for chunk in chunks:
            planned = self._split(chunk, step)
            for group, layers in enumerate(self._memory.groups):
                if layers.window is not None:
                    self._plan_window_group(planned, group, step)
            if self._has_global_layers:
                self._plan_global_group(planned, step)
        for rank, source, target in self._memory.take_copies():
            step.builders[rank].copies.append((source, target))
        return self._finish(step)

    def _split(self, chunk: Chunk, step: _UnfinishedStep) -> _PlannedChunk:
        """Give each rank its rows of the chunk."""
        blocks, begin = chunk.sequence.blocks, chunk.sequence.blocks.computed
        spans = []
        for part in split_chunk(begin, begin + chunk.num_tokens, self._ring.ranks):
            raw_pages = as_indices([blocks.own_pages[block] for block in part.touched_blocks])
            token_ids = blocks.tokens.slice(part.begin, part.end)
            spans.append(step.builders[part.rank].add_rows(part, raw_pages, token_ids))
        wanted = [spans[-1].last_row()] if chunk.samples else []
        for span in wanted:
            step.want_logits(span)
        return _PlannedChunk(chunk, spans, wanted)

    def _plan_window_group(self, planned: _PlannedChunk, group: int, step: _UnfinishedStep) -> None:
        """Plan layers with a window: their pages are on every rank, so each rank attends alone."""
        blocks = planned.chunk.sequence.blocks
        entries = blocks.tables[group].entries
        window = self._memory.groups[group].window
        assert window is not None, group

        def rows(span: RowSpan) -> GroupRows:
            first = blocks.layout.first_seen(window, span.first_position)
            seen = entries[first : span.part.sealed_blocks.stop]
            return span.with_own_blocks(span.first_block - first, seen)

        for span in planned.spans:
            builder = step.builders[span.rank]
            builder.local[group].append(rows(span))
            sealed = span.part.sealed_blocks
            builder.sealed_packed[group].append(entries[sealed.start : sealed.stop, PAGE])
        for span in planned.wanted:
            step.builders[span.rank].last_layer_local[group].append(rows(span))

    def _plan_global_group(self, planned: _PlannedChunk, step: _UnfinishedStep) -> None:
        """Plan global (full-attention) layers: their pages are sharded over the ranks."""
        begin = planned.chunk.sequence.blocks.computed
        end = begin + planned.chunk.num_tokens
        shards = self._shards(planned)
        self._seal_new_blocks(shards, step)

        def rows(span: RowSpan) -> GroupRows:
            seen = shards.count_before(span.rank, span.first_block)
            return span.with_own_blocks(seen, shards.tables[span.rank])

        row_counts = [0] * self._ring.ranks
        for span in planned.spans:
            step.builders[span.rank].local[0].append(rows(span))
            row_counts[span.rank] += span.rows
        for span in planned.wanted:
            step.builders[span.rank].last_layer_local[0].append(rows(span))
        pass_q, _ = self.choose_passing(row_counts, shards.past_counts)
        # Of a zigzag-split chunk every rank has rows that attend to new blocks: pass their keys. In
        # the last layer one row of a sequence attends at most: there queries are always cheaper.
        step.exchange.add(
            shards,
            planned.spans,
            pass_q_past=pass_q,
            pass_q_new=not is_zigzag(begin, end, self._ring.ranks),
        )
        step.last_layer_exchange.add(shards, planned.wanted, pass_q_past=True, pass_q_new=True)

    def _shards(self, planned: _PlannedChunk) -> SequenceShards:
        """Return which rank holds which blocks of the sequence in this step."""
        blocks = planned.chunk.sequence.blocks
        begin, end = blocks.computed, blocks.computed + planned.chunk.num_tokens
        first, last = begin // BLOCK_TOKENS, end // BLOCK_TOKENS  # blocks that the chunk completes
        table, pages_per_rank = blocks.tables[0], self._memory.packed[0].pages_per_rank
        past = self._pasts.get(table)
        if past is None or past.blocks != first:
            past = PastShards.of(table.entries[:first], pages_per_rank, self._ring.ranks)
            self._pasts[table] = past
        computing = [np.full(len(s.part.sealed_blocks), s.rank) for s in planned.spans]
        return SequenceShards.of(
            past,
            table.entries[first:last],
            np.concatenate([NO_INDICES, *computing]),
            pages_per_rank,
        )

    def _seal_new_blocks(self, shards: SequenceShards, step: _UnfinishedStep) -> None:
        """Choose the page into which each rank seals each block that it computes.

        A block that it owns has its page already. One that another rank owns is staged until it has
        been sent there: it takes the next of this rank's first `foreign_blocks` staging pages.
        """
        staging = self._memory.packed[0].staging
        for rank, builder in enumerate(step.builders):
            sealing = shards.tables[rank][shards.past_counts[rank] :, PAGE]  # a view
            if len(sealing):
                foreign = np.flatnonzero(shards.owners[rank] != rank)
                sealing[foreign] = staging.start + builder.foreign_blocks + np.arange(len(foreign))
                builder.foreign_blocks += len(foreign)
                builder.sealed_packed[0].append(sealing)
            assert builder.foreign_blocks <= self._ring.foreign_blocks

    def choose_passing(self, rows: Items[int], pages: Items[int]) -> tuple[bool, CommCost]:
        """Choose between keys and queries, given rows and past pages by rank.

        Returns whether queries are passed, and what the chosen way costs.
        """
        pass_kv = pass_kv_cost(
            rows, pages, page_bytes=self._page_bytes, tile_pages=self._ring.tile_blocks
        )
        pass_q = pass_q_cost(rows, pages, row_bytes=self._row_bytes)
        is_pass_q = prefers_pass_q(
            pass_kv, pass_q, self.link, pairs_per_second=self.pairs_per_second
        )
        return is_pass_q, pass_q if is_pass_q else pass_kv

    def _finish(self, step: _UnfinishedStep) -> list[RankStep]:
        """Build every rank's step."""
        transfers = [
            _global_transfers(step.exchange)
            if layers.window is None
            else _window_transfers([builder.sealed_packed[group] for builder in step.builders])
            for group, layers in enumerate(self._memory.groups)
        ]
        last_transfers = transfers[self._last_group]
        if self._memory.groups[self._last_group].window is None:
            last_transfers = _global_transfers(step.last_layer_exchange)
        steps = []
        for rank, builder in enumerate(step.builders):
            groups = tuple(
                each.group_step(rank, local)
                for each, local in zip(transfers, builder.local, strict=True)
            )
            last_layer = last_transfers.group_step(rank, builder.last_layer_local[self._last_group])
            result_rows = tuple(map(as_indices, step.result_rows)) if rank == LEADER else ()
            steps.append(builder.build(groups, last_layer, result_rows))
        return steps


@dataclass(frozen=True, slots=True)
class _Transfers:
    """What every rank sends and receives in the layers of one group, by rank."""

    all_gather: list[list[Round]]
    remote_queries: list[RemoteQueries]
    rounds: list[list[Round]]

    def group_step(self, rank: int, local: list[GroupRows]) -> GroupStep:
        return GroupStep(
            all_gather=tuple(self.all_gather[rank]),
            local=tuple(local),
            remote_queries=self.remote_queries[rank],
            rounds=tuple(self.rounds[rank]),
        )


def _global_transfers(exchange: Exchange) -> _Transfers:
    queries, rounds = exchange.remote_queries(), exchange.rounds()
    return _Transfers([[] for _ in queries], queries, rounds)


def _window_transfers(sealed_pages: list[list[NDArray[np.int64]]]) -> _Transfers:
    """List the rounds after which every rank has all window pages that were sealed.

    `sealed_pages[r]`: those that rank r seals. With 3 ranks, rank 0 first sends to 1 and receives
    from 2, then sends to 2 and receives from 1. A page has the same number everywhere, so it
    arrives where it stays.
    """
    ranks = len(sealed_pages)
    sealed = [np.concatenate([NO_INDICES, *pages]) for pages in sealed_pages]
    all_gather: list[list[Round]] = [[] for _ in sealed]
    for distance in range(1, ranks):
        for rank in range(ranks):
            target, source = (rank + distance) % ranks, (rank - distance) % ranks
            all_gather[rank].append(
                Round(
                    target=target,
                    sends=sealed[rank],
                    source=source,
                    receives=sealed[source],
                    staged_to_owned=NO_INDICES.reshape(0, 2),
                    rows=(),
                )
            )
    no_queries = RemoteQueries((NO_INDICES,) * ranks, (0,) * ranks, ())
    return _Transfers(all_gather, [no_queries] * ranks, [[] for _ in sealed])
