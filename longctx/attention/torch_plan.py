"""Plans the tiles that the torch backend attends: rectangles of rows by keys, cut once per step.

A tile is a batch of equal rectangles, `B` times `R` query rows by `N` pages, so that many short
sequences cost one call, as do the row blocks of a prefill under a sliding window. Three cases:

* decode (one row): short contexts of many sequences in one padded tile; else a tile per sequence
  that reads the past in place, where its pages follow each other, and then the own block;
* prefill under a narrow window: one rectangle per row block, its window and its own block;
* other prefill: all rows of the chunk against past pages, unmasked; among themselves, masked.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compress.shape import BLOCK_TOKENS
from longctx.attention.backend import ChunkRows
from longctx.kv.block_entry import ENTRY_COLUMNS, FIRST_POSITION, PAGE, ROW_BEGIN, ROWS, Entries
from longctx.kv.pool_indices import PoolIndices, pool_indices, to_device

TILE_SCORES = 1 << 21  # the most scores (rows x keys) of one tile of the past
COPIED_BLOCKS = 128  # the most pages of one tile that have to be gathered or decoded
SHORT_BLOCKS = 8  # shorter contexts are copied, so that many sequences cost one call
RUN_BLOCKS = 16  # a run this long is worth a tile, and a merge, of its own
NARROW_WINDOW_TOKENS = 1024  # up to this window a prefill computes one rectangle per row block


@dataclass(frozen=True, slots=True)
class Tile:
    """Rows of the batch by `packed` and then `own` pages.

    `rows` are [B, R], or one slice of the batch. Pages are [B * n], or a slice of the pool where
    they follow each other.

    `bias` [B, 1, R, keys] is 0 where a row sees a key and -inf elsewhere, or None where all rows
    see all keys. If `causal`, row i of the tile sees keys 0 to i. The first `skip` packed rows are
    left out, and of the own ones those before `own_skip` and from `own_rows` on. A `first` tile has
    no earlier one with a part of these rows' attention. Of the flattened [B * R] results, `picked`
    are real and belong to the batch's rows `targets`, and the others are padding; both are None
    where `rows` is a slice.
    """

    rows: Tensor | slice
    batch: int
    packed: PoolIndices | None
    own: PoolIndices | None
    bias: Tensor | None
    causal: bool
    first: bool
    skip: int = 0
    own_skip: int = 0
    own_rows: int | None = None
    picked: Tensor | None = None
    targets: Tensor | None = None


def plan_tiles(
    chunks: Sequence[ChunkRows],
    group: int,
    *,
    window: int | None,
    lossless: bool,
    in_place: bool,
    device: torch.device,
) -> tuple[Tile, ...]:
    """Plan tiles that together show every row of `chunks` all keys that it may see, each once.

    With a `lossless` codec sealed rows equal raw ones, so a chunk may read its own sealed blocks
    raw. With an `in_place` codec runs of pages are read where they are; other pages are decoded,
    tile by tile.
    """
    planner = _Planner(group, window, lossless, in_place, device)
    return tuple(planner.tiles(chunks))


@dataclass(frozen=True, slots=True)
class _Rectangle:
    """Rows of one chunk, the past entries that they see, and their own block."""

    chunk: ChunkRows
    row_begin: int  # within the chunk
    rows: int
    entries: Entries
    own_block: int  # an index into the chunk's own pages


class _Planner:
    def __init__(
        self,
        group: int,
        window: int | None,
        lossless: bool,
        in_place: bool,
        device: torch.device,
    ) -> None:
        self._group = group
        self._window = window
        self._lossless = lossless
        self._in_place = in_place
        self._device = device
        self._begun: set[int] = set()  # first rows of the chunks that have a tile

    def tiles(self, chunks: Sequence[ChunkRows]) -> Iterator[Tile]:
        """Yield the tiles of all chunks; those that are padded come last."""
        padded: dict[tuple[int, int], list[_Rectangle]] = defaultdict(list)
        for chunk in chunks:
            if len(chunk.own_pages) == 0:
                past = self._visible(chunk, 0, chunk.past_entries)
                yield from self._past(chunk, past)
            elif chunk.rows == 1:
                entries = self._visible(chunk, 0, chunk.past_entries)
                if len(entries) <= SHORT_BLOCKS and len(chunks) > 1:
                    padded[1, _bucket(len(entries))].append(_Rectangle(chunk, 0, 1, entries, 0))
                else:
                    yield from self._one_row(chunk, entries)
            elif self._window is not None and self._window <= NARROW_WINDOW_TOKENS:
                for rectangle in self._row_blocks(chunk, with_past=True):
                    padded[BLOCK_TOKENS, _bucket(len(rectangle.entries))].append(rectangle)
            else:
                past = self._visible(chunk, 0, chunk.past_entries)
                yield from self._past(chunk, past)
                if self._lossless:
                    yield self._chunk_raw(chunk)
                else:
                    for rectangle in self._row_blocks(chunk, with_past=False):
                        padded[BLOCK_TOKENS, 0].append(rectangle)
                    if len(chunk.own_pages) > 1:
                        yield self._chunk_sealed(chunk)
        for (rows, blocks), rectangles in padded.items():
            if len(rectangles) == 1:
                blocks = len(rectangles[0].entries)
            limit = max(1, 2 * COPIED_BLOCKS // (blocks + 1))
            for begin in range(0, len(rectangles), limit):
                yield self._padded(rectangles[begin : begin + limit], rows, blocks)

    def _visible(self, chunk: ChunkRows, row: int, end: int) -> Entries:
        """Select entries before `end` that row `row` of the chunk, or a later one, sees."""
        entries = chunk.entries[self._group]
        if self._window is None:
            return entries[:end]
        oldest = chunk.first_position + row - self._window + 1
        last_positions = entries[:end, FIRST_POSITION] + entries[:end, ROWS] - 1
        return entries[int(np.searchsorted(last_positions, oldest)) : end]

    def _past(self, chunk: ChunkRows, entries: Entries) -> Iterator[Tile]:
        """Yield tiles of all rows of the chunk against past entries."""
        for part in self._past_parts(chunk, entries):
            yield self._one(chunk, part, self._sees(chunk, np.arange(chunk.rows), part))

    def _past_parts(self, chunk: ChunkRows, entries: Entries) -> Iterator[Entries]:
        viewed = max(RUN_BLOCKS, TILE_SCORES // chunk.rows // BLOCK_TOKENS)
        copied = min(viewed, COPIED_BLOCKS)
        return _cut(entries, viewed if self._in_place else copied, copied)

    def _one_row(self, chunk: ChunkRows, entries: Entries) -> Iterator[Tile]:
        """Yield tiles of one row, cut to exactly the keys that it sees: nothing is copied.

        Nothing is masked either, but for tiles with parts of blocks.
        """
        position, own_rows = chunk.first_position, chunk.own_row + 1
        oldest = 0 if self._window is None else max(0, position - self._window + 1)
        skip = max(0, oldest - int(entries[0, FIRST_POSITION])) if len(entries) else 0
        parts = list(self._past_parts(chunk, entries))
        last = parts.pop() if parts and _whole(parts[-1]) else None
        for part in parts:
            if _whole(part):
                yield replace(self._one(chunk, part, None), skip=skip)
            else:
                yield self._one(chunk, part, self._sees(chunk, np.arange(1), part))
            skip = 0
        # An own block that began before the window has no past in it.
        unseen = max(0, oldest - (position - chunk.own_row))
        assert not (unseen and len(entries)), "the window skips from the past or the own block"
        yield Tile(
            rows=slice(chunk.row_begin, chunk.row_begin + 1),
            batch=1,
            packed=None if last is None else self._pages(last[:, PAGE]),
            own=self._pages(chunk.own_pages),
            bias=None,
            causal=False,
            first=self._begin([chunk]),
            skip=skip,
            own_rows=own_rows,
            own_skip=unseen,
        )

    def _chunk_sealed(self, chunk: ChunkRows) -> Tile:
        """Plan the chunk's rows against its own sealed blocks, each row those before its block."""
        end = chunk.past_entries + len(chunk.own_pages) - 1
        entries = chunk.entries[self._group][chunk.past_entries : end]
        rows = np.arange(chunk.rows)
        row_block = (chunk.own_row + rows) // BLOCK_TOKENS
        key_block = np.repeat(np.arange(len(entries)), BLOCK_TOKENS)
        earlier = key_block[None] < row_block[:, None]
        seen = self._sees(chunk, rows, entries)
        return self._one(chunk, entries, earlier if seen is None else earlier & seen)

    def _chunk_raw(self, chunk: ChunkRows) -> Tile:
        """Plan the chunk's rows against all its own blocks, raw."""
        causal = chunk.own_row == 0 and self._window is None
        bias = None
        if not causal:
            rows = chunk.own_row + np.arange(chunk.rows)
            keys = np.arange(len(chunk.own_pages) * BLOCK_TOKENS)
            seen = keys[None] <= rows[:, None]
            if self._window is not None:
                seen &= keys[None] > rows[:, None] - self._window
            bias = self._bias(seen[None])
        return Tile(
            rows=slice(chunk.row_begin, chunk.row_begin + chunk.rows),
            batch=1,
            packed=None,
            own=self._pages(chunk.own_pages),
            bias=bias,
            causal=causal,
            first=self._begin([chunk]),
        )

    def _row_blocks(self, chunk: ChunkRows, *, with_past: bool) -> Iterator[_Rectangle]:
        """Yield one rectangle for each own block of the chunk."""
        for block in range(len(chunk.own_pages)):
            begin = max(0, block * BLOCK_TOKENS - chunk.own_row)
            end = min(chunk.rows, (block + 1) * BLOCK_TOKENS - chunk.own_row)
            last = chunk.past_entries + block
            entries = self._visible(chunk, begin, last)
            if not with_past:
                entries = entries[:0]
            yield _Rectangle(chunk, begin, end - begin, entries, block)

    def _one(self, chunk: ChunkRows, entries: Entries, seen: NDArray[np.bool_] | None) -> Tile:
        return Tile(
            rows=slice(chunk.row_begin, chunk.row_begin + chunk.rows),
            batch=1,
            packed=self._pages(entries[:, PAGE]),
            own=None,
            bias=None if seen is None or seen.all() else self._bias(seen[None]),
            causal=False,
            first=self._begin([chunk]),
        )

    def _sees(
        self, chunk: ChunkRows, rows: NDArray[np.int64], entries: Entries
    ) -> NDArray[np.bool_] | None:
        """Compute which rows see which keys [rows, keys]; None if all rows see all keys.

        A key may be outside of a row's window, or in a row of the page that the entry lacks.
        """
        if self._window is None and _whole(entries):
            return None
        exists, positions = _entry_keys(entries)
        if self._window is None:
            return np.repeat(exists[None], len(rows), axis=0)
        oldest = chunk.first_position + rows - self._window
        seen: NDArray[np.bool_] = exists[None] & (positions[None] > oldest[:, None])
        return seen

    def _padded(self, rectangles: Sequence[_Rectangle], rows: int, blocks: int) -> Tile:
        """Put rectangles of different sizes into one tile, with the padding masked."""
        batch = len(rectangles)
        row_index = np.zeros((batch, rows), dtype=np.int64)
        real = np.zeros((batch, rows), dtype=bool)
        packed = np.zeros((batch, blocks, ENTRY_COLUMNS), dtype=np.int64)
        own = np.zeros(batch, dtype=np.int64)
        own_row = np.zeros((batch, rows), dtype=np.int64)
        position = np.zeros((batch, rows), dtype=np.int64)
        for index, rectangle in enumerate(rectangles):
            chunk, count = rectangle.chunk, rectangle.rows
            steps = np.arange(rectangle.row_begin, rectangle.row_begin + count)
            row_index[index, :count] = chunk.row_begin + steps
            real[index, :count] = True
            packed[index, : len(rectangle.entries)] = rectangle.entries
            own[index] = chunk.own_pages[rectangle.own_block]
            own_row[index, :count] = chunk.own_row + steps - rectangle.own_block * BLOCK_TOKENS
            position[index, :count] = chunk.first_position + steps
        own_keys = np.arange(BLOCK_TOKENS)
        seen = own_keys[None, None] <= own_row[:, :, None]  # padding rows see one key: finite
        own_position = (position - own_row)[:, :, None] + own_keys
        if self._window is not None:
            seen &= own_position > position[:, :, None] - self._window
        if blocks:
            exists, positions = _entry_keys(packed)
            past = np.broadcast_to(exists[:, None], (batch, rows, blocks * BLOCK_TOKENS))
            if self._window is not None:
                oldest = position - self._window
                past = past & (positions[:, None] > oldest[:, :, None])
            seen = np.concatenate([past, seen], axis=2)
        tile = Tile(
            rows=slice(int(row_index[0, 0]), int(row_index[0, 0]) + 1),
            batch=batch,
            packed=self._pages(packed[:, :, PAGE].ravel()) if blocks else None,
            own=self._pages(own),
            bias=self._bias(seen),
            causal=False,
            first=self._begin([rectangle.chunk for rectangle in rectangles]),
        )
        if batch == rows == 1:
            return tile
        picked = np.flatnonzero(real)
        return replace(
            tile,
            rows=to_device(row_index, self._device),
            picked=to_device(picked, self._device),
            targets=to_device(row_index.ravel()[picked], self._device),
        )

    def _begin(self, chunks: Sequence[ChunkRows]) -> bool:
        """Note that a tile has rows of these chunks; return whether it is the first of them all."""
        begins = {chunk.row_begin for chunk in chunks}
        first = self._begun.isdisjoint(begins)
        self._begun |= begins
        return first

    def _pages(self, pages: NDArray[np.int64]) -> PoolIndices:
        return pool_indices(pages, self._device)

    def _bias(self, seen: NDArray[np.bool_]) -> Tensor:
        bias = torch.zeros(seen.shape, device=self._device)
        return bias.masked_fill_(~to_device(seen, self._device), -torch.inf)[:, None]


def _whole(entries: Entries) -> bool:
    """Whether each entry has all rows of its page."""
    return bool((entries[:, ROWS] == BLOCK_TOKENS).all())


def _cut(entries: Entries, run_blocks: int, other_blocks: int) -> Iterator[Entries]:
    """Cut the past into tiles: long runs of pages, which are read in place, and the rest.

    Runs of at least RUN_BLOCKS pages become tiles of at most `run_blocks`, the entries between
    them tiles of at most `other_blocks`. One stray page would otherwise make a whole tile be
    gathered, in each layer of each step.

    Worked example with RUN_BLOCKS = 16, run_blocks = 32 and other_blocks = 128: pages 5, 9, 20 to
    59 and 7 become the tiles (5, 9), (20 to 51), (52 to 59) and (7).
    """
    done = 0  # entries before this one are in tiles
    for begin, end in _runs(entries[:, PAGE]):
        if end - begin >= RUN_BLOCKS:
            yield from _pieces(entries[done:begin], other_blocks)
            yield from _pieces(entries[begin:end], run_blocks)
            done = end
    yield from _pieces(entries[done:], other_blocks)


def _runs(pages: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Yield begin and end of each run of pages that follow each other, such as 20, 21, 22."""
    if len(pages) == 0:
        return
    breaks = np.flatnonzero(np.diff(pages) != 1) + 1
    begins, ends = np.r_[0, breaks], np.r_[breaks, len(pages)]
    yield from zip(begins.tolist(), ends.tolist(), strict=True)


def _pieces(entries: Entries, most: int) -> Iterator[Entries]:
    for begin in range(0, len(entries), most):
        yield entries[begin : begin + most]


def _bucket(blocks: int) -> int:
    """Round up to a power of two, so that few shapes of padded tiles occur."""
    return 0 if blocks == 0 else 1 << (blocks - 1).bit_length()


def _entry_keys(entries: Entries) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Tell which of the n * block_tokens rows of entries [..., n, columns] exist, and where.

    Returns `exists` and `positions`, both [..., n * block_tokens].
    """
    row = np.arange(BLOCK_TOKENS)
    begin, rows = entries[..., ROW_BEGIN, None], entries[..., ROWS, None]
    exists = (row >= begin) & (row < begin + rows)
    positions = entries[..., FIRST_POSITION, None] + row - begin
    flat = (*entries.shape[:-2], -1)
    return exists.reshape(flat), positions.reshape(flat)
