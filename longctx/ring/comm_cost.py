"""What travels when rows and the keys that they see are on different ranks: the one or the other.

Bytes sent per layer, by all ranks together, for one sequence whose rank r computes `rows[r]` rows
and has `pages[r]` pages that they see:

    new       of a chunk that is cut, `new_pages_sent` * page_bytes
    keys      sum over r with rows of (pages that r lacks) * page_bytes
    queries   sum over r of rows[r] * (other ranks with pages) * row_bytes

where a row's query goes out and its result, with the lse, comes back in float32:

    row_bytes = heads * (head_dim * (query_bytes + 4) + 4)

Source of the choice: https://arxiv.org/abs/2411.01783; differs: encoded pages travel, and time is
compared, by the bytes of the rank that sends most, by how many messages follow each other, and by
how evenly the ranks would work.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from compress.shape import BLOCK_TOKENS
from longctx.ring.link import Link
from longctx.ring.placement import Part, owner

RESULT_BYTES = 4  # of a value or an lse: float32


@dataclass(frozen=True, slots=True)
class RowBytes:
    """What one row takes on the wire: its query, and what comes back."""

    query: int
    result: int

    @classmethod
    def of(cls, heads: int, head_dim: int, *, query_bytes: int) -> "RowBytes":
        return cls(heads * head_dim * query_bytes, heads * (head_dim + 1) * RESULT_BYTES)


@dataclass(frozen=True, slots=True)
class Traffic:
    """Of one layer, for what is past: bytes that each rank sends, messages that wait for each
    other, and rows times keys that each rank then attends.
    """

    bytes_sent: tuple[int, ...]
    messages: int
    pairs: tuple[int, ...]

    def link_seconds(self, link: Link) -> float:
        return link.seconds(self.messages, max(self.bytes_sent))


def keys_traffic(
    rows: Sequence[int], pages: Sequence[int], *, page_bytes: int, tile_pages: int
) -> Traffic:
    """Every rank with rows gets all pages that it lacks, so many at a time."""
    ranks = range(len(rows))
    sent = tuple(
        pages[sender] * page_bytes * sum(rows[r] > 0 for r in ranks if r != sender)
        for sender in ranks
    )
    messages = (len(rows) - 1) * -(-max(pages) // tile_pages)
    return Traffic(sent, messages, tuple(own * sum(pages) * BLOCK_TOKENS for own in rows))


def queries_traffic(rows: Sequence[int], pages: Sequence[int], *, row_bytes: RowBytes) -> Traffic:
    """Every rank with pages gets the rows of all others and sends back results."""
    ranks = range(len(rows))
    sent = tuple(
        rows[sender] * row_bytes.query * sum(pages[r] > 0 for r in ranks if r != sender)
        + (sum(rows) - rows[sender]) * row_bytes.result * (pages[sender] > 0)
        for sender in ranks
    )
    return Traffic(sent, 2, tuple(own * sum(rows) * BLOCK_TOKENS for own in pages))


def new_pages_sent(cut: Sequence[Part], ranks: int) -> int:
    """Of a chunk that is cut: blocks that a rank sees and has not computed, or that it keeps."""
    sent = 0
    for rank in range(ranks):
        latest = max((part.begin for part in cut if part.rank == rank), default=-1)
        for part in cut:
            if part.rank != rank:
                keeps = sum(owner(block, ranks) == rank for block in part.sealed)
                sent += len(part.sealed) if part.begin < latest else keeps
    return sent


def passes_queries(
    keys: Traffic, queries: Traffic, link: Link, *, pairs_per_second: float = math.inf
) -> bool:
    """Whether passing the queries is the faster way.

    What travels is hidden behind attention, as far as that takes time: so the longer of the two
    counts, at the rank that attends most. With keys that depends on who has rows, with queries on
    who has pages. Where both take as long, the wires decide.
    """

    def cost(way: Traffic) -> tuple[float, float]:
        sending = way.link_seconds(link)
        return max(sending, max(way.pairs) / pairs_per_second), sending

    return cost(queries) < cost(keys)
