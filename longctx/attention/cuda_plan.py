"""Cuts the rows of a step into the tiles that the Triton kernel attends, on the host, with numpy.

A tile has rows of one chunk that share an own block, and the entries that all of them see. Worked
example, 32 rows to a tile: the chunk of tokens 100 to 139 (own row 36 of its first own block, one
past entry) becomes the tiles of tokens 100 to 127, which see entry 0 and own block 0 up to
themselves, and 128 to 139, which see entries 0 and 1 and own block 1.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compress.shape import BLOCK_TOKENS
from longctx.attention.backend import ChunkRows
from longctx.kernels.triton_attention import ENTRY_COLUMNS, TILE_COLUMNS
from longctx.kv.block_entry import FIRST_POSITION, PAGE, ROW_BEGIN, ROWS, Entries
from longctx.kv.pool_indices import to_device

FEW_ROWS = 16  # query rows times heads of a group that make a tile of decoding
MOST_SPLITS = 64
SPLIT_ENTRIES = 4  # pages that are worth a program of their own
PROGRAMS_PER_PROCESSOR = 2  # of a GPU: so many keep its memory busy

# Columns of a tile beside its position and own row
FIRST_ROW, ROWS_OF_TILE, OWN_PAGE, BEGIN, END, BEGUN, OUT_ROW = 0, 1, 3, 5, 6, 7, 8
Tile = tuple[int, int, int, int, int, int, int, int, int]


@dataclass(frozen=True, slots=True)
class TileLaunch:
    """Tiles that one launch attends: int32 [tiles, TILE_COLUMNS].

    `entries` int32 [entries, 4] are what their ranges name. Where `unpacked` is given, these
    entries' pages are to be decoded before, to rows that `entries` name by their place in it.
    """

    tiles: Tensor
    entries: Tensor
    unpacked: Tensor | None = None


@dataclass(frozen=True, slots=True)
class TileBatch:
    """Rows that are attended by the same launches, one after the other; `m` of products a tile.

    Where `splits` are more than 1, the launches write parts of `rows` int32 [rows], which are the
    step's rows, to be merged when all are there. So parts take no room for other rows.
    """

    m: int
    launches: tuple[TileLaunch, ...]
    splits: int = 1
    rows: Tensor | None = None


@dataclass(slots=True)
class CUDAPlan:
    """The chunks of a step as one group of layers sees them; its tiles are cut when first asked.

    `tables` has int32 [entries, 4] for each chunk. `segment` is the most entries that are decoded
    at a time for chunks of many rows, 0 where pages are rows as they are.
    """

    chunks: Sequence[ChunkRows]
    tables: Sequence[NDArray[np.int32]]
    group: int
    window: int | None
    device: torch.device
    processors: int
    segment: int
    covered: int  # rows of the step that the plan names
    _batches: dict[tuple[int, int, int], tuple[TileBatch, ...]] = field(default_factory=dict)

    def batches(self, *, heads: int, kv_heads: int, most: int) -> tuple[TileBatch, ...]:
        """Return the launches, in order, for layers of so many heads.

        Chunks of few rows come first. Tiles of the others have `most` rows of products. Where
        tiles are few, their pages are split over programs.
        """
        key = (heads, kv_heads, most)
        made = self._batches.get(key)
        if made is None:
            made = self._batches[key] = tuple(self._cut(heads // kv_heads, kv_heads, most))
        return made

    def _cut(self, group: int, kv_heads: int, most: int) -> Iterator[TileBatch]:
        small = max(FEW_ROWS, power_of_two(group))
        is_few = [chunk.rows * group <= small for chunk in self.chunks]
        few = [index for index, each in enumerate(is_few) if each]
        many = [index for index, each in enumerate(is_few) if not each]
        for chosen, m in ((few, small), (many, max(most, small))):
            if not chosen:
                continue
            tiles, entries = self._table(chosen, m // group)
            splits, rows = self._splits(tiles, kv_heads), None
            if splits > 1:
                rows = to_device(_in_a_row(tiles), self.device)
            if self.segment and chosen is many:
                launches = tuple(self._segments(tiles, entries))
            else:
                table = to_device(entries, self.device)
                launches = (TileLaunch(to_device(tiles, self.device), table),)
            yield TileBatch(m, launches, splits, rows)

    def _table(
        self, chosen: Sequence[int], most_rows: int
    ) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Cut the chosen chunks into tiles, over one table of all their entries."""
        bounds = np.cumsum([0, *(len(self.tables[index]) for index in chosen)])
        lines = [
            tile
            for index, bound in zip(chosen, bounds.tolist(), strict=False)
            for tile in self._tiles_of(index, most_rows, bound)
        ]
        tiles = np.array(lines, dtype=np.int32).reshape(len(lines), TILE_COLUMNS)
        entries = np.concatenate([self.tables[index] for index in chosen])
        return tiles, entries if len(entries) else np.zeros((1, ENTRY_COLUMNS), dtype=np.int32)

    def _segments(
        self, tiles: NDArray[np.int32], entries: NDArray[np.int32]
    ) -> Iterator[TileLaunch]:
        """Cut the entries into runs that are decoded one after the other.

        A tile takes part where its range meets a run, and has its own block in the last of these.
        """
        rows = entries.copy()
        rows[:, 0] = np.arange(len(entries)) % self.segment
        packed, table = to_device(entries, self.device), to_device(rows, self.device)
        empty = tiles[:, BEGIN] == tiles[:, END]
        first = np.where(empty, 0, tiles[:, BEGIN] // self.segment)
        last = np.where(empty, 0, (tiles[:, END] - 1) // self.segment)
        for number in range(int(last.max()) + 1):
            begin, end = number * self.segment, min((number + 1) * self.segment, len(entries))
            there = (first <= number) & (number <= last)
            if not there.any():
                continue
            part = tiles[there]
            part[:, BEGIN] = part[:, BEGIN].clip(begin, end)
            part[:, END] = part[:, END].clip(begin, end)
            part[:, OWN_PAGE] = np.where(last[there] == number, part[:, OWN_PAGE], -1)
            part[:, BEGUN] = first[there] < number
            yield TileLaunch(to_device(part, self.device), table, packed[begin:end])

    def _tiles_of(self, index: int, most_rows: int, bound: int) -> Iterator[Tile]:
        chunk = self.chunks[index]
        own = len(chunk.own_pages) > 0
        offset = 0
        while offset < chunk.rows:
            block, own_row = divmod(chunk.own_row + offset, BLOCK_TOKENS)
            rows = min(most_rows, chunk.rows - offset)
            if own:
                rows = min(rows, BLOCK_TOKENS - own_row)
            position = chunk.first_position + offset
            seen = chunk.past_entries + (block if own else 0)
            begin = bound + self._outside_window(chunk.entries[self.group][:seen], position)
            page = int(chunk.own_pages[block]) if own else -1
            yield (
                chunk.row_begin + offset,
                rows,
                position,
                page,
                own_row,
                begin,
                bound + seen,
                0,
                chunk.row_begin + offset,
            )
            offset += rows

    def _outside_window(self, entries: Entries, position: int) -> int:
        """Count the leading entries that lie before the window of a row at `position`."""
        if self.window is None or not len(entries):
            return 0
        within = entries[:, FIRST_POSITION] + entries[:, ROWS] > position - self.window + 1
        return int(np.argmax(within)) if within.any() else len(entries)

    def _splits(self, table: NDArray[np.int32], kv_heads: int) -> int:
        """Over how many programs the pages of a tile go: a power of two."""
        longest = int((table[:, END] - table[:, BEGIN]).max())
        wanted = -(-self.processors * PROGRAMS_PER_PROCESSOR // (len(table) * kv_heads))
        return power_of_two(max(1, min(wanted, longest // SPLIT_ENTRIES, MOST_SPLITS)))


def _in_a_row(tiles: NDArray[np.int32]) -> NDArray[np.int32]:
    """Let the tiles write one after the other; return which row of the step each of these is."""
    counts = tiles[:, ROWS_OF_TILE]
    tiles[:, OUT_ROW] = np.cumsum(counts) - counts
    return np.repeat(tiles[:, FIRST_ROW] - tiles[:, OUT_ROW], counts) + np.arange(
        counts.sum(), dtype=np.int32
    )


def plan_chunks(
    chunks: Sequence[ChunkRows],
    group: int,
    *,
    window: int | None,
    device: torch.device,
    processors: int,
    segment: int,
) -> CUDAPlan:
    """Take what the kernel reads of the chunks' block tables; see `CUDAPlan`."""
    columns = [PAGE, ROW_BEGIN, ROWS, FIRST_POSITION]
    return CUDAPlan(
        chunks=chunks,
        tables=[chunk.entries[group][:, columns].astype(np.int32) for chunk in chunks],
        group=group,
        window=window,
        device=device,
        processors=processors,
        segment=segment,
        covered=sum(chunk.rows for chunk in chunks),
    )


def power_of_two(count: int) -> int:
    """Return the smallest power of two that is not below `count`."""
    return 1 << (count - 1).bit_length()
