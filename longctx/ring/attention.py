"""One rank's attention in one step: what it has, what passes by, and what it is asked.

Encoded pages travel, results are merged in float32. Each transfer is under way while something else
is attended: queries and the first tile of keys while the own keys are, every further tile while the
one before it is.

Source: Ring Attention, https://arxiv.org/abs/2310.01889. Differs: pages go from their rank straight
to each other one, not from neighbour to neighbour: as many bytes, and no rank waits for two others.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from longctx.attention.backend import AttentionBackend, AttentionPlan
from longctx.attention.merge import merge, merge_sink
from longctx.kv.memory import KVMemory
from longctx.model.call_recorder import RecordedCall
from longctx.model.layer_attention import AttentionCall
from longctx.ring.step import GroupStep, RankStep, Round, Rows
from longctx.ring.transport import Transfer, Transport


@dataclass(frozen=True, slots=True)
class _Passing:
    """A `Round`, ready for every layer of its group."""

    round: Round
    sends: Tensor | slice
    receives: Tensor | slice
    kept: Tensor  # [pages, 2]
    plan: AttentionPlan | None


@dataclass(frozen=True, slots=True)
class _UnderWay:
    passing: _Passing
    transfer: Transfer
    arriving: Tensor  # [pages, page_bytes]: the pages themselves where they lie side by side


@dataclass(frozen=True, slots=True)
class _Group:
    """A `GroupStep`, ready for every layer of its group."""

    gathers: tuple[_Passing, ...]
    local: AttentionPlan | None
    asks: tuple[tuple[int, Tensor], ...]  # rank, rows
    answers: tuple[tuple[int, int], ...]  # rank, how many rows
    guests: AttentionPlan | None
    rounds: tuple[_Passing, ...]


@dataclass(frozen=True, slots=True)
class _Results:
    """Of rows that other ranks attend."""

    transfer: Transfer
    parts: list[tuple[Tensor, Tensor, Tensor]]  # rows, out, lse


class RankAttention:
    """A `LayerAttention` over all ranks, which go through the same layers in the same order."""

    def __init__(
        self,
        step: RankStep,
        memory: KVMemory,
        backend: AttentionBackend,
        transport: Transport,
        calls: Sequence[RecordedCall],
    ) -> None:
        self._memory = memory
        self._backend = backend
        self._transport = transport
        self._calls = calls
        self.waited_seconds = 0.0  # for what other ranks sent
        self._slots = self._indices(step.slots)
        self._seals = len(step.sealed_raw) > 0
        self._sealed_raw = self._indices(step.sealed_raw)
        self._sealed_packed = [self._indices(pages) for pages in step.sealed_packed]
        self._groups = [self._group(each, group) for group, each in enumerate(step.groups)]
        self._last_layer = max(memory.group_of)
        self._last = self._group(step.last, memory.group_of[self._last_layer])

    def attend(self, call: AttentionCall, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        self._memory.write(call.layer, self._slots, key, value)
        if self._seals:
            packed = self._sealed_packed[self._memory.group_of[call.layer]]
            self._backend.seal(call.layer, self._sealed_raw, packed)
        out, lse = self._over_ranks(call, query)
        if call.sinks is not None:
            out, lse = merge_sink(out, lse, call.sinks)
        return out.to(query.dtype)

    def serve(self, layer: int) -> None:
        """The layer, of a rank that has no rows."""
        recorded = self._calls[layer]
        self._over_ranks(recorded.call, recorded.query[:0])

    def _over_ranks(self, call: AttentionCall, query: Tensor) -> tuple[Tensor, Tensor]:
        layer = call.layer
        last = layer == self._last_layer
        group = self._last if last else self._groups[self._memory.group_of[layer]]
        for gathered in [self._begin(layer, passing) for passing in group.gathers]:
            self._end(layer, gathered)
        asking, guests = self._ask(layer, group, query)
        rounds = iter(group.rounds)
        coming = self._begin_next(layer, rounds)
        out, lse = self._attend(call, query, group.local)
        results = self._answer(call, group, asking, guests)
        while coming is not None:
            arrived = coming
            self._end(layer, arrived)
            coming = self._begin_next(layer, rounds)
            if arrived.passing.plan is not None:
                here = self._attend(call, query, arrived.passing.plan)
                out, lse = merge(out, lse, *here)
        self._wait(results.transfer)
        for rows, their_out, their_lse in results.parts:
            out[rows], lse[rows] = merge(out[rows], lse[rows], their_out, their_lse)
        return out, lse

    def _attend(
        self, call: AttentionCall, query: Tensor, plan: AttentionPlan | None
    ) -> tuple[Tensor, Tensor]:
        if plan is None:
            out = torch.zeros(query.shape, dtype=torch.float32, device=query.device)
            return out, torch.full(query.shape[:2], -torch.inf, device=query.device)
        return self._backend.attend(call, query, plan)

    def _wait(self, transfer: Transfer) -> None:
        began = time.perf_counter()
        transfer.wait()
        self.waited_seconds += time.perf_counter() - began

    # -- keys ------------------------------------------------------------------------------------

    def _begin_next(self, layer: int, rounds: Iterator[_Passing]) -> _UnderWay | None:
        passing = next(rounds, None)
        return None if passing is None else self._begin(layer, passing)

    def _begin(self, layer: int, passing: _Passing) -> _UnderWay:
        pool = self._memory.packed_pages(layer)
        if isinstance(passing.receives, slice):
            arriving = pool[passing.receives]
        else:
            arriving = pool.new_empty(len(passing.receives), pool.shape[1])
        sends, receives = [], []
        if len(passing.round.sends):
            sends.append((passing.round.target, pool[passing.sends]))
        if len(arriving):
            receives.append((passing.round.source, arriving))
        return _UnderWay(passing, self._transport.begin(sends, receives), arriving)

    def _end(self, layer: int, under_way: _UnderWay) -> None:
        """What was under way is in its pages, and what stays on this rank where it belongs."""
        self._wait(under_way.transfer)
        passing = under_way.passing
        words = self._memory.packed_pages(layer).view(torch.int64)
        if not isinstance(passing.receives, slice):
            words[passing.receives] = under_way.arriving.view(torch.int64)
        if len(passing.kept):
            words[passing.kept[:, 1]] = words[passing.kept[:, 0]]

    # -- queries ---------------------------------------------------------------------------------

    def _ask(self, layer: int, group: _Group, query: Tensor) -> tuple[Transfer, Tensor]:
        """Queries on their way, and those that come: [rows of all who ask, heads, head_dim]."""
        rows = sum(count for _, count in group.answers)
        guests = query.new_empty(rows, *query.shape[1:])
        counts = [count for _, count in group.answers]
        receives = zip((rank for rank, _ in group.answers), _split(guests, counts), strict=True)
        sends = [(rank, query.index_select(0, asked)) for rank, asked in group.asks]
        return self._transport.begin(sends, list(receives)), guests

    def _answer(
        self, call: AttentionCall, group: _Group, asking: Transfer, guests: Tensor
    ) -> _Results:
        """Attend the rows of others; the results are on their way, and those of the own rows."""
        self._wait(asking)
        sends: list[tuple[int, Tensor]] = []
        if group.guests is not None:
            out, lse = self._attend(call, guests, group.guests)
            counts = [count for _, count in group.answers]
            for (rank, _), part, part_lse in zip(
                group.answers, _split(out, counts), _split(lse, counts), strict=True
            ):
                sends += [(rank, part), (rank, part_lse)]
        receives: list[tuple[int, Tensor]] = []
        parts = []
        for rank, rows in group.asks:
            shape = (len(rows), *guests.shape[1:])
            out = torch.empty(shape, dtype=torch.float32, device=guests.device)
            lse = torch.empty(shape[:2], dtype=torch.float32, device=guests.device)
            receives += [(rank, out), (rank, lse)]
            parts.append((rows, out, lse))
        return _Results(self._transport.begin(sends, receives), parts)

    # -- plans -----------------------------------------------------------------------------------

    def _group(self, step: GroupStep, group: int) -> _Group:
        asks, answers = step.queries.asks, step.queries.answers
        return _Group(
            gathers=tuple(self._passing(each, group) for each in step.gathers),
            local=self._plan(step.local, group),
            asks=tuple((r, self._tensor(rows)) for r, rows in enumerate(asks) if len(rows)),
            answers=tuple((r, rows) for r, rows in enumerate(answers) if rows),
            guests=self._plan(step.queries.rows, group),
            rounds=tuple(self._passing(each, group) for each in step.rounds),
        )

    def _passing(self, each: Round, group: int) -> _Passing:
        return _Passing(
            each,
            self._indices(each.sends),
            self._indices(each.receives),
            self._tensor(each.kept),
            self._plan(each.rows, group),
        )

    def _plan(self, rows: Sequence[Rows], group: int) -> AttentionPlan | None:
        return self._backend.plan([each.chunk(group) for each in rows], group) if rows else None

    def _tensor(self, array: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(array).to(self._memory.device, non_blocking=True)

    def _indices(self, array: NDArray[np.int64]) -> Tensor | slice:
        """A slice where they follow each other: used in place."""
        if len(array) and bool((np.diff(array) == 1).all()):
            return slice(int(array[0]), int(array[-1]) + 1)
        return self._tensor(array)


def _split(rows: Tensor, counts: Sequence[int]) -> list[Tensor]:
    return list(torch.split(rows, list(counts)))
