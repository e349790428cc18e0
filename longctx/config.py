"""The engine's configuration: frozen, self-describing, self-checking.

Each field is an option of the command line by the same name (`options.py` derives it).
"""

import dataclasses
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints


def _cache_dir() -> Path:
    try:
        return Path.home() / ".cache" / "longctx"
    except RuntimeError:  # a container's user without HOME and without an entry in /etc/passwd
        return Path(os.devnull) / "longctx"  # nothing can be kept there, so it is measured again


CACHE_DIR = _cache_dir()  # what was measured of models that were loaded
CPU_STEP_TOKENS = 512  # of a step, where none are asked for
LONGEST_CPU_STEP_TOKENS = 2048
SMALL_STEP_BYTES = 16 << 20  # of keys and values, in a step of more than CPU_STEP_TOKENS

Dtype = Literal["float32", "bfloat16", "float16"]
Weights = Literal["auto", "int8", "int4"]
Activations = Literal["auto", "exact"]
# Names of what the registries hold, so that a wrong one is refused before anything is loaded.
KVCodec = Literal["auto", "raw", "bf16", "int8", "int4"]
AttentionBackendName = Literal["auto", "reference", "torch", "cpu", "cuda"]
EvictionPolicyName = Literal["lru", "gdsf"]
DTYPES: tuple[Dtype, ...] = get_args(Dtype)
KV_CODECS: tuple[KVCodec, ...] = get_args(KVCodec)[1:]  # all that `auto` is not


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    model: Annotated[
        Path | None,
        "Hugging Face folder, GGUF file or a name that longctx models lists; needle if absent",
    ] = None
    device: Annotated[str, "cpu, cuda, cuda:1, ...; auto takes CUDA where there is one"] = "auto"
    dtype: Annotated[
        Literal["auto", Dtype],
        "compute type; auto: the checkpoint's, on CPUs float32; of a bfloat16 checkpoint the one "
        "of both that is faster on this CPU, timed once",
    ] = "auto"
    weights: Annotated[
        Weights,
        "how linear layers keep their weights; auto: as the checkpoint has them; int8, int4: "
        "rounded to so many bits, in less memory and less exact (on a CPU; faster in float32)",
    ] = "auto"
    force_weights: Annotated[
        bool, "keep weights as told whatever that costs this model; it is not measured then"
    ] = False
    activations: Annotated[
        Activations,
        "how rows enter linear layers whose weights are integers; auto: rounded to 16 bits where "
        "this CPU multiplies integers faster; exact: in the compute type",
    ] = "auto"
    max_context: Annotated[int | None, "longest prompt and answer, tokens; the model's own"] = None
    force_context: Annotated[bool, "allow a max-context beyond the trained length"] = False
    rope_override: Annotated[
        str | None, "JSON that replaces the model's rope parameters, such as a YaRN extension"
    ] = None
    threads: Annotated[int | None, "CPU threads of the engine; one per core if absent"] = None
    attention_backend: Annotated[
        AttentionBackendName,
        "what computes attention; auto: the kernels for cpu or cuda where they are, else torch",
    ] = "auto"

    def __post_init__(self) -> None:
        _check_fields(self)
        if self.force_weights and self.weights == "auto":
            raise ValueError("force_weights needs weights to force; name them by weights")
        for name in ("max_context", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheConfig:
    kv_codec: Annotated[
        KVCodec,
        "how sealed KV blocks are stored; auto: int8 where this model measurably loses nothing by "
        "it, else raw",
    ] = "auto"
    force_codec: Annotated[
        bool, "store with kv-codec whatever that costs this model; it is not measured then"
    ] = False
    force_level: Annotated[
        bool, "answer prompts of modules at levels of exactness that cost this model too much"
    ] = False
    device_pool_gib: Annotated[
        float | None,
        "memory for KV blocks, of each rank; a quarter of RAM for all ranks, or most of what the "
        "GPU has free",
    ] = None
    host_pool_gib: Annotated[
        float | None, "RAM for KV blocks below a GPU's; an eighth of it with CUDA, else none"
    ] = None
    kv_dir: Annotated[
        Path | None, "folder of KV blocks that outlive the process; kv in store-dir when serving"
    ] = None
    disk_cap_gib: Annotated[
        float | None, "most that kv-dir may hold; half of what is free there if absent"
    ] = None
    disk_free_gib: Annotated[float, "room that is left to others on the disk of kv-dir"] = 2.0
    disk_ttl_days: Annotated[
        float | None, "stored blocks that nobody used for so long are deleted; kept if absent"
    ] = None
    disk_compress: Annotated[
        bool,
        "compress blocks on the disk where that saves 15%: pays for bf16, on a slow or small disk",
    ] = False
    eviction_policy: Annotated[EvictionPolicyName, "which blocks leave a full tier"] = "gdsf"

    def __post_init__(self) -> None:
        _check_fields(self)
        if self.device_pool_gib is not None and self.device_pool_gib <= 0:
            raise ValueError(f"device_pool_gib={self.device_pool_gib} must be positive")
        for name in ("host_pool_gib", "disk_cap_gib", "disk_free_gib", "disk_ttl_days"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name}={value} must not be negative")
        if self.force_codec and self.kv_codec == "auto":
            raise ValueError("force_codec needs a codec to force; name one by kv_codec")


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    max_batch_tokens: Annotated[
        int | None,
        "tokens computed per step, prompts and answers; 512 on a CPU, up to 2048 of a small model, "
        "4096 on a GPU, more with many ranks",
    ] = None
    target_step_ms: Annotated[
        float | None,
        "longest time between two tokens of an answer while prompts are computed beside it, "
        "as far as possible; 250 on a CPU, 50 on a GPU",
    ] = None
    max_sequences: Annotated[int, "sequences running at once"] = 64
    max_waiting: Annotated[
        int, "answers that may wait, each of a request's n; more are refused with 429"
    ] = 1024

    def __post_init__(self) -> None:
        for name in ("max_sequences", "max_waiting"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.target_step_ms is not None and not 1 <= self.target_step_ms <= 60_000:
            raise ValueError(f"target_step_ms={self.target_step_ms} must be from 1 to 60000")
        if self.max_batch_tokens is not None and self.max_batch_tokens < self.max_sequences:
            raise ValueError(
                f"max_batch_tokens={self.max_batch_tokens} cannot feed "
                f"max_sequences={self.max_sequences}; raise the first or lower the second"
            )

    def batch_tokens(
        self, device_type: str, *, token_bytes: int | None = None, ranks: int = 1
    ) -> int:
        """How many tokens a step computes: as told, or enough to keep such devices busy.

        Not so many that answers wait. On a CPU what a step costs beside its tokens counts for a
        model of which a token takes few `token_bytes` (keys and values in all layers, as computed),
        so it gets longer ones. Each of many ranks needs a few blocks of its own.
        """
        if self.max_batch_tokens is not None:
            return self.max_batch_tokens
        if device_type == "cpu":
            most = 0 if token_bytes is None else SMALL_STEP_BYTES // token_bytes
            enough = max(CPU_STEP_TOKENS, min(most, LONGEST_CPU_STEP_TOKENS), 256 * ranks)
        else:
            enough = 4096 * ranks
        return max(enough, self.max_sequences)

    def target_seconds(self, device_type: str) -> float:
        """How long a step may take: as told, or what a reader of an answer hardly notices."""
        default = 250.0 if device_type == "cpu" else 50.0
        return (self.target_step_ms or default) / 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class RingConfig:
    ranks: Annotated[int, "processes that share each prompt, with its KV blocks"] = 1
    head: Annotated[
        str | None,
        "HOST:PORT where to wait for ranks that torchrun starts, on any machines; else they are "
        "started here",
    ] = None
    head_secret: Annotated[
        Path | None,
        "file that ranks of other machines must know, made if absent; ring-secret in store-dir "
        "when serving",
    ] = None

    def __post_init__(self) -> None:
        if self.ranks < 1:
            raise ValueError(f"ranks={self.ranks} must be at least 1")
        if self.head is not None and self.ranks < 2:
            raise ValueError(f"head={self.head} waits for ranks; say by ranks how many, 2 or more")
        if self.head is not None and not self.head.rpartition(":")[2].isdigit():
            raise ValueError(f"head={self.head} must be HOST:PORT")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    model: ModelConfig = field(default_factory=ModelConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    ring: RingConfig = field(default_factory=RingConfig)

    def __post_init__(self) -> None:
        if self.ring.ranks > 1 and self.cache.host_pool_gib:
            raise ValueError(
                f"host_pool_gib={self.cache.host_pool_gib} is for one rank; with "
                f"ranks={self.ring.ranks} blocks go from the devices to kv_dir at once"
            )
        if self.ring.ranks > 1 and self.cache.disk_compress:
            raise ValueError(
                f"disk_compress is for one rank; with ranks={self.ring.ranks} blocks are written "
                "as they are, so leave it out"
            )


def _check_fields(config: Any) -> None:
    """Raises ValueError for a value that is none of its field's `Literal`, or not finite."""
    hints = get_type_hints(type(config))
    for each in dataclasses.fields(config):
        choices, value = get_args(hints[each.name]), getattr(config, each.name)
        if get_origin(hints[each.name]) is Literal and value not in choices:
            raise ValueError(f"{each.name}={value!r} is unknown; choose from {', '.join(choices)}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{each.name}={value} must be a finite number")
