"""What travels between ranks in layers that see everything, gathered over a step's chunks."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from longctx.kv.block_entry import PAGE
from longctx.ring.leader_memory import LeaderMemory
from longctx.ring.step import NONE, Queries, Round, Rows
from longctx.ring.step_builder import Piece


@dataclass(frozen=True, slots=True)
class Past:
    """One sequence's first `blocks` blocks, by the rank that keeps them."""

    blocks: int
    tables: list[NDArray[np.int64]]  # per rank, entries with the rank's own pages
    numbers: list[NDArray[np.int64]]  # per rank, which blocks of the sequence these are

    @classmethod
    def of(cls, entries: NDArray[np.int64], pages_per_rank: int, ranks: int) -> "Past":
        keeper, page = np.divmod(entries[:, PAGE], pages_per_rank)
        local = entries.copy()
        local[:, PAGE] = page
        numbers = [np.flatnonzero(keeper == rank) for rank in range(ranks)]
        return cls(len(entries), [local[own] for own in numbers], numbers)


@dataclass(frozen=True, slots=True)
class Spread:
    """One sequence's blocks on each rank: those of its past that the rank keeps, in order, then
    those that it computes in this step.
    """

    tables: list[NDArray[np.int64]]  # per rank, entries with the rank's own pages
    numbers: list[NDArray[np.int64]]  # per rank, which blocks of the sequence these are
    past: list[int]  # per rank, how many of them were there before
    keepers: list[NDArray[np.int64]]  # per rank, of what it computes: who keeps it
    kept_pages: list[NDArray[np.int64]]  # and where, on that rank

    @classmethod
    def of(
        cls,
        past: Past,
        new: NDArray[np.int64],
        computing: NDArray[np.int64],
        pages_per_rank: int,
    ) -> "Spread":
        """`new`: entries of the blocks that ranks `computing` fill in this step."""
        tables, numbers = list(past.tables), list(past.numbers)
        counts = [len(own) for own in numbers]
        keepers, kept_pages = [NONE] * len(tables), [NONE] * len(tables)
        if len(new):
            keeper, page = np.divmod(new[:, PAGE], pages_per_rank)
            for rank in range(len(tables)):
                own = np.flatnonzero(computing == rank)
                tables[rank] = np.concatenate([tables[rank], new[own]])
                tables[rank][counts[rank] :, PAGE] = page[own]
                numbers[rank] = np.concatenate([numbers[rank], own + past.blocks])
                keepers[rank], kept_pages[rank] = keeper[own], page[own]
        return cls(tables, numbers, counts, keepers, kept_pages)

    def sees(self, rank: int, block: int) -> int:
        """How many of the rank's blocks stand before that block of the sequence."""
        return int(np.searchsorted(self.numbers[rank], block))


@dataclass(frozen=True, slots=True)
class _Parcel:
    """Blocks of one sequence on their way from one rank to another."""

    entries: NDArray[np.int64]  # with the sender's pages
    kept_pages: NDArray[np.int64]  # where they stay on the receiver; -1: they pass
    seen_by: list[tuple[Piece, int]]  # rows there, and how many of the blocks they see


class Exchange:
    def __init__(self, memory: LeaderMemory) -> None:
        self._ranks = range(memory.ring.ranks)
        self._tile = memory.ring.tile_blocks
        self._staging = memory.packed[0].staging.start + memory.ring.own_blocks
        # By pair of ranks: rows of the first that the second attends, and pages that it gets.
        self._guests: dict[tuple[int, int], list[tuple[Piece, NDArray[np.int64]]]] = {}
        self._parcels: dict[tuple[int, int], list[_Parcel]] = {}

    def add(self, spread: Spread, pieces: list[Piece], *, asks_past: bool, asks_new: bool) -> None:
        """Bring the rows of one sequence together with what they see on other ranks.

        `asks_past`, `asks_new`: for blocks that were there before, and for those of this step, the
        queries are passed, not the keys.
        """
        for holder in self._ranks:
            past = spread.past[holder]
            asked = slice(0 if asks_past else past, None if asks_new else past)
            for piece in pieces:
                if piece.part.rank != holder:
                    seen = spread.sees(holder, piece.part.sealed.start)
                    entries = spread.tables[holder][:seen][asked]
                    if len(entries):
                        pair = (piece.part.rank, holder)
                        self._guests.setdefault(pair, []).append((piece, entries))
            computes = len(spread.numbers[holder]) > past
            if asks_past and not computes:
                continue  # nothing to send
            for rank in self._ranks:
                if rank != holder:
                    own = [piece for piece in pieces if piece.part.rank == rank]
                    self._send(spread, holder, rank, own, past_too=not asks_past, new=not asks_new)

    def _send(
        self,
        spread: Spread,
        holder: int,
        rank: int,
        pieces: list[Piece],
        *,
        past_too: bool,
        new: bool,
    ) -> None:
        past, length = spread.past[holder], len(spread.numbers[holder])
        sees = [spread.sees(holder, piece.part.sealed.start) for piece in pieces]
        sent = np.zeros(length, dtype=bool)
        if pieces and past_too:
            sent[:past] = True
        if pieces and new:
            sent[past : max(sees)] = True
        kept = np.full(length, -1)
        kept[past:] = np.where(spread.keepers[holder] == rank, spread.kept_pages[holder], -1)
        chosen = np.flatnonzero(sent | (kept >= 0))
        if not len(chosen):
            return
        # Blocks that are sent only to stay are the last ones: none of the rows sees them.
        seen_by = [
            (piece, int(sent[:seen].sum())) for piece, seen in zip(pieces, sees, strict=True)
        ]
        parcel = _Parcel(spread.tables[holder][chosen], kept[chosen], seen_by)
        self._parcels.setdefault((holder, rank), []).append(parcel)

    def queries(self) -> list[Queries]:
        """Of each rank."""
        steps = []
        for rank in self._ranks:
            asks = tuple(
                np.concatenate(
                    [
                        NONE,
                        *(
                            np.arange(piece.row_begin, piece.row_begin + piece.rows)
                            for piece, _ in self._guests.get((rank, holder), ())
                        ),
                    ]
                )
                for holder in self._ranks
            )
            begin, answers, rows = 0, [], []
            for source in self._ranks:
                first = begin
                for piece, entries in self._guests.get((source, rank), ()):
                    rows.append(piece.rows_apart(len(entries), entries, row_begin=begin))
                    begin += piece.rows
                answers.append(begin - first)
            steps.append(Queries(asks, tuple(answers), tuple(rows)))
        return steps

    def rounds(self) -> list[list[Round]]:
        """Of each rank: in turn to those after it, from those before it, a tile at a time."""
        ranks = len(self._ranks)
        rounds: list[list[Round]] = [[] for _ in self._ranks]
        for away in range(1, ranks):
            tiles = [self._tiles(rank, (rank + away) % ranks) for rank in self._ranks]
            for turn in range(max(map(len, tiles))):
                half = self._staging + len(rounds[0]) % 2 * self._tile
                passing = [own[turn] if turn < len(own) else [] for own in tiles]
                for rank in self._ranks:
                    source = (rank - away) % ranks
                    arriving = _arriving(passing[source], half)
                    sends = np.concatenate([NONE, *(p.entries[:, PAGE] for p in passing[rank])])
                    rounds[rank].append(Round((rank + away) % ranks, sends, source, *arriving))
        return rounds

    def _tiles(self, sender: int, receiver: int) -> list[list[_Parcel]]:
        """What goes from one rank to another, cut into so much as travels at once."""
        tiles: list[list[_Parcel]] = []
        room = 0
        for parcel in self._parcels.get((sender, receiver), ()):
            begin = 0
            while begin < len(parcel.entries):
                if room == 0:
                    tiles.append([])
                    room = self._tile
                end = min(begin + room, len(parcel.entries))
                seen_by = [
                    (piece, min(seen, end) - begin)
                    for piece, seen in parcel.seen_by
                    if seen > begin
                ]
                cut = slice(begin, end)
                tiles[-1].append(_Parcel(parcel.entries[cut], parcel.kept_pages[cut], seen_by))
                room -= end - begin
                begin = end
        return tiles


def _arriving(
    parcels: list[_Parcel], first_page: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], tuple[Rows, ...]]:
    """`receives`, `kept` and `rows` of a round in which these parcels arrive."""
    rows: list[Rows] = []
    kept: list[NDArray[np.int64]] = [NONE.reshape(0, 2)]
    page = first_page
    for parcel in parcels:
        staged = np.arange(page, page + len(parcel.entries))
        entries = parcel.entries.copy()
        entries[:, PAGE] = staged
        rows += [piece.rows_apart(seen, entries) for piece, seen in parcel.seen_by]
        stays = np.flatnonzero(parcel.kept_pages >= 0)
        kept.append(np.stack([staged[stays], parcel.kept_pages[stays]], axis=1))
        page += len(parcel.entries)
    return np.arange(first_page, page), np.concatenate(kept), tuple(rows)
