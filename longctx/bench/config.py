"""What the benchmarks let their user choose. Each field is an option; no name is used twice."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from longctx.config import KV_CODECS, KVCodec
from longctx.needles.generator import KINDS
from longctx.needles.ruler_tasks import TASKS
from prompt_cache.level import EXACT, Level, parse_level

CACHES = {"cold": 0, "warm": 1, "restored": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchConfig:
    """Options that every benchmark takes."""

    seed: Annotated[int, "another seed, another text; the same seed, the same text"] = 0
    out: Annotated[Path | None, "folder for the results as JSON and PNG"] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundsConfig:
    """How often benchmarks of speed repeat what they measure."""

    rounds: Annotated[int, "times that each figure is taken; the median counts"] = 3

    def __post_init__(self) -> None:
        _at_least("rounds", self.rounds, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class NiahConfig:
    """Options of `longctx bench niah`: the grid of lengths and depths, and what is asked."""

    lengths: Annotated[str, "document lengths in tokens"] = "4096,16384,32768,65536"
    depths: Annotated[str, "where needles lie, percent of the document"] = "0,25,50,75,100"
    questions: Annotated[int, "questions per length, depth and seed"] = 20
    seeds: Annotated[int, "sets of haystacks, from --seed on"] = 1
    kind: Annotated[str, f"what the needles say: {', '.join(KINDS)}"] = "any"
    distractors: Annotated[int, "false needles per needle: same attribute, other keys"] = 0
    match: Annotated[
        Literal["exact", "contains"], "the answer is the value, or has it as a word of a sentence"
    ] = "exact"
    answer_tokens: Annotated[int, "longest answer"] = 64

    def __post_init__(self) -> None:
        if min(self.token_lengths) < 256:
            raise ValueError(f"lengths={self.lengths}: a document needs at least 256 tokens")
        if not all(0 <= depth <= 100 for depth in self.percent_depths):
            raise ValueError(f"depths={self.depths}: a depth is a percentage from 0 to 100")
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind} is unknown; choose from {', '.join(KINDS)}")
        for name in ("questions", "seeds", "answer_tokens"):
            _at_least(name, getattr(self, name), 1)
        _at_least("distractors", self.distractors, 0)

    @property
    def token_lengths(self) -> tuple[int, ...]:
        return _whole_numbers("lengths", self.lengths)

    @property
    def percent_depths(self) -> tuple[float, ...]:
        return _numbers("depths", self.depths)


@dataclass(frozen=True, slots=True, kw_only=True)
class VariantsConfig:
    """In which ways one question is asked, to be compared."""

    caches: Annotated[
        str | None,
        "where the text is when it is asked: cold (not computed yet), warm (on the device), "
        "restored (on disk, after a restart); for niah warm, for ruler as it comes, if absent",
    ] = None
    codecs: Annotated[
        str | None, "KV codecs to compare with raw, forced; the engine's own one alone if absent"
    ] = None

    def __post_init__(self) -> None:
        if unknown := [name for name in (self.caches or "warm").split(",") if name not in CACHES]:
            raise ValueError(f"caches={unknown[0]} is unknown; choose from {', '.join(CACHES)}")
        if unknown := [name for name in (self.codecs or "raw").split(",") if name not in KV_CODECS]:
            known = ", ".join(KV_CODECS)
            raise ValueError(f"codecs={unknown[0]} is unknown; choose from {known}")

    @property
    def every_cache(self) -> tuple[str, ...]:
        """In the order that one text is asked in; warm alone where none is named."""
        return tuple(sorted(set((self.caches or "warm").split(",")), key=CACHES.__getitem__))

    @property
    def every_codec(self) -> tuple[KVCodec, ...]:
        """The codecs that are compared, `raw` first; none where the engine's own is measured."""
        if self.codecs is None:
            return ()
        named = self.codecs.split(",")
        return tuple(codec for codec in KV_CODECS if codec == "raw" or codec in named)

    @property
    def several(self) -> bool:
        return len(self.every_codec or ("own",)) * len(self.every_cache) > 1


@dataclass(frozen=True, slots=True, kw_only=True)
class LevelsConfig:
    """How exactly prompts that are made of modules are computed, to be compared."""

    levels: Annotated[
        str | None,
        "levels of exactness to compare with exact: niah cuts documents into modules for that, and "
        "asks them as they are if absent; modules takes link:16,modular if absent",
    ] = None

    def __post_init__(self) -> None:
        if EXACT in self.every_level:
            raise ValueError(f"levels={self.levels} has exact, which all are compared with")

    @property
    def every_level(self) -> tuple[Level, ...]:
        """Those that are named, without `exact`."""
        if self.levels is None:
            return ()
        return tuple(parse_level(level, param="levels") for level in self.levels.split(","))


@dataclass(frozen=True, slots=True, kw_only=True)
class FillerConfig:
    """Whose words haystacks are made of."""

    haystack: Annotated[
        Path | None, "a text, or a folder of texts, to hide things in; generated prose if absent"
    ] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AskedConfig:
    """Which server is asked, instead of the engine in this process."""

    base_url: Annotated[
        str | None, "an OpenAI-compatible server to measure, such as http://127.0.0.1:8000/v1"
    ] = None
    server_key: Annotated[str | None, "its API key; better LONGCTX_SERVER_KEY"] = None
    ask_model: Annotated[str | None, "its model; the first that it lists if absent"] = None

    def __post_init__(self) -> None:
        for name in ("server_key", "ask_model"):
            if self.base_url is None and getattr(self, name) is not None:
                raise ValueError(f"{name} is for a server; name that with --base-url")
        if self.base_url is not None and not self.base_url.startswith(("http://", "https://")):
            raise ValueError(f"base_url={self.base_url} must begin with http:// or https://")


@dataclass(frozen=True, slots=True, kw_only=True)
class RulerConfig:
    """Options of `longctx bench ruler`."""

    tasks: Annotated[str, f"which of {', '.join(TASKS)}"] = ",".join(
        name for name in TASKS if name != "qa"
    )
    prompt_lengths: Annotated[str, "lengths of prompt and answer together, in tokens"] = "4096,8192"
    samples: Annotated[int, "prompts of each task and length"] = 20
    answer_prefix: Annotated[
        bool, "end each prompt with the beginning of its answer, as the paper does"
    ] = True
    squad_file: Annotated[Path | None, "passages and questions for qa, in SQuAD's format"] = None

    def __post_init__(self) -> None:
        if unknown := [name for name in self.every_task if name not in TASKS]:
            raise ValueError(f"tasks={unknown[0]} is unknown; choose from {', '.join(TASKS)}")
        if ("qa" in self.every_task) != (self.squad_file is not None):
            raise ValueError("the task qa and --squad-file need each other")
        _at_least("prompt_lengths", min(self.token_lengths), 256)
        _at_least("samples", self.samples, 1)

    @property
    def every_task(self) -> tuple[str, ...]:
        return tuple(self.tasks.split(","))

    @property
    def token_lengths(self) -> tuple[int, ...]:
        return _whole_numbers("prompt_lengths", self.prompt_lengths)


@dataclass(frozen=True, slots=True, kw_only=True)
class DocumentConfig:
    """Document lengths, for `longctx bench document` and `restart`."""

    document_lengths: Annotated[str, "document lengths in tokens"] = "4096,32768,262144"

    def __post_init__(self) -> None:
        if min(self.token_lengths) < 256:
            raise ValueError(
                f"document_lengths={self.document_lengths}: a document needs at least 256 tokens"
            )

    @property
    def token_lengths(self) -> tuple[int, ...]:
        return _whole_numbers("document_lengths", self.document_lengths)


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartConfig:
    """Options of `longctx bench restart` alone."""

    random_model: Annotated[Literal["100m", "213m"] | None, "random weights of that size"] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class UploadConfig:
    """Options of `longctx bench upload`."""

    upload_tokens: Annotated[int, "tokens of the document at most"] = 131_072
    upload_questions: Annotated[int, "questions before the restart, and again after it"] = 20

    def __post_init__(self) -> None:
        _at_least("upload_tokens", self.upload_tokens, 4096)
        most = self.upload_tokens // 128  # more would make it a list of facts
        if self.upload_questions % 5 or not 5 <= self.upload_questions <= most:
            raise ValueError(
                f"upload_questions={self.upload_questions} must be a multiple of 5, at most {most} "
                f"for {self.upload_tokens} tokens"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModulesConfig:
    """Options of `longctx bench modules`."""

    parts: Annotated[str, "what is measured: quality, retrieval, speed"] = "quality,retrieval,speed"
    modules: Annotated[int, "modules in a prompt"] = 6
    module_tokens: Annotated[int, "tokens of each where speed is measured"] = 2000
    fact_tokens: Annotated[int, "tokens of each where facts are asked for"] = 1000
    fact_questions: Annotated[int, "questions of each kind"] = 100
    speed_model: Annotated[
        Literal["100m", "213m"], "parameters of the model of random weights, without --model"
    ] = "100m"

    def __post_init__(self) -> None:
        if unknown := set(self.every_part) - {"quality", "retrieval", "speed"}:
            raise ValueError(
                f"parts={self.parts} has {', '.join(sorted(unknown))}; choose from quality, "
                "retrieval, speed"
            )
        _at_least("modules", self.modules, 1)
        _at_least("module_tokens", self.module_tokens, 1)
        _at_least("fact_tokens", self.fact_tokens, 256)
        _at_least("fact_questions", self.fact_questions, 5)

    @property
    def every_part(self) -> tuple[str, ...]:
        return tuple(self.parts.split(","))


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityConfig:
    """Options of `longctx bench quality`."""

    # The defaults are those of the gate at a start, so that the verdicts are the same
    text_tokens: Annotated[int, "tokens read of each text"] = 320
    own_tokens: Annotated[int, "tokens that the model goes on to say after each question"] = 32
    text_file: Annotated[Path | None, "UTF-8 text to read instead of the built-in ones"] = None

    def __post_init__(self) -> None:
        _at_least("text_tokens", self.text_tokens, 1)
        _at_least("own_tokens", self.own_tokens, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckConfig:
    """Options of `longctx bench check`."""

    baseline: Annotated[Path | None, "file of benchmarks and what they came to"] = None
    renew: Annotated[bool, "write what is measured now into it, instead of judging"] = False


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelsConfig:
    """Options of `longctx bench kernels`: the shapes that are measured."""

    head_dims: Annotated[str, "values per head"] = "64,128"
    groups: Annotated[str, "query heads per key head"] = "4,8"
    kv_heads: Annotated[int, "key heads"] = 4
    context: Annotated[int, "tokens that lie before the row or chunk"] = 16_384
    prefill_rows: Annotated[int, "query rows of the prefill chunk"] = 256
    sequences: Annotated[str, "numbers of sequences that decode a row at once"] = "1"

    def __post_init__(self) -> None:
        for name, values in (
            ("head_dims", self.every_head_dim),
            ("groups", self.every_group),
            ("sequences", self.every_sequences),
        ):
            _at_least(name, min(values), 1)
        _at_least("kv_heads", self.kv_heads, 1)
        _at_least("context", self.context, 64)
        _at_least("prefill_rows", self.prefill_rows, 1)

    @property
    def every_head_dim(self) -> tuple[int, ...]:
        return _whole_numbers("head_dims", self.head_dims)

    @property
    def every_group(self) -> tuple[int, ...]:
        return _whole_numbers("groups", self.groups)

    @property
    def every_sequences(self) -> tuple[int, ...]:
        return _whole_numbers("sequences", self.sequences)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeConfig:
    """Options of `longctx bench decode`."""

    against: Annotated[
        Literal["nothing", "transformers"],
        "transformers: its generate answers the same prompts, by turns with longctx",
    ] = "nothing"
    size: Annotated[
        Literal["100m", "213m", "8b"] | None,
        "parameters of the random model without --model; 213m, against transformers 100m",
    ] = None
    contexts: Annotated[
        str | None,
        "prompt lengths in tokens; 512,4096,16384,32768, against transformers 100,4000,8000",
    ] = None
    new_tokens: Annotated[int, "tokens decoded after each prompt"] = 32

    def __post_init__(self) -> None:
        if min(self.token_lengths) < 1:
            raise ValueError(f"contexts={self.contexts}: a prompt has at least one token")
        _at_least("new_tokens", self.new_tokens, 2)

    @property
    def model_size(self) -> str:
        return self.size or ("213m" if self.against == "nothing" else "100m")

    @property
    def token_lengths(self) -> tuple[int, ...]:
        usual = "512,4096,16384,32768" if self.against == "nothing" else "100,4000,8000"
        return _whole_numbers("contexts", self.contexts or usual)


@dataclass(frozen=True, slots=True, kw_only=True)
class CUDAConfig:
    """Options of `longctx bench cuda`."""

    depth: Annotated[int, "tokens that lie before what is measured"] = 131_072
    batches: Annotated[str, "numbers of sequences whose attention is measured"] = "1,16"

    def __post_init__(self) -> None:
        _at_least("depth", self.depth, 256)
        _at_least("batches", min(_whole_numbers("batches", self.batches)), 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class RanksConfig:
    """Options of `longctx bench ring`."""

    rank_counts: Annotated[str, "numbers of ranks that share a prompt"] = "1,2,4"
    prompt_tokens: Annotated[int, "length of the prompt; whole chunks of it are read"] = 8192
    model_size: Annotated[Literal["100m", "213m"], "parameters of the random model"] = "100m"

    def __post_init__(self) -> None:
        _at_least("rank_counts", min(self.every_rank_count), 1)
        _at_least("prompt_tokens", self.prompt_tokens, self.chunk_tokens)

    @property
    def every_rank_count(self) -> tuple[int, ...]:
        return _whole_numbers("rank_counts", self.rank_counts)

    @property
    def chunk_tokens(self) -> int:
        """Enough tokens for every rank to compute an early and a late run of two blocks."""
        return 256 * max(self.every_rank_count)

    @property
    def tokens(self) -> int:
        return self.prompt_tokens // self.chunk_tokens * self.chunk_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class EvictionConfig:
    """Options of `longctx bench eviction`: how its traces are drawn, and what an extent costs."""

    trace_requests: Annotated[int, "questions in a trace; the first half only fills the tier"] = (
        3000
    )
    documents: Annotated[int, "documents that are asked again and again"] = 200
    zipf: Annotated[float, "exponent of their popularity"] = 0.9
    scan_share: Annotated[float, "share of questions on documents that are asked only once"] = 0.2
    drift: Annotated[float, "chance per question that some document becomes the favorite"] = 0.01
    median_tokens: Annotated[int, "half of the documents are longer"] = 16_384
    length_spread: Annotated[float, "standard deviation of the logarithm of their lengths"] = 1.0
    tokens_per_second: Annotated[float, "prefill at the beginning of a document"] = 2000.0
    doubling_tokens: Annotated[int, "position at which prefill takes twice that time"] = 32_768
    extent_bytes: Annotated[int, "stored bytes of 1,024 tokens"] = 32 << 20
    capacities: Annotated[str, "sizes of the tier, percent of all documents but scans"] = (
        "5,10,20,40,80"
    )

    def __post_init__(self) -> None:
        sizes = ("median_tokens", "doubling_tokens", "extent_bytes")
        for name in ("trace_requests", "documents", *sizes):
            _at_least(name, getattr(self, name), 1)
        if not all(0 < percent <= 100 for percent in self.percent_capacities):
            raise ValueError(f"capacities={self.capacities}: a percentage up to 100")
        if self.tokens_per_second <= 0:
            raise ValueError(f"tokens_per_second={self.tokens_per_second} must be positive")
        for name in ("scan_share", "drift"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be from 0 to 1")

    @property
    def percent_capacities(self) -> tuple[float, ...]:
        return _numbers("capacities", self.capacities)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadConfig:
    """Options of `longctx bench load`."""

    load_depths: Annotated[str, "tokens of the document that are computed already"] = (
        "0,4096,16384,60000"
    )
    window_tokens: Annotated[int, "tokens of the document that are computed at each depth"] = 2048
    answers: Annotated[int, "answers that run beside it"] = 4
    chat_tokens: Annotated[int, "prompt of each answer, and of the chat that arrives"] = 100
    load_model: Annotated[
        Literal["100m", "213m"], "parameters of the model of random weights, without --model"
    ] = "213m"

    def __post_init__(self) -> None:
        for name in ("window_tokens", "answers", "chat_tokens"):
            _at_least(name, getattr(self, name), 1)
        _at_least("load_depths", min(self.every_depth), 0)

    @property
    def every_depth(self) -> tuple[int, ...]:
        return _whole_numbers("load_depths", self.load_depths)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleConfig:
    """Options of `longctx bench schedule`: the machine that is simulated, and what it is asked."""

    step_costs: Annotated[
        str,
        "ms of a step, a prompt token, a pair of tokens, an answer and a token of its context, as "
        "ms_per of /v1/scheduler has them; a Llama of 100M parameters on two cores if absent",
    ] = "20,0.6,0.000055,3,0.0002"
    pool_tokens: Annotated[int, "tokens whose KV the device holds"] = 1 << 21
    requests: Annotated[int, "requests of the trace"] = 2000
    documents_read: Annotated[int, "of these, documents that are read beside the chats"] = 9
    longest_tokens: Annotated[int, "the longest of the documents"] = 1_000_000
    busy: Annotated[float, "part of the time that all but the longest document take"] = 0.6
    trace_file: Annotated[
        Path | None,
        "requests from a CSV file with the columns of the Azure LLM traces instead: TIMESTAMP, "
        "ContextTokens, GeneratedTokens",
    ] = None
    live: Annotated[
        bool, "serve a small trace with the model as well, and compare its times with the simulated"
    ] = False

    def __post_init__(self) -> None:
        if len(self.costs_ms) != 5 or min(self.costs_ms) < 0 or not any(self.costs_ms):
            raise ValueError(f"step_costs={self.step_costs} must be five numbers from 0")
        for name in ("pool_tokens", "longest_tokens"):
            _at_least(name, getattr(self, name), 64)
        _at_least("documents_read", self.documents_read, 0)
        _at_least("requests", self.requests, self.documents_read + 1)
        if not 0 < self.busy <= 2:
            raise ValueError(f"busy={self.busy} must be above 0, and 2 at most")

    @property
    def costs_ms(self) -> tuple[float, ...]:
        return _numbers("step_costs", self.step_costs)


def _whole_numbers(name: str, text: str) -> tuple[int, ...]:
    """Raises ValueError unless the text is whole numbers, separated by commas."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(f"{name}={text} must be whole numbers such as 4096,32768") from error


def _numbers(name: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(f"{name}={text} must be numbers such as 0,25,50,75,100") from error


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name}={value} must be at least {least}")
