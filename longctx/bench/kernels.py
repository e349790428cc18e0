"""Attention kernels against what the machine can do: memory read for decode, products for prefill.

Every backend that works on the device, on pages of every codec, beside torch's own
scaled_dot_product_attention on dense keys and values. All take turns in one process on the same
threads; medians count. Decode walks through as many layers as no cache holds, one query row for
each sequence; prefill is a chunk at the end of the context. Sealing and the plan of a step are not
part of it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
from longctx.attention.registry import BACKENDS, backend_for
from longctx.bench.config import BenchConfig, KernelsConfig, RoundsConfig
from longctx.bench.machine_rates import (
    GemmRate,
    alternate,
    last_level_cache_bytes,
    memory_bandwidth,
    seconds_of,
)
from longctx.bench.picture import Series, draw_bars
from longctx.bench.random_pages import random_chunk
from longctx.bench.report import Parameter, Report, Result
from longctx.config import EngineConfig
from longctx.errors import ModelRefused
from longctx.kv.memory import KVMemory
from longctx.model.layer_attention import AttentionCall
from longctx.model.loader import computes_bfloat16, device_of
from longctx.model.spec import LayerSpec

LEFT_OUT = "reference"  # obvious, not fast
SDPA = "sdpa"
DENSE = "dense"
GPU_CALLS = 8  # at least, between two waits for a GPU, whose own time would count


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
    """One way to attend; `decode`, for so many sequences, and `prefill` return seconds a call."""

    backend: str
    codec: str
    heads: Heads
    decode: Mapping[int, Callable[[], float]]
    prefill: Callable[[], float]
    kv_bytes: int  # that one decode call reads for each sequence
    flop: float  # of one prefill call
    decode_seconds: dict[int, float] = field(default_factory=dict)
    prefill_seconds: float = field(default=0.0)

    @property
    def works(self) -> list[Callable[[], float]]:
        """What is measured: each decode, then the prefill."""
        return [*self.decode.values(), self.prefill]

    def keep(self, seconds: Sequence[float]) -> None:
        """Take note of the seconds of all `works`, and let go of the pages."""
        self.decode_seconds = dict(zip(self.decode, seconds, strict=False))
        self.prefill_seconds = seconds[-1]
        self.decode, self.prefill = {}, _spent

    def read_per_second(self, sequences: int) -> float:
        return self.kv_bytes * sequences / self.decode_seconds[sequences]

    @property
    def flop_per_second(self) -> float:
        return self.flop / self.prefill_seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    memory: str  # how its bandwidth was taken
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
    device = device_of(engine.model.device)
    dtype = _dtype(engine.model.dtype, device)
    torch.manual_seed(bench.seed)
    reads = memory_bandwidth(device)
    gemms = {name: GemmRate(getattr(torch, name), device) for name in ("float32", "bfloat16")}
    takes = (reads.take, *(rate.take for rate in gemms.values()))
    contenders: list[Contender] = []
    for head_dim in kernels.every_head_dim:
        for group in kernels.every_group:
            heads = Heads(kv_heads=kernels.kv_heads, group=group, head_dim=head_dim)
            say(f"head_dim {head_dim}, {group} query heads per key head")
            place = Place(device=device, dtype=dtype, backends=_backends(engine, device))
            these = list(_contenders(heads, place, engine.cache.kv_codec, kernels, say))
            works = [work for each in these for work in each.works]
            yardsticks = [partial(seconds_of, take) for take in takes]
            taken = [median(figures) for figures in alternate(yardsticks + works, rounds.rounds)]
            del works
            seconds = iter(taken[len(yardsticks) :])
            for each in these:
                each.keep([next(seconds) for _ in each.works])
            contenders += these
    machine = Machine(
        memory=reads.metric,
        bytes_per_second=reads.bytes_per_second,
        flop_per_second={name: rate.flop_per_second for name, rate in gemms.items()},
    )
    parameters: dict[str, Parameter] = {
        "context_tokens": kernels.context,
        "prefill_rows": kernels.prefill_rows,
        "dtype": str(dtype).removeprefix("torch."),
        "device": str(device),
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where attention is computed, in which type, and by which backends."""

    device: torch.device
    dtype: torch.dtype
    backends: Sequence[str]

    @property
    def calls(self) -> int:
        """How many calls are timed together at least."""
        return GPU_CALLS if self.device.type == "cuda" else 1


def _backends(engine: EngineConfig, device: torch.device) -> Sequence[str]:
    """Returns the backend that was asked for, or all but the slow one that work on the device."""
    if engine.model.attention_backend != "auto":
        return (backend_for(engine.model.attention_backend, device),)
    found = []
    for name in BACKENDS:
        try:
            found.append(backend_for(name, device))
        except ModelRefused:
            continue
    return [name for name in found if name != LEFT_OUT]


def _dtype(name: str, device: torch.device) -> torch.dtype:
    """Returns the compute type of the queries; `auto` is what a model gets on this device."""
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" or computes_bfloat16() else "float32"
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _spent() -> float:
    raise AssertionError("this contender was measured already")


def _contenders(
    heads: Heads,
    place: Place,
    chosen: str,
    kernels: KernelsConfig,
    say: Callable[[str], None],
) -> Iterator[Contender]:
    codecs = list(CODECS) if chosen == "auto" else [chosen]
    for codec in codecs:
        try:
            memory = _memory(heads, place, codec, kernels)
        except ShapeRefused as error:
            say(f"{codec} is left out: {error}")
            continue
        blocks = kernels.context // BLOCK_TOKENS
        rows = [
            replace(random_chunk(memory, past_blocks=blocks, rows=1), row_begin=number)
            for number in range(max(kernels.every_sequences))
        ]
        chunk = random_chunk(memory, past_blocks=blocks, rows=kernels.prefill_rows)
        for backend in place.backends:
            yield _paged(heads, place, backend, memory, rows, chunk, kernels.every_sequences)
    yield _dense(heads, place, kernels)


def _memory(heads: Heads, place: Place, codec: str, kernels: KernelsConfig) -> KVMemory:
    """Makes pools for decode rows and a prefill chunk, in twice as many layers as caches hold."""
    shape = KVShape(kv_heads=heads.kv_heads, head_dim=heads.head_dim, dtype=place.dtype)
    page_bytes = CODECS[codec](shape).page_bytes
    past_blocks = kernels.context // BLOCK_TOKENS
    layers = 2 * last_level_cache_bytes(place.device) // (past_blocks * page_bytes) + 1
    own_blocks = kernels.prefill_rows // BLOCK_TOKENS + 2
    sequences = max(kernels.every_sequences)
    spec = LayerSpec(
        heads=heads.heads, kv_heads=heads.kv_heads, head_dim=heads.head_dim, window=None
    )
    pages = (sequences + 1) * past_blocks + 2 * own_blocks + sequences + 2
    return KVMemory(
        [spec] * layers,
        dtype=place.dtype,
        device=place.device,
        codec=codec,
        pool_bytes=layers * page_bytes * pages,
        step_blocks=2 * own_blocks + sequences,
    )


def _paged(
    heads: Heads,
    place: Place,
    backend: str,
    memory: KVMemory,
    rows: Sequence[ChunkRows],
    chunk: ChunkRows,
    batches: Sequence[int],
) -> Contender:
    attention = BACKENDS[backend](memory)
    layers = len(memory.codecs)
    calls = [AttentionCall(layer, heads.head_dim**-0.5) for layer in range(layers)]

    def attend(chunks: Sequence[ChunkRows], count: int) -> Callable[[], float]:
        tokens = sum(each.rows for each in chunks)
        query = _random((tokens, heads.heads, heads.head_dim), place)
        turns = [calls[number % layers] for number in range(max(count, place.calls))]

        def work() -> float:
            plan = attention.plan(chunks, 0)

            def walk() -> None:
                for call in turns:
                    attention.attend(call, query, plan)

            return seconds_of(walk, place.device) / len(turns)

        return work

    return Contender(
        backend=backend,
        codec=memory.codecs[0].name,
        heads=heads,
        decode={count: attend(rows[:count], layers) for count in batches},
        prefill=attend([chunk], 1),
        kv_bytes=rows[0].past_entries * memory.codecs[0].page_bytes,
        flop=_flop(heads, chunk.rows, past_tokens=chunk.first_position, causal=True),
    )


def _dense(heads: Heads, place: Place, kernels: KernelsConfig) -> Contender:
    """Makes torch's own attention; its prefill sees only what precedes the chunk, unmasked."""
    most = max(kernels.every_sequences)
    shape = (most, heads.kv_heads, kernels.context, heads.head_dim)
    kv_bytes = 2 * place.dtype.itemsize * heads.kv_heads * heads.head_dim * kernels.context
    layers = 2 * last_level_cache_bytes(place.device) // kv_bytes + 1
    pairs = [(_random(shape, place), _random(shape, place)) for _ in range(layers)]

    def attend(sequences: int, rows: int, count: int) -> Callable[[], float]:
        query = _random((sequences, heads.heads, rows, heads.head_dim), place)
        parts = [(key[:sequences], value[:sequences]) for key, value in pairs]
        turns = [parts[number % layers] for number in range(max(count, place.calls))]

        def walk() -> None:
            for key, value in turns:
                F.scaled_dot_product_attention(query, key, value, enable_gqa=True)

        return lambda: seconds_of(walk, place.device) / len(turns)

    return Contender(
        backend=SDPA,
        codec=DENSE,
        heads=heads,
        decode={count: attend(count, 1, layers) for count in kernels.every_sequences},
        prefill=attend(1, kernels.prefill_rows, 1),
        kv_bytes=kv_bytes,
        flop=_flop(heads, kernels.prefill_rows, past_tokens=kernels.context, causal=False),
    )


def _random(shape: tuple[int, ...], place: Place) -> Tensor:
    return torch.randn(shape, dtype=place.dtype, device=place.device)


def _flop(heads: Heads, rows: int, *, past_tokens: int, causal: bool) -> float:
    """Counts two products of two operations for every query row and key that it sees."""
    pairs = rows * past_tokens + (rows * (rows + 1) // 2 if causal else 0)
    return 4.0 * heads.heads * heads.head_dim * pairs


def _results(
    contenders: Sequence[Contender], machine: Machine, parameters: Mapping[str, Parameter]
) -> Iterator[Result]:
    yield Result(metric=machine.memory, value=machine.bytes_per_second / 1e9, unit="GB/s")
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
        for sequences, seconds in each.decode_seconds.items():
            torch_best = _fastest_of_torch(contenders, each.heads, sequences)
            read_per_second = each.read_per_second(sequences)
            share = f"share_of_{machine.memory.replace(' ', '_')}"
            yield Result(
                metric="decode",
                value=1000 * seconds,
                unit="ms",
                parameters={
                    **at,
                    "sequences": sequences,
                    "gb_per_second": read_per_second / 1e9,
                    share: read_per_second / machine.bytes_per_second,
                },
                baseline=f"{torch_best.backend} {torch_best.codec}",
                baseline_value=1000 * torch_best.decode_seconds[sequences],
            )
        sdpa = next(one for one in contenders if one.heads == each.heads and one.backend == SDPA)
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


def _fastest_of_torch(contenders: Sequence[Contender], heads: Heads, sequences: int) -> Contender:
    """Returns torch's fastest decode, whatever the pages."""
    rivals = [
        each for each in contenders if each.heads == heads and each.backend in ("torch", SDPA)
    ]
    return min(rivals, key=lambda each: each.decode_seconds[sequences])


def _tables(
    contenders: Sequence[Contender], machine: Machine, dtype: str, subtitle: str
) -> Iterator[Table]:
    for heads in dict.fromkeys(each.heads for each in contenders):
        title = f"head_dim {heads.head_dim}, {heads.group} query heads per key head"
        table = Table(title=title, caption=subtitle)
        for name in ("", "pages", "rows", "decode", "GB/s", "of memory", "prefill", "of products"):
            table.add_column(name, justify="right")
        gemm = machine.flop_per_second[dtype]
        for each in (one for one in contenders if one.heads == heads):
            prefill = (
                f"{each.flop_per_second / 1e9:.0f} GFLOP/s",
                f"{each.flop_per_second / gemm:.0%}",
            )
            for sequences, seconds in each.decode_seconds.items():
                read_per_second = each.read_per_second(sequences)
                table.add_row(
                    each.backend,
                    each.codec,
                    str(sequences),
                    f"{1000 * seconds:.2f} ms",
                    f"{read_per_second / 1e9:.1f}",
                    f"{read_per_second / machine.bytes_per_second:.0%}",
                    *prefill,
                )
                prefill = ("", "")
        yield table


def _draw(contenders: Sequence[Contender], subtitle: str, path: Path) -> None:
    first = contenders[0].heads
    shown = [each for each in contenders if each.heads == first]
    (sequences, *_) = shown[0].decode_seconds
    draw_bars(
        path,
        title=f"Time of {sequences} decode rows, head_dim {first.head_dim}, group of {first.group}",
        subtitle=subtitle,
        groups=[f"{each.backend} {each.codec}" for each in shown],
        series=(
            Series(
                label="decode", values=[1000 * each.decode_seconds[sequences] for each in shown]
            ),
        ),
        unit="ms",
    )
