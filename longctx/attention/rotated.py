"""Lets any backend attend to keys that serve at other positions than they were encoded at.

An entry whose `ROTATION` is d holds keys that were encoded d positions before their present one;
for them a query is turned back by d. So the rows of a chunk are repeated once for each rotation
among its entries, as further rows of a wider batch that see those entries and nothing else. One
call of the backend attends them all, and the results of a row and its copies are merged. A step
without such entries goes to the backend as it is.

Worked example: a chunk of 3 rows sees entries with rotations 0, 500, 500 and -90. The wide batch
has rows 0 to 2, which see the entry of rotation 0 and their own blocks; rows 3 to 5, turned by
-500, which see the two entries of 500; rows 6 to 8, turned by 90, which see the last entry; and row
9, which sees nothing. The merged parts are [[0, 3, 6], [1, 4, 7], [2, 5, 8]]. Had another chunk of
the step a single rotation, its parts would be filled up with row 9. Read `plan`, then `attend`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from longctx.attention.backend import AttentionBackend, AttentionPlan, ChunkRows
from longctx.attention.merge import merge_parts
from longctx.kv.block_entry import FIRST_POSITION, ROTATION, ROWS
from longctx.kv.memory import KVMemory
from longctx.kv.pool_indices import PoolIndices, to_device
from longctx.model.layer_attention import AttentionCall
from longctx.model.spec import Rotation


@dataclass(frozen=True, slots=True)
class _Plan:
    """A step as a `wide` batch: its `rows`, in order, then their copies, then one empty row.

    Row i of the wide batch is the step's row `source[i]`. Its rows `parted` [n] have copies:
    `parts` [n, most parts] lists each of them and its copies, filled up with the empty row. `turns`
    has the cosines and sines of all copies, for each way in which a layer of the group turns its
    keys. `plain` is the step as it is, for layers whose keys do not turn.
    """

    wide: AttentionPlan
    rows: int
    source: Tensor
    parted: Tensor
    parts: Tensor
    turns: dict[Rotation, tuple[Tensor, Tensor]]
    plain: AttentionPlan | None


class RotatedAttention:
    """An `AttentionBackend` around another one, which turns queries where entries are rotated."""

    def __init__(
        self, inner: AttentionBackend, memory: KVMemory, rotations: Sequence[Rotation | None]
    ) -> None:
        """Wrap `inner`; `rotations` has for each layer how it turns its keys."""
        self._inner = inner
        self._rotations = tuple(rotations)
        self._device = memory.device
        self._windows = [group.window for group in memory.groups]
        self._kinds = [{rotations[layer] for layer in group.layers} for group in memory.groups]

    def plan(self, chunks: Sequence[ChunkRows], group: int) -> AttentionPlan:
        """Plan the wide batch of the step, or the step as it is where no entry is rotated."""
        kinds = self._kinds[group]
        if kinds == {None} or not any(chunk.rotated_entries for chunk in chunks):
            return self._inner.plan(chunks, group)
        chunks = sorted(chunks, key=lambda chunk: chunk.row_begin)
        parted = [_part(chunk, group, self._windows[group]) for chunk in chunks]
        if not any(part.moved for part in parted):
            return self._inner.plan(
                [
                    _with_table(chunk, group, part.unmoved, chunk.row_begin, chunk.own_pages)
                    for chunk, part in zip(chunks, parted, strict=True)
                ],
                group,
            )
        rows = sum(chunk.rows for chunk in chunks)
        copied = [chunk.rows * len(part.moved) for chunk, part in zip(chunks, parted, strict=True)]
        most, empty = 1 + max(len(part.moved) for part in parted), rows + sum(copied)
        source = np.zeros(empty + 1, dtype=np.int64)
        offsets = np.zeros(empty - rows, dtype=np.int64)
        base, copies, parts = [], [], []
        begin, copy_begin = 0, rows
        for chunk, part in zip(chunks, parted, strict=True):
            step_rows = np.arange(chunk.row_begin, chunk.row_begin + chunk.rows)
            source[begin : begin + chunk.rows] = step_rows
            base.append(_with_table(chunk, group, part.unmoved, begin, chunk.own_pages))
            members = np.full((chunk.rows if part.moved else 0, most), empty, dtype=np.int64)
            members[:, 0] = begin + np.arange(len(members))
            for number, (offset, entries) in enumerate(part.moved, 1):
                end = copy_begin + chunk.rows
                source[copy_begin:end] = step_rows
                offsets[copy_begin - rows : end - rows] = offset
                copies.append(_with_table(chunk, group, entries, copy_begin, chunk.own_pages[:0]))
                members[:, number] = np.arange(copy_begin, end)
                copy_begin = end
            parts.append(members)
            begin += chunk.rows
        joined = np.concatenate(parts)
        return _Plan(
            wide=self._inner.plan([*base, *copies], group),
            rows=rows,
            source=to_device(source, self._device),
            parted=to_device(joined[:, 0], self._device),
            parts=to_device(joined, self._device),
            turns={kind: self._turns(kind, -offsets) for kind in kinds if kind is not None},
            plain=self._inner.plan(chunks, group) if None in kinds else None,
        )

    def seal(self, layer: int, raw: PoolIndices, packed: PoolIndices) -> None:
        self._inner.seal(layer, raw, packed)

    def attend(self, call: AttentionCall, query: Tensor, plan: object) -> tuple[Tensor, Tensor]:
        """Attend as any backend does, with copies of rows for rotated entries."""
        rotation = self._rotations[call.layer]
        if not isinstance(plan, _Plan) or rotation is None:
            inner_plan = plan.plain if isinstance(plan, _Plan) else plan
            return self._inner.attend(call, query, inner_plan)
        rows = plan.rows
        wide = query.index_select(0, plan.source)
        wide[rows:-1] = rotation.turn(wide[rows:-1], *plan.turns[rotation])
        out, lse = self._inner.attend(replace(call, merged=True), wide, plan.wide)
        out[plan.parted], lse[plan.parted] = merge_parts(out[plan.parts], lse[plan.parts])
        if rows == len(query):
            return out[:rows], lse[:rows]
        all_out = out.new_zeros(query.shape)
        all_lse = lse.new_full(query.shape[:2], -torch.inf)
        all_out[plan.source[:rows]], all_lse[plan.source[:rows]] = out[:rows], lse[:rows]
        return all_out, all_lse

    def _turns(self, rotation: Rotation, offsets: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        distinct, which = np.unique(offsets, return_inverse=True)
        cosines, sines = rotation.turns(to_device(distinct, self._device))
        return cosines[to_device(which, self._device)], sines[to_device(which, self._device)]


@dataclass(frozen=True, slots=True)
class _Parts:
    """A chunk's table, split into the entries that did not move and those of each rotation."""

    unmoved: NDArray[np.int64]
    moved: list[tuple[int, NDArray[np.int64]]]


def _part(chunk: ChunkRows, group: int, window: int | None) -> _Parts:
    """Split a chunk's table by rotation, without moved entries that no row of it sees."""
    table = chunk.entries[group][: None if len(chunk.own_pages) else chunk.past_entries]
    count = chunk.rotated_entries
    if not count:
        return _Parts(table, [])
    assert count <= chunk.past_entries, "a block that is being computed is rotated"
    assert not chunk.absent_keys, "rotated entries and absent ones are told apart by nobody"
    past, offsets = table[:count], table[:count, ROTATION]
    unmoved = np.concatenate([past[offsets == 0], table[count:]])
    if window is not None:
        seen = past[:, FIRST_POSITION] + past[:, ROWS] > chunk.first_position - window + 1
        past, offsets = past[seen], offsets[seen]
    distinct = dict.fromkeys(offsets.tolist())
    return _Parts(unmoved, [(each, past[offsets == each]) for each in distinct if each])


def _with_table(
    chunk: ChunkRows,
    group: int,
    entries: NDArray[np.int64],
    row_begin: int,
    own_pages: NDArray[np.int64],
) -> ChunkRows:
    """Place the chunk's rows at `row_begin` of another batch, with another table."""
    # Entries that are not past are of own blocks; rows without own blocks see none of them.
    own_entries = len(chunk.entries[group]) - chunk.past_entries if len(own_pages) else 0
    tables = tuple(entries if i == group else table for i, table in enumerate(chunk.entries))
    return replace(
        chunk,
        row_begin=row_begin,
        own_pages=own_pages,
        past_entries=len(entries) - own_entries,
        entries=tables,
        rotated_entries=0,
    )
