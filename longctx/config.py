"""The engine's configuration: frozen, self-describing, self-checking.

Each field is an option of the command line by the same name (`options.py` derives it).
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    model: Annotated[Path | None, "Hugging Face model folder; the embedded model if absent"] = None
    device: Annotated[str, "cpu, cuda, cuda:1, ...; auto takes CUDA where there is one"] = "auto"
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        "compute type; auto: the checkpoint's, but float32 on CPUs without bfloat16 instructions",
    ] = "auto"
    max_context: Annotated[int | None, "longest prompt and answer, tokens; the model's own"] = None
    force_context: Annotated[bool, "allow a max-context beyond the trained length"] = False
    rope_override: Annotated[
        str | None, "JSON that replaces the model's rope parameters, such as a YaRN extension"
    ] = None
    threads: Annotated[int | None, "CPU threads of the engine; one per core if absent"] = None
    attention_backend: Annotated[str, "reference or torch"] = "torch"


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheConfig:
    kv_codec: Annotated[str, "how sealed KV blocks are stored: raw, bf16 or int8"] = "raw"
    device_pool_gib: Annotated[
        float | None, "memory for KV blocks; a quarter of RAM, or most of what the GPU has free"
    ] = None

    def __post_init__(self) -> None:
        if self.device_pool_gib is not None and self.device_pool_gib <= 0:
            raise ValueError(f"device_pool_gib={self.device_pool_gib} must be positive")


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    max_batch_tokens: Annotated[
        int | None, "tokens computed per step, prompts and answers; 512 on a CPU, 4096 on a GPU"
    ] = None
    max_sequences: Annotated[int, "sequences running at once"] = 64
    max_waiting: Annotated[int, "requests that may wait; more are refused with 429"] = 1024

    def __post_init__(self) -> None:
        if self.max_batch_tokens is not None and self.max_batch_tokens < self.max_sequences:
            raise ValueError(
                f"max_batch_tokens={self.max_batch_tokens} cannot feed "
                f"max_sequences={self.max_sequences}; raise the first or lower the second"
            )

    def batch_tokens(self, device_type: str) -> int:
        """As told, or enough to keep such a device busy without making answers wait."""
        if self.max_batch_tokens is not None:
            return self.max_batch_tokens
        return max(512 if device_type == "cpu" else 4096, self.max_sequences)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    model: ModelConfig = field(default_factory=ModelConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
