"""Builds one prompt: its own tokens, the runs that they form, and what it reuses between them.

An ordinary prompt is one run of tokens. A prompt with pieces of modules, positions or cuts is built
run by run: what is computed here is appended to its own tokens, and what is reused only names rows
of another chain. The last token is always its own, so that there is a row to sample from.
"""

from collections.abc import Sequence as Items
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from compress.shape import BLOCK_TOKENS
from longctx.errors import InvalidRequest
from longctx.kv.layout import PLAIN, CachedChain, Layout, ReusedSpan, Run
from longctx.kv.prefix_index import PrefixName
from longctx.kv.sequence_blocks import TokenIds


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a request says, as its sequences begin with it: own tokens and their layout.

    `ends` are the token counts and names up to the end of each document, or of each piece of a
    module that is encoded. `reused_ids` are the tokens that the reused spans say, in order.
    """

    tokens: TokenIds
    layout: Layout = PLAIN
    ends: tuple[tuple[int, PrefixName], ...] = ()
    linked_tokens: int = 0
    reused_ids: tuple[NDArray[np.int32], ...] = ()


class PromptBuilder:
    """Builds a prompt that has modules, positions or cuts.

    Call `cut`, `compute` and `reuse` in reading order, then `prompt` once. Tokens follow on those
    before them unless a position is given; positions may leave gaps and never go back.
    """

    def __init__(
        self, base: NDArray[np.int32], ends: tuple[tuple[int, PrefixName], ...] = ()
    ) -> None:
        """Begin with an ordinary prompt of the tokens `base`, whose documents end at `ends`."""
        self._base = base
        self._ends = ends
        self._tail: list[int] = []
        self._runs = [Run()] if len(base) else []
        self._reused: list[ReusedSpan] = []
        self._position = len(base)
        self._cut = not self._runs
        self._linked_tokens = 0
        self._reused_ids: list[NDArray[np.int32]] = []

    @property
    def _own_tokens(self) -> int:
        return len(self._base) + len(self._tail)

    def cut(self) -> None:
        """End the block here, so that the next tokens begin another one."""
        self._cut = True

    def compute(self, token_ids: Items[int], position: int | None = None) -> None:
        """Append tokens to compute. Raises InvalidRequest where their position is taken."""
        position = self._check(position)
        if not len(token_ids):
            return
        if self._cut or position != self._position:
            block, entry = self._next_block_and_entry()
            self._runs.append(Run(self._own_tokens, block, position, entry))
            self._cut = False
        self._tail += token_ids
        self._position = position + len(token_ids)

    def reuse(
        self, chain: CachedChain, begin: int, token_ids: NDArray[np.int32], position: int | None
    ) -> None:
        """Append the rows of a chain from its token `begin` on, which say `token_ids`.

        Raises InvalidRequest where the position is taken.
        """
        position = self._check(position)
        end = begin + len(token_ids)
        if begin < end:
            self._reused_ids.append(token_ids)
            _, entry = self._next_block_and_entry()
            self._reused.append(ReusedSpan(chain, begin, end, position, entry))
            self._cut = True
            self._position = position + end - begin

    def count_linked(self, tokens: int) -> None:
        """Count tokens that were given to `compute` and belong to a part that is else reused."""
        self._linked_tokens += tokens

    def prompt(self) -> Prompt:
        """Return the prompt.

        If the prompt ends with a reused span, its last token is computed instead: a reused row has
        keys and values but no logits, and the answer is sampled from the logits of the last row. A
        prompt that is nothing but a module of 100 tokens reuses 99 and computes the 100th, at its
        position, as its only own token.
        """
        if self._reused and (not self._runs or self._last_entry > self._runs[-1].entry):
            last = self._reused.pop()
            self._position -= 1
            if last.end - last.begin > 1:
                shorter = ReusedSpan(
                    last.chain, last.begin, last.end - 1, last.position, last.entry
                )
                self._reused.append(shorter)
            self._linked_tokens += 1
            token_ids = self._reused_ids.pop()
            self._reused_ids.append(token_ids[:-1])
            self.compute(token_ids[-1:].tolist())
        return Prompt(
            TokenIds(self._base, self._tail),
            Layout(tuple(self._runs) or (Run(),), tuple(self._reused)),
            self._ends,
            self._linked_tokens,
            tuple(self._reused_ids),
        )

    @property
    def _last_entry(self) -> int:
        return self._reused[-1].entry + len(self._reused[-1].blocks)

    def _next_block_and_entry(self) -> tuple[int, int]:
        """Return the own block and the table entry that come next if the last run ends here."""
        block = entry = 0
        if self._runs:
            run = self._runs[-1]
            blocks = -(-(self._own_tokens - run.token) // BLOCK_TOKENS)
            block, entry = run.block + blocks, run.entry + blocks
        if self._reused:
            entry = max(entry, self._last_entry)
        return block, entry

    def _check(self, position: int | None) -> int:
        if position is None:
            return self._position
        if position < self._position:
            raise InvalidRequest(
                f"a segment is to begin at position {position}, but what comes before it ends at "
                f"{self._position}; positions may leave gaps and never go back",
                param="position",
            )
        return position
