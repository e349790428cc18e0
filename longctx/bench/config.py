"""What the benchmarks let their user choose. Each field is an option; no name stands twice."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from longctx.embedded.generator import KINDS


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchConfig:
    """What every benchmark takes."""

    seed: Annotated[int, "another seed, another text; the same seed, the same text"] = 0
    out: Annotated[Path | None, "folder for the results as JSON and PNG"] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundsConfig:
    rounds: Annotated[int, "times that each figure is taken; the median counts"] = 3

    def __post_init__(self) -> None:
        _at_least("rounds", self.rounds, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class NiahConfig:
    lengths: Annotated[str, "document lengths in tokens"] = "4096,16384,32768,65536"
    depths: Annotated[str, "where needles lie, percent of the document"] = "0,25,50,75,100"
    questions: Annotated[int, "questions per length and depth"] = 20
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
        _at_least("questions", self.questions, 1)
        _at_least("distractors", self.distractors, 0)
        _at_least("answer_tokens", self.answer_tokens, 1)

    @property
    def token_lengths(self) -> tuple[int, ...]:
        return _whole_numbers("lengths", self.lengths)

    @property
    def percent_depths(self) -> tuple[float, ...]:
        return _numbers("depths", self.depths)


@dataclass(frozen=True, slots=True, kw_only=True)
class DocumentConfig:
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
class DecodeConfig:
    size: Annotated[Literal["100m", "213m"], "parameters of the random model without --model"] = (
        "100m"
    )
    contexts: Annotated[str, "prompt lengths in tokens"] = "100,4000,8000"
    new_tokens: Annotated[int, "tokens decoded after each prompt"] = 64

    def __post_init__(self) -> None:
        if min(self.token_lengths) < 1:
            raise ValueError(f"contexts={self.contexts}: a prompt has at least one token")
        _at_least("new_tokens", self.new_tokens, 2)

    @property
    def token_lengths(self) -> tuple[int, ...]:
        return _whole_numbers("contexts", self.contexts)


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
