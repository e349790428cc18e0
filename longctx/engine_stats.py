"""What an engine counts and holds: plain data, which travels between processes as it is.

Counters grow from 0 for as long as the engine lives; everything else is as of now.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from longctx.request import FinishReason, TokenSource
from offload.stats import StoreStats, TierStats
from offload.tier_names import TierName

# Where the time of a step goes. `layers` is what the model does between calls of attention: linear
# layers, norms, and transformers' own Python, and in recognized layers the writing of keys and
# values. On many ranks it is all that they do.
StepPart = Literal[
    "schedule", "batch", "layers", "write", "seal", "attention", "commit", "sample", "output"
]
STEP_PARTS: tuple[StepPart, ...] = get_args(StepPart)


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupStats:
    """Counts the device's blocks of one layer group, without those that no sequence can get."""

    capacity_blocks: int
    blocks_in_use: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RingStats:
    """Says what the ranks that share each prompt sent to each other, and how fast that goes."""

    sent_bytes: int  # by all ranks, each as of its last step
    wait_seconds: float  # that rank 0 waited for others
    link_latency_seconds: float  # between two ranks, as measured at the start
    link_bytes_per_second: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassStats:
    """Says how many sequences of a class run and wait, and what of their prompts is left."""

    running: int
    waiting: int
    prompt_tokens_left: int
    share_seconds_left: float  # what its chunks may take of the next step beside answers


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerStats:
    """Says what the scheduler aims at, what it knows of the time of steps, and who is in line."""

    target_step_seconds: float
    step_seconds: float  # of the last step
    predicted_seconds: float  # of the same step, before it ran
    prediction_error: float | None  # the median of the last steps, as a part of what they took
    seconds_per: Mapping[str, float]  # the cost model: for each step, token, pair, answer, context
    classes: Mapping[str, ClassStats]
    tenants: int  # with work


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """Holds the counters and gauges of an engine, and of its tiers.

    Tokens of prompts and answers are counted when a request ends, whatever its end;
    `computed_tokens` are counted step by step.
    """

    requests_running: int  # sequences in the current batch
    requests_waiting: int
    requests_ended: Mapping[FinishReason, int]
    prompt_tokens: int
    cached_tokens: int  # of `prompt_tokens`, those that a cache had
    prompt_tokens_by_source: Mapping[TokenSource, int]  # together `prompt_tokens`
    generated_tokens: int
    steps: int
    step_seconds: Mapping[StepPart, float]  # of all steps that computed something
    computed_tokens: int  # rows that went through the model
    preemptions: int
    scheduler: SchedulerStats

    documents_open: int
    modules_open: int
    document_tiers: Mapping[str, TierName]  # the fastest that has each one, after its prompt
    prefixes_held: int  # documents, each after its prompt, whole on the device
    raw_blocks_in_use: int  # blocks that are being filled
    groups: tuple[GroupStats, ...]  # by layer group

    device: TierStats
    store: StoreStats | None  # None for an engine without tiers below the device
    ring: RingStats | None  # None for an engine with one rank

    @property
    def tiers(self) -> dict[TierName, TierStats]:
        """The tiers that this engine has, by name, the fastest first."""
        return {"device": self.device, **({} if self.store is None else self.store.tiers)}
