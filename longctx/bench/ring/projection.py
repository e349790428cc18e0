"""How long prefill on many GPUs should take: a model of compute and links, not a measurement.

Every rank computes at a given rate, perfectly; what is added is what the split itself costs: bytes
that attention does not hide, latencies, and ranks that have more to do than the mean. A rank is one
GPU, or eight that share a layer (which longctx does not do; it is what published figures of a model
of 405 billion parameters were taken on).

Source of the rate and of the figures beside it: https://arxiv.org/abs/2411.01783: 540 TFLOP/s of an
H100 in attention alone; 77 s for 1M tokens on 128 of them, which the authors call 93% efficient.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from compress.shape import BLOCK_TOKENS
from longctx.ring.comm_cost import (
    RowBytes,
    new_pages_sent,
    pass_kv_cost,
    pass_q_cost,
    prefers_pass_q,
)
from longctx.ring.link import Link
from longctx.ring.placement import count_owned, split_chunk

GPU_FLOP_PER_SECOND = 540e12
# Of one GPU and direction, as specified, at 80%.
LINKS: Mapping[str, Link] = {
    "NVLink": Link(5e-6, 0.8 * 450e9),
    "InfiniBand": Link(10e-6, 0.8 * 50e9),
    "Ethernet": Link(50e-6, 0.8 * 12.5e9),
}
CHUNK_TOKENS_PER_RANK = 4096
TILE_BLOCKS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A model as one rank sees it; heads and links are divided among the rank's `gpus`."""

    name: str
    parameters: float
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    gpus: int

    @property
    def page_bytes(self) -> int:
        """The bytes of one block in one layer, bfloat16, for one GPU's heads."""
        return 2 * 2 * self.kv_heads * self.head_dim * BLOCK_TOKENS // self.gpus

    @property
    def row_bytes(self) -> RowBytes:
        return RowBytes.of(self.heads // self.gpus, self.head_dim, query_bytes=2)

    def attention_flop(self, pairs: float) -> float:
        """Operations of one layer for so many pairs of row and key, on one of a rank's GPUs."""
        return 4 * self.heads * self.head_dim * pairs / self.gpus

    @property
    def linear_flop(self) -> float:
        """Operations of one layer for one row, on one of a rank's GPUs."""
        return 2 * self.parameters / self.layers / self.gpus


MODELS = (
    Model(
        name="8B",
        parameters=8e9,
        layers=32,
        heads=32,
        kv_heads=8,
        head_dim=128,
        gpus=1,
    ),
    Model(
        name="405B",
        parameters=405e9,
        layers=126,
        heads=128,
        kv_heads=8,
        head_dim=128,
        gpus=8,
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Projection:
    model: str
    link: str
    tokens: int
    gpus: int
    seconds: float
    ideal_seconds: float  # the same work, evenly divided, nothing sent

    @property
    def efficiency(self) -> float:
        return self.ideal_seconds / self.seconds


def project(
    model: Model, link_name: str, tokens: int, gpus: int, *, flop_per_second: float
) -> Projection:
    """Sums up the chunks that the engine would cut a prompt of so many tokens into."""
    ranks, link = gpus // model.gpus, LINKS[link_name]
    seconds = ideal = 0.0
    for begin in range(0, tokens, CHUNK_TOKENS_PER_RANK * ranks):
        end = min(tokens, begin + CHUNK_TOKENS_PER_RANK * ranks)
        pairs = (end - begin) * (begin + end) / 2
        whole = (end - begin) * model.linear_flop + model.attention_flop(pairs)
        ideal += model.layers * whole / ranks / flop_per_second
        seconds += model.layers * _layer_seconds(model, link, begin, end, ranks, flop_per_second)
    return Projection(
        model=model.name,
        link=link_name,
        tokens=tokens,
        gpus=gpus,
        seconds=seconds,
        ideal_seconds=ideal,
    )


def _layer_seconds(
    model: Model, link: Link, begin: int, end: int, ranks: int, flop_per_second: float
) -> float:
    """Returns one layer's time: the slowest rank's linears, then its attention or the wires."""
    cut = split_chunk(begin, end, ranks)
    rows, pairs = [0] * ranks, [0.0] * ranks
    for part in cut:
        rows[part.rank] += part.rows
        pairs[part.rank] += part.rows * (part.begin - begin + part.rows / 2)
    past = count_owned(0, begin // BLOCK_TOKENS, ranks)
    new_bytes = new_pages_sent(cut, ranks) * model.page_bytes / ranks
    sending = link.seconds(ranks - 1, 0) + new_bytes / link.bytes_per_second
    if begin and ranks > 1:
        keys = pass_kv_cost(rows, past, page_bytes=model.page_bytes, tile_pages=TILE_BLOCKS)
        queries = pass_q_cost(rows, past, row_bytes=model.row_bytes)
        pairs_per_second = flop_per_second / model.attention_flop(1)
        is_pass_q = prefers_pass_q(keys, queries, link, pairs_per_second=pairs_per_second)
        sending += (queries if is_pass_q else keys).link_seconds(link)
    else:
        is_pass_q = False
    for rank in range(ranks):
        # Where queries are passed, a rank attends everybody's rows against its own share.
        pairs[rank] += (
            (end - begin) * past[rank] * BLOCK_TOKENS if is_pass_q else rows[rank] * float(begin)
        )
    attending = max(model.attention_flop(each) for each in pairs) / flop_per_second
    return max(rows) * model.linear_flop / flop_per_second + max(attending, sending)
