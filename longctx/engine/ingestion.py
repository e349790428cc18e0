"""Follows prompts that are computed to be kept, until their blocks are on stable storage.

A request for no answer (`max_tokens` 0) ends once everything that it can leave behind is durable,
or as durable as it will be. Where it all is on disk already, from an earlier run of the server say,
it ends at once: nothing is loaded before somebody asks.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from longctx.engine.sequence import Sequence
from longctx.kv.cache_manager import KVCacheManager
from longctx.kv.found_tokens import note_in_place
from longctx.kv.layout import Layout
from longctx.kv.prefix_index import owner_of, tokens_before
from longctx.kv.prefix_match import deepest
from offload.block_run import EXTENT_BLOCKS
from offload.key import BlockKey
from offload.store import KVStore

# After something was evicted from the disk, what is durable is checked again at most so often.
RECHECK_SECONDS = 1.0


@dataclass(slots=True)
class _TrackedChain:
    """The blocks of one document in the prompt that it was ingested under, or of a module."""

    keys: tuple[BlockKey, ...]
    layout: Layout
    before_tokens: int  # of the prompt, before the document
    end_tokens: int
    durable_blocks: int = 0
    reported_tokens: int | None = None  # in the last `durable_changes`


class Ingestion:
    """Says of which documents and modules how many tokens are durable, and which prompts are done.

    The engine calls `register` when a prompt to be kept is submitted, `wait_durable` when it is
    computed, and before each step `take_durable`, whose sequences end. `durable_changes` may be
    called at any time, and `forget` when a document or module is closed. Only the engine's thread
    calls it; the store writes in threads of its own.
    """

    def __init__(
        self,
        cache: KVCacheManager,
        store: KVStore,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._cache = cache
        self._store = store
        self._clock = clock
        self._chains: dict[str, _TrackedChain] = {}
        self._waiting: list[Sequence] = []
        self._changed = False  # what is durable may differ from what was reported
        self._losses = 0
        self._checked_seconds = 0.0

    def register(self, sequence: Sequence) -> bool:
        """Note the documents of a prompt that is to be kept; return whether all is durable already.

        The store retains the blocks of its last document, or of its module, from now on.
        """
        blocks = sequence.blocks
        self._cache.find_keys(blocks)
        for end, name in blocks.document_ends:
            keys = tuple(blocks.key(block) for block in range(blocks.blocks_until(end)))
            self._cache.prefixes.know(name, keys)
        if blocks.document_ends:
            self._know(sequence)
        limit = blocks.full_blocks()
        keys = tuple(blocks.key(block) for block in range(limit))
        depth = self._durable(keys, blocks.layout)
        if depth == limit:
            sequence.cached_tokens = blocks.layout.tokens(depth)
            note_in_place(blocks, depth, partial(self._cache.tier_of, blocks, 0))
        return depth == limit

    def _know(self, sequence: Sequence) -> None:
        """Follow the module, or the last document of the prompt, and have the store retain it."""
        blocks = sequence.blocks
        end, name = blocks.document_ends[-1]
        owner, keys = owner_of(name), self._cache.prefixes.known_keys(name)
        before = 0 if blocks.layout.closed else tokens_before(blocks.document_ends)
        known = self._chains.get(owner)
        if known is None or known.end_tokens <= end or not blocks.layout.closed:
            self._chains[owner] = _TrackedChain(keys, blocks.layout, before, end)
        self._store.retain(owner, keys)
        self._changed = True

    def durable_tokens(self, owner: str) -> int:
        """Return how many tokens of a document or module could be restored from disk alone."""
        chain = self._chains.get(owner)
        return 0 if chain is None else self._durable_tokens(chain)

    def forget(self, document_id: str) -> None:
        """Stop following a document or module that is closed."""
        self._chains.pop(document_id, None)

    def wait_durable(self, sequence: Sequence) -> None:
        """Keep a computed sequence until `take_durable` finds its blocks written."""
        self._waiting.append(sequence)

    def take_durable(self, *, transferred: bool) -> list[Sequence]:
        """Remove and return the sequences whose blocks are all written, as far as possible.

        Sequences that have ended meanwhile are removed too, and not returned. `transferred` says
        that something was written or read since the last call.
        """
        self._changed |= transferred
        over = [
            s for s in self._waiting if s.blocks.offload.writing == 0 or s.finish_reason is not None
        ]
        self._waiting = [s for s in self._waiting if s not in over]
        return [sequence for sequence in over if sequence.finish_reason is None]

    def durable_changes(self) -> dict[str, int]:
        """Return the durable tokens of the documents where they changed since the last call."""
        losses, now = self._store.losses, self._clock()
        lost = losses != self._losses and now - self._checked_seconds > RECHECK_SECONDS
        if not (self._changed or lost):
            return {}
        self._changed = False
        if lost:
            self._losses, self._checked_seconds = losses, now
        changes = {}
        for document_id, chain in self._chains.items():
            if lost:
                chain.durable_blocks = self._intact(chain)
            tokens = self._durable_tokens(chain)
            if tokens != chain.reported_tokens:
                chain.reported_tokens = changes[document_id] = tokens
        return changes

    def _durable_tokens(self, chain: _TrackedChain) -> int:
        if chain.durable_blocks < len(chain.keys):
            chain.durable_blocks = self._durable(
                chain.keys, chain.layout, begin=chain.durable_blocks
            )
        if chain.durable_blocks == len(chain.keys):
            # The tokens after the last full block are computed with every question.
            return chain.end_tokens - chain.before_tokens
        return max(0, chain.layout.tokens(chain.durable_blocks) - chain.before_tokens)

    def _intact(self, chain: _TrackedChain) -> int:
        """Return how many blocks come before the first extent that has lost its end.

        A chain leaves the disk extent by extent, from its end on, so it suffices to ask for the
        last block of each: of 40 durable blocks those are 15, 31 and 39. If 31 is gone, 16 blocks
        are left.
        """
        for begin in range(0, chain.durable_blocks, EXTENT_BLOCKS):
            last = min(begin + EXTENT_BLOCKS, chain.durable_blocks) - 1
            if not self._store.durable(0, chain.keys[last]):
                return begin
        return chain.durable_blocks

    def _durable(self, keys: tuple[BlockKey, ...], layout: Layout, begin: int = 0) -> int:
        """Return how many blocks of a chain could be restored from disk alone."""

        def available(group: int, block: int) -> bool:
            return self._store.durable(group, keys[block])

        groups = self._cache.memory.groups
        return deepest(groups, layout, available, begin=begin, limit=len(keys))
