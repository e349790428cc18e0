"""Where a sequence's own blocks lie, and what it reuses between them.

A sequence's *own* tokens are those that it computes, or finds under keys of its own. They come in
runs of consecutive positions; a run's blocks are full but for its last one. Between runs a position
may jump, and entries of other chains may lie there: *reused* rows, which nobody computes here.

    prompt      "You are"  [module: 100 tokens]  "Tell me"        an ordinary prompt: one run
    own tokens   0 1                              2 3 ...          0 1 2 3 ...
    own blocks   0                                1 ...            0 (64 tokens), 1, ...
    entries      0          1 2                   3 ...            0, 1, ...

Own tokens and own blocks are numbered without what is reused; the entries of a block table with
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
    """Own tokens at consecutive positions: its first token, block, position and entry."""

    token: int = 0
    block: int = 0
    position: int = 0
    entry: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class CachedChain:
    """A chain of blocks that prompts reuse, up to the end of a module's piece or of a document.

    It reuses nothing itself. `name` is that of the `Prefix` which holds it while it is resident;
    `root` the parent of its first block.
    """

    name: PrefixName
    layout: "Layout"
    keys: tuple[BlockKey, ...]
    root: BlockKey

    @property
    def owner(self) -> str:
        """Return the id of the module or document."""
        return owner_of(self.name)

    @property
    def tokens(self) -> int:
        """Return how many tokens its blocks hold."""
        return self.layout.tokens(len(self.keys))


@dataclass(frozen=True, slots=True)
class ReusedSpan:
    """Tokens `begin` to `end` of a chain, reused at consecutive positions from `position` on.

    `entry` is the index of its first entry in the block table of the prompt that reuses it.
    """

    chain: CachedChain
    begin: int
    end: int
    position: int
    entry: int

    @property
    def rotation(self) -> int:
        """Return how far its keys are from where they were encoded, in positions."""
        return self.position - self.chain.layout.position(self.begin)

    @property
    def blocks(self) -> range:
        """Return the chain's blocks that hold these tokens."""
        layout = self.chain.layout
        return range(layout.blocks(self.begin), layout.blocks(self.end - 1) + 1)

    def entries(self, table: Entries) -> Entries:
        """Return the chain's table entries as they are in this prompt.

        Say tokens 70 to 200 of a chain at position 0 are reused at position 500. Its blocks 1, 2
        and 3 hold them: (ROW_BEGIN, ROWS, FIRST_POSITION) are (6, 58, 500), (0, 64, 558) and
        (0, 8, 622), and ROTATION is 430 in all three.
        """
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
        """Return the parent key of what follows; `before` is the parent of what is reused.

        Whole blocks in their own place, after all that is before them in the chain, are the chain
        itself: what follows is shared with prompts that contain the same text.
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
    """Maps own tokens to blocks, positions and table entries; immutable, any thread may ask.

    `runs` begin at own token 0; the last one goes on for ever. Where it is empty, at the end of a
    prompt that is computed to be kept, the layout is `closed`: the block before it is sealed
    however few tokens it has. `plain`: one run at the positions from 0 on, an ordinary prompt.
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
        """Return all chains that it reuses tokens of, each once."""
        return list({reused.chain.name: reused.chain for reused in self.reused}.values())

    # -- tokens, blocks, positions ----------------------------------------------------------------

    def blocks(self, tokens: int) -> int:
        """Return how many blocks the first `tokens` tokens complete: the block of the next one."""
        if self.plain:  # asked several times for each sequence in each step
            return tokens // BLOCK_TOKENS
        run = self.runs[bisect_right(self._tokens, tokens) - 1]
        return run.block + (tokens - run.token) // BLOCK_TOKENS

    def tokens(self, blocks: int) -> int:
        """Return how many tokens the first `blocks` blocks hold: the next block's first one."""
        if self.plain:
            return blocks * BLOCK_TOKENS
        index = self._run_of_block(blocks)
        run = self.runs[index]
        tokens = run.token + (blocks - run.block) * BLOCK_TOKENS
        return tokens if index + 1 == len(self.runs) else min(tokens, self._tokens[index + 1])

    def position(self, token: int) -> int:
        """Return the position of an own token."""
        if self.plain:
            return token
        run = self.runs[bisect_right(self._tokens, token) - 1]
        return run.position + token - run.token

    def entry(self, block: int) -> int:
        """Return the index of an own block in a table of all entries."""
        if self.plain:
            return block
        run = self.runs[self._run_of_block(block)]
        return run.entry + block - run.block

    def within(self, begin: int, budget: int) -> int:
        """Return how many tokens from `begin` on one step may compute under `budget`.

        Runs end blocks early, so the limit is also `budget // 64 + 2` blocks touched, as many as
        `budget` tokens of one run can touch at most. Say a module has pieces of 10 tokens, a
        block each: under a budget of 128 tokens a step touches 4 blocks and computes 40 tokens.
        """
        touched = budget // BLOCK_TOKENS + 2
        return min(budget, self.tokens(self.blocks(begin) + touched) - begin)

    def charge(self, begin: int, end: int) -> int:
        """Return what these tokens take of a step's budget.

        That is their number, or (blocks touched - 2) * 64 where runs end blocks early: the 40
        tokens of the example in `within` touch 4 blocks and take all of 128.
        """
        touched = self.blocks(end - 1) - self.blocks(begin) + 1
        return max(end - begin, (touched - 2) * BLOCK_TOKENS)

    def first_needed(self, window: int | None, blocks: int) -> int:
        """Return the first block that queries after the first `blocks` blocks still see."""
        if window is None:
            return 0
        tokens = self.tokens(blocks)
        # A kept prompt may be reused but for its last token, which then looks back from there.
        position = self.position(tokens - 1 if self.closed and tokens else tokens)
        return min(blocks, self.first_seen(window, position))

    def first_seen(self, window: int, position: int) -> int:
        """Return the first block of which a query at `position` sees something."""
        oldest = max(0, position - window + 1)
        index = max(0, bisect_right(self._positions, oldest) - 1)
        run = self.runs[index]
        ahead = max(0, oldest - run.position)
        if index + 1 < len(self.runs) and ahead >= self._tokens[index + 1] - run.token:
            return self._blocks[index + 1]  # there is a gap, or something reused
        return run.block + ahead // BLOCK_TOKENS

    def cut(self, begin: int, end: int) -> Iterator[tuple[int, int]]:
        """Split tokens `begin` to `end` by runs: yield the begin and end of each part."""
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
        """Return entries of the first own blocks and of all that is reused, with no page yet."""
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
        """Return which entries of a table are own blocks `begin` to `end`."""
        if len(self.runs) == 1 or begin >= self._blocks[-1]:
            return slice(self.entry(begin), self.entry(begin) + max(0, end - begin))
        return np.array([self.entry(block) for block in range(begin, end)], dtype=np.int64)

    def rotated(self, entries: int) -> int:
        """Return how many of the first `entries` there are up to the last rotated one."""
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
        """Return the keys of blocks `begin` to `end`; `before`: the key before them, or the root.

        `token_ids(first, stop)` returns these own tokens.
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
        """Return the parent key of a block; `before`: the key before it, or the root."""
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
