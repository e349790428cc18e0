"""From sequences to blocks: the scheduler's only door to memory.

A sequence is *admitted* with whatever of its prompt is in the pools already, gets pages chunk by
chunk from `allocate`, and after each step `commit` publishes what was sealed under its key.
Keys that are being computed are pending: who needs one of them waits for it. Blocks that nobody
holds stay findable until their room is needed; so do whole prefixes that nobody uses.
"""

import operator
from bisect import bisect_left
from collections.abc import Callable
from enum import Enum
from functools import partial

from longctx.kv.block_entry import PAGE
from longctx.kv.block_table import BlockTable
from longctx.kv.found_tokens import note_admitted
from longctx.kv.layout import CachedChain
from longctx.kv.memory import KVMemory
from longctx.kv.offloading import KVOffloader
from longctx.kv.prefix_index import PrefixIndex, PrefixName
from longctx.kv.prefix_match import Available, deepest
from longctx.kv.resident_prefixes import ResidentPrefixes
from longctx.kv.sequence_blocks import SequenceBlocks
from offload.block_run import EXTENT_BLOCKS
from offload.key import BlockKey
from offload.stats import Cleared
from offload.tier_names import TierName

MAX_LOADS = 2  # a tier that lists what it cannot read makes nobody wait for ever

NO_ROOM_BELOW = (
    "this context is larger than the device, and the tiers below it take no more of it; see "
    "--disk-cap-gib, --disk-free-gib and the space on the disk"
)


class Admission(Enum):
    """What came of an attempt to give a waiting sequence its memory."""

    ADMITTED = "admitted"
    WAITS = "waits"  # nothing has changed since it was refused or began to wait
    NEEDS_PREFIX = "needs_prefix"  # what it reuses is not resident; it is in `wanted` now
    NEEDS_OWNER = "needs_owner"  # another sequence is computing its next block
    NEEDS_LOAD = "needs_load"  # a lower tier is reading blocks for it
    NEEDS_ROOM = "needs_room"


class KVCacheManager:
    """Maps sequences to KV blocks: the scheduler's only door to memory.

    The order of calls for one sequence: `admit` until it is admitted, then for each step `allocate`
    before it and `commit` after it, at last `release`; `fork` between two steps. A sequence that
    ends while it waits goes through `leave_load` instead of `release`. The engine's thread makes
    all calls; `poll_transfers` takes note of what other threads have read and written.
    """

    def __init__(self, memory: KVMemory, offloader: KVOffloader | None = None) -> None:
        self.memory = memory
        self.offloader = offloader
        self.prefixes = PrefixIndex()
        self.resident_prefixes = ResidentPrefixes(memory, self.prefixes)
        # Chains that are not resident and that a waiting sequence reuses, with the sequence of the
        # highest priority that does: whoever reads this has them computed, and empties it.
        self.wanted: dict[PrefixName, tuple[CachedChain, SequenceBlocks]] = {}
        self._pending: dict[BlockKey, SequenceBlocks] = {}  # keys that are being computed, by whom
        self._releases = 0
        self.hits = self.misses = 0  # blocks of prompts that the device had, or had not

    @property
    def _changes(self) -> int:
        """A number that grows whenever room may have become free."""
        return self._releases + self.resident_prefixes.freed

    @property
    def can_stream(self) -> bool:
        """Whether contexts may be larger than the device: their old blocks are in a lower tier."""
        return self.offloader is not None and self.memory.can_stream

    # -- admission ------------------------------------------------------------------------------

    def admit(self, sequence: SequenceBlocks, *, spare_blocks: int) -> Admission:
        """Give the sequence what is cached of its prompt, or say why it has to wait.

        It waits for the blocks that another sequence is computing or a lower tier is reading, or
        until there is room for all of its tokens and `spare_blocks` more (one for each sequence
        that runs, whose open block may fill meanwhile).

        Say a prompt fills 10 blocks. The device has 0 to 3, another sequence is computing 4 and 5,
        the disk has 6 to 9. The first attempt finds depth 4, sees that the owner of block 4 also
        computes block 5, and waits until 5 is published (NEEDS_OWNER). The next one finds depth 6,
        makes room for the other 4 blocks, becomes their owner itself, and has the disk read them
        (NEEDS_LOAD). The third one finds depth 10 and computes only what follows (ADMITTED).
        """
        load = sequence.offload.load
        if (
            sequence.blocked_on in self._pending
            or sequence.refused_at == self._changes
            or (load is not None and not load.ended)
            or (self.offloader is not None and self.offloader.is_spilling(sequence))
        ):
            return Admission.WAITS
        if not self._acquire_prefixes(sequence):
            return Admission.NEEDS_PREFIX
        # A streaming sequence reads its past from the tiers: it must not hold all of a prefix.
        if not sequence.offload.streams:
            self._find_prefix(sequence)
        self.find_keys(sequence)
        limit, needed = sequence.reusable_blocks(), sequence.full_blocks()
        depth = self._depth(sequence, self._on_device(sequence))
        if sequence.trace is not None:
            sequence.trace.note([self.tier_of(sequence, 0, block) for block in range(limit)])
        if self._wait_for_owner(sequence, depth):
            return Admission.NEEDS_OWNER
        # First hold what is there, then let go of the load that brought it: in between nobody
        # could evict these blocks. Only then is it known how much room is missing.
        self._attach(sequence, depth)
        self.leave_load(sequence)
        missing = range(depth, min(needed, depth + self._most_held(sequence)))
        if not self.resident_prefixes.make_room(self.memory.pages_needed(missing, spare_blocks)):
            self._detach(sequence)
            sequence.refused_at = self._changes
            return Admission.NEEDS_ROOM
        # Pending before a load begins: whoever needs these blocks waits instead of reading twice.
        for block in range(depth, limit):
            self._pending[sequence.key(block)] = sequence
        if self._restore(sequence, depth):
            return Admission.NEEDS_LOAD
        if self.offloader is not None:
            self.offloader.on_admitted(sequence, depth)
        self.resident_prefixes.keep(sequence)
        note_admitted(sequence, depth, partial(self.tier_of, sequence, 0))
        # What a load brought counts as a miss of the device, though it is there now.
        found = depth if load is None else load.begin
        self.hits += found + sum(len(reused.blocks) for reused in sequence.layout.reused)
        self.misses += needed - found
        return Admission.ADMITTED

    def _acquire_prefixes(self, sequence: SequenceBlocks) -> bool:
        """Acquire every prefix that the prompt reuses; if one is not resident, acquire none, queue
        those that are not in `wanted`, and return False."""
        chains = sequence.layout.chains
        absent = [chain for chain in chains if chain.name not in self.prefixes]
        for chain in absent:
            wanted = self.wanted.setdefault(chain.name, (chain, sequence))
            if sequence.preemption_key < wanted[1].preemption_key:
                self.wanted[chain.name] = (chain, sequence)
        if not absent:
            sequence.reused_prefixes = tuple(self.prefixes.take(chain.name) for chain in chains)
        return not absent

    def _wait_for_owner(self, sequence: SequenceBlocks, depth: int) -> bool:
        """If another sequence is computing block `depth`, mark this one as waiting for it.

        Returns whether it waits. It then holds nothing.
        """
        limit = sequence.reusable_blocks()
        owner = self._pending.get(sequence.key(depth)) if depth < limit else None
        if owner is None or owner is sequence:
            return False
        # Until the last one that they share: looking again after each step would cost more.
        last = depth
        while last + 1 < limit and self._pending.get(sequence.key(last + 1)) is owner:
            last += 1
        sequence.blocked_on = sequence.key(last)
        self.resident_prefixes.leave(sequence)
        return True

    def computed_by(self, sequence: SequenceBlocks) -> SequenceBlocks | None:
        """Return the sequence that computes the blocks which this one waits for, if any."""
        return None if sequence.blocked_on is None else self._pending.get(sequence.blocked_on)

    def expected_tokens(self, sequence: SequenceBlocks) -> int:
        """Estimate how many tokens of a waiting sequence it will not compute itself.

        Those are in some tier, or another sequence computes them. It takes the logarithm of their
        number: whoever has a block is taken to have all before it.
        """
        self.find_keys(sequence)
        blocks = range(sequence.reusable_blocks())

        def missing(block: int) -> bool:
            in_tier = self.tier_of(sequence, 0, block) is not None
            return not in_tier and sequence.key(block) not in self._pending

        if blocks and not missing(blocks[-1]):
            return sequence.layout.tokens(len(blocks))
        return sequence.layout.tokens(bisect_left(blocks, True, key=missing))

    def _find_prefix(self, sequence: SequenceBlocks) -> None:
        for _, name in reversed(sequence.document_ends):
            prefix = self.prefixes.get(name)
            # A prompt that ends with the document computes its last block again: a prefix that
            # holds this block as well could leave no room for it.
            if prefix is not None and prefix.blocks <= sequence.reusable_blocks():
                self.prefixes.acquire(prefix)
                sequence.prefix = prefix
                return

    def find_keys(self, sequence: SequenceBlocks) -> None:
        """Name all full blocks of the tokens so far; the keys of documents are known already."""
        for _, name in reversed(sequence.document_ends):
            if sequence.known_keys == 0:
                sequence.base_keys = self.prefixes.known_keys(name)
        sequence.extend_keys()

    def _depth(self, sequence: SequenceBlocks, available: Available) -> int:
        """Return the depth in blocks at which the prompt can continue, given what is available."""
        begin = 0 if sequence.prefix is None else sequence.prefix.blocks
        limit = sequence.reusable_blocks()
        return deepest(self.memory.groups, sequence.layout, available, begin=begin, limit=limit)

    def _on_device(self, sequence: SequenceBlocks) -> Available:
        """Say which blocks the sequence can use at once; a streaming one those that are stored."""
        windowed = [group.window is not None for group in self.memory.groups]

        def available(group: int, block: int) -> bool:
            if sequence.offload.streams and not windowed[group]:
                return self._is_stored(sequence, block)
            return self._page(sequence, group, block) is not None

        return available

    def _is_stored(self, sequence: SequenceBlocks, block: int) -> bool:
        return self.offloader is not None and self.offloader.store.has(0, sequence.key(block))

    def _most_held(self, sequence: SequenceBlocks) -> int:
        """Return how many blocks the sequence holds at once while it is computed."""
        return self.memory.step_blocks if sequence.offload.streams else self.memory.capacity_blocks

    def _page(self, sequence: SequenceBlocks, group: int, block: int) -> int | None:
        """Return the packed page that holds a block of the sequence's prompt, if one does."""
        prefix = sequence.prefix
        if prefix is not None and prefix.window_begin[group] <= block < prefix.blocks:
            return int(prefix.tables[group][block, PAGE])
        return self.memory.packed[group].lookup(sequence.key(block))

    def tier_of(self, sequence: SequenceBlocks, group: int, block: int) -> TierName | None:
        """Return the fastest tier that has a block of the sequence's prompt, or None."""
        if self._page(sequence, group, block) is not None:
            return "device"
        return (
            None
            if self.offloader is None
            else self.offloader.store.tier_of(group, sequence.key(block))
        )

    def _attach(self, sequence: SequenceBlocks, depth: int) -> None:
        """Fill the sequence's block tables with its first `depth` blocks and all that it reuses.

        It acquires each page that no prefix holds for it; `live_from` is the first of those.
        """
        prefix, layout = sequence.prefix, sequence.layout
        reused_prefixes = {each.name: each for each in sequence.reused_prefixes}
        tables, live_from = [], []
        for index, group in enumerate(self.memory.groups):
            entries = layout.table(depth)
            begin = layout.first_needed(group.window, depth)
            if group.window is None and prefix is not None:
                begin = min(prefix.blocks, depth)
                entries[:begin] = prefix.tables[index][:begin]
            if group.window is None and sequence.offload.streams:
                begin = sequence.offload.absent = depth
            found = [self._page(sequence, index, block) for block in range(begin, depth)]
            held = [page for page in found if page is not None]
            assert len(held) == len(found)
            entries[layout.own(begin, depth), PAGE] = held
            self.memory.packed[index].acquire(held)
            for reused in layout.reused:
                rows = reused.entries(reused_prefixes[reused.chain.name].tables[index])
                entries[reused.entry : reused.entry + len(rows)] = rows
            tables.append(BlockTable(layout, entries, depth))
            live_from.append(begin)
        sequence.tables, sequence.live_from = tuple(tables), live_from
        sequence.computed = layout.tokens(depth)
        sequence.blocked_on = None

    # -- lower tiers ------------------------------------------------------------------------------

    def poll_transfers(self) -> bool:
        """Take note of what was read and written below; return whether there was anything."""
        changed = self.offloader is not None and self.offloader.poll()
        self._releases += changed
        return changed

    def _restore(self, sequence: SequenceBlocks, depth: int) -> bool:
        """Begin to load what a lower tier has of the prompt beyond `depth`; whether it does.

        The sequence was just attached at `depth`. If it waits, it keeps only what the load holds
        for it, and stays the owner of its pending blocks.
        """
        if self.offloader is None or sequence.offload.loads == MAX_LOADS:
            return False
        target = self._depth(sequence, self._anywhere(sequence))
        if target == depth or not self.offloader.load(sequence, depth, target, self._page):
            return False
        self._let_go(sequence)
        return True

    def leave_load(self, sequence: SequenceBlocks) -> None:
        """Drop the sequence's reference to its load, after attaching the blocks or on abort."""
        load = sequence.offload.load
        if self.offloader is not None and load is not None:
            sequence.offload.load = None
            self._no_longer_pending(sequence, load.begin)
            self.offloader.leave(load)
            self._releases += 1

    def _anywhere(self, sequence: SequenceBlocks) -> Available:
        """Say which blocks the device or a lower tier has."""
        assert self.offloader is not None
        store = self.offloader.store

        def available(group: int, block: int) -> bool:
            there = self._page(sequence, group, block) is not None
            return there or store.has(group, sequence.key(block))

        return available

    # -- steps ----------------------------------------------------------------------------------

    def allocate(self, sequence: SequenceBlocks, num_tokens: int) -> bool:
        """Allocate pages for the sequence's next `num_tokens` tokens; none, and False, for want of
        room.

        With 130 tokens computed the open block 2 has a raw page. 100 more tokens fill blocks 2
        and begin 3: one packed page per layer group, for block 2, and one raw page, for block 3.
        """
        layout = sequence.layout
        first = layout.blocks(sequence.computed)
        end = sequence.computed + num_tokens
        sealed = range(first, layout.blocks(end))
        if sealed and not self._make_room(sequence, sealed):
            return False
        for group, table in enumerate(sequence.tables):
            for block, page in zip(sealed, self.memory.allocate(group, sealed), strict=True):
                begin = layout.tokens(block)
                rows = layout.tokens(block + 1) - begin
                table.append(page, rows=rows, first_position=layout.position(begin))
        touched = range(first, layout.blocks(end - 1) + 1)
        new = [block for block in touched if block not in sequence.own_pages]
        # The raw pool holds the largest possible batch, so this cannot fail.
        sequence.own_pages.update(zip(new, self.memory.raw.allocate(len(new)), strict=True))
        return True

    def _make_room(self, sequence: SequenceBlocks, sealed: range) -> bool:
        needed = self.memory.pages_needed(sealed)
        if not self.resident_prefixes.make_room(needed) and sequence.offload.streams:
            self._stream_out(sequence, len(sealed))
        return self.resident_prefixes.make_room(needed)

    def _stream_out(self, sequence: SequenceBlocks, blocks: int) -> None:
        """Release the oldest blocks of a streaming sequence, as far as they are stored below."""
        tier = sequence.offload
        begin = tier.absent
        end = min(begin + blocks, tier.store_until, sequence.layout.blocks(sequence.computed))
        while tier.absent < end and self._is_stored(sequence, tier.absent):
            tier.absent += 1
        self.memory.packed[0].release(sequence.tables[0].pages(begin, tier.absent))
        sequence.live_from[0] = tier.absent
        if begin == tier.absent < end and not tier.writing:
            assert self.offloader is not None
            self.offloader.offer_all(sequence)  # its extent was not complete
            if not tier.writing:
                tier.failure = NO_ROOM_BELOW

    def commit(self, sequence: SequenceBlocks, num_tokens: int, seconds: float = 0.0) -> None:
        """Publish what the step sealed, and release what has left the windows.

        `seconds`: what computing these tokens took.
        """
        first = sequence.layout.blocks(sequence.computed)
        sequence.computed += num_tokens
        end = sequence.layout.blocks(sequence.computed)
        if first == end:
            return
        sequence.extend_keys()
        for block in range(first, end):
            key, entry = sequence.key(block), sequence.layout.entry(block)
            sources = sequence.sources_until(block + 1)
            for pool, table in zip(self.memory.packed, sequence.tables, strict=True):
                page = int(table.entries[entry, PAGE])
                pool.publish(page, key, parent=sequence.parent(block), sources=sources)
            self.memory.raw.release([sequence.own_pages.pop(block)])
            if self._pending.get(key) is sequence:
                del self._pending[key]
        self.resident_prefixes.keep(sequence)
        if self.offloader is not None:
            self.offloader.on_computed(sequence, num_tokens, seconds)
        self._slide_windows(sequence)

    def fork(self, parent: SequenceBlocks, child: SequenceBlocks) -> None:
        """Give `child` what `parent` has: the sealed blocks shared, a copy of the open one."""
        child.tables = tuple(table.fork() for table in parent.tables)
        child.live_from = list(parent.live_from)
        child.base_keys, child.tail_keys = parent.base_keys, list(parent.tail_keys)
        child.computed = parent.computed
        child.offload.streams, child.offload.absent = parent.offload.streams, parent.offload.absent
        for pool, held in zip(self.memory.packed, child.held_pages, strict=True):
            pool.acquire(held)
        if parent.prefix is not None:
            self.prefixes.acquire(parent.prefix)
            child.prefix = parent.prefix
        for prefix in parent.reused_prefixes:
            self.prefixes.acquire(prefix)
        child.reused_prefixes = parent.reused_prefixes
        for block, page in parent.own_pages.items():
            (copy,) = self.memory.raw.allocate(1)
            self.memory.copy_raw(block, page, copy)
            child.own_pages[block] = copy

    def release(self, sequence: SequenceBlocks) -> None:
        """Release the sequence's memory. Sealed blocks stay cached: it may be admitted again."""
        if self.offloader is not None:
            self.offloader.offer_all(sequence)
            sequence.offload.loads = 0
        self._detach(sequence)
        self._releases += 1

    def preempt(self, sequence: SequenceBlocks) -> None:
        """Release the memory of a sequence that will go on: its sealed blocks are kept below."""
        if self.offloader is not None:
            self.offloader.spill(sequence)
        self.release(sequence)

    def _detach(self, sequence: SequenceBlocks) -> None:
        """Undo `_attach`; blocks that it was to compute are nobody's now."""
        self._no_longer_pending(sequence, sequence.layout.blocks(sequence.computed))
        self._let_go(sequence)

    def _no_longer_pending(self, sequence: SequenceBlocks, begin: int) -> None:
        for block in range(begin, sequence.known_keys):
            if self._pending.get(sequence.key(block)) is sequence:
                del self._pending[sequence.key(block)]

    def _let_go(self, sequence: SequenceBlocks) -> None:
        if sequence.tables:
            for pool, held in zip(self.memory.packed, sequence.held_pages, strict=True):
                pool.release(held)
        self.memory.raw.release(list(sequence.own_pages.values()))
        sequence.own_pages.clear()
        sequence.tables = ()
        sequence.computed = sequence.offload.absent = 0
        sequence.blocked_on = None
        self.resident_prefixes.leave(sequence)

    def close_document(self, document_id: str) -> None:
        """Hold the document whole no longer; its blocks stay cached until `erase`."""
        self.resident_prefixes.close_document(document_id)

    def erase(self, owner: str, *, sources: bool = True) -> Cleared:
        """Delete what stems from a closed document or module from the device and all tiers.

        What others own stays. Without `sources` only what the owner retained goes, and what
        follows it. Nothing that runs may need it any more: what is held is not found again. Returns
        how much the device had; the tiers below are done when `KVOffloader.erased` says so.
        """
        if self.offloader is None:
            owned = {
                key for name in self.prefixes.names() for key in self.prefixes.known_keys(name)
            }
            keys: list[BlockKey] = []
            is_owned: Callable[[BlockKey], bool] = owned.__contains__
        else:
            keys = self.offloader.erase(owner, sources=sources)
            is_owned = self.offloader.store.is_owned
        source = owner if sources else None
        blocks = [pool.erase(source, keys, is_owned) for pool in self.memory.packed]
        sizes = [sum(pool.page_bytes) for pool in self.memory.packed]
        return Cleared(sum(blocks), sum(map(operator.mul, blocks, sizes)))

    def clear(self) -> list[int]:
        """Evict every idle block; return how many there were, by layer group."""
        self.resident_prefixes.clear()
        return [pool.forget(range(1, pool.num_pages)) for pool in self.memory.packed]

    # -- windows --------------------------------------------------------------------------------

    def _slide_windows(self, sequence: SequenceBlocks) -> None:
        """Release the window pages that no later query sees.

        Those before the end of an extent stay cached, since a prompt can continue there; the
        others are superseded: they are the first to be evicted. With a window of 128 tokens and
        block 17 just sealed, blocks 14 and 15 stay (extent 0 ends with 15), 13 is superseded.
        """
        layout = sequence.layout
        for index, group in enumerate(self.memory.groups):
            if group.window is None:
                continue
            position = layout.position(sequence.computed)
            first = min(layout.blocks(sequence.computed), layout.first_seen(group.window, position))
            pool, begin = self.memory.packed[index], sequence.live_from[index]
            pages = sequence.tables[index].pages(begin, max(begin, first))
            for block, page in enumerate(pages, begin):
                extent_end = (block // EXTENT_BLOCKS + 1) * EXTENT_BLOCKS
                if block >= layout.first_needed(group.window, extent_end):
                    pool.release([page])
                else:
                    pool.supersede([page])
            sequence.live_from[index] = max(first, sequence.live_from[index])
