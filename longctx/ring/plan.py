"""From scheduled chunks to what each rank does: the leader's part of every step.

All is decided here, once, from the leader's tables; see `step.py` for what comes out. Read
`StepPlanner.plan`.
"""

from collections.abc import Sequence as Items
from weakref import WeakKeyDictionary

import numpy as np

from compress.shape import BLOCK_TOKENS
from longctx.engine.scheduler import Chunk
from longctx.kv.block_entry import PAGE
from longctx.kv.block_table import BlockTable
from longctx.model.spec import ModelSpec
from longctx.ring.comm_cost import RowBytes, Traffic, keys_traffic, passes_queries, queries_traffic
from longctx.ring.exchange import Exchange, Past, Spread
from longctx.ring.leader_memory import LeaderMemory
from longctx.ring.link import Link
from longctx.ring.placement import is_zigzag, parts
from longctx.ring.step import NONE, GroupStep, Queries, RankStep, Round
from longctx.ring.step_builder import Draft, Piece, indices


class StepPlanner:
    def __init__(
        self, memory: LeaderMemory, spec: ModelSpec, link: Link, pairs_per_second: float
    ) -> None:
        """`pairs_per_second`: rows times keys that a rank attends in one layer."""
        self._memory = memory
        self._ring = memory.ring
        # Of sequences that are computed: most steps add no block to it.
        self._pasts: WeakKeyDictionary[BlockTable, Past] = WeakKeyDictionary()
        self.link, self.pairs_per_second = link, pairs_per_second
        self._last_group = memory.group_of[len(spec.layers) - 1]
        self._global = memory.groups[0].window is None
        if self._global:
            layers = memory.groups[0].layers
            self._page_bytes = sum(memory.packed[0].page_bytes) // len(layers)
            widest = max((spec.layers[layer] for layer in layers), key=lambda each: each.heads)
            self._row_bytes = RowBytes.of(
                widest.heads, widest.head_dim, query_bytes=spec.dtype.itemsize
            )

    def plan(self, chunks: Items[Chunk]) -> list[RankStep]:
        """What each rank does; pages for every chunk must have been allocated."""
        ranks = self._ring.ranks
        drafts = [Draft(len(self._memory.groups)) for _ in range(ranks)]
        every, last = Exchange(self._memory), Exchange(self._memory)
        logits_of: list[list[int]] = [[] for _ in range(ranks)]
        drawing = 0
        for chunk in chunks:
            pieces = self._rows(chunk, drafts)
            wanted: list[Piece] = []
            if chunk.draws:
                wanted = [pieces[-1].pick_last()]
                rank = pieces[-1].part.rank
                drafts[rank].logits_rows.append(wanted[0].row_begin)
                logits_of[rank].append(drawing)
                drawing += 1
            for group, layers in enumerate(self._memory.groups):
                if layers.window is not None:
                    self._window(chunk, group, pieces, wanted, drafts)
            if self._global:
                self._spread(chunk, pieces, wanted, drafts, every, last)
        for rank, source, target in self._memory.take_copies():
            drafts[rank].copies.append((source, target))
        return self._steps(drafts, every, last, logits_of)

    def _rows(self, chunk: Chunk, drafts: list[Draft]) -> list[Piece]:
        """Give each rank its rows of the chunk."""
        sequence, begin = chunk.sequence, chunk.sequence.blocks.computed
        pieces = []
        for part in parts(begin, begin + chunk.num_tokens, self._ring.ranks):
            raw = np.array(
                [sequence.blocks.own_pages[block] for block in part.touched], dtype=np.int64
            )
            token_ids = sequence.blocks.tokens.slice(part.begin, part.end)
            pieces.append(drafts[part.rank].add_rows(part, raw, token_ids))
        return pieces

    def _window(
        self,
        chunk: Chunk,
        group: int,
        pieces: list[Piece],
        wanted: list[Piece],
        drafts: list[Draft],
    ) -> None:
        """Layers that see a window: the pages are on every rank, so each attends alone."""
        entries = chunk.sequence.blocks.tables[group].entries
        window = self._memory.groups[group].window
        assert window is not None, group
        for chosen, last in ((pieces, False), (wanted, True)):
            for piece in chosen:
                first = chunk.sequence.blocks.layout.first_seen(window, piece.first_position)
                seen = entries[first : piece.part.sealed.stop]
                rows = piece.rows_of(piece.first_block - first, seen)
                drafts[piece.part.rank].add_local(group, rows, last=last)
        for piece in pieces:
            sealed = entries[piece.part.sealed.start : piece.part.sealed.stop, PAGE]
            drafts[piece.part.rank].sealed_packed[group].append(sealed)

    def _spread(
        self,
        chunk: Chunk,
        pieces: list[Piece],
        wanted: list[Piece],
        drafts: list[Draft],
        every: Exchange,
        last: Exchange,
    ) -> None:
        """Layers that see everything: the pages are spread over the ranks."""
        memory = self._memory
        begin = chunk.sequence.blocks.computed
        end = begin + chunk.num_tokens
        first, sealed = begin // BLOCK_TOKENS, end // BLOCK_TOKENS
        table, pool = chunk.sequence.blocks.tables[0], memory.packed[0]
        past = self._pasts.get(table)
        if past is None or past.blocks != first:
            past = Past.of(table.entries[:first], pool.pages_per_rank, len(drafts))
            self._pasts[table] = past
        computing = np.concatenate(
            [NONE, *(np.full(len(p.part.sealed), p.part.rank) for p in pieces)]
        )
        spread = Spread.of(past, table.entries[first:sealed], computing, pool.pages_per_rank)
        for rank, draft in enumerate(drafts):
            if len(spread.numbers[rank]) > spread.past[rank]:
                sealing = spread.tables[rank][spread.past[rank] :, PAGE]  # a view
                guests = np.flatnonzero(spread.keepers[rank] != rank)
                sealing[guests] = pool.staging.start + draft.staged + np.arange(len(guests))
                draft.staged += len(guests)
                draft.sealed_packed[0].append(sealing)
        assert max(draft.staged for draft in drafts) <= memory.ring.own_blocks
        for chosen, is_last in ((pieces, False), (wanted, True)):
            for piece in chosen:
                rank = piece.part.rank
                rows = piece.rows_of(spread.sees(rank, piece.first_block), spread.tables[rank])
                drafts[rank].add_local(0, rows, last=is_last)
        row_counts = [0] * len(drafts)
        for piece in pieces:
            row_counts[piece.part.rank] += piece.rows
        asks, _ = self.choose(row_counts, spread.past)
        every.add(
            spread,
            pieces,
            asks_past=asks,
            asks_new=not is_zigzag(begin, end, len(drafts)),
        )
        last.add(spread, wanted, asks_past=True, asks_new=True)

    def choose(self, rows: Items[int], pages: Items[int]) -> tuple[bool, Traffic]:
        """For rows and past pages by rank: whether queries are passed, and what that sends."""
        keys = keys_traffic(
            rows, pages, page_bytes=self._page_bytes, tile_pages=self._ring.tile_blocks
        )
        queries = queries_traffic(rows, pages, row_bytes=self._row_bytes)
        asks = passes_queries(keys, queries, self.link, pairs_per_second=self.pairs_per_second)
        return asks, queries if asks else keys

    def _steps(
        self,
        drafts: list[Draft],
        every: Exchange,
        last: Exchange,
        logits_of: list[list[int]],
    ) -> list[RankStep]:
        ranks = len(drafts)
        groups = range(len(self._memory.groups))
        gathers = [self._gathers(drafts, group) for group in groups]
        none = [Queries((NONE,) * ranks, (0,) * ranks, ())] * ranks
        empty: list[list[Round]] = [[] for _ in range(ranks)]
        queries, rounds = [none] * len(groups), [empty] * len(groups)
        last_queries, last_rounds = none, empty
        if self._global:
            queries[0], rounds[0] = every.queries(), every.rounds()
            if self._last_group == 0:
                last_queries, last_rounds = last.queries(), last.rounds()
        steps = []
        for rank, draft in enumerate(drafts):
            each = tuple(
                GroupStep(
                    tuple(gathers[group][rank]),
                    tuple(draft.local[group]),
                    queries[group][rank],
                    tuple(rounds[group][rank]),
                )
                for group in groups
            )
            final = GroupStep(
                each[self._last_group].gathers,
                tuple(draft.last_local[self._last_group]),
                last_queries[rank],
                tuple(last_rounds[rank]),
            )
            counts = tuple(map(indices, logits_of)) if rank == 0 else ()
            steps.append(draft.step(each, final, counts))
        return steps

    def _gathers(self, drafts: list[Draft], group: int) -> list[list[Round]]:
        """Every rank gets the window pages that the others seal."""
        if self._memory.groups[group].window is None:
            return [[] for _ in drafts]
        sealed = [np.concatenate([NONE, *draft.sealed_packed[group]]) for draft in drafts]
        ranks = len(drafts)
        return [
            [
                Round(
                    target=(rank + away) % ranks,
                    sends=sealed[rank],
                    source=(rank - away) % ranks,
                    receives=sealed[(rank - away) % ranks],
                    kept=NONE.reshape(0, 2),
                    rows=(),
                )
                for away in range(1, ranks)
            ]
            for rank in range(ranks)
        ]
