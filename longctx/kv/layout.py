"""Where a sequence's own blocks lie, and what it borrows between them.

A sequence's *own* tokens are those that it computes, or finds under keys of its own. They come in
runs of consecutive positions; a run's blocks are full but for its last one. Between runs a position
may jump, and entries of other chains may stand: *borrowed* rows, which nobody computes here.

    prompt      "You are"  [module: 100 tokens]  "Tell me"        an ordinary prompt: one run
    own tokens   0 1                              2 3 ...          0 1 2 3 ...
    own blocks   0                                1 ...            0 (64 tokens), 1, ...
    entries      0          1 2                   3 ...            0, 1, ...

Own tokens and own blocks are numbered without what is borrowed; the entries of a block table with
it. Every question costs the logarithm of the number of runs, whatever the length.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from compress.shape import BLOCK_TOKENS
from longctx.kv.block_entry import ENTRY_COLUMNS, FIRST_POSITION, ROTATION, ROW_BEGIN, ROWS, Entries
from longctx.kv.prefix_index import PrefixName, owner_of
from offload.key import BlockKey, chain_keys, short_key
from prompt_cache.lineage import after_reused


@dataclass(frozen=True, slots=True)
class Run:
    """The first of its own tokens, blocks, positions and entries."""

    token: int = 0
    block: int = 0
    position: int = 0
    entry: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class CachedChain:
    """A chain that others borrow from: its blocks up to the end of a piece or of a document.

    It borrows nothing itself. `name` is that of the `Prefix` which holds it while it is resident;
    `root` the parent of its first block.
    """

    name: PrefixName
    layout: "Layout"
    keys: tuple[BlockKey, ...]
    root: BlockKey

    @property
    def owner(self) -> str:
        """Id of the module or document."""
        return owner_of(self.name)

    @property
    def tokens(self) -> int:
        """Of its blocks."""
        return self.layout.tokens(len(self.keys))


@dataclass(frozen=True, slots=True)
class ReusedSpan:
    """Own tokens `begin` to `end` of a source, at consecutive positions from `position` on.

    `entry`: of the block table, where its first one stands.
    """

    chain: CachedChain
    begin: int
    end: int
    position: int
    entry: int

    @property
    def rotation(self) -> int:
        return self.position - self.chain.layout.position(self.begin)

    @property
    def blocks(self) -> range:
        """Of the source."""
        layout = self.chain.layout
        return range(layout.blocks(self.begin), layout.blocks(self.end - 1) + 1)

    def entries(self, table: Entries) -> Entries:
        """From the source's table, as they stand here."""
        layout, blocks = self.chain.layout, self.blocks
        entries = table[blocks.start : blocks.stop].copy()
        before = self.begin - layout.tokens(blocks.start)
        entries[0, ROW_BEGIN] += before
        entries[0, FIRST_POSITION] += before
        entries[0, ROWS] -= before
        entries[-1, ROWS] -= layout.tokens(blocks.stop) - self.end
        entries[:, FIRST_POSITION] += self.rotation
        entries[:, ROTATION] = self.rotation
        return entries

    def lineage(self, before: BlockKey) -> BlockKey:
        """The parent of what follows, where `before` is that of what is borrowed.

        What stands here as in the source, after all that stands before it there, is the source.
        """
        chain, blocks = self.chain, self.blocks
        last = chain.keys[blocks.stop - 1]
        parent = chain.keys[blocks.start - 1] if blocks.start else chain.root
        whole = chain.layout.tokens(blocks.start) == self.begin and (
            chain.layout.tokens(blocks.stop) == self.end
        )
        if whole and self.rotation == 0 and before == parent:
            return last
        return after_reused(
            before, last=last, begin=self.begin, end=self.end, position=self.position
        )


class Layout:
    """`runs` begin at own token 0; the last one goes on for ever.

    Where it is empty, at the end of a prompt that is computed to be kept, the layout is `closed`:
    the block before it is sealed however few tokens it has. `plain`: one run at the positions from
    0 on, an ordinary prompt.
    """

    __slots__ = ("_blocks", "_positions", "_tokens", "closed", "plain", "reused", "runs")

    def __init__(
        self,
        runs: tuple[Run, ...] = (Run(),),
        reused: tuple[ReusedSpan, ...] = (),
        *,
        closed: bool = False,
    ) -> None:
        self.runs = runs
        self.reused = reused
        self.closed = closed
        self.plain = runs == (Run(),)
        self._tokens = [run.token for run in runs]
        self._blocks = [run.block for run in runs]
        self._positions = [run.position for run in runs]

    @property
    def chains(self) -> list[CachedChain]:
        """All that it borrows from, each once."""
        return list({reused.chain.name: reused.chain for reused in self.reused}.values())

    # -- tokens, blocks, positions ----------------------------------------------------------------

    def blocks(self, tokens: int) -> int:
        """Blocks that are complete with the first `tokens` tokens; the block of the next one."""
        if self.plain:  # asked several times for each sequence in each step
            return tokens // BLOCK_TOKENS
        run = self.runs[bisect_right(self._tokens, tokens) - 1]
        return run.block + (tokens - run.token) // BLOCK_TOKENS

    def tokens(self, blocks: int) -> int:
        """Tokens of the first `blocks` blocks; the first token of the next one."""
        if self.plain:
            return blocks * BLOCK_TOKENS
        index = self._run_of_block(blocks)
        run = self.runs[index]
        tokens = run.token + (blocks - run.block) * BLOCK_TOKENS
        return tokens if index + 1 == len(self.runs) else min(tokens, self._tokens[index + 1])

    def position(self, token: int) -> int:
        if self.plain:
            return token
        run = self.runs[bisect_right(self._tokens, token) - 1]
        return run.position + token - run.token

    def entry(self, block: int) -> int:
        """Where the block stands in a table of all entries."""
        if self.plain:
            return block
        run = self.runs[self._run_of_block(block)]
        return run.entry + block - run.block

    def within(self, begin: int, budget: int) -> int:
        """How many of the tokens from `begin` on a step may compute that has room for `budget`.

        As many, unless cuts spread them over more blocks than so many could touch without any.
        """
        touched = budget // BLOCK_TOKENS + 2
        return min(budget, self.tokens(self.blocks(begin) + touched) - begin)

    def charge(self, begin: int, end: int) -> int:
        """What of its budget computing these tokens takes."""
        touched = self.blocks(end - 1) - self.blocks(begin) + 1
        return max(end - begin, (touched - 2) * BLOCK_TOKENS)

    def first_needed(self, window: int | None, blocks: int) -> int:
        """The first block that a query after the first `blocks` blocks, or later, still sees."""
        if window is None:
            return 0
        tokens = self.tokens(blocks)
        # What is kept may be borrowed but for its last token, which then looks back from there.
        position = self.position(tokens - 1 if self.closed and tokens else tokens)
        return min(blocks, self.first_seen(window, position))

    def first_seen(self, window: int, position: int) -> int:
        """The first block of which a query at `position` sees something."""
        oldest = max(0, position - window + 1)
        index = max(0, bisect_right(self._positions, oldest) - 1)
        run = self.runs[index]
        ahead = max(0, oldest - run.position)
        if index + 1 < len(self.runs) and ahead >= self._tokens[index + 1] - run.token:
            return self._blocks[index + 1]  # there is a gap, or something borrowed
        return run.block + ahead // BLOCK_TOKENS

    def cut(self, begin: int, end: int) -> Iterator[tuple[int, int]]:
        """Tokens `begin` to `end`, run by run."""
        if self.plain and begin < end:
            yield begin, end
            return
        while begin < end:
            index = bisect_right(self._tokens, begin)
            stop = end if index == len(self.runs) else min(end, self._tokens[index])
            yield begin, stop
            begin = stop

    # -- entries ----------------------------------------------------------------------------------

    def table(self, blocks: int) -> Entries:
        """Entries of the first own blocks and of all that is borrowed, but without pages."""
        ends = [self.entry(blocks)]
        if self.reused:
            last = self.reused[-1]
            ends.append(last.entry + len(last.blocks))
        entries = np.zeros((max(ends), ENTRY_COLUMNS), dtype=np.int64)
        for index, run in enumerate(self.runs):
            begin, end = run.block, blocks
            if index + 1 < len(self.runs):
                end = min(blocks, self._blocks[index + 1])
            if begin < end:
                own = entries[run.entry : run.entry + end - begin]
                own[:, ROWS] = BLOCK_TOKENS
                own[-1, ROWS] = self.tokens(end) - self.tokens(end - 1)
                own[:, FIRST_POSITION] = run.position + np.arange(end - begin) * BLOCK_TOKENS
        return entries

    def own(self, begin: int, end: int) -> slice | NDArray[np.int64]:
        """Which entries of a table are blocks `begin` to `end`."""
        if len(self.runs) == 1 or begin >= self._blocks[-1]:
            return slice(self.entry(begin), self.entry(begin) + max(0, end - begin))
        return np.array([self.entry(block) for block in range(begin, end)], dtype=np.int64)

    def rotated(self, entries: int) -> int:
        """How many of the first entries there are up to the last one that is rotated."""
        for reused in reversed(self.reused):
            end = reused.entry + len(reused.blocks)
            if end <= entries and reused.rotation:
                return end
        return 0

    # -- keys -------------------------------------------------------------------------------------

    def keys(
        self,
        token_ids: Callable[[int, int], NDArray[np.int32]],
        begin: int,
        end: int,
        before: BlockKey,
    ) -> list[BlockKey]:
        """Of blocks `begin` to `end`; `before` is the key of the one before them, or the root.

        `token_ids(first, stop)`: these own tokens.
        """
        keys: list[BlockKey] = []
        for first, stop in self.cut(self.tokens(begin), self.tokens(end)):
            before = self.lineage(begin + len(keys), before)
            ids, position = token_ids(first, stop), self.position(first)
            named = chain_keys(before, ids, first_position=position, block_tokens=BLOCK_TOKENS)
            full = len(named) * BLOCK_TOKENS
            if full < len(ids):
                parent = named[-1] if named else before
                named.append(short_key(parent, ids[full:], first_position=position + full))
            keys += named
            before = keys[-1]
        return keys

    def lineage(self, block: int, before: BlockKey) -> BlockKey:
        """The parent of a block, where `before` is the key of the block before it, or the root."""
        run = self.runs[self._run_of_block(block)]
        if self.reused and run.block == block:
            previous = 0 if block == 0 else self.entry(block - 1) + 1
            for reused in self.reused:
                if previous <= reused.entry < run.entry:
                    before = reused.lineage(before)
        return before

    def _run_of_block(self, block: int) -> int:
        return bisect_right(self._blocks, block) - 1


PLAIN = Layout()
