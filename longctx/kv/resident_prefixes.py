"""Whole prompts that stay on the device while there is room: documents ready to be asked about.

A prefix holds one reference to each of its blocks for all its users together. Those without users
are evicted, the least recently used first, when somebody needs their room.
"""

from collections.abc import Sequence as Items

import numpy as np

from longctx.kv.block_entry import PAGE
from longctx.kv.memory import KVMemory
from longctx.kv.prefix_index import Prefix, PrefixIndex, PrefixName
from longctx.kv.sequence_blocks import SequenceBlocks


class ResidentPrefixes:
    """Holds the blocks of whole prefixes, and evicts idle ones when room is needed.

    A prefix has one reference to each of its pages for all its users. The engine's thread makes
    all calls.
    """

    def __init__(self, memory: KVMemory, prefixes: PrefixIndex) -> None:
        self._memory = memory
        self._prefixes = prefixes
        self.freed = 0  # prefixes that were evicted or closed, ever

    def keep(self, sequence: SequenceBlocks) -> None:
        """Hold everything up to the end of each document that the sequence has computed."""
        if sequence.offload.absent:
            return
        for end_tokens, name in sequence.document_ends:
            blocks = sequence.blocks_until(end_tokens)
            computed = sequence.layout.blocks(sequence.computed)
            if 0 < blocks <= computed and name not in self._prefixes:
                self._hold(sequence, name, end_tokens)

    def leave(self, sequence: SequenceBlocks) -> None:
        """Release every prefix that the sequence uses; a closed one goes with its last user."""
        held = (
            [*sequence.reused_prefixes]
            if sequence.prefix is None
            else [sequence.prefix, *sequence.reused_prefixes]
        )
        sequence.prefix, sequence.reused_prefixes = None, ()
        for prefix in held:
            prefix.users -= 1
            if prefix.closed and prefix.users == 0:
                self._free(prefix)

    def close_document(self, document_id: str) -> None:
        """Release the document's prefixes, those in use with their last user."""
        for prefix in self._prefixes.pop_document(document_id):
            prefix.closed = True
            if prefix.users == 0:
                self._free(prefix)

    def clear(self) -> None:
        """Evict all idle prefixes."""
        while (prefix := self._prefixes.pop_idle()) is not None:
            self._free(prefix)

    def make_room(self, needed: Items[Items[int]]) -> bool:
        """Evict idle prefixes until each pool has `needed[group][rank]` free pages.

        Evict nothing, and return False, where that cannot be reached: a document is not given up
        for nothing.
        """
        for index, pool in enumerate(self._memory.packed):
            missing = [
                pages - room
                for pages, room in zip(needed[index], pool.available_by_rank, strict=True)
            ]
            if max(missing) > 0 and any(
                pages > idle for pages, idle in zip(missing, self._idle_pages(index), strict=True)
            ):
                return False
        while any(
            room < pages
            for pool, wanted in zip(self._memory.packed, needed, strict=True)
            for room, pages in zip(pool.available_by_rank, wanted, strict=True)
        ):
            prefix = self._prefixes.pop_idle()
            if prefix is None:
                return False
            self._free(prefix)
        return True

    def _idle_pages(self, group: int) -> list[int]:
        """Count the pages of each rank that idle prefixes hold."""
        pool = self._memory.packed[group]
        pages = [
            prefix.tables[group][prefix.window_begin[group] :, PAGE]
            for prefix in self._prefixes.idle()
        ]
        ranks = np.concatenate([np.empty(0, dtype=np.int64), *pages]) // pool.pages_per_rank
        counts: list[int] = np.bincount(ranks, minlength=pool.ranks).tolist()
        return counts

    def _hold(self, sequence: SequenceBlocks, name: PrefixName, end_tokens: int) -> None:
        blocks, layout = sequence.blocks_until(end_tokens), sequence.layout
        begins = [layout.first_needed(group.window, blocks) for group in self._memory.groups]
        for group, begin, live in zip(self._memory.groups, begins, sequence.live_from, strict=True):
            if group.window is not None and begin < live:
                return  # it went by without being computed here; its blocks have their keys
        tables = tuple(table.entries[:blocks].copy() for table in sequence.tables)
        for pool, entries, begin in zip(self._memory.packed, tables, begins, strict=True):
            pool.acquire(entries[begin:, PAGE].tolist())
        self._prefixes.add(
            Prefix(
                name=name,
                token_ids=sequence.tokens.upto(end_tokens),
                keys=tuple(sequence.key(block) for block in range(blocks)),
                tables=tables,
                window_begin=tuple(begins),
            )
        )

    def _free(self, prefix: Prefix) -> None:
        for pool, entries, begin in zip(
            self._memory.packed, prefix.tables, prefix.window_begin, strict=True
        ):
            pool.release(entries[begin:, PAGE].tolist())
        self.freed += 1
