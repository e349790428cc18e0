"""What ranks send each other in global (full-attention) layers, collected over a step's chunks.

The ranks' shards of a sequence are described by `PastShards` (what was there before the step) and
`SequenceShards` (with the step's new blocks). `Exchange` turns them into the queries and the rounds
of pages that every rank's `GroupStep` lists.

Example, used in the comments below: 3 ranks and the first chunk of a prompt, blocks 0 to 19. Rank 0
computes blocks 0-2 and 16-19, rank 1 blocks 3-5 and 13-15, rank 2 blocks 6-12; blocks 0-15 are
owned by rank 0, blocks 16-19 by rank 1 (see `placement.py`).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from longctx.kv.block_entry import PAGE
from longctx.ring.leader_memory import LeaderMemory
from longctx.ring.step import NO_INDICES, GroupRows, RemoteQueries, Round
from longctx.ring.step_builder import RowSpan

NOT_OWNED = -1  # in place of a page, of blocks that only pass through the receiver's staging pages


@dataclass(frozen=True, slots=True)
class PastShards:
    """One sequence's first `blocks` blocks, by the rank that owns them."""

    blocks: int
    tables: list[NDArray[np.int64]]  # per rank, entries with the rank's own pages
    block_indices: list[NDArray[np.int64]]  # per rank, which blocks of the sequence these are

    @classmethod
    def of(cls, entries: NDArray[np.int64], pages_per_rank: int, ranks: int) -> "PastShards":
        """`entries`: the leader's, whose page numbers are owner * pages_per_rank + page."""
        owners, pages = np.divmod(entries[:, PAGE], pages_per_rank)
        local = entries.copy()
        local[:, PAGE] = pages
        block_indices = [np.flatnonzero(owners == rank) for rank in range(ranks)]
        return cls(len(entries), [local[owned] for owned in block_indices], block_indices)


@dataclass(frozen=True, slots=True)
class SequenceShards:
    """The blocks of one sequence that each rank holds in this step.

    Those of the past that the rank owns come first, then those that it computes, in order. In the
    example rank 1 holds blocks 3-5 and 13-15, all of them new; their owner is rank 0.
    """

    tables: list[NDArray[np.int64]]  # per rank, entries with the rank's own pages
    block_indices: list[NDArray[np.int64]]  # per rank, which blocks of the sequence these are
    past_counts: list[int]  # per rank, how many of them are past
    owners: list[NDArray[np.int64]]  # per rank, the owner of each block that it computes
    owner_pages: list[NDArray[np.int64]]  # and the page there

    @classmethod
    def of(
        cls,
        past: PastShards,
        new: NDArray[np.int64],
        computing: NDArray[np.int64],
        pages_per_rank: int,
    ) -> "SequenceShards":
        """`new`: the leader's entries of the blocks that the ranks `computing` complete."""
        tables, block_indices = list(past.tables), list(past.block_indices)
        past_counts = [len(own) for own in block_indices]
        owners, owner_pages = [NO_INDICES] * len(tables), [NO_INDICES] * len(tables)
        if len(new):
            new_owners, pages = np.divmod(new[:, PAGE], pages_per_rank)
            for rank in range(len(tables)):
                computed = np.flatnonzero(computing == rank)
                tables[rank] = np.concatenate([tables[rank], new[computed]])
                tables[rank][past_counts[rank] :, PAGE] = pages[computed]
                block_indices[rank] = np.concatenate([block_indices[rank], computed + past.blocks])
                owners[rank], owner_pages[rank] = new_owners[computed], pages[computed]
        return cls(tables, block_indices, past_counts, owners, owner_pages)

    def count_before(self, rank: int, block: int) -> int:
        """Count the blocks held by `rank` that precede `block` in the sequence."""
        return int(np.searchsorted(self.block_indices[rank], block))

    def count(self, rank: int) -> int:
        """Count the blocks held by `rank`."""
        return len(self.block_indices[rank])


@dataclass(frozen=True, slots=True)
class _PageMessage:
    """Blocks of one sequence sent from one rank to another."""

    entries: NDArray[np.int64]  # with the sender's pages
    owner_pages: NDArray[np.int64]  # where the receiver keeps those it owns; else NOT_OWNED
    seen_by: list[tuple[RowSpan, int]]  # rows there, and how many of the blocks they attend to


class Exchange:
    """Collects what is sent in a step, then lists it by rank.

    Call `add` for each sequence of the step, then `remote_queries` and `rounds`. It belongs to the
    one thread that plans the step.
    """

    def __init__(self, memory: LeaderMemory) -> None:
        self._ranks = range(memory.ring.ranks)
        self._tile_blocks = memory.ring.tile_blocks
        self._first_tile_page = memory.packed[0].staging.start + memory.ring.foreign_blocks
        # By (rank of the rows, rank that attends them), with the entries they attend to there.
        self._queries: dict[tuple[int, int], list[tuple[RowSpan, NDArray[np.int64]]]] = {}
        # By (sender, receiver).
        self._messages: dict[tuple[int, int], list[_PageMessage]] = {}

    def add(
        self, shards: SequenceShards, spans: list[RowSpan], *, pass_q_past: bool, pass_q_new: bool
    ) -> None:
        """Bring the rows of one sequence together with what they attend to on other ranks.

        `pass_q_past`: queries are passed to the blocks that were there before, instead of their
        keys to the rows; `pass_q_new`: the same for blocks of this step.
        """
        for holder in self._ranks:
            past = shards.past_counts[holder]
            queried = slice(0 if pass_q_past else past, None if pass_q_new else past)
            for span in spans:
                if span.rank != holder:
                    seen = shards.count_before(holder, span.part.sealed_blocks.start)
                    entries = shards.tables[holder][:seen][queried]
                    if len(entries):
                        self._queries.setdefault((span.rank, holder), []).append((span, entries))
            is_computing = shards.count(holder) > past
            if pass_q_past and not is_computing:
                continue  # nothing to send
            for receiver in self._ranks:
                if receiver != holder:
                    message = self._message(
                        shards,
                        holder,
                        receiver,
                        [span for span in spans if span.rank == receiver],
                        passed=range(
                            past if pass_q_past else 0,
                            past if pass_q_new else shards.count(holder),
                        ),
                    )
                    if len(message.entries):
                        self._messages.setdefault((holder, receiver), []).append(message)

    def _message(
        self,
        shards: SequenceShards,
        holder: int,
        receiver: int,
        spans: list[RowSpan],
        *,
        passed: range,
    ) -> _PageMessage:
        """Choose which of the holder's blocks the receiver gets; maybe none.

        `passed`: those of the holder's blocks whose keys are passed, not queries to them. The
        receiver gets the passed blocks that a span there attends to, and new ones that it owns. Of
        past blocks it gets all, since every row attends to all of them. In the example, where
        nothing is past and keys are passed:

            holder  receiver  attended to by its spans      owned by it    sent
              0        1      0-2, by rows of both          16-19          0-2, 16-19
              0        2      0-2, by rows of both          none           0-2
              1        0      3-5, 13-15, by rows of 16-19  3-5, 13-15     3-5, 13-15
              1        2      3-5, by rows of both          none           3-5
              2        0      6-12, by rows of 16-19        6-12           6-12
              2        1      6-12, by rows of 13-15        none           6-12
        """
        past, count = shards.past_counts[holder], shards.count(holder)
        seen = [shards.count_before(holder, span.part.sealed_blocks.start) for span in spans]
        is_attended = np.zeros(count, dtype=bool)
        is_attended[passed.start : min(passed.stop, max(seen, default=0))] = True
        owner_pages = np.full(count, NOT_OWNED)
        owner_pages[past:] = np.where(
            shards.owners[holder] == receiver, shards.owner_pages[holder], NOT_OWNED
        )
        sent = np.flatnonzero(is_attended | (owner_pages != NOT_OWNED))
        # Blocks that are sent only to their owner come last: no row there attends to them. So a
        # span attends to a prefix of what is sent: of 0-2 and 16-19 to the first three.
        seen_by = [
            (span, int(is_attended[:before].sum()))
            for span, before in zip(spans, seen, strict=True)
        ]
        return _PageMessage(shards.tables[holder][sent], owner_pages[sent], seen_by)

    def remote_queries(self) -> list[RemoteQueries]:
        """List, by rank, the rows whose queries it sends and those that it receives."""
        return [
            RemoteQueries(
                tuple(self._sent_rows(rank, holder) for holder in self._ranks),
                *self._received_rows(rank),
            )
            for rank in self._ranks
        ]

    def _sent_rows(self, rank: int, holder: int) -> NDArray[np.int64]:
        spans = [span for span, _ in self._queries.get((rank, holder), ())]
        return np.concatenate([NO_INDICES, *(span.batch_rows for span in spans)])

    def _received_rows(self, rank: int) -> tuple[tuple[int, ...], tuple[GroupRows, ...]]:
        """Lay the rows that arrive end to end: counts by source, and what the rows attend to."""
        begin, counts, rows = 0, [], []
        for source in self._ranks:
            first = begin
            for span, entries in self._queries.get((source, rank), ()):
                rows.append(span.without_own_blocks(len(entries), entries, row_begin=begin))
                begin += span.rows
            counts.append(begin - first)
        return tuple(counts), tuple(rows)

    def rounds(self) -> list[list[Round]]:
        """List the rounds of each rank, as many for each: empty ones where it has less to send.

        Rank r first sends all it has to r+1, a tile at a time, then to r+2, and so on; meanwhile it
        receives from r-1, then from r-2. Odd and even rounds use two halves of the staging pages:
        one tile is attended while the next one arrives.
        """
        ranks = len(self._ranks)
        rounds: list[list[Round]] = [[] for _ in self._ranks]
        for distance in range(1, ranks):
            tiles = [self._tiles(rank, (rank + distance) % ranks) for rank in self._ranks]
            for turn in range(max(map(len, tiles))):
                page = self._first_tile_page + len(rounds[0]) % 2 * self._tile_blocks
                sent = [own[turn] if turn < len(own) else [] for own in tiles]
                for rank in self._ranks:
                    target, source = (rank + distance) % ranks, (rank - distance) % ranks
                    rounds[rank].append(_round(target, sent[rank], source, sent[source], page))
        return rounds

    def _tiles(self, sender: int, receiver: int) -> list[list[_PageMessage]]:
        """Cut what one rank sends another into tiles of at most `tile_blocks` blocks.

        With tiles of 4 blocks, messages of 3 and 7 blocks become tiles of 3+1, 4 and 2.
        """
        tiles: list[list[_PageMessage]] = []
        room = 0
        for message in self._messages.get((sender, receiver), ()):
            begin = 0
            while begin < len(message.entries):
                if room == 0:
                    tiles.append([])
                    room = self._tile_blocks
                end = min(begin + room, len(message.entries))
                seen_by = [
                    (span, min(seen, end) - begin) for span, seen in message.seen_by if seen > begin
                ]
                entries, owner_pages = message.entries[begin:end], message.owner_pages[begin:end]
                tiles[-1].append(_PageMessage(entries, owner_pages, seen_by))
                room -= end - begin
                begin = end
        return tiles


def _round(
    target: int,
    sent: list[_PageMessage],
    source: int,
    arriving: list[_PageMessage],
    first_page: int,
) -> Round:
    """Build one rank's round; what arrives is staged in the pages from `first_page` on."""
    rows: list[GroupRows] = []
    staged_to_owned: list[NDArray[np.int64]] = [NO_INDICES.reshape(0, 2)]
    page = first_page
    for message in arriving:
        staged = np.arange(page, page + len(message.entries))
        entries = message.entries.copy()
        entries[:, PAGE] = staged
        rows += [
            span.without_own_blocks(seen, entries, row_begin=span.row_begin)
            for span, seen in message.seen_by
        ]
        owned = np.flatnonzero(message.owner_pages != NOT_OWNED)
        staged_to_owned.append(np.stack([staged[owned], message.owner_pages[owned]], axis=1))
        page += len(message.entries)
    return Round(
        target=target,
        sends=np.concatenate([NO_INDICES, *(message.entries[:, PAGE] for message in sent)]),
        source=source,
        receives=np.arange(first_page, page),
        staged_to_owned=np.concatenate(staged_to_owned),
        rows=tuple(rows),
    )
