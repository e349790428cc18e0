"""From sequences to blocks: the scheduler's only door to memory.

A sequence is *admitted* with whatever of its prompt is in the pools already, gets pages chunk by
chunk from `allocate`, and after each step `commit` publishes what was sealed under its key.
Keys that are being computed are pending: who needs one of them waits for it. Blocks that nobody
holds stay findable until their room is needed; so do whole prefixes that nobody uses.
"""

import numpy as np
from numpy.typing import NDArray

from compress.shape import BLOCK_TOKENS
from longctx.attention.backend import ENTRY_COLUMNS, FIRST_POSITION, PAGE, ROWS, ChunkRows
from longctx.kv_memory import KVMemory
from longctx.sequence import BlockTable, Sequence
from offload.key import BlockKey, chain_keys
from prompt_cache.prefix import Prefix, PrefixIndex, PrefixName

EXTENT_BLOCKS = 16  # windows are kept longer at the end of each extent: there a prompt can resume


class KVCacheManager:
    def __init__(self, memory: KVMemory) -> None:
        self.memory = memory
        self.prefixes = PrefixIndex()
        self._pending: dict[BlockKey, Sequence] = {}
        self._releases = 0  # grows whenever room may have become free

    # -- admission ------------------------------------------------------------------------------

    def admit(self, sequence: Sequence, *, spare_blocks: int) -> bool:
        """Give the sequence what is cached of its prompt; False if it has to wait.

        It waits for the blocks that another sequence is computing, or until there is room for all
        of its tokens and `spare_blocks` more.
        """
        if sequence.blocked_on in self._pending or sequence.tried_at == self._releases:
            return False
        self._find_prefix(sequence)
        self._extend_keys(sequence)
        depth, pages = self._match(sequence)
        limit = sequence.full_blocks()
        owner = self._pending.get(sequence.key(depth)) if depth < limit else None
        if owner is not None:
            # Until the last one that they share: looking again after each step would cost more.
            last = depth
            while last + 1 < limit and self._pending.get(sequence.key(last + 1)) is owner:
                last += 1
            sequence.blocked_on = sequence.key(last)
            self._leave_prefix(sequence)
            return False
        self._attach(sequence, depth, pages)
        if not self._make_room(limit - depth + spare_blocks):
            self._detach(sequence)
            sequence.tried_at = self._releases
            return False
        for block in range(depth, limit):
            self._pending[sequence.key(block)] = sequence
        self._keep_prefixes(sequence)
        return True

    def computed_by(self, sequence: Sequence) -> Sequence | None:
        """Whom the waiting sequence waits for."""
        return None if sequence.blocked_on is None else self._pending.get(sequence.blocked_on)

    def _find_prefix(self, sequence: Sequence) -> None:
        for _, name in reversed(sequence.document_ends):
            prefix = self.prefixes.get(name)
            # A prompt that ends with the document computes its last block again: a prefix that
            # holds this block as well could leave no room for it.
            if prefix is not None and prefix.blocks <= sequence.full_blocks():
                self.prefixes.acquire(prefix)
                sequence.prefix = prefix
                if sequence.known_keys == 0:
                    sequence.base_keys = prefix.keys
                return

    def _extend_keys(self, sequence: Sequence) -> None:
        """Keys of all full blocks of the tokens so far."""
        known = sequence.known_keys
        end = len(sequence.tokens) // BLOCK_TOKENS
        if known >= end:
            return
        parent = sequence.key(known - 1) if known else sequence.namespace
        first = known * BLOCK_TOKENS
        token_ids = sequence.tokens.slice(first, end * BLOCK_TOKENS)
        sequence.tail_keys += chain_keys(
            parent, token_ids, first_position=first, block_tokens=BLOCK_TOKENS
        )

    def _match(self, sequence: Sequence) -> tuple[int, list[int]]:
        """Depth in blocks at which the prompt can go on, and the pages found beyond the prefix.

        That is as deep as global layers have every block, and there windows their last window.
        """
        prefix_blocks = 0 if sequence.prefix is None else sequence.prefix.blocks
        limit = sequence.full_blocks()
        depth, pages = min(prefix_blocks, limit), []
        if self.memory.groups[0].window is None:
            pool = self.memory.packed[0]
            while depth < limit and (page := pool.lookup(sequence.key(depth))) is not None:
                pages.append(page)
                depth += 1
        else:
            depth = limit
        missing: int | None = depth
        while missing is not None:
            depth = missing
            missing = self._missing_from_windows(sequence, depth)
        return depth, pages[: max(0, depth - prefix_blocks)]

    def _missing_from_windows(self, sequence: Sequence, depth: int) -> int | None:
        """The last block that a window before `depth` lacks in some group."""
        missing = None
        for index, group in enumerate(self.memory.groups):
            if group.window is not None:
                for block in range(depth - 1, group.first_needed(depth * BLOCK_TOKENS) - 1, -1):
                    if self._window_page(sequence, index, block) is None:
                        missing = block if missing is None else min(missing, block)
                        break
        return missing

    def _window_page(self, sequence: Sequence, group: int, block: int) -> int | None:
        prefix = sequence.prefix
        if prefix is not None and prefix.window_begin[group] <= block < prefix.blocks:
            return int(prefix.tables[group][block, PAGE])
        return self.memory.packed[group].lookup(sequence.key(block))

    def _attach(self, sequence: Sequence, depth: int, pages: list[int]) -> None:
        """Make the first `depth` blocks the sequence's own past."""
        prefix = sequence.prefix
        tables, live_from = [], []
        for index, group in enumerate(self.memory.groups):
            entries = _entries(depth)
            if group.window is None:
                begin = depth - len(pages)
                if prefix is not None:
                    entries[:begin] = prefix.tables[index][:begin]
                held = pages
            else:
                begin = group.first_needed(depth * BLOCK_TOKENS)
                found = [self._window_page(sequence, index, b) for b in range(begin, depth)]
                held = [page for page in found if page is not None]
                assert len(held) == depth - begin
            entries[begin:, PAGE] = held
            self.memory.packed[index].acquire(held)
            tables.append(BlockTable(entries))
            live_from.append(begin)
        sequence.tables, sequence.live_from = tuple(tables), live_from
        sequence.computed = depth * BLOCK_TOKENS
        sequence.blocked_on = None

    # -- steps ----------------------------------------------------------------------------------

    def allocate(self, sequence: Sequence, num_tokens: int) -> bool:
        """Pages for the sequence's next `num_tokens` tokens; False, and nothing, without room."""
        first = sequence.computed // BLOCK_TOKENS
        end = sequence.computed + num_tokens
        sealed = range(first, end // BLOCK_TOKENS)
        if not self._make_room(len(sealed)):
            return False
        for pool, table in zip(self.memory.packed, sequence.tables, strict=True):
            for block, page in zip(sealed, pool.allocate(len(sealed)), strict=True):
                table.append(page, rows=BLOCK_TOKENS, first_position=block * BLOCK_TOKENS)
        touched = range(first, (end - 1) // BLOCK_TOKENS + 1)
        new = [block for block in touched if block not in sequence.own_pages]
        # The raw pool holds the largest possible batch, so this cannot fail.
        sequence.own_pages.update(zip(new, self.memory.raw.allocate(len(new)), strict=True))
        return True

    def chunk_rows(self, sequence: Sequence, num_tokens: int, *, row_begin: int) -> ChunkRows:
        """What the sequence's next `num_tokens` tokens see, for the batch."""
        first, own_row = divmod(sequence.computed, BLOCK_TOKENS)
        last = (sequence.computed + num_tokens - 1) // BLOCK_TOKENS
        own = [sequence.own_pages[block] for block in range(first, last + 1)]
        return ChunkRows(
            row_begin=row_begin,
            rows=num_tokens,
            first_position=sequence.computed,
            own_row=own_row,
            own_pages=np.array(own, dtype=np.int64),
            past_entries=first,
            entries=tuple(table.entries for table in sequence.tables),
        )

    def commit(self, sequence: Sequence, num_tokens: int) -> None:
        """The step has run: publish what it sealed, let go of what left the windows."""
        first = sequence.computed // BLOCK_TOKENS
        sequence.computed += num_tokens
        end = sequence.computed // BLOCK_TOKENS
        if first == end:
            return
        self._extend_keys(sequence)
        for block in range(first, end):
            key = sequence.key(block)
            for pool, table in zip(self.memory.packed, sequence.tables, strict=True):
                pool.publish(int(table.entries[block, PAGE]), key)
            self.memory.raw.release([sequence.own_pages.pop(block)])
            if self._pending.get(key) is sequence:
                del self._pending[key]
        self._keep_prefixes(sequence)
        self._slide_windows(sequence)

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """`child` continues where `parent` stands: shared sealed blocks, its own open one."""
        child.tables = tuple(BlockTable(table.entries) for table in parent.tables)
        child.live_from = list(parent.live_from)
        child.base_keys, child.tail_keys = parent.base_keys, list(parent.tail_keys)
        child.computed = parent.computed
        for pool, held in zip(self.memory.packed, self._held(child), strict=True):
            pool.acquire(held)
        if parent.prefix is not None:
            self.prefixes.acquire(parent.prefix)
            child.prefix = parent.prefix
        for block, page in parent.own_pages.items():
            (copy,) = self.memory.raw.allocate(1)
            self.memory.copy_raw(page, copy)
            child.own_pages[block] = copy

    def release(self, sequence: Sequence) -> None:
        """Let go of all memory. Sealed blocks stay cached, so it may be admitted again."""
        self._detach(sequence)
        self._releases += 1

    def _detach(self, sequence: Sequence) -> None:
        for block in range(sequence.computed // BLOCK_TOKENS, sequence.known_keys):
            if self._pending.get(sequence.key(block)) is sequence:
                del self._pending[sequence.key(block)]
        if sequence.tables:
            for pool, held in zip(self.memory.packed, self._held(sequence), strict=True):
                pool.release(held)
        self.memory.raw.release(list(sequence.own_pages.values()))
        sequence.own_pages.clear()
        sequence.tables = ()
        sequence.computed = 0
        sequence.blocked_on = None
        self._leave_prefix(sequence)

    def close_document(self, document_id: str) -> None:
        """Free what only prompts with this document use; running ones keep it until they end."""
        for prefix in self.prefixes.pop_document(document_id):
            prefix.closed = True
            if prefix.users == 0:
                self._free_prefix(prefix)

    # -- prefixes, windows, room ------------------------------------------------------------------

    def _keep_prefixes(self, sequence: Sequence) -> None:
        """Hold everything up to the end of each document that has been computed."""
        for end_tokens, name in sequence.document_ends:
            blocks = end_tokens // BLOCK_TOKENS
            if 0 < blocks <= sequence.computed // BLOCK_TOKENS and name not in self.prefixes:
                self._keep_prefix(sequence, name, end_tokens)

    def _keep_prefix(self, sequence: Sequence, name: PrefixName, end_tokens: int) -> None:
        blocks = end_tokens // BLOCK_TOKENS
        begins = [group.first_needed(blocks * BLOCK_TOKENS) for group in self.memory.groups]
        for group, begin, live in zip(self.memory.groups, begins, sequence.live_from, strict=True):
            if group.window is not None and begin < live:
                return  # it went by without being computed here; its blocks have their keys
        tables = tuple(table.entries[:blocks].copy() for table in sequence.tables)
        for pool, entries, begin in zip(self.memory.packed, tables, begins, strict=True):
            pool.acquire(entries[begin:, PAGE].tolist())
        self.prefixes.add(
            Prefix(
                name=name,
                token_ids=sequence.tokens.upto(end_tokens),
                keys=tuple(sequence.key(block) for block in range(blocks)),
                tables=tables,
                window_begin=tuple(begins),
            )
        )

    def _leave_prefix(self, sequence: Sequence) -> None:
        prefix, sequence.prefix = sequence.prefix, None
        if prefix is None:
            return
        prefix.users -= 1
        if prefix.closed and prefix.users == 0:
            self._free_prefix(prefix)

    def _free_prefix(self, prefix: Prefix) -> None:
        for pool, entries, begin in zip(
            self.memory.packed, prefix.tables, prefix.window_begin, strict=True
        ):
            pages = entries[begin:, PAGE].tolist()
            pool.release(pages)
            if prefix.closed:
                pool.forget(pages)
        self._releases += 1

    def _slide_windows(self, sequence: Sequence) -> None:
        for index, group in enumerate(self.memory.groups):
            if group.window is None:
                continue
            first = group.first_needed(sequence.computed)
            pool, entries = self.memory.packed[index], sequence.tables[index].entries
            for block in range(sequence.live_from[index], first):
                extent_end = (block // EXTENT_BLOCKS + 1) * EXTENT_BLOCKS * BLOCK_TOKENS
                page = int(entries[block, PAGE])
                if block >= group.first_needed(extent_end):
                    pool.release([page])
                else:
                    pool.supersede([page])
            sequence.live_from[index] = max(first, sequence.live_from[index])

    def _held(self, sequence: Sequence) -> list[list[int]]:
        """Per group: the pages to which the sequence has a reference of its own."""
        return [
            table.entries[begin:, PAGE].tolist()
            for table, begin in zip(sequence.tables, sequence.live_from, strict=True)
        ]

    def _make_room(self, blocks: int) -> bool:
        """Let unused prefixes go until every group can give `blocks` pages.

        None goes where that would not suffice: a document is not given up for nothing.
        """
        needed = [self._needed(index, blocks) for index in range(len(self.memory.packed))]
        for index, pool in enumerate(self.memory.packed):
            missing = needed[index] - pool.available
            if missing > 0 and missing > sum(
                prefix.blocks - prefix.window_begin[index] for prefix in self.prefixes.idle()
            ):
                return False
        while any(
            pool.available < pages for pool, pages in zip(self.memory.packed, needed, strict=True)
        ):
            prefix = self.prefixes.pop_idle()
            if prefix is None:
                return False
            self._free_prefix(prefix)
        return True

    def _needed(self, group: int, blocks: int) -> int:
        """Pages that `blocks` more blocks of one sequence take of a group at any one time."""
        window = self.memory.groups[group].window
        if window is None:
            return blocks
        return min(blocks, window // BLOCK_TOKENS + 2 + self.memory.step_blocks)


def _entries(blocks: int) -> NDArray[np.int64]:
    """Entries of full blocks at their positions from 0, pages still to be filled in."""
    entries = np.zeros((blocks, ENTRY_COLUMNS), dtype=np.int64)
    entries[:, ROWS] = BLOCK_TOKENS
    entries[:, FIRST_POSITION] = np.arange(blocks) * BLOCK_TOKENS
    return entries
