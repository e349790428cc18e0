"""Defines what the engine is asked and what it returns, as plain frozen data.

How far a request has come is a `Sequence` (`engine/sequence.py`). Every request ends in
exactly one `RequestOutput` with `finished=True`, and each of its `n` choices in exactly one
`FinishReason`.
"""

from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import Literal, get_args

from longctx.errors import InvalidRequest
from offload.stats import Cleared
from offload.tier_names import TierName

TokenSource = Literal["computed", TierName, "none"]  # where a prompt's tokens come from
SOURCES: tuple[TokenSource, ...] = get_args(TokenSource)

MAX_INT = 2**31 - 1  # counts and token ids
MAX_SEED = 2**63 - 1
MAX_BIAS = 1e6  # beyond any logit, and far from where float32 ends
MAX_STOPS = 64  # each is looked for after every token
MAX_STOP_CHARACTERS = 1024
MAX_LOGPROBS = 20  # tokens of which log-probabilities are told, in one token's place


class FinishReason(StrEnum):
    """Why a choice ended."""

    STOP = "stop"  # end-of-text token, stop string or stop id
    LENGTH = "length"  # max_tokens or the context is used up; also a prefill without an answer
    ABORT = "abort"  # the caller went away
    ERROR = "error"  # the engine failed; `RequestOutput.error` says how


class RequestClass(IntEnum):
    """Says which prompts are served first when they compete; smaller is sooner."""

    INTERACTIVE = 0
    BATCH = 1
    INGEST = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the answer is sampled. A neutral value switches a step off."""

    max_tokens: int | None = 256  # 0: prefill only, nothing is sampled; None: as many as fit
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0
    seed: int | None = None  # None: the engine chooses one at random
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    n: int = 1
    logprobs: int | None = None  # of each token, and of so many of the likeliest in its place
    grammar: str | None = None  # what the answer has to follow, as `text/grammar.py` writes it
    prompt_logprobs: int | None = None  # the same for the prompt, all of which is then computed
    shown_tokens: tuple[int, ...] = ()  # special ones that the answer's text names

    def __post_init__(self) -> None:
        """Raises InvalidRequest for a number out of its range. That of `logit_bias` and of
        `stop_token_ids` is the model's vocabulary, which the engine checks."""
        if self.max_tokens is not None:
            _between("max_tokens", self.max_tokens, 0, MAX_INT)
        _between("temperature", self.temperature, 0.0, 100.0)
        _between("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _between("top_k", self.top_k, 0, MAX_INT)
        _between("min_p", self.min_p, 0.0, 1.0)
        _between("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        _between("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _between("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _between("n", self.n, 1, 128)
        for name in ("logprobs", "prompt_logprobs"):
            if (wanted := getattr(self, name)) is not None:
                _between(name, wanted, 0, MAX_LOGPROBS)
        if self.seed is not None:
            _between("seed", self.seed, -MAX_SEED - 1, MAX_SEED)
        for token_id in (*self.stop_token_ids, *self.logit_bias):
            name = "stop_token_ids" if token_id in self.stop_token_ids else "logit_bias"
            _between(name, token_id, 0, MAX_INT)
        for bias in self.logit_bias.values():
            _between("logit_bias", bias, -MAX_BIAS, MAX_BIAS)
        if len(self.stop) > MAX_STOPS:
            raise InvalidRequest(
                f"stop has {len(self.stop)} strings, the limit is {MAX_STOPS}; leave some out",
                param="stop",
            )
        longest = max(map(len, self.stop), default=0)
        if longest > MAX_STOP_CHARACTERS:
            raise InvalidRequest(
                f"stop has a string of {longest} characters, the limit is {MAX_STOP_CHARACTERS}; "
                "a shorter beginning of it stops as well",
                param="stop",
            )
        if any(not text for text in self.stop):
            raise InvalidRequest("stop contains an empty string; remove it", param="stop")


def _between(name: str, value: float, low: float, high: float, *, open_low: bool = False) -> None:
    if (low < value if open_low else low <= value) and value <= high:  # NaN fails both
        return
    bracket = "(" if open_low else "["
    raise InvalidRequest(f"{name}={value} is outside {bracket}{low}, {high}]", param=name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Consecutive tokens of a module; `position` is the position of the first one."""

    token_ids: tuple[int, ...]
    position: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """One part of a prompt: literal tokens, a document or a piece of a module that is open.

    `position` is that of its first token. If absent, literal tokens and documents follow on, and a
    piece of a module is at the position where it was encoded. Positions may leave gaps and never go
    back. A block ends before and after a piece of a module, where a position jumps, and before a
    `cut`.

    `link_tokens` says whether a piece or document is computed in context (None), or reused as it
    was encoded elsewhere, but for its first `link_tokens` tokens, which are computed in context.

    `encodes` names a module all of whose pieces are to be computed and kept; nothing else is in its
    request. Some segments:

        Segment(token_ids=(5, 6, 7))                    text
        Segment(document_id="file-1")                   a document, computed or found in the cache
        Segment(module_id="m", piece=1, link_tokens=0)  a piece, reused as it was encoded
        Segment(encodes="m")                            a whole request: compute the module "m"
    """

    token_ids: tuple[int, ...] = ()
    document_id: str | None = None
    module_id: str | None = None
    piece: int = 0
    encodes: str | None = None
    position: int | None = None
    link_tokens: int | None = None
    cut: bool = False

    def __post_init__(self) -> None:
        named = [self.document_id, self.module_id, self.encodes]
        if sum(name is not None for name in named) + bool(self.token_ids) > 1:
            raise ValueError("a segment is literal tokens, or a document, or of a module")
        if self.link_tokens is not None and (
            self.link_tokens < 0 or (self.document_id is None and self.module_id is None)
        ):
            raise ValueError("only a document or a piece of a module is linked, from 0 tokens on")


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is asked: a prompt, how to sample its answers, and for whom.

    `segments` are in reading order; their tokens concatenated are the prompt.
    """

    request_id: str
    segments: tuple[Segment, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    request_class: RequestClass = RequestClass.INTERACTIVE
    salt: str = ""  # tenant salt; blocks are shared only between equal salts
    explain: bool = False  # its usage says why the cache had what it had
    in_memory: bool = False  # what it computes, but for documents, is not written to disk
    # Stored prompts and schemas whose text is among the literal tokens: what is computed for this
    # request is erased when one of them is closed (`Engine.close_module`).
    sources: tuple[str, ...] = ()

    @property
    def keeps_prompt(self) -> bool:
        """Whether the prompt is computed to be kept: the request ends when that is durable."""
        return self.sampling.max_tokens == 0 and self.sampling.prompt_logprobs is None


@dataclass(frozen=True, slots=True, kw_only=True)
class Erasure:
    """What was erased of a closed document or module, by tier, and what the rest waits for.

    What somebody else owns is not erased. A block counts once for each layer group.
    """

    tiers: dict[TierName, Cleared] = field(default_factory=dict)
    requests: int = 0  # that were asked before, and still use it
    transfers: int = 0  # of its blocks, to or from a tier; or their deletion is under way
    left: int = 0  # blocks that could not be deleted: the log says why

    @property
    def waits(self) -> bool:
        """Whether anything of it may be left."""
        return bool(self.requests or self.transfers or self.left)


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence:
    """Where a prompt parts from known text that begins alike: the first token, and some text.

    `known` is the id of a document, or "prompt" for another recent prompt of the same tenant.
    """

    position: int
    text: str
    known_text: str
    known: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheExplanation:
    """What the cache had of a prompt when it was admitted, and why no more (`explain.py`).

    `found_tokens` counts them by tier. Of those found on the device, `waited_tokens` were still
    being computed by other requests when this one came. Reused tokens are counted apart;
    `linked_tokens` are those of reused parts that were to be computed in context.
    """

    prompt_tokens: int
    found_tokens: dict[TierName, int]
    waited_tokens: int
    reason: str  # one of `explain.REASONS`
    detail: str
    reused_tokens: int = 0
    linked_tokens: int = 0
    divergence: Divergence | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Token counts of one request. `computed_tokens` counts what the runner really computed.

    Of the `cached_tokens`, `reused_tokens` were encoded without what comes before them here;
    `linked_tokens` are those of the same parts that are computed in context.
    """

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    computed_tokens: int
    reused_tokens: int = 0
    linked_tokens: int = 0
    # The prompt's, each counted once: those computed, those that each tier had when the request was
    # admitted, and those of which nothing was needed any more when it ended (`none`).
    tokens_by_source: dict[TokenSource, int] = field(default_factory=dict)
    # Until it ran for the first time, if it did. Two requests are counted alike without it.
    queue_seconds: float | None = field(default=None, compare=False)
    explanation: CacheExplanation | None = None  # where it was asked for


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far the prefill is, in tokens of the prompt: `cache` were found, `processed` are done.

    `rest_ms` is how long the rest is expected to take; None before anything was computed.
    """

    total: int
    cache: int
    processed: int
    time_ms: float
    rest_ms: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleState:
    """Where an open module is. `tier` is the best that has all of it; `hits` counts its reuses.

    `kv_bytes` counts its sealed blocks in all global layers, or in all layers where none is.
    """

    tokens: int
    blocks: int
    kv_bytes: int
    tier: str  # device, host, disk or none
    hits: int
    durable_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """How likely a token was, as the natural log of its share in the softmax of the model's logits.

    These are the float32 logits before anything that sampling does to them. `likeliest` are the
    tokens with the largest logits in its place, of equals the smaller ids first. The first token of
    a prompt has neither.
    """

    token_id: int
    logprob: float | None
    likeliest: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOutput:
    """One event of one request: prefill progress, new text of choice `index`, or its end.

    `prompt_logprobs` are those of the next tokens of the prompt, in order; they belong to all
    choices, and come before their tokens.
    """

    request_id: str
    index: int = 0
    token_ids: tuple[int, ...] = ()
    text: str = ""  # complete characters only; what a stop string may still swallow is held back
    logprobs: tuple[TokenLogprob, ...] = ()  # of `token_ids`, where they were asked for
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    progress: Progress | None = None
    finish_reason: FinishReason | None = None  # of choice `index`
    stop_reason: str | int | None = None  # the stop string or id that ended it
    finished: bool = False  # the last event of the request
    usage: Usage | None = None  # with `finished`
    error: str | None = None  # with FinishReason.ERROR
    error_param: str | None = None  # the parameter at fault, where the request was


@dataclass(frozen=True, slots=True, kw_only=True)
class LevelVerdict:
    """Whether a level of exactness may be used with a model; `reason` is one line for people."""

    level: str
    passed: bool
    reason: str
