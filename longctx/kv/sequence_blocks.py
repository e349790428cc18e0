"""The KV side of a sequence: its tokens, which blocks they fill, and where those lie.

What was asked, and how the answer is sampled, is the engine's business (`engine/sequence.py`).
Everything here is read and written by the engine's thread alone.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from compress.shape import BLOCK_TOKENS
from longctx.kv.block_table import BlockTable
from longctx.kv.layout import PLAIN, Layout
from longctx.kv.lookup_trace import LookupTrace
from longctx.kv.offload_state import OffloadState
from longctx.kv.prefix_index import Prefix, PrefixName, contains
from offload.key import BlockKey
from offload.tier_names import TierName


class TokenIds:
    """Token ids of a sequence: a shared beginning, which is never copied, and its own tail."""

    def __init__(self, base: NDArray[np.int32], tail: list[int]) -> None:
        self._base = base
        self._tail = tail

    def __len__(self) -> int:
        return len(self._base) + len(self._tail)

    def append(self, token_id: int) -> None:
        self._tail.append(token_id)

    def slice(self, begin: int, end: int) -> NDArray[np.int32]:
        base = len(self._base)
        tail = np.array(self._tail[max(0, begin - base) : max(0, end - base)], dtype=np.int32)
        return tail if begin >= base else np.concatenate([self._base[begin:end], tail])

    def upto(self, end: int) -> NDArray[np.int32]:
        """Return the first `end` tokens; the shared beginning itself where it ends there."""
        return self._base if end == len(self._base) else self.slice(0, end)

    def fork(self) -> "TokenIds":
        return TokenIds(self._base, list(self._tail))


@dataclass(slots=True, eq=False)
class SequenceBlocks:
    """Tokens of one sequence and the KV blocks that hold their keys and values.

    A token is *computed* once its keys and values exist. `KVCacheManager` fills in what lies below
    `tail_keys`; a sequence that waits or was preempted holds no page. Two sequences compare by
    identity.
    """

    tokens: TokenIds  # the prompt, then what was sampled
    prompt_tokens: int
    namespace: BlockKey
    preemption_key: tuple[int, ...]  # lower is kept: a total order, so no two preempt in turn
    layout: Layout = PLAIN  # where its own blocks lie, and what it reuses between them
    sources: tuple[tuple[int, str], ...] = ()  # documents and modules in the prompt: begin, id
    document_ends: tuple[tuple[int, PrefixName], ...] = ()  # tokens up to there, and their name
    prefill_only: bool = False  # computed to be kept: nothing is sampled
    in_memory: bool = False  # what it computes, but for documents, is not written to disk
    fresh_from: int | None = None  # tokens from here on are computed, also where a cache has them
    leaves: bool = False  # one of its sources is closed: nothing of it is kept for others
    base_keys: tuple[BlockKey, ...] = ()  # of a prefix, shared with it
    tail_keys: list[BlockKey] = field(default_factory=list)  # those that follow
    computed: int = 0
    prefix: Prefix | None = None  # acquired: holds the first `prefix.blocks` global blocks
    reused_prefixes: tuple[Prefix, ...] = ()  # acquired: hold what it reuses
    tables: tuple[BlockTable, ...] = ()  # one per layer group, while it has memory
    live_from: list[int] = field(default_factory=list)  # per group: first block held on its own
    own_pages: dict[int, int] = field(default_factory=dict)  # block index -> raw page, still open
    blocked_on: BlockKey | None = None  # while waiting: the last block that another computes for it
    refused_at: int | None = None  # while waiting for room: the state of the pools at that time
    # Of the prompt and of what it reuses, by tier, when it was first admitted
    found_tokens: dict[TierName, int] | None = None
    offload: OffloadState = field(default_factory=OffloadState)
    trace: LookupTrace | None = None  # where its blocks were, if the request asks

    @property
    def remaining(self) -> int:
        """Return how many tokens are to be computed until the next one can be sampled."""
        return len(self.tokens) - self.computed

    @property
    def reused_tokens(self) -> int:
        """Return how many tokens of other chains the prompt reuses."""
        return sum(reused.end - reused.begin for reused in self.layout.reused)

    @property
    def held_pages(self) -> list[list[int]]:
        """Return, by group, the pages to which the sequence has a reference of its own."""
        return [
            table.pages(begin, table.blocks)
            for table, begin in zip(self.tables, self.live_from, strict=True)
        ]

    def key(self, block: int) -> BlockKey:
        base = len(self.base_keys)
        return self.base_keys[block] if block < base else self.tail_keys[block - base]

    @property
    def known_keys(self) -> int:
        return len(self.base_keys) + len(self.tail_keys)

    def extend_keys(self) -> None:
        """Name all blocks that the tokens so far fill."""
        known, end = self.known_keys, self.layout.blocks(len(self.tokens))
        before = self.key(known - 1) if known else self.namespace
        self.tail_keys += self.layout.keys(self.tokens.slice, known, end, before)

    def parent(self, block: int) -> BlockKey:
        """Return the key before a block; of the first one, the namespace."""
        return self.key(block - 1) if block else self.namespace

    def has_source(self, name: str) -> bool:
        """Whether a document or module of that id is in the prompt."""
        return any(source == name for _, source in self.sources)

    def sources_until(self, block: int) -> tuple[str, ...]:
        """Return the ids of the documents and modules that begin before the end of block - 1."""
        if not self.sources:
            return ()
        end = self.layout.tokens(block)
        return tuple(dict.fromkeys(name for begin, name in self.sources if begin < end))

    def forget_document(self, document_id: str) -> None:
        """Keep nothing more of a closed document for others."""
        self.document_ends = tuple(
            (end, name) for end, name in self.document_ends if not contains(name, document_id)
        )
        if self.has_source(document_id):
            self.leaves = True
            if not self.offload.streams:
                self.offload.store_until = self.offload.stored

    def full_blocks(self) -> int:
        """Return how many blocks all tokens but the last fill.

        Of a prompt that is only kept, and sealed to its end, that is all blocks.
        """
        return self.layout.blocks(len(self.tokens) - (0 if self.layout.closed else 1))

    def reusable_blocks(self) -> int:
        """Return how many of the full blocks a cache may provide: those before `fresh_from`."""
        full = self.full_blocks()
        return full if self.fresh_from is None else min(full, self.layout.blocks(self.fresh_from))

    def blocks_until(self, end: int) -> int:
        """Return the blocks of the prefix that ends there: a document's last one is open, and not
        counted; a module's piece is sealed to its end."""
        return self.layout.blocks(end) if self.layout.closed else end // BLOCK_TOKENS

    def fork(self, preemption_key: tuple[int, ...]) -> "SequenceBlocks":
        """The same tokens for another choice of the request; it holds no memory yet."""
        return SequenceBlocks(
            tokens=self.tokens.fork(),
            prompt_tokens=self.prompt_tokens,
            namespace=self.namespace,
            preemption_key=preemption_key,
            layout=self.layout,
            sources=self.sources,
            document_ends=self.document_ends,
            prefill_only=self.prefill_only,
            in_memory=self.in_memory,
            leaves=self.leaves,
        )
