"""One rank's step while it is planned, chunk by chunk."""

from collections.abc import Sequence as Items
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from compress.shape import BLOCK_TOKENS
from longctx.ring.placement import ChunkPart
from longctx.ring.step import NO_INDICES, GroupRows, GroupStep, RankStep


def as_indices(values: Items[int]) -> NDArray[np.int64]:
    return np.array(values, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class RowSpan:
    """Rows of a chunk part that attend: all of them, or the last one, whose logits are wanted."""

    part: ChunkPart
    row_begin: int  # in its rank's batch
    rows: int
    first_position: int
    raw_pages: NDArray[np.int64]  # of the blocks that hold the rows

    @property
    def rank(self) -> int:
        return self.part.rank

    @property
    def first_block(self) -> int:
        return self.first_position // BLOCK_TOKENS

    @property
    def batch_rows(self) -> NDArray[np.int64]:
        """The rows as indices into their rank's batch."""
        return np.arange(self.row_begin, self.row_begin + self.rows)

    def last_row(self) -> "RowSpan":
        """Return the span cut down to its last row."""
        offset = self.rows - 1
        return RowSpan(
            self.part, self.row_begin + offset, 1, self.first_position + offset, self.raw_pages[-1:]
        )

    def with_own_blocks(self, past_entries: int, entries: NDArray[np.int64]) -> GroupRows:
        """Return the rows on their own rank: they attend to their raw blocks too.

        Rows of the first block attend to `entries[:past_entries]`, those of the next block to one
        entry more, and so on.
        """
        return GroupRows(
            row_begin=self.row_begin,
            rows=self.rows,
            first_position=self.first_position,
            own_row=self.first_position % BLOCK_TOKENS,
            own_pages=self.raw_pages,
            past_entries=past_entries,
            entries=entries,
        )

    def without_own_blocks(
        self, past_entries: int, entries: NDArray[np.int64], *, row_begin: int
    ) -> GroupRows:
        """Return the rows as they attend to `entries[:past_entries]` alone.

        `row_begin`: the first of them in the batch that attends: their own rank's, or the rows
        that another rank has received.
        """
        return GroupRows(
            row_begin=row_begin,
            rows=self.rows,
            first_position=self.first_position,
            own_row=0,
            own_pages=NO_INDICES,
            past_entries=past_entries,
            entries=entries,
        )


class RankStepBuilder:
    """Collects what one rank does for all chunks of a step.

    Call `add_rows` for each part of a chunk, fill the public lists, then call `build` once.
    """

    def __init__(self, groups: int) -> None:
        """`groups`: how many layer groups the model has."""
        self.copies: list[tuple[int, int]] = []  # raw pages, source and target
        self.logits_rows: list[int] = []
        self.foreign_blocks = 0  # so far: those it computes and another rank owns
        self.sealed_packed: list[list[NDArray[np.int64]]] = [[] for _ in range(groups)]
        self.local: list[list[GroupRows]] = [[] for _ in range(groups)]
        self.last_layer_local: list[list[GroupRows]] = [[] for _ in range(groups)]
        self._rows = 0
        self._token_ids: list[NDArray[np.int64]] = [NO_INDICES]
        self._positions: list[NDArray[np.int64]] = [NO_INDICES]
        self._slots: list[NDArray[np.int64]] = [NO_INDICES]
        self._fresh_pages: list[int] = []
        self._sealed_raw: list[NDArray[np.int64]] = [NO_INDICES]

    def add_rows(
        self, part: ChunkPart, raw_pages: NDArray[np.int64], token_ids: NDArray[np.int32]
    ) -> RowSpan:
        """Append the part's rows to this rank's batch.

        `raw_pages`: of the blocks that hold them. A part of positions 100 to 199, say, is in blocks
        1 to 3: its slots are rows 36 to 63 of the first page, all 64 of the second and rows 0 to 7
        of the third; the first two pages are sealed, the third is fresh.
        """
        span = RowSpan(part, self._rows, part.rows, part.begin, raw_pages)
        self._rows += part.rows
        self._token_ids.append(token_ids.astype(np.int64))
        positions = np.arange(part.begin, part.end)
        self._positions.append(positions)
        block, row = np.divmod(positions - part.begin + part.begin % BLOCK_TOKENS, BLOCK_TOKENS)
        self._slots.append(raw_pages[block] * BLOCK_TOKENS + row)
        self._sealed_raw.append(raw_pages[: len(part.sealed_blocks)])
        # A last block that stays incomplete and begins within this part has a new page.
        if part.end % BLOCK_TOKENS and part.sealed_blocks.stop * BLOCK_TOKENS >= part.begin:
            self._fresh_pages.append(int(raw_pages[-1]))
        return span

    def build(
        self,
        groups: tuple[GroupStep, ...],
        last_layer: GroupStep,
        result_rows: tuple[NDArray[np.int64], ...],
    ) -> RankStep:
        """Return the finished step; the arguments are as in `RankStep`."""
        return RankStep(
            token_ids=np.concatenate(self._token_ids),
            positions=np.concatenate(self._positions),
            slots=np.concatenate(self._slots),
            copies=as_indices([page for pair in self.copies for page in pair]).reshape(-1, 2),
            fresh_pages=as_indices(self._fresh_pages),
            sealed_raw=np.concatenate(self._sealed_raw),
            sealed_packed=tuple(
                np.concatenate([NO_INDICES, *pages]) for pages in self.sealed_packed
            ),
            groups=groups,
            last_layer=last_layer,
            logits_rows=as_indices(self.logits_rows),
            result_rows=result_rows,
        )
