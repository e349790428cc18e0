"""Keys that stand elsewhere than they were encoded: any backend, and queries turned to suit.

An entry whose `ROTATION` is d holds keys that were encoded d positions before where they stand
now; for them a query is turned back by d. So the rows of a chunk are repeated once for each
rotation among its entries, as further rows of a wider batch that see those entries and nothing
else. One call of the backend computes them all, and what the copies of a row saw is merged.
A step without such entries goes to the backend as it is. Read `plan`, then `attend`.
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
    """`wide`: a batch of the step's `rows`, in order, then their copies, then one empty row.

    Its row i is the step's row `source[i]`. Rows `parted` [n] of it have copies: `parts`
    [n, most parts] are each of them and its copies, filled up with the empty row. `turns` has
    cosines and sines for all copies, for each way in which a layer of the group turns its keys.
    `plain` is the step as it is, for layers whose keys do not turn.
    """

    wide: AttentionPlan
    rows: int
    source: Tensor
    parted: Tensor
    parts: Tensor
    turns: dict[Rotation, tuple[Tensor, Tensor]]
    plain: AttentionPlan | None


class RotatedAttention:
    def __init__(
        self, inner: AttentionBackend, memory: KVMemory, rotations: Sequence[Rotation | None]
    ) -> None:
        """`rotations`: how each layer turns its keys, see `rotation.py`."""
        self._inner = inner
        self._rotations = tuple(rotations)
        self._device = memory.device
        self._windows = [group.window for group in memory.groups]
        self._kinds = [{rotations[layer] for layer in group.layers} for group in memory.groups]

    def plan(self, chunks: Sequence[ChunkRows], group: int) -> AttentionPlan:
        kinds = self._kinds[group]
        if kinds == {None} or not any(chunk.rotated_entries for chunk in chunks):
            return self._inner.plan(chunks, group)
        chunks = sorted(chunks, key=lambda chunk: chunk.row_begin)
        parted = [_part(chunk, group, self._windows[group]) for chunk in chunks]
        if not any(part.moved for part in parted):
            return self._inner.plan(
                [
                    _seeing(chunk, group, part.unmoved, chunk.row_begin, chunk.own_pages)
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
            base.append(_seeing(chunk, group, part.unmoved, begin, chunk.own_pages))
            members = np.full((chunk.rows if part.moved else 0, most), empty, dtype=np.int64)
            members[:, 0] = begin + np.arange(len(members))
            for number, (offset, entries) in enumerate(part.moved, 1):
                end = copy_begin + chunk.rows
                source[copy_begin:end] = step_rows
                offsets[copy_begin - rows : end - rows] = offset
                copies.append(_seeing(chunk, group, entries, copy_begin, chunk.own_pages[:0]))
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
        """As any backend's."""
        rotation = self._rotations[call.layer]
        if not isinstance(plan, _Plan) or rotation is None:
            inner_plan = plan.plain if isinstance(plan, _Plan) else plan
            return self._inner.attend(call, query, inner_plan)
        rows = plan.rows
        wide = query.index_select(0, plan.source)
        wide[rows:-1] = rotation.turn(wide[rows:-1], *plan.turns[rotation])
        out, lse = self._inner.attend(call, wide, plan.wide)
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
    """A chunk's table: the entries that did not move, and those of each rotation."""

    unmoved: NDArray[np.int64]
    moved: list[tuple[int, NDArray[np.int64]]]


def _part(chunk: ChunkRows, group: int, window: int | None) -> _Parts:
    """Moved entries that no row of the chunk sees are left out."""
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


def _seeing(
    chunk: ChunkRows,
    group: int,
    entries: NDArray[np.int64],
    row_begin: int,
    own_pages: NDArray[np.int64],
) -> ChunkRows:
    """The chunk's rows, from `row_begin` of another batch on, with another table."""
    # Entries that are not past are of own blocks, and rows without own blocks see none of them
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
