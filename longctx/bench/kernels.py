"""Attention kernels against what the machine can do: memory read for decode, products for prefill.

Every backend, on pages of every codec, beside torch's own scaled_dot_product_attention on dense
keys and values. All take turns in one process on the same threads; medians count. Decode walks
through as many layers as no cache holds, one query row each; prefill is a chunk at the end of the
context. Sealing and the plan of a step are not part of it.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor

from compress.codec import CODECS
from compress.shape import BLOCK_TOKENS, KVShape, ShapeRefused
from longctx.attention.backend import ChunkRows
from longctx.attention.registry import BACKENDS
from longctx.bench.config import BenchConfig, KernelsConfig, RoundsConfig
from longctx.bench.machine_rates import (
    GemmRate,
    ReadBandwidth,
    alternate,
    last_level_cache_bytes,
    seconds_of,
)
from longctx.bench.picture import Series, draw_bars
from longctx.bench.random_pages import random_chunk
from longctx.bench.report import Parameter, Report, Result
from longctx.config import EngineConfig
from longctx.kv.memory import KVMemory
from longctx.model.layer_attention import AttentionCall
from longctx.model.loader import computes_bfloat16
from longctx.model.spec import LayerSpec

LEFT_OUT = "reference"  # obvious, not fast
SDPA = "sdpa"
DENSE = "dense"


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    kv_heads: int
    group: int
    head_dim: int

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group


@dataclass(slots=True, kw_only=True)
class Contender:
    """One way to attend; `decode` and `prefill` return the seconds of one call."""

    backend: str
    codec: str
    heads: Heads
    decode: Callable[[], float]
    prefill: Callable[[], float]
    kv_bytes: int  # that one decode call reads
    flop: float  # of one prefill call
    decode_seconds: float = field(default=0.0)
    prefill_seconds: float = field(default=0.0)

    @property
    def read_per_second(self) -> float:
        return self.kv_bytes / self.decode_seconds

    @property
    def flop_per_second(self) -> float:
        return self.flop / self.prefill_seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    bytes_per_second: float
    flop_per_second: Mapping[str, float]  # by type


def run(
    engine: EngineConfig,
    bench: BenchConfig,
    rounds: RoundsConfig,
    kernels: KernelsConfig,
    *,
    say: Callable[[str], None],
) -> Report:
    """Measures every backend on pages of every codec, by turns with the machine's own rates."""
    if engine.model.threads is not None:
        torch.set_num_threads(engine.model.threads)
    dtype = _dtype(engine.model.dtype)
    torch.manual_seed(bench.seed)
    reads = ReadBandwidth()
    gemms = {name: GemmRate(getattr(torch, name)) for name in ("float32", "bfloat16")}
    takes = (reads.take, *(rate.take for rate in gemms.values()))
    contenders: list[Contender] = []
    for head_dim in kernels.every_head_dim:
        for group in kernels.every_group:
            heads = Heads(kv_heads=kernels.kv_heads, group=group, head_dim=head_dim)
            say(f"head_dim {head_dim}, {group} query heads per key head")
            these = list(_contenders(heads, dtype, engine.cache.kv_codec, kernels, say))
            works = [work for each in these for work in (each.decode, each.prefill)]
            yardsticks = [partial(seconds_of, take) for take in takes]
            taken = [median(figures) for figures in alternate(yardsticks + works, rounds.rounds)]
            for each, decode, prefill in zip(
                these, taken[len(yardsticks) :: 2], taken[len(yardsticks) + 1 :: 2], strict=True
            ):
                each.decode_seconds, each.prefill_seconds = decode, prefill
                each.decode = each.prefill = _spent  # frees the pages
            contenders += these
    machine = Machine(
        bytes_per_second=reads.bytes_per_second,
        flop_per_second={name: rate.flop_per_second for name, rate in gemms.items()},
    )
    parameters: dict[str, Parameter] = {
        "context_tokens": kernels.context,
        "prefill_rows": kernels.prefill_rows,
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "rounds": rounds.rounds,
    }
    rows = tuple(_results(contenders, machine, parameters))
    subtitle = (
        f"{kernels.context:,} tokens, {parameters['dtype']}, {parameters['threads']} threads; "
        f"memory {machine.bytes_per_second / 1e9:.1f} GB/s, products "
        + ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in machine.flop_per_second.items())
        + " GFLOP/s"
    )
    return Report(
        results=rows,
        tables=tuple(_tables(contenders, machine, str(parameters["dtype"]), subtitle)),
        draw=partial(_draw, contenders, subtitle),
    )


def _dtype(name: str) -> torch.dtype:
    """Returns the compute type of the queries; `auto` is what a model gets on this CPU."""
    if name == "auto":
        name = "bfloat16" if computes_bfloat16() else "float32"
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _spent() -> float:
    raise AssertionError("this contender was measured already")


def _contenders(
    heads: Heads,
    dtype: torch.dtype,
    chosen: str,
    kernels: KernelsConfig,
    say: Callable[[str], None],
) -> Iterator[Contender]:
    codecs = list(CODECS) if chosen == "auto" else [chosen]
    for codec in codecs:
        try:
            memory = _memory(heads, dtype, codec, kernels)
        except ShapeRefused as error:
            say(f"{codec} is left out: {error}")
            continue
        blocks = kernels.context // BLOCK_TOKENS
        row = random_chunk(memory, past_blocks=blocks, rows=1)
        chunk = random_chunk(memory, past_blocks=blocks, rows=kernels.prefill_rows)
        for backend in BACKENDS:
            if backend != LEFT_OUT:
                yield _paged(heads, dtype, backend, memory, row, chunk)
    yield _dense(heads, dtype, kernels)


def _memory(heads: Heads, dtype: torch.dtype, codec: str, kernels: KernelsConfig) -> KVMemory:
    """Makes pools for a decode row and a prefill chunk, in twice as many layers as caches hold."""
    shape = KVShape(kv_heads=heads.kv_heads, head_dim=heads.head_dim, dtype=dtype)
    page_bytes = CODECS[codec](shape).page_bytes
    past_blocks = kernels.context // BLOCK_TOKENS
    layers = 2 * last_level_cache_bytes() // (past_blocks * page_bytes) + 1
    own_blocks = kernels.prefill_rows // BLOCK_TOKENS + 2
    spec = LayerSpec(
        heads=heads.heads, kv_heads=heads.kv_heads, head_dim=heads.head_dim, window=None
    )
    return KVMemory(
        [spec] * layers,
        dtype=dtype,
        device=torch.device("cpu"),
        codec=codec,
        pool_bytes=layers * page_bytes * (2 * (past_blocks + own_blocks) + 2),
        step_blocks=2 * own_blocks,
    )


def _paged(
    heads: Heads,
    dtype: torch.dtype,
    backend: str,
    memory: KVMemory,
    row: ChunkRows,
    chunk: ChunkRows,
) -> Contender:
    attention = BACKENDS[backend](memory)
    layers = len(memory.codecs)
    calls = [AttentionCall(layer, heads.head_dim**-0.5) for layer in range(layers)]
    one, many = (torch.randn(n, heads.heads, heads.head_dim).to(dtype) for n in (1, chunk.rows))

    def attend(query: Tensor, rows: ChunkRows, count: int) -> float:
        plan = attention.plan([rows], 0)
        began = time.perf_counter()
        for call in calls[:count]:
            attention.attend(call, query, plan)
        return (time.perf_counter() - began) / count

    return Contender(
        backend=backend,
        codec=memory.codecs[0].name,
        heads=heads,
        decode=lambda: attend(one, row, layers),
        prefill=lambda: attend(many, chunk, 1),
        kv_bytes=row.past_entries * memory.codecs[0].page_bytes,
        flop=_flop(heads, chunk.rows, past_tokens=chunk.first_position, causal=True),
    )


def _dense(heads: Heads, dtype: torch.dtype, kernels: KernelsConfig) -> Contender:
    """Makes torch's own attention; its prefill sees only what precedes the chunk, unmasked."""
    shape = (1, heads.kv_heads, kernels.context, heads.head_dim)
    kv_bytes = 2 * dtype.itemsize * heads.kv_heads * heads.head_dim * kernels.context
    layers = 2 * last_level_cache_bytes() // kv_bytes + 1
    pairs = [(torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)) for _ in range(layers)]
    one, many = (
        torch.randn(1, heads.heads, rows, heads.head_dim).to(dtype)
        for rows in (1, kernels.prefill_rows)
    )

    def attend(query: Tensor, count: int) -> float:
        began = time.perf_counter()
        for key, value in pairs[:count]:
            F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
        return (time.perf_counter() - began) / count

    return Contender(
        backend=SDPA,
        codec=DENSE,
        heads=heads,
        decode=lambda: attend(one, layers),
        prefill=lambda: attend(many, 1),
        kv_bytes=kv_bytes,
        flop=_flop(heads, kernels.prefill_rows, past_tokens=kernels.context, causal=False),
    )


def _flop(heads: Heads, rows: int, *, past_tokens: int, causal: bool) -> float:
    """Counts two products of two operations for every query row and key that it sees."""
    pairs = rows * past_tokens + (rows * (rows + 1) // 2 if causal else 0)
    return 4.0 * heads.heads * heads.head_dim * pairs


def _results(
    contenders: Sequence[Contender], machine: Machine, parameters: Mapping[str, Parameter]
) -> Iterator[Result]:
    yield Result(metric="memory read", value=machine.bytes_per_second / 1e9, unit="GB/s")
    for name, rate in machine.flop_per_second.items():
        yield Result(
            metric="matrix product", value=rate / 1e9, unit="GFLOP/s", parameters={"dtype": name}
        )
    gemm = machine.flop_per_second[str(parameters["dtype"])]
    for each in contenders:
        at: dict[str, Parameter] = {
            **parameters,
            "backend": each.backend,
            "codec": each.codec,
            "head_dim": each.heads.head_dim,
            "kv_heads": each.heads.kv_heads,
            "group": each.heads.group,
        }
        torch_best, sdpa = _baselines(contenders, each.heads)
        yield Result(
            metric="decode",
            value=1000 * each.decode_seconds,
            unit="ms",
            parameters={
                **at,
                "gb_per_second": each.read_per_second / 1e9,
                "share_of_memory_read": each.read_per_second / machine.bytes_per_second,
            },
            baseline=f"{torch_best.backend} {torch_best.codec}",
            baseline_value=1000 * torch_best.decode_seconds,
        )
        yield Result(
            metric="prefill",
            value=1e12 * each.prefill_seconds / each.flop,
            unit="ms/GFLOP",
            parameters={
                **at,
                "gflop_per_second": each.flop_per_second / 1e9,
                "share_of_matrix_product": each.flop_per_second / gemm,
            },
            baseline=SDPA,
            baseline_value=1e12 * sdpa.prefill_seconds / sdpa.flop,
        )


def _baselines(contenders: Sequence[Contender], heads: Heads) -> tuple[Contender, Contender]:
    """Returns torch's fastest decode, whatever the pages, and its own attention's prefill."""
    rivals = [each for each in contenders if each.heads == heads]
    by_torch = [each for each in rivals if each.backend in ("torch", SDPA)]
    fastest = min(by_torch, key=lambda each: each.decode_seconds)
    return fastest, next(each for each in rivals if each.backend == SDPA)


def _tables(
    contenders: Sequence[Contender], machine: Machine, dtype: str, subtitle: str
) -> Iterator[Table]:
    for heads in dict.fromkeys(each.heads for each in contenders):
        title = f"head_dim {heads.head_dim}, {heads.group} query heads per key head"
        table = Table(title=title, caption=subtitle)
        for name in ("", "pages", "decode", "GB/s", "of memory", "prefill", "of products"):
            table.add_column(name, justify="right")
        gemm = machine.flop_per_second[dtype]
        for each in contenders:
            if each.heads == heads:
                table.add_row(
                    each.backend,
                    each.codec,
                    f"{1000 * each.decode_seconds:.2f} ms",
                    f"{each.read_per_second / 1e9:.1f}",
                    f"{each.read_per_second / machine.bytes_per_second:.0%}",
                    f"{each.flop_per_second / 1e9:.0f} GFLOP/s",
                    f"{each.flop_per_second / gemm:.0%}",
                )
        yield table


def _draw(contenders: Sequence[Contender], subtitle: str, path: Path) -> None:
    first = contenders[0].heads
    shown = [each for each in contenders if each.heads == first]
    draw_bars(
        path,
        title=f"Time of one decode row, head_dim {first.head_dim}, group of {first.group}",
        subtitle=subtitle,
        groups=[f"{each.backend} {each.codec}" for each in shown],
        series=(Series(label="decode", values=[1000 * each.decode_seconds for each in shown]),),
        unit="ms",
    )
