"""Moves KV blocks between the device and the tiers below: written through, and loaded back.

Down: the blocks of documents and of long or repeated prompts are offered to the store as they are
sealed, an extent at a time; windows at checkpoints. Up: what a waiting prompt lacks and a lower
tier has is read into fresh pages, while others run. Pages are pinned as long as a transfer needs
them. Nothing here waits: `poll` takes note, once a step, of what has happened meanwhile.
"""

import time
from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass

from compress.shape import BLOCK_TOKENS
from longctx.kv.found_tokens import note_load
from longctx.kv.memory import KVMemory
from longctx.kv.offload_state import Load
from longctx.kv.sequence_blocks import SequenceBlocks
from longctx.kv.transfer import PageTransfer, Transfer
from offload.block_run import EXTENT_BLOCKS, BlockRun, Slots
from offload.key import BlockKey
from offload.stats import Erased
from offload.store import Gone, KVStore, Late, Loaded, Written
from offload.tier_names import TierName

KEPT_PROMPT_TOKENS = 1024  # prompts from here on are stored at once, shorter ones when seen again
OVERDUE_SECONDS = 2.0  # a slow prefill stores parts of extents: a crash loses at most so much
# A preempted sequence whose blocks are on their way down is admitted when they are there, or then.
SPILL_SECONDS = 5.0
SPILLED_BYTES = 256 << 20  # copies on their way down; what is more is computed again
WINDOW_SHARE = 0.08  # bytes that window checkpoints may add, beside those where a prompt ends


@dataclass(slots=True, eq=False)
class _Write:
    """A run of blocks on its way down, and the pages that it pins."""

    sequence: SequenceBlocks
    run: BlockRun
    pages: list[int]
    slots: Slots
    ready: Callable[[], bool]
    cost_seconds: float
    retained: bool
    in_memory: bool = False
    copied_bytes: int = 0  # of copies, which pin nothing


class KVOffloader:
    """The engine's side of the store: decides what goes down and what comes up, and when.

    The engine's thread makes all calls, none of which waits for a disk: it offers and asks, and
    `poll`, once a step, tells what the store's threads have done since. Pages are pinned (acquired)
    for as long as a transfer reads or writes them.
    """

    def __init__(
        self,
        memory: KVMemory,
        store: KVStore,
        *,
        staged: bool,
        transfers: Items[Transfer] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`staged`: pages pass through copies, since threads cannot address the pool's memory.

        `transfers`: one of each group, where the pages do not all lie in this process.
        """
        self.store = store
        self._memory = memory
        self._transfers = transfers or [PageTransfer(pool, staged=staged) for pool in memory.packed]
        self._clock = clock
        self._seconds_per_token: float | None = None  # of prefill, as measured lately
        self._copying: list[_Write] = []  # to pinned memory, before they are offered
        self._writes: dict[int, _Write] = {}
        self._loads: dict[int, Load] = {}
        self._erasing: dict[int, str | None] = {}  # what the store deletes, by ticket
        self._copied_bytes = 0
        self.erased: dict[str, Erased] = {}  # what it has deleted; whoever reads this empties it

    @property
    def busy(self) -> bool:
        """Whether transfers are under way, so that `poll` will have something to tell."""
        return bool(self._copying or self._writes or self._loads or self._erasing)

    def transfers_of(self, source: str) -> int:
        """Count the transfers under way of prompts with that document or module."""
        writes = (*self._copying, *self._writes.values())
        return sum(write.sequence.has_source(source) for write in writes) + sum(
            source in load.sources for load in self._loads.values()
        )

    def poll(self) -> bool:
        """Take note of what was transferred; return whether pages were unpinned."""
        self._offer_copied()
        events = self.store.poll()
        for event in events:
            match event:
                case Written():
                    self._written(self._writes.pop(event.ticket))
                case Loaded():
                    self._loaded(self._loads.pop(event.ticket), event.found)
                case Late():
                    self._loads[event.ticket].ended = True
                case Gone():
                    owner = self._erasing.pop(event.ticket, None)
                    if owner is not None:
                        self.erased[owner] = event.erased
        return bool(events)

    def close(self, flush_seconds: float) -> None:
        """Write what was offered, as long as that may take, and end all transfers."""
        deadline = time.monotonic() + flush_seconds
        self.flush(max(0.0, deadline - time.monotonic()))
        self.store.close()

    def flush(self, seconds: float) -> None:
        """Wait, as long as that may take, until what was offered or deleted so far is done."""
        deadline = time.monotonic() + seconds
        while self._copying and time.monotonic() < deadline:
            self._offer_copied()
        self.store.flush(max(0.0, deadline - time.monotonic()))
        self.poll()

    # -- down -----------------------------------------------------------------------------------

    def on_admitted(self, sequence: SequenceBlocks, depth: int) -> None:
        """Decide how much of the sequence is worth storing; `depth` blocks of it were found."""
        for _, source in sequence.sources:
            self.store.use(source)
        prompt = sequence.layout.blocks(sequence.prompt_tokens)
        documents = max((end for end, _ in sequence.document_ends), default=0)
        own_tokens = sequence.prompt_tokens - documents
        seen_again = prompt if own_tokens >= KEPT_PROMPT_TOKENS else min(depth, prompt)
        if sequence.in_memory:
            seen_again = 0
        sequence.offload.store_until = max(sequence.blocks_until(documents), seen_again)
        if sequence.leaves:
            sequence.offload.store_until = 0
        if sequence.offload.streams:
            sequence.offload.store_until = prompt
        ingests = sequence.prefill_only
        known = 0 if sequence.prefix is None or ingests else sequence.prefix.blocks
        known = max(known, sequence.offload.absent)
        sequence.offload.stored = min(known, sequence.offload.store_until)
        sequence.offload.stored_seconds = self._clock()

    def on_computed(self, sequence: SequenceBlocks, num_tokens: int, seconds: float) -> None:
        """Note what its next tokens cost, and offer what they sealed.

        To be called while the windows before them are still held.
        """
        sequence.offload.prefill_seconds += seconds
        if num_tokens >= BLOCK_TOKENS and seconds:
            before, now = self._seconds_per_token, seconds / num_tokens
            self._seconds_per_token = now if before is None else 0.8 * before + 0.2 * now
        self._offer_sealed(sequence, all_of_it=False)

    def offer_all(self, sequence: SequenceBlocks) -> None:
        """Offer every sealed block that is worth storing, complete extent or not."""
        self._offer_sealed(sequence, all_of_it=True)

    def spill(self, sequence: SequenceBlocks) -> None:
        """Offer copies of the sealed blocks that no tier has, the answer's too, so that who is
        preempted computes only its last rows again; its pages are free at once.

        What a request keeps in memory goes no further than the host's. Of a closed document
        nothing is kept, and of pages that do not lie in this process there are no copies.
        """
        self.offer_all(sequence)
        end = sequence.layout.blocks(sequence.computed)
        begin = max(sequence.offload.stored, sequence.offload.absent)
        while begin < end and self.store.has(0, sequence.key(begin)):
            begin += 1
        nowhere = sequence.in_memory and not self.store.memory_tiers
        if begin >= end or sequence.leaves or nowhere:
            return
        first = begin
        runs: list[tuple[int, int, list[int]]] = []
        while begin < end:
            extent_end = min(end, (begin // EXTENT_BLOCKS + 1) * EXTENT_BLOCKS)
            for index, group in enumerate(self._memory.groups):
                if group.window is None:
                    pages = sequence.tables[index].pages(begin, extent_end)
                    runs.append((index, begin, pages))
            begin = extent_end
        runs += self._windows_before(sequence, end) or []
        if not runs:
            return
        sequence.offload.spilled_seconds = self._clock()
        seconds = (end - first) * BLOCK_TOKENS * (self._seconds_per_token or 0.0) / len(runs)
        for index, begin, pages in runs:
            self._spill_pages(sequence, index, begin, pages, seconds)
        self._offer_copied()

    def _spill_pages(
        self, sequence: SequenceBlocks, group: int, begin: int, pages: list[int], seconds: float
    ) -> None:
        size_bytes = len(pages) * sum(self._memory.packed[group].page_bytes)
        if not pages or self._copied_bytes + size_bytes > SPILLED_BYTES:
            return
        copies = self._transfers[group].copies(pages)
        if copies is None:
            return
        self._copied_bytes += size_bytes
        sequence.offload.spilling += 1
        run = self._run(sequence, group, begin, len(pages))
        self._copying.append(
            _Write(sequence, run, [], *copies, seconds, False, sequence.in_memory, size_bytes)
        )

    def is_spilling(self, sequence: SequenceBlocks) -> bool:
        """Whether its blocks are on their way down, so that it is better to wait than compute."""
        tier = sequence.offload
        return tier.spilling > 0 and self._clock() - tier.spilled_seconds < SPILL_SECONDS

    def _offer_sealed(self, sequence: SequenceBlocks, *, all_of_it: bool) -> None:
        """Offer complete extents, and others where a document ends or too much would wait.

        Say a document ends with block 40 and 37 blocks are sealed, 16 of them stored before:
        blocks 16 to 31 are offered, 32 to 36 wait until block 39 is sealed, for two seconds at
        most. With `all_of_it` 32 to 36 are offered too.
        """
        limit = min(sequence.offload.store_until, sequence.layout.blocks(sequence.computed))
        if sequence.offload.stored >= limit:
            return
        marks = {sequence.blocks_until(end) for end, _ in sequence.document_ends} | {
            sequence.offload.store_until
        }
        overdue = self._clock() - sequence.offload.stored_seconds > OVERDUE_SECONDS
        while sequence.offload.stored < limit:
            begin = sequence.offload.stored
            extent_end = (begin // EXTENT_BLOCKS + 1) * EXTENT_BLOCKS
            end = min([limit, extent_end, *(mark for mark in marks if mark > begin)])
            if end != extent_end and end not in marks and not overdue and not all_of_it:
                return
            self._offer_blocks(sequence, begin, end)
            at_mark = end in marks or (all_of_it and end == limit)
            self._offer_windows(sequence, end, always=at_mark)
            sequence.offload.stored = end
            sequence.offload.stored_seconds = self._clock()

    def _offer_blocks(self, sequence: SequenceBlocks, begin: int, end: int) -> None:
        for index, group in enumerate(self._memory.groups):
            if group.window is None:
                pages = sequence.tables[index].pages(begin, end)
                self._offer(sequence, index, begin, pages)
        sequence.offload.window_budget += WINDOW_SHARE * self._block_bytes() * (end - begin)

    def _block_bytes(self) -> int:
        """Return the bytes of one block in all groups: windows may add a share of that."""
        return self._memory.block_bytes or sum(sum(p.page_bytes) for p in self._memory.packed)

    def _offer_windows(self, sequence: SequenceBlocks, end: int, *, always: bool) -> None:
        """Offer the windows before block `end`, so that a prompt can continue there later.

        Unless `always`, only as far as the budget of such checkpoints allows.
        """
        checkpoint = self._windows_before(sequence, end)
        if checkpoint is None:
            return
        size_bytes = sum(
            len(pages) * sum(self._memory.packed[index].page_bytes)
            for index, _, pages in checkpoint
        )
        if always or size_bytes <= sequence.offload.window_budget:
            sequence.offload.window_budget = max(0.0, sequence.offload.window_budget - size_bytes)
            for index, begin, pages in checkpoint:
                self._offer(sequence, index, begin, pages)

    def _windows_before(
        self, sequence: SequenceBlocks, end: int
    ) -> list[tuple[int, int, list[int]]] | None:
        """Return group, first block and pages of each window before block `end`; None where one
        of them went by without being computed here."""
        windows: list[tuple[int, int, list[int]]] = []
        for index, group in enumerate(self._memory.groups):
            if group.window is None:
                continue
            begin = sequence.layout.first_needed(group.window, end)
            if begin < sequence.live_from[index]:
                return None
            windows.append((index, begin, sequence.tables[index].pages(begin, end)))
        return windows

    def _run(self, sequence: SequenceBlocks, group: int, begin: int, blocks: int) -> BlockRun:
        return BlockRun(
            namespace=sequence.namespace,
            group=group,
            first_block=begin,
            parent=sequence.parent(begin),
            keys=tuple(sequence.key(block) for block in range(begin, begin + blocks)),
            sources=sequence.sources_until(begin + blocks),
        )

    def _offer(self, sequence: SequenceBlocks, group: int, begin: int, pages: list[int]) -> None:
        run = self._run(sequence, group, begin, len(pages))
        if all(self.store.durable(group, key) for key in run.keys):
            return
        self._memory.packed[group].acquire(pages)
        slots, ready = self._transfers[group].outgoing(pages)
        cost, sequence.offload.prefill_seconds = sequence.offload.prefill_seconds, 0.0
        retained = bool(sequence.document_ends)
        sequence.offload.writing += 1
        self._copying.append(_Write(sequence, run, pages, slots, ready, cost, retained))
        self._offer_copied()

    def _offer_copied(self) -> None:
        while self._copying and self._copying[0].ready():
            write = self._copying.pop(0)
            ticket = self.store.offer(
                write.run,
                write.slots,
                cost_seconds=write.cost_seconds,
                retained=write.retained,
                in_memory=write.in_memory,
            )
            self._writes[ticket] = write

    def _written(self, write: _Write) -> None:
        pool = self._memory.packed[write.run.group]
        pool.release(write.pages)
        if write.copied_bytes:
            self._copied_bytes -= write.copied_bytes
            write.sequence.offload.spilling -= 1
        else:
            write.sequence.offload.writing -= 1

    def erase(self, owner: str, *, sources: bool) -> list[BlockKey]:
        """Have the store delete what it has of an owner, as `KVStore.delete`; return its keys.

        With `sources`, `erased` has the result, once `poll` has seen it.
        """
        ticket, keys = self.store.delete(owner, sources=sources)
        self._erasing[ticket] = owner if sources else None
        return keys

    # -- up -------------------------------------------------------------------------------------

    def load(
        self,
        sequence: SequenceBlocks,
        depth: int,
        target: int,
        page_of: Callable[[SequenceBlocks, int, int], int | None],
    ) -> bool:
        """Begin to read what the sequence lacks between two depths, if that beats computing it.

        `page_of(sequence, group, block)` is the page of a block that the device has. There must be
        room for all blocks up to `target`. Returns whether a load began.
        """
        wanted: list[tuple[int, list[int]]] = []
        held: list[list[int]] = []
        for index, group in enumerate(self._memory.groups):
            begin = sequence.layout.first_needed(group.window, target)
            if group.window is None and sequence.offload.streams:
                begin = target
            elif group.window is None and sequence.prefix is not None:
                begin = min(sequence.prefix.blocks, target)
            pages = [page_of(sequence, index, block) for block in range(begin, target)]
            held.append([page for page in pages if page is not None])
            missing = [block for block, page in enumerate(pages, begin) if page is None]
            wanted.append((index, missing))
        tiers = [
            [self.store.tier_of(group, sequence.key(block)) for block in missing]
            for group, missing in wanted
        ]
        if not self._worth_loading(tiers, target - depth):
            return False
        windows_only = self._memory.groups[0].window is not None
        note_load(sequence, depth, wanted[0][1], tiers[0], windows_only=windows_only)
        for pool, there in zip(self._memory.packed, held, strict=True):
            pool.acquire(there)  # first, or the fresh pages might be these
        parts: list[tuple[int, tuple[BlockKey, ...], list[int], Slots]] = []
        parents: list[list[BlockKey]] = []
        for index, missing in wanted:
            if missing:
                fresh = self._memory.allocate(index, missing)
                slots = self._transfers[index].incoming(fresh)
                keys = tuple(sequence.key(block) for block in missing)
                parts.append((index, keys, fresh, slots))
                parents.append([sequence.parent(block) for block in missing])
        sources = sequence.sources_until(target)
        load = sequence.offload.load = Load(depth, held, parts, parents, sources)
        sequence.offload.loads += 1
        ticket = self.store.load([(group, keys, slots) for group, keys, _, slots in parts], sources)
        self._loads[ticket] = load
        return True

    def _worth_loading(self, tiers: Items[Items[TierName | None]], blocks: int) -> bool:
        """Whether reading blocks from these tiers, by group, takes less time than computing
        `blocks` blocks.

        Each block is read at the speed of the tier that has it. Where a speed is unknown, reading
        is worth it: it is how the speed becomes known.
        """
        if self._seconds_per_token is None:
            return True
        sizes: Counter[TierName] = Counter()
        for pool, places in zip(self._memory.packed, tiers, strict=True):
            for tier, count in Counter(places).items():
                if tier is not None:
                    sizes[tier] += count * sum(pool.page_bytes)
        read_seconds = self.store.read_seconds(sizes)
        if read_seconds is None:
            return True
        return read_seconds < blocks * BLOCK_TOKENS * self._seconds_per_token

    def read_layer(self, layer: int, keys: Items[BlockKey], pages: Items[int]) -> bool:
        """Fill packed pages of one global layer, waiting for it; whether every block was there."""
        (slot,) = [i for i, own in enumerate(self._memory.groups[0].layers) if own == layer]
        return self._transfers[0].fetch(
            slot, pages, lambda slots: all(self.store.read(0, keys, slots))
        )

    def leave(self, load: Load) -> None:
        """End a load: its sequence holds what it needs itself now, or needs it no more."""
        load.abandoned = True
        for pool, pages in zip(self._memory.packed, load.held, strict=True):
            pool.release(pages)
        if load.arrived:
            self._release_parts(load)

    def _loaded(self, load: Load, found: Items[Items[bool]]) -> None:
        for part, parents, there in zip(load.parts, load.parents, found, strict=True):
            group, keys, pages, slots = part
            self._transfers[group].arrived(slots, pages)
            pool = self._memory.packed[group]
            for key, parent, page, is_there in zip(keys, parents, pages, there, strict=True):
                if is_there:
                    pool.publish(page, key, parent=parent, sources=load.sources)
        load.ended = load.arrived = True
        if load.abandoned:
            self._release_parts(load)

    def _release_parts(self, load: Load) -> None:
        for group, _, pages, _ in load.parts:
            self._memory.packed[group].release(pages)
