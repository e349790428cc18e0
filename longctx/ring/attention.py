"""One rank's attention in one step: to its own pages, to pages that arrive, and for other ranks.

Pages travel as the codec encoded them; results are merged in float32. Each transfer runs while
something else is attended: queries and the first tile of pages while this rank attends to its own
pages, every further tile while the one before it is attended.

Source: Ring Attention, https://arxiv.org/abs/2310.01889. Differs: each rank sends its pages
directly to every other rank instead of relaying what its neighbor sent. As many bytes travel, and
no rank waits for two others.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longctx.attention.backend import AttentionBackend, AttentionPlan
from longctx.attention.merge import merge, merge_sink
from longctx.kv.memory import KVMemory
from longctx.kv.pool_indices import PoolIndices, pool_indices, to_device
from longctx.model.call_recorder import RecordedCall
from longctx.model.layer_attention import AttentionCall, Place
from longctx.ring.step import GroupRows, GroupStep, RankStep, Round
from longctx.ring.transport import Transfer, Transport


@dataclass(frozen=True, slots=True)
class _PreparedRound:
    """A `Round` with what every layer of its group needs of it, on the device."""

    round: Round
    sends: PoolIndices
    receives: PoolIndices
    staged_to_owned: Tensor  # [pages, 2]
    plan: AttentionPlan | None


@dataclass(frozen=True, slots=True)
class _RoundInFlight:
    prepared: _PreparedRound
    transfer: Transfer
    arriving: Tensor  # [pages, page_bytes]: the pool's own memory where the pages are contiguous


@dataclass(frozen=True, slots=True)
class _PreparedGroup:
    """A `GroupStep` with what every layer of its group needs of it, on the device."""

    all_gather: tuple[_PreparedRound, ...]
    local: AttentionPlan | None
    sent_rows: tuple[tuple[int, Tensor], ...]  # rank, rows
    received_counts: tuple[tuple[int, int], ...]  # rank, how many rows
    remote: AttentionPlan | None  # of the rows that other ranks send
    rounds: tuple[_PreparedRound, ...]


@dataclass(frozen=True, slots=True)
class _RemoteResults:
    """Results of this rank's rows that other ranks attend, on their way here."""

    transfer: Transfer
    parts: list[tuple[Tensor, Tensor, Tensor]]  # rows, out, lse


class RankAttention:
    """A `LayerAttention` over all ranks, for one step.

    Every rank calls it for the same layers in the same order, from the one thread of its `Rank`:
    `attend` if it has rows, else `attend_without_rows`. Each call sends to and waits for the other
    ranks. Both raise PeerLost.
    """

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
        self.wait_seconds = 0.0  # for what other ranks sent
        self._slots = pool_indices(step.slots, self._memory.device)
        self._seals = len(step.sealed_raw) > 0
        self._sealed_raw = pool_indices(step.sealed_raw, self._memory.device)
        self._sealed_packed = [
            pool_indices(pages, self._memory.device) for pages in step.sealed_packed
        ]
        self._groups = [self._group(each, group) for group, each in enumerate(step.groups)]
        self._placed = -1  # the layer whose keys and values are there
        self._last_layer = max(memory.group_of)
        self._last_group = self._group(step.last_layer, memory.group_of[self._last_layer])

    def place(self, layer: int) -> Place:
        self._placed = layer
        return Place(self._memory.raw_rows(layer), self._slots)

    def by_kernels(self) -> None:
        return None

    def attend(self, call: AttentionCall, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """As `LayerAttention.attend`: write and seal the rows' KV, then attend over all ranks."""
        if self._placed != call.layer:
            self._memory.write(call.layer, self._slots, key, value)
        if self._seals:
            packed = self._sealed_packed[self._memory.group_of[call.layer]]
            self._backend.seal(call.layer, self._sealed_raw, packed)
        out, lse = self._over_ranks(call, query)
        if call.sinks is not None:
            out, lse = merge_sink(out, lse, call.sinks)
        return out.to(query.dtype)

    def attend_without_rows(self, layer: int) -> None:
        """Take part in the layer on a rank that has no rows: send pages, attend others' rows."""
        recorded = self._calls[layer]
        self._over_ranks(recorded.call, recorded.query[:0])

    def _over_ranks(self, call: AttentionCall, query: Tensor) -> tuple[Tensor, Tensor]:
        """Attend the rows to all keys, wherever they are.

        `query` [rows, heads, head_dim] -> out and lse as `AttentionBackend.attend` returns them.
        With two rounds of pages, each line starts a transfer and attends meanwhile:

            send queries, start round 0    attend own rows to own pages
            wait for others' queries       attend them, send their results back
            wait for round 0, start 1      attend own rows to its pages
            wait for round 1               attend own rows to its pages
            wait for own rows' results     merge them
        """
        layer = call.layer
        group = self._groups[self._memory.group_of[layer]]
        if layer == self._last_layer:
            group = self._last_group
        for gathering in [self._begin(layer, prepared) for prepared in group.all_gather]:
            self._end(layer, gathering)
        sending, remote_query = self._send_queries(group, query)
        rounds = iter(group.rounds)
        in_flight = self._begin_next(layer, rounds)
        out, lse = self._attend(call, query, group.local)
        results = self._return_results(call, group, sending, remote_query)
        while in_flight is not None:
            arrived = in_flight
            self._end(layer, arrived)
            in_flight = self._begin_next(layer, rounds)
            if arrived.prepared.plan is not None:
                here = self._attend(call, query, arrived.prepared.plan)
                out, lse = merge(out, lse, *here)
        self._wait(results.transfer)
        for rows, their_out, their_lse in results.parts:
            out[rows], lse[rows] = merge(out[rows], lse[rows], their_out, their_lse)
        return out, lse

    def _attend(
        self, call: AttentionCall, query: Tensor, plan: AttentionPlan | None
    ) -> tuple[Tensor, Tensor]:
        """Attend the plan's rows; out 0 and lse -inf where there is nothing to attend to."""
        if plan is None:
            out = torch.zeros(query.shape, dtype=torch.float32, device=query.device)
            return out, torch.full(query.shape[:2], -torch.inf, device=query.device)
        return self._backend.attend(call, query, plan)

    def _wait(self, transfer: Transfer) -> None:
        began = time.perf_counter()
        transfer.wait()
        self.wait_seconds += time.perf_counter() - began

    # -- pages -----------------------------------------------------------------------------------

    def _begin_next(self, layer: int, rounds: Iterator[_PreparedRound]) -> _RoundInFlight | None:
        prepared = next(rounds, None)
        return None if prepared is None else self._begin(layer, prepared)

    def _begin(self, layer: int, prepared: _PreparedRound) -> _RoundInFlight:
        pool = self._memory.packed_pages(layer)
        if isinstance(prepared.receives, slice):
            arriving = pool[prepared.receives]
        else:
            arriving = pool.new_empty(len(prepared.receives), pool.shape[1])
        sends, receives = [], []
        if len(prepared.round.sends):
            sends.append((prepared.round.target, pool[prepared.sends]))
        if len(arriving):
            receives.append((prepared.round.source, arriving))
        return _RoundInFlight(prepared, self._transport.begin(sends, receives), arriving)

    def _end(self, layer: int, in_flight: _RoundInFlight) -> None:
        """Wait for the round; then put what arrived into its pages and what is owned into place."""
        self._wait(in_flight.transfer)
        prepared = in_flight.prepared
        pages = self._memory.packed_pages(layer).view(torch.int64)  # eight bytes at a time
        if not isinstance(prepared.receives, slice):
            pages[prepared.receives] = in_flight.arriving.view(torch.int64)
        if len(prepared.staged_to_owned):
            pages[prepared.staged_to_owned[:, 1]] = pages[prepared.staged_to_owned[:, 0]]

    # -- queries ---------------------------------------------------------------------------------

    def _send_queries(self, group: _PreparedGroup, query: Tensor) -> tuple[Transfer, Tensor]:
        """Start to send queries, and to receive those of other ranks.

        Returns the transfer and where they arrive, [rows of all other ranks, heads, head_dim].
        """
        counts = [count for _, count in group.received_counts]
        remote_query = query.new_empty(sum(counts), *query.shape[1:])
        sources = [rank for rank, _ in group.received_counts]
        receives = list(zip(sources, _split(remote_query, counts), strict=True))
        sends = [(rank, query.index_select(0, rows)) for rank, rows in group.sent_rows]
        return self._transport.begin(sends, receives), remote_query

    def _return_results(
        self, call: AttentionCall, group: _PreparedGroup, sending: Transfer, remote_query: Tensor
    ) -> _RemoteResults:
        """Attend other ranks' rows once they are here; start to return their results.

        Starts to receive the results of this rank's rows, too.
        """
        self._wait(sending)
        sends: list[tuple[int, Tensor]] = []
        if group.remote is not None:
            out, lse = self._attend(call, remote_query, group.remote)
            counts = [count for _, count in group.received_counts]
            for (rank, _), part, part_lse in zip(
                group.received_counts, _split(out, counts), _split(lse, counts), strict=True
            ):
                sends += [(rank, part), (rank, part_lse)]
        receives: list[tuple[int, Tensor]] = []
        parts = []
        for rank, rows in group.sent_rows:
            shape = (len(rows), *remote_query.shape[1:])
            out = torch.empty(shape, dtype=torch.float32, device=remote_query.device)
            lse = torch.empty(shape[:2], dtype=torch.float32, device=remote_query.device)
            receives += [(rank, out), (rank, lse)]
            parts.append((rows, out, lse))
        return _RemoteResults(self._transport.begin(sends, receives), parts)

    # -- plans -----------------------------------------------------------------------------------

    def _group(self, step: GroupStep, group: int) -> _PreparedGroup:
        sent, counts = step.remote_queries.sent_rows, step.remote_queries.received_counts
        return _PreparedGroup(
            all_gather=tuple(self._round(each, group) for each in step.all_gather),
            local=self._plan(step.local, group),
            sent_rows=tuple(
                (r, to_device(rows, self._memory.device))
                for r, rows in enumerate(sent)
                if len(rows)
            ),
            received_counts=tuple((r, count) for r, count in enumerate(counts) if count),
            remote=self._plan(step.remote_queries.rows, group),
            rounds=tuple(self._round(each, group) for each in step.rounds),
        )

    def _round(self, each: Round, group: int) -> _PreparedRound:
        return _PreparedRound(
            round=each,
            sends=pool_indices(each.sends, self._memory.device),
            receives=pool_indices(each.receives, self._memory.device),
            staged_to_owned=to_device(each.staged_to_owned, self._memory.device),
            plan=self._plan(each.rows, group),
        )

    def _plan(self, rows: Sequence[GroupRows], group: int) -> AttentionPlan | None:
        return self._backend.plan([each.chunk(group) for each in rows], group) if rows else None


def _split(rows: Tensor, counts: Sequence[int]) -> list[Tensor]:
    return list(torch.split(rows, list(counts)))
