"""Benchmarks: `longctx bench NAME`. Quality and speed, measured through the engine that serves.

A benchmark is a module with `run(*configs, say=...) -> Report`, loaded when it is chosen: what it
draws and compares with (matplotlib, transformers' own generate) is nothing a server should load.
"""

from dataclasses import dataclass

from longctx.bench.config import (
    AskedConfig,
    BenchConfig,
    CheckConfig,
    CUDAConfig,
    DecodeConfig,
    DocumentConfig,
    EvictionConfig,
    FillerConfig,
    KernelsConfig,
    LevelsConfig,
    LoadConfig,
    ModulesConfig,
    NiahConfig,
    QualityConfig,
    RanksConfig,
    RestartConfig,
    RoundsConfig,
    RulerConfig,
    ScheduleConfig,
    UploadConfig,
    VariantsConfig,
)
from longctx.bench.versus_config import VersusConfig
from longctx.config import EngineConfig


@dataclass(frozen=True, slots=True)
class Bench:
    """One benchmark. `run` of `module` takes the option trees `configs`, in this order."""

    help: str
    module: str
    configs: tuple[type, ...]


BENCHES: dict[str, Bench] = {
    "niah": Bench(
        "find needles in haystacks, by length and depth: cold, warm, restored, for each codec, in "
        "modules at each level of exactness",
        "longctx.bench.retrieval.niah",
        (EngineConfig, BenchConfig, FillerConfig, VariantsConfig, LevelsConfig, NiahConfig),
    ),
    "ruler": Bench(
        "RULER's tasks: retrieval, tracing and counting, in process (each codec, cold, warm, "
        "restored) or on any server",
        "longctx.bench.retrieval.ruler",
        (EngineConfig, BenchConfig, FillerConfig, VariantsConfig, AskedConfig, RulerConfig),
    ),
    "document": Bench(
        "what a question on a document costs, before and after it was read",
        "longctx.bench.document",
        (EngineConfig, BenchConfig, RoundsConfig, DocumentConfig),
    ),
    "restart": Bench(
        "what a document costs after a restart, read back from disk",
        "longctx.bench.restart",
        (EngineConfig, BenchConfig, RoundsConfig, DocumentConfig, RestartConfig),
    ),
    "upload": Bench(
        "a large document through the server: read by stage, asked, and asked after a restart",
        "longctx.bench.served.upload",
        (EngineConfig, BenchConfig, UploadConfig),
    ),
    "modules": Bench(
        "prompts made of modules: what each level of exactness costs and saves",
        "longctx.bench.modules",
        (EngineConfig, BenchConfig, RoundsConfig, LevelsConfig, ModulesConfig),
    ),
    "quality": Bench(
        "what each codec costs a model: KL divergence, changed tokens, perplexity",
        "longctx.bench.quality",
        (EngineConfig, BenchConfig, QualityConfig),
    ),
    "check": Bench(
        "run a baseline's benchmarks again; fails where quality left its interval",
        "longctx.bench.check",
        (BenchConfig, CheckConfig),
    ),
    "kernels": Bench(
        "attention against the machine's memory and arithmetic, for every codec",
        "longctx.bench.kernels",
        (EngineConfig, BenchConfig, RoundsConfig, KernelsConfig),
    ),
    "decode": Bench(
        "prefill and decode of one sequence, against transformers.generate",
        "longctx.bench.decode",
        (EngineConfig, BenchConfig, RoundsConfig, DecodeConfig),
    ),
    "cuda": Bench(
        "a GPU in one call: copies, attention and a Llama of 8B, each beside what bounds it",
        "longctx.bench.cuda",
        (EngineConfig, BenchConfig, RoundsConfig, CUDAConfig),
    ),
    "versus": Bench(
        "the same model by longctx and by other engines: speed, memory, a document, a restart",
        "longctx.bench.versus.versus",
        (EngineConfig, BenchConfig, RoundsConfig, FillerConfig, VersusConfig),
    ),
    "load": Bench(
        "how steady answers stay beside a long document, and what it keeps of its speed",
        "longctx.bench.scheduling.load",
        (EngineConfig, BenchConfig, LoadConfig),
    ),
    "schedule": Bench(
        "schedulers compared without a model, in virtual time, and what a machine bears",
        "longctx.bench.scheduling.schedule",
        (EngineConfig, BenchConfig, ScheduleConfig),
    ),
    "ring": Bench(
        "what it costs to share a prompt among ranks, and a projection to many GPUs",
        "longctx.bench.ring.ring",
        (EngineConfig, BenchConfig, RanksConfig),
    ),
    "eviction": Bench(
        "replay questions on documents against each eviction policy",
        "longctx.bench.eviction",
        (BenchConfig, RoundsConfig, EvictionConfig),
    ),
}
