"""The communication cost of rows whose keys are on other ranks: pass the keys or the queries.

Passing the keys ("pass-KV") sends encoded pages to the ranks that have rows; passing the queries
("pass-Q") sends rows to the ranks that have pages, and their results back. Per layer, summed over
all ranks, for one sequence of which rank r computes `rows[r]` rows and owns `pages[r]` past pages:

    pass-KV   sum over r with rows of (pages that r does not own) * page_bytes
    pass-Q    sum over r of rows[r] * (other ranks with pages) * row_bytes

A row's query goes out in the model's dtype; its result comes back with the lse, in float32:

    row_bytes = heads * (head_dim * (query_bytes + 4) + 4)

A zigzag-split chunk sends `new_pages_sent` * page_bytes of its own blocks in either case.

Example: 2 ranks own 100 pages each and rank 0 decodes one row. With 8 KV heads, 32 heads, a
head_dim of 128 and bfloat16, pass-KV sends 100 pages of 256 KiB, 26 MB, and pass-Q 25 kB.

Source of the choice: https://arxiv.org/abs/2411.01783. Differs: encoded pages travel, and times are
compared instead of bytes. They follow from the bytes of the rank that sends most, from how many
messages wait for each other, and from how evenly the ranks would work.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from compress.shape import BLOCK_TOKENS
from longctx.ring.link import Link
from longctx.ring.placement import ChunkPart, owner

RESULT_BYTES = 4  # of a value or an lse: float32


@dataclass(frozen=True, slots=True)
class RowBytes:
    """Bytes that one row takes on the wire: its query going out, its result coming back."""

    query: int
    result: int

    @classmethod
    def of(cls, heads: int, head_dim: int, *, query_bytes: int) -> "RowBytes":
        """`query_bytes`: of one value of a query. The result has an lse per head beside `out`."""
        return cls(heads * head_dim * query_bytes, heads * (head_dim + 1) * RESULT_BYTES)


@dataclass(frozen=True, slots=True)
class CommCost:
    """What one layer's attention to past blocks costs, one way or the other.

    `bytes_sent[r]`: by rank r. `messages`: how many have to wait for each other. `pairs[r]`: rows
    times keys that rank r attends then.
    """

    bytes_sent: tuple[int, ...]
    messages: int
    pairs: tuple[int, ...]

    def link_seconds(self, link: Link) -> float:
        """Return how long the rank that sends most is busy sending."""
        return link.seconds(self.messages, max(self.bytes_sent))


def pass_kv_cost(
    rows: Sequence[int], pages: Sequence[int], *, page_bytes: int, tile_pages: int
) -> CommCost:
    """Every rank with rows receives all pages that it does not own, `tile_pages` at a time."""
    ranks = range(len(rows))
    sent = tuple(
        pages[sender] * page_bytes * sum(rows[r] > 0 for r in ranks if r != sender)
        for sender in ranks
    )
    messages = (len(rows) - 1) * -(-max(pages) // tile_pages)
    return CommCost(sent, messages, tuple(own * sum(pages) * BLOCK_TOKENS for own in rows))


def pass_q_cost(rows: Sequence[int], pages: Sequence[int], *, row_bytes: RowBytes) -> CommCost:
    """Every rank with pages receives the rows of all others and sends their results back."""
    ranks = range(len(rows))
    sent = tuple(
        rows[sender] * row_bytes.query * sum(pages[r] > 0 for r in ranks if r != sender)
        + (sum(rows) - rows[sender]) * row_bytes.result * (pages[sender] > 0)
        for sender in ranks
    )
    return CommCost(sent, 2, tuple(own * sum(rows) * BLOCK_TOKENS for own in pages))


def new_pages_sent(parts: Sequence[ChunkPart], ranks: int) -> int:
    """Count the blocks sent for a zigzag-split chunk, in one layer, by all ranks.

    Each rank receives those that it attends to but did not compute, plus those that it will own.
    3 ranks and blocks 0 to 19 (see `placement.py`; rank 0 owns 0-15, rank 1 owns 16-19):

        rank 0   computed 0-2 and 16-19, attends to the 13 between           13
        rank 1   computed 3-5 and 13-15, attends to 0-2 and 6-12, owns 16-19 14
        rank 2   computed 6-12, attends to 0-5                                6
    """
    sent = 0
    for rank in range(ranks):
        latest = max((part.begin for part in parts if part.rank == rank), default=-1)
        for part in parts:
            if part.rank != rank:
                owned = sum(owner(block, ranks) == rank for block in part.sealed_blocks)
                sent += len(part.sealed_blocks) if part.begin < latest else owned
    return sent


def prefers_pass_q(
    pass_kv: CommCost, pass_q: CommCost, link: Link, *, pairs_per_second: float = math.inf
) -> bool:
    """Return whether passing the queries is faster than passing the keys.

    Transfers are hidden behind attention as far as that takes time, so the longer of the two
    counts, at the rank that attends most: with pass-KV that depends on who has rows, with pass-Q on
    who has pages. If both ways take as long, the time on the link decides.
    """

    def cost(way: CommCost) -> tuple[float, float]:
        sending = way.link_seconds(link)
        return max(sending, max(way.pairs) / pairs_per_second), sending

    return cost(pass_q) < cost(pass_kv)
