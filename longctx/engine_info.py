"""Defines what a loaded engine says of itself: plain data, sent between processes as it is."""

import math
from dataclasses import dataclass

from longctx.config import KVCodec
from offload.tier_names import TierName


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextLimits:
    """How long prompts and answers may be.

    A model of 131,072 tokens, a device that holds 20,000, and a disk below it that holds a million:
    `longest_tokens` is 131,072, since blocks can be streamed from the disk, but what is decoded is
    not stored: an answer may have 20,000 tokens less the prompt, or `streamed_answer_tokens` where
    that is more.
    """

    max_context_tokens: int  # the model's
    capacity_tokens: int  # tokens of KV that the device pool holds
    longest_tokens: int  # prompt and answer together that can be served
    streamed_answer_tokens: int  # an answer whose prompt is larger than the device

    @property
    def cure(self) -> str:
        """What a user can do so that longer ones are served."""
        if self.longest_tokens == self.max_context_tokens:
            return "raise --max-context where the model allows it"
        return "raise --device-pool-gib"

    def answer_tokens(self, prompt_tokens: int) -> int:
        """Return the largest number of tokens that the answer to such a prompt may have.

        Only what is stored can leave the device while it is needed, and answers are not stored.
        """
        beside = max(self.capacity_tokens - prompt_tokens, self.streamed_answer_tokens)
        return max(0, min(self.longest_tokens - prompt_tokens, beside))


@dataclass(frozen=True, slots=True, kw_only=True)
class Damage:
    """What a codec, weights or a level do to a model: means over rows of next-token distributions.

    Each `*_error` is half the width of the 95% interval of that mean.

    A row is compared with that of a float32 pass. `raw_kl` is how far raw KV in the type that
    serves is from it, in nats, and `raw_flips` the share of rows whose likeliest token is another;
    both are 0 where float32 serves. `kl` and `flips` are what the codec adds to them: in 16 bits
    that may be less than 0, by chance. `nats` is what a token of the text costs with raw KV,
    `more_nats` how much more with the codec.
    """

    rows: int
    kl: float
    kl_error: float
    flips: float
    flips_error: float
    nats: float
    more_nats: float
    more_nats_error: float
    raw_kl: float
    raw_flips: float

    @property
    def raw_perplexity(self) -> float:
        """Perplexity of the text with raw KV."""
        return math.exp(min(self.nats, 700.0))

    @property
    def perplexity_rise(self) -> float:
        """Perplexity with the codec over that with raw KV, less 1."""
        return math.expm1(min(self.more_nats, 700.0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What was measured of one codec or level; a part is None where no row could be compared."""

    text: Damage | None
    own: Damage | None
    seconds: float  # that the measurement took, of all its codecs together


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a codec or level may cost a model.

    `kl` holds for the whole 95% interval, the others for the mean.
    """

    kl: float  # nats per token
    flips: float
    perplexity_rise: float


PARTS = {"text": "on text", "own": "in its own answers"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What the gate says of a codec or level: which parts it judged, and what exceeds the limits.

    A model for which nothing could be judged has no faults, and it has not passed either.
    """

    name: str  # of the codec or level
    measured: Measured
    limits: Limits
    judged: tuple[str, ...]  # the parts: "text" and "own"
    faults: tuple[str, ...]
    text_is_foreign: bool  # predicted worse than by guessing, so not judged

    @property
    def passed(self) -> bool:
        """Whether something was judged and nothing exceeds the limits."""
        return bool(self.judged) and not self.faults

    @property
    def reason(self) -> str:
        """One line for people: the faults, or what was measured and allowed."""
        if self.faults:
            return "; ".join(self.faults)
        if not self.judged:
            return "its context or answers are too short to tell"
        parts = {"text": self.measured.text, "own": self.measured.own}
        known = ((part, parts[part]) for part in self.judged)
        figures = [f"{PARTS[part]} {damage.kl:.1e}" for part, damage in known if damage is not None]
        return f"KL {' and '.join(figures)} nats, at most {self.limits.kl:g} allowed"


@dataclass(frozen=True, slots=True, kw_only=True)
class CodecChoice:
    """Which codec an engine serves with, and why; `reason` is one line for people.

    `verdict` is None where nothing had to be measured.
    """

    codec: KVCodec
    reason: str
    forced: bool = False
    verdict: Verdict | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """What an engine says of its model, memory, tiers and codec when it is ready to serve.

    It is read when the engine opens and does not change; the server keeps a copy of it.
    """

    model_name: str
    fingerprint: str  # of all that tokens and answers depend on: weights, configuration, tokenizer
    limits: ContextLimits
    tier_capacity_tokens: dict[TierName, int]  # that fit, about; 0 where there is no such tier
    disk_capacity_bytes: int
    disk_bytes: int  # stored there when the engine started, of any model
    block_tokens: int
    kv_block_bytes: int  # one block in all global layers
    kv_window_bytes: int  # what the layers with windows hold of a finished prompt
    kv_codec: KVCodec
    codec_choice: CodecChoice  # why that one
    device: str
    dtype: str
    dtype_reason: str | None  # where `auto` had to choose
    backend: str
    vocab_size: int
    shiftable: bool  # cached keys may serve at other positions than they were encoded at
    shiftable_reason: str

    @property
    def max_context_tokens(self) -> int:
        return self.limits.max_context_tokens

    @property
    def capacity_tokens(self) -> int:
        """Tokens of KV that the device pool holds."""
        return self.limits.capacity_tokens

    def kv_bytes(self, tokens: int) -> int:
        """Return the device memory of a computed prompt; its open block does not count."""
        blocks = tokens // self.block_tokens
        return blocks * self.kv_block_bytes + (self.kv_window_bytes if blocks else 0)
