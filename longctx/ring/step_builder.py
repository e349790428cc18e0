"""One rank's step while it is put together, chunk by chunk."""

from collections.abc import Sequence as Items
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from compress.shape import BLOCK_TOKENS
from longctx.ring.placement import Part
from longctx.ring.step import NONE, GroupStep, RankStep, Rows


def indices(values: Items[int]) -> NDArray[np.int64]:
    return np.array(values, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows of a part that are attended: all of them, or the last one, whose logits are wanted."""

    part: Part
    row_begin: int  # in its rank's batch
    rows: int
    first_position: int
    raw_pages: NDArray[np.int64]  # of the blocks that the rows lie in

    @property
    def first_block(self) -> int:
        return self.first_position // BLOCK_TOKENS

    def pick_last(self) -> "Piece":
        offset = self.rows - 1
        return Piece(
            self.part, self.row_begin + offset, 1, self.first_position + offset, self.raw_pages[-1:]
        )

    def rows_of(self, past_entries: int, entries: NDArray[np.int64]) -> Rows:
        """The rows in their own rank's batch, which see that many entries and their own blocks."""
        return Rows(
            self.row_begin,
            self.rows,
            self.first_position,
            self.first_position % BLOCK_TOKENS,
            self.raw_pages,
            past_entries,
            entries,
        )

    def rows_apart(
        self, past_entries: int, entries: NDArray[np.int64], *, row_begin: int | None = None
    ) -> Rows:
        """The rows, here or as guests of another rank, against other blocks than their own."""
        begin = self.row_begin if row_begin is None else row_begin
        return Rows(begin, self.rows, self.first_position, 0, NONE, past_entries, entries)


class Draft:
    def __init__(self, groups: int) -> None:
        self.copies: list[tuple[int, int]] = []
        self.logits_rows: list[int] = []
        self.staged = 0  # blocks that it computes and does not keep
        self.sealed_packed: list[list[NDArray[np.int64]]] = [[] for _ in range(groups)]
        self.local: list[list[Rows]] = [[] for _ in range(groups)]
        self.last_local: list[list[Rows]] = [[] for _ in range(groups)]
        self._rows = 0
        self._token_ids: list[NDArray[np.int64]] = [NONE]
        self._positions: list[NDArray[np.int64]] = [NONE]
        self._slots: list[NDArray[np.int64]] = [NONE]
        self._fresh: list[int] = []
        self._sealed_raw: list[NDArray[np.int64]] = [NONE]

    def add_rows(
        self, part: Part, raw_pages: NDArray[np.int64], token_ids: NDArray[np.int32]
    ) -> Piece:
        """`raw_pages`: of the blocks that the part's rows lie in."""
        piece = Piece(part, self._rows, part.rows, part.begin, raw_pages)
        self._rows += part.rows
        self._token_ids.append(token_ids.astype(np.int64))
        positions = np.arange(part.begin, part.end)
        self._positions.append(positions)
        block, row = np.divmod(positions - part.begin + part.begin % BLOCK_TOKENS, BLOCK_TOKENS)
        self._slots.append(raw_pages[block] * BLOCK_TOKENS + row)
        self._sealed_raw.append(raw_pages[: len(part.sealed)])
        if part.end % BLOCK_TOKENS and part.sealed.stop * BLOCK_TOKENS >= part.begin:
            self._fresh.append(int(raw_pages[-1]))
        return piece

    def add_local(self, group: int, rows: Rows, *, last: bool) -> None:
        (self.last_local if last else self.local)[group].append(rows)

    def step(
        self,
        groups: tuple[GroupStep, ...],
        last: GroupStep,
        logits_of: tuple[NDArray[np.int64], ...],
    ) -> RankStep:
        return RankStep(
            token_ids=np.concatenate(self._token_ids),
            positions=np.concatenate(self._positions),
            slots=np.concatenate(self._slots),
            copies=indices([page for pair in self.copies for page in pair]).reshape(-1, 2),
            fresh_pages=indices(self._fresh),
            sealed_raw=np.concatenate(self._sealed_raw),
            sealed_packed=tuple(np.concatenate([NONE, *pages]) for pages in self.sealed_packed),
            groups=groups,
            last=last,
            logits_rows=indices(self.logits_rows),
            logits_of=logits_of,
        )
