"""One prompt in the making: its own tokens, how they lie, and what it borrows between them.

An ordinary prompt is one run of tokens. A prompt with pieces of modules, positions or cuts is built
run by run: what is computed here is appended to its own tokens, what is borrowed only names the
rows of another chain. The last token is always its own, so that there is a row to sample from.
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
    """What a request says, as its sequences begin: own tokens, and how they lie."""

    tokens: TokenIds
    layout: Layout = PLAIN
    ends: tuple[tuple[int, PrefixName], ...] = ()  # of its documents, or of the pieces of a module
    linked_tokens: int = 0
    reused_ids: tuple[NDArray[np.int32], ...] = ()


class PromptBuilder:
    """One prompt in the making; call in reading order, then `prompt`."""

    def __init__(
        self, base: NDArray[np.int32], ends: tuple[tuple[int, PrefixName], ...] = ()
    ) -> None:
        """`base`: tokens that it begins with, as an ordinary prompt would."""
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
        """The block ends here."""
        self._cut = True

    def compute(self, token_ids: Items[int], position: int | None = None) -> None:
        """Tokens of its own. Raises InvalidRequest where the position is taken."""
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
        """The tokens of a source from `begin` on, which say `token_ids`.

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
        """So many of the tokens that were computed would else have been borrowed."""
        self._linked_tokens += tokens

    def prompt(self) -> Prompt:
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
        """Own blocks so far, where the last run ends here; and entries."""
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
                f"a segment is to stand at position {position}, but what stands before it ends at "
                f"{self._position}; positions may leave gaps and never go back",
                param="position",
            )
        return position
