"""How far a request has come: one `Sequence` for each of its choices."""

from dataclasses import dataclass, field
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from compress.shape import BLOCK_TOKENS
from longctx.engine.sampler import SamplingState
from longctx.kv.block_entry import ENTRY_COLUMNS, PAGE
from longctx.kv.layout import PLAIN, Layout
from longctx.kv.lookup_trace import Trace
from longctx.kv.offload_state import TierState
from longctx.kv.prefix_index import Prefix, PrefixName, contains
from longctx.request import FinishReason, Request
from longctx.text.detokenizer import TextStream
from offload.key import BlockKey


class SequenceState(Enum):
    WAITING = "waiting"  # holds no memory; also after a preemption
    RUNNING = "running"
    FINISHED = "finished"


class BlockTable:
    """What a sequence sees in one layer group: a growing array of entries, in reading order.

    Its own sealed blocks are entered one after the other; what it borrows is there from the start.
    """

    def __init__(
        self, layout: Layout = PLAIN, entries: NDArray[np.int64] | None = None, blocks: int = 0
    ) -> None:
        """`entries`: of the first `blocks` own blocks, and of all that is borrowed."""
        self.blocks = blocks
        self._layout = layout
        self._length = 0 if entries is None else len(entries)
        self._entries = np.zeros((self._length + 16, ENTRY_COLUMNS), dtype=np.int64)
        if entries is not None:
            self._entries[: self._length] = entries

    @property
    def entries(self) -> NDArray[np.int64]:
        """[entries, ENTRY_COLUMNS], a view."""
        return self._entries[: self._length]

    def pages(self, begin: int, end: int) -> list[int]:
        """The pages of own blocks `begin` to `end`."""
        pages: list[int] = self._entries[self._layout.own(begin, end), PAGE].tolist()
        return pages

    def append(self, page: int, *, rows: int, first_position: int) -> None:
        """The sequence's next own block."""
        at = self._layout.entry(self.blocks)
        if at >= len(self._entries):
            grown = np.zeros((2 * at, ENTRY_COLUMNS), dtype=np.int64)
            grown[: self._length] = self._entries[: self._length]
            self._entries = grown
        self._entries[at] = (page, 0, rows, first_position, 0)
        self._length = max(self._length, at + 1)
        self.blocks += 1

    def fork(self) -> "BlockTable":
        return BlockTable(self._layout, self.entries, self.blocks)


class TokenIds:
    """A prompt's shared beginning, which is never copied, and what is the sequence's own."""

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
        """The first `end` tokens; the shared beginning itself where it ends there."""
        return self._base if end == len(self._base) else self.slice(0, end)

    def fork(self) -> "TokenIds":
        return TokenIds(self._base, list(self._tail))


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a request says, as its sequences begin: own tokens, and how they lie."""

    tokens: TokenIds
    layout: Layout = PLAIN
    ends: tuple[tuple[int, PrefixName], ...] = ()  # of its documents, or of the pieces of a module
    linked_tokens: int = 0
    borrowed_ids: tuple[NDArray[np.int32], ...] = ()


@dataclass(slots=True, eq=False)
class Sequence:
    """One answer in the making.

    Computed means: keys and values exist. While `computed < len(tokens) - 1` it is in prefill;
    an answering sequence has exactly one token that is not computed, the last one drawn.
    """

    request: Request
    index: int  # which of the request's choices
    arrival: int  # order of submission; never changes, so preemption has a total order
    arrival_seconds: float
    tokens: TokenIds
    prompt_tokens: int
    sampling: SamplingState
    seed: int
    text: TextStream
    namespace: BlockKey
    layout: Layout = PLAIN  # where its own blocks lie, and what it borrows between them
    owners: frozenset[str] = frozenset()  # ids of the documents and modules in the prompt
    linked_tokens: int = 0  # of what it borrows: computed in context all the same
    document_ends: tuple[tuple[int, PrefixName], ...] = ()  # tokens up to there, and their name
    base_keys: tuple[BlockKey, ...] = ()  # of a prefix, shared with it
    tail_keys: list[BlockKey] = field(default_factory=list)  # those that follow
    state: SequenceState = SequenceState.WAITING
    computed: int = 0
    prefix: Prefix | None = None  # acquired: holds the first `prefix.blocks` global blocks
    lenders: tuple[Prefix, ...] = ()  # acquired: hold what it borrows
    tables: tuple[BlockTable, ...] = ()
    live_from: list[int] = field(default_factory=list)  # per group: first block held on its own
    own_pages: dict[int, int] = field(default_factory=dict)  # block index -> raw page, still open
    blocked_on: BlockKey | None = None  # while waiting: the last block that another computes for it
    tried_at: int = -1  # while waiting for room: the state of the pools when it was last refused
    cached_tokens: int | None = None  # prompt tokens that were found when it was first admitted
    computed_tokens: int = 0  # tokens really computed, again after preemptions too
    preemptions: int = 0
    forked: bool = False  # the request's other choices have parted from it
    tier: TierState = field(default_factory=TierState)
    trace: Trace | None = None  # where its blocks were, if the request asks
    finish_reason: FinishReason | None = None

    @property
    def remaining(self) -> int:
        """Tokens to compute until the next one can be drawn."""
        return len(self.tokens) - self.computed

    @property
    def answering(self) -> bool:
        return self.computed >= self.prompt_tokens and self.remaining == 1

    @property
    def completion_tokens(self) -> int:
        return len(self.tokens) - self.prompt_tokens

    @property
    def borrowed_tokens(self) -> int:
        return sum(borrowed.end - borrowed.begin for borrowed in self.layout.borrowed)

    @property
    def rank(self) -> tuple[int, int, int]:
        """Who gives way to whom: smaller stays. A total order, so nobody is evicted in circles."""
        return (self.request.request_class, self.arrival, self.index)

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

    @property
    def width(self) -> int:
        """Sequences that this one is or is about to become: choices fork at the first token."""
        return 1 if self.index or self.forked else self.request.sampling.n

    def fork(self, index: int, text: TextStream) -> "Sequence":
        """Another choice of the request, which goes on where this one stands."""
        return Sequence(
            request=self.request,
            index=index,
            arrival=self.arrival,
            arrival_seconds=self.arrival_seconds,
            tokens=self.tokens.fork(),
            prompt_tokens=self.prompt_tokens,
            sampling=self.sampling.fork(self.seed + index),
            seed=self.seed + index,
            text=text,
            namespace=self.namespace,
            layout=self.layout,
            owners=self.owners,
            linked_tokens=self.linked_tokens,
            document_ends=self.document_ends,
            cached_tokens=self.cached_tokens,
        )

    def forget_document(self, document_id: str) -> None:
        """It is closed: what is computed of it is not kept for others."""
        self.document_ends = tuple(
            (end, name) for end, name in self.document_ends if not contains(name, document_id)
        )

    def full_blocks(self) -> int:
        """Blocks that a cache may provide: those that all tokens before the last one fill.

        Of a prompt that is only kept, and sealed to its end, that is all.
        """
        return self.layout.blocks(len(self.tokens) - (0 if self.layout.closed else 1))

    def blocks_until(self, end: int) -> int:
        """Blocks of the prefix that ends there: a document's last one is open, a piece's not."""
        return self.layout.blocks(end) if self.layout.closed else end // BLOCK_TOKENS
