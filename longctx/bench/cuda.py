"""All that matters on a GPU, in one call, each figure beside what bounds it in the same run.

How fast memory is copied on the device and to it; attention of all codecs in `bench kernels`, as a
share of that; the steps of a Llama of 8 billion random weights in `bench decode`, beside the time
in which its bytes could be copied; and blocks that come back from host memory.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Final, get_args

import torch
from rich.table import Table

from compress.codec import CODECS
from compress.shape import BLOCK_TOKENS, KVShape
from longctx.attention.registry import backend_for
from longctx.bench import decode, kernels
from longctx.bench.config import (
    BenchConfig,
    CUDAConfig,
    DecodeConfig,
    KernelsConfig,
    RoundsConfig,
)
from longctx.bench.machine_rates import COPY_BYTES, CopyBandwidth, alternate, seconds_of
from longctx.bench.random_model import SIZES, Size
from longctx.bench.random_pages import fill_pages
from longctx.bench.report import Report, Result
from longctx.config import AttentionBackendName, EngineConfig
from longctx.errors import ModelRefused
from longctx.kv.memory import KVMemory
from longctx.kv.open_store import pinned
from longctx.kv.transfer import PageTransfer
from longctx.model.loader import device_of
from longctx.model.spec import LayerSpec
from offload.arena import paged
from offload.eviction import LRU
from offload.host import HostTier
from offload.key import BlockKey, GroupKey

MODEL: Final = "8b"
SHORT_TOKENS = 512  # before a step whose time is that of the weights
PREFILL_ROWS = 4096
RESTORED_BLOCKS = 64
ON_DEVICE, FROM_PINNED = "on the device", "pinned to device"


def run(
    engine: EngineConfig,
    bench: BenchConfig,
    rounds: RoundsConfig,
    cuda: CUDAConfig,
    *,
    say: Callable[[str], None],
) -> Report:
    """Measures the GPU. Raises ModelRefused where there is none."""
    device = device_of(engine.model.device)
    if device.type != "cuda":
        raise ModelRefused(
            f"bench cuda measures a GPU, and this would be {device}; start it where torch finds a "
            "CUDA device, or use bench kernels and bench decode"
        )
    if engine.model.model is not None:
        raise ModelRefused(
            f"bench cuda brings a random model; use bench decode for {engine.model.model}"
        )
    return measure(device, engine, bench, rounds, cuda, say=say)


def measure(
    device: torch.device,
    engine: EngineConfig,
    bench: BenchConfig,
    rounds: RoundsConfig,
    cuda: CUDAConfig,
    *,
    say: Callable[[str], None],
) -> Report:
    """Measures any device in the same way; of a CPU the figures say nothing of a GPU."""
    size = SIZES[MODEL]
    say("memory")
    copies = _copy_rates(device, rounds.rounds)
    say("blocks from host memory")
    restored = _restored_per_second(device, size, rounds.rounds)
    attention = kernels.run(
        _with_backend(engine, device),
        bench,
        rounds,
        KernelsConfig(
            head_dims=str(size.head_dim),
            groups=str(size.heads // size.kv_heads),
            kv_heads=size.kv_heads,
            context=cuda.depth,
            prefill_rows=min(PREFILL_ROWS, cuda.depth),
            sequences=cuda.batches,
        ),
        say=say,
    )
    contexts = f"{SHORT_TOKENS},{cuda.depth}"
    steps = decode.run(engine, bench, rounds, DecodeConfig(size=MODEL, contexts=contexts), say=say)
    results = (
        *(
            Result(metric="copy", value=rate / 1e9, unit="GB/s", parameters={"way": way})
            for way, rate in copies.items()
        ),
        Result(
            metric="restore",
            value=restored / 1e9,
            unit="GB/s",
            parameters={"share_of_pinned_copy": restored / copies[FROM_PINNED]},
        ),
        *(replace(each, metric=f"attention {each.metric}") for each in attention.results),
        *_steps(steps.results, size, copies[ON_DEVICE]),
    )
    return Report(results=results, tables=(_table(results, device),), draw=attention.draw)


def _with_backend(engine: EngineConfig, device: torch.device) -> EngineConfig:
    """Names the backend that would serve, so that slower ones are not measured."""
    name = backend_for(engine.model.attention_backend, device)
    (backend,) = (each for each in get_args(AttentionBackendName) if each == name)
    return replace(engine, model=replace(engine.model, attention_backend=backend))


def _copy_rates(device: torch.device, rounds: int) -> dict[str, float]:
    """Returns bytes per second by way; on the device they count as read and as written."""
    words = COPY_BYTES // 4
    there, pageable = torch.zeros(words, device=device), torch.zeros(words)
    locked = torch.zeros(words, pin_memory=device.type == "cuda")
    ways = {
        ON_DEVICE: CopyBandwidth(there, torch.empty_like(there)),
        FROM_PINNED: CopyBandwidth(locked, there),
        "device to pinned": CopyBandwidth(there, locked),
        "pageable to device": CopyBandwidth(pageable, there),
    }
    alternate([partial(seconds_of, way.take) for way in ways.values()], rounds)
    return {name: way.bytes_per_second for name, way in ways.items()}


def _restored_per_second(device: torch.device, size: Size, rounds: int) -> float:
    """Returns the bytes of int8 pages per second from the host tier into the pool, copies included.

    It is what a question waits for whose document left the device, decision and queues aside.
    """
    spec = LayerSpec(heads=size.heads, kv_heads=size.kv_heads, head_dim=size.head_dim, window=None)
    block_bytes = size.layers * _page_bytes(size, "int8")
    memory = KVMemory(
        [spec] * size.layers,
        dtype=torch.bfloat16,
        device=device,
        codec="int8",
        pool_bytes=(RESTORED_BLOCKS + 4) * block_bytes,
        step_blocks=2,
    )
    (pool,) = memory.packed
    pages = pool.allocate(RESTORED_BLOCKS)
    fill_pages(memory, [pages])
    transfer = PageTransfer(pool, staged=True)
    host = HostTier(
        capacity_bytes=2 * RESTORED_BLOCKS * block_bytes,
        page_bytes=pool.page_bytes,
        policy=LRU[GroupKey](),
        allocate=pinned if device.type == "cuda" else paged,
    )
    keys = [BlockKey(number.to_bytes(32, "big")) for number in range(RESTORED_BLOCKS)]
    slots, ready = transfer.outgoing(pages)
    while not ready():
        pass
    stored = host.put(0, keys, slots, parent=None, cost_seconds=1.0, retained=False)
    if stored < RESTORED_BLOCKS:
        raise ModelRefused(
            f"bench cuda could keep {stored} of {RESTORED_BLOCKS} blocks in host memory; it needs "
            f"{RESTORED_BLOCKS * block_bytes / 1e9:.1f} GB that can be pinned"
        )

    def restore() -> None:
        target = transfer.incoming(pages)
        host.read(0, keys, target)
        transfer.arrived(target, pages)

    (taken,) = alternate([partial(seconds_of, restore, device)], rounds)
    return RESTORED_BLOCKS * block_bytes / median(taken)


def _page_bytes(size: Size, codec: str, dtype: torch.dtype = torch.bfloat16) -> int:
    shape = KVShape(kv_heads=size.kv_heads, head_dim=size.head_dim, dtype=dtype)
    return CODECS[codec](shape).page_bytes


def _steps(results: Sequence[Result], size: Size, copied_per_second: float) -> Iterator[Result]:
    """Yields the time of decoded tokens and of chunks; the first beside that of its bytes."""
    for each in results:
        codec, context = (
            str(each.parameters["kv_codec"]),
            int(each.parameters["context_tokens"] or 0),
        )
        if each.metric == "prefill":
            tokens = float(each.parameters["chunk_tokens"] or 0)
            seconds = float(each.parameters["chunk_seconds"] or 0)
            yield replace(each, metric="prompt")
            yield replace(each, metric="chunk", value=tokens / seconds)
            continue
        dtype: torch.dtype = getattr(torch, str(each.parameters["dtype"]))
        kv_bytes = context // BLOCK_TOKENS * size.layers * _page_bytes(size, codec, dtype)
        floor = (dtype.itemsize * size.weights_read + kv_bytes) / copied_per_second
        seconds = 1 / each.value
        yield replace(
            each,
            metric="step",
            value=1000 * seconds,
            unit="ms",
            parameters={
                **each.parameters,
                "floor_ms": 1000 * floor,
                "times_floor": seconds / floor,
            },
        )


def _table(results: Sequence[Result], device: torch.device) -> Table:
    title = "A GPU" if device.type == "cuda" else str(device)
    table = Table(title=f"{title}: each figure, and its share of what bounds it")
    for name in ("what", "figure", "share"):
        table.add_column(name, justify="left" if name == "what" else "right")
    for each in results:
        what, share = _told(each.metric, each.parameters)
        table.add_row(what, f"{each.value:,.4g} {each.unit}", share)
    return table


def _told(metric: str, at: Mapping[str, object]) -> tuple[str, str]:
    """Returns what a figure is of, and its share of a bound where there is one."""
    of = ("way", "backend", "codec", "sequences", "dtype", "kv_codec", "context_tokens")
    words = [str(at[name]) for name in of if name in at]
    shares = [value for name, value in at.items() if name.startswith("share_of_")]
    share = "".join(f"{value:.0%}" for value in shares if isinstance(value, float))
    if isinstance(at.get("times_floor"), float):
        share = f"{at['times_floor']:.2f} x floor"
    return f"{metric}: {', '.join(words)}", share
