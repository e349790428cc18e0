"""Runs an engine whose logits are kept, to compare them with those of eager transformers.

The engine is the real one, step by step. Its runner is wrapped, and the logits that it returns are
kept with the choice and the number of tokens that they belong to.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from compress.codec import CODECS
from compress.shape import KVShape
from longctx.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from longctx.engine.engine import Engine
from longctx.engine.model_runner import Runner
from longctx.engine.scheduler import Chunk
from longctx.engine.stats import StepSeconds
from longctx.engine_stats import RingStats
from longctx.kv.sequence_blocks import TokenIds
from longctx.open_engine import engine_parts
from longctx.request import (
    FinishReason,
    Progress,
    Request,
    RequestClass,
    RequestOutput,
    SamplingParams,
    Segment,
    Usage,
)
from longctx.ring.ranks import Ranks
from offload.units import GIB
from tests.support.tiny_models import BASE, HEAD_DIM, VOCAB_SIZE


@dataclass
class Answered:
    """Everything that one request returned, checked to come in order."""

    tokens: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    texts: dict[int, str] = field(default_factory=lambda: defaultdict(str))
    reasons: dict[int, list[FinishReason]] = field(default_factory=lambda: defaultdict(list))
    progress: list[Progress] = field(default_factory=list)
    finished: int = 0
    usage: Usage | None = None
    errors: list[str] = field(default_factory=list)

    def take(self, output: RequestOutput) -> None:
        assert not self.finished, f"an output after the last one: {output}"
        if output.progress is not None:
            self.progress.append(output.progress)
            return
        assert not self.reasons[output.index], f"an output after its choice ended: {output}"
        self.tokens[output.index] += output.token_ids
        self.texts[output.index] += output.text
        if output.finish_reason is not None:
            self.reasons[output.index].append(output.finish_reason)
        if output.error is not None:
            self.errors.append(output.error)
        self.finished += output.finished
        if output.finished:
            assert output.usage is not None
            self.usage = output.usage

    @property
    def answer(self) -> list[int]:
        return self.tokens[0]

    @property
    def reason(self) -> FinishReason:
        (reason,) = self.reasons[0]
        return reason

    @property
    def counts(self) -> Usage:
        assert self.usage is not None, "not finished"
        return self.usage


class RecordingRunner:
    """A `Runner` that keeps the logits of every step, and fails when it is told to.

    `logits[request_id, index][tokens]` is the row that followed the first `tokens` tokens.
    """

    def __init__(self, runner: Runner) -> None:
        self.inner = runner
        self.failures: list[Exception] = []
        self.logits: dict[tuple[str, int], dict[int, Tensor]] = defaultdict(dict)
        self.texts_of: dict[tuple[str, int], TokenIds] = {}

    @property
    def computed_tokens(self) -> int:
        return self.inner.computed_tokens

    @property
    def seconds(self) -> StepSeconds | None:
        return self.inner.seconds

    def ring_stats(self) -> RingStats | None:
        return self.inner.ring_stats()

    def run_chunks(self, chunks: Sequence[Chunk]) -> Tensor:
        if self.failures:
            raise self.failures.pop()
        logits = self.inner.run_chunks(chunks)
        each = torch.split(logits, [chunk.logits_rows for chunk in chunks])
        for chunk, rows in zip(chunks, each, strict=True):
            if chunk.samples:
                sequence = chunk.sequence
                name = (sequence.request.request_id, sequence.index)
                self.logits[name][len(sequence.blocks.tokens)] = rows[-1].clone()
                self.texts_of[name] = sequence.blocks.tokens
        return logits


class RecordedEngine(Engine):
    """The real engine with a recording runner, and its parts at hand."""

    def __init__(
        self, config: EngineConfig, model_folder: Path, ranks: Ranks | None = None
    ) -> None:
        parts = engine_parts(config, model_folder, ranks=ranks)
        self.runner = RecordingRunner(parts.runner)
        super().__init__(replace(parts, runner=self.runner))
        self.cache = parts.cache
        self.memory = parts.memory
        self.scheduler = parts.scheduler
        self.answered: dict[str, Answered] = defaultdict(Answered)
        self.logits = self.runner.logits

    @property
    def preemptions(self) -> int:
        return self.scheduler.preemptions

    def tokens_of(self, name: tuple[str, int]) -> list[int]:
        """Return prompt and answer of a choice that has sampled at least once."""
        tokens = self.runner.texts_of[name]
        return [int(token) for token in tokens.slice(0, len(tokens))]

    def take_step(self) -> list[RequestOutput]:
        outputs = self.step()
        for output in outputs:
            self.answered[output.request_id].take(output)
        return outputs

    def finish(self, *requests: Request, steps: int = 5000) -> list[Answered]:
        """Submit requests and run until nothing is left; return what each of them returned."""
        for request in requests:
            self.submit(request)
        while self.has_work:
            self.take_step()
            steps -= 1
            assert steps > 0, "the engine does not come to an end"
        return [self.answered[request.request_id] for request in requests]

    def assert_idle(self) -> None:
        """Assert that nothing runs, and that no page is held once the prefixes are dropped."""
        assert not self.has_work
        while self.has_transfers:  # what is on its way to the disk is held until it is there
            self.step()
        assert not self.scheduler.running and not self.scheduler.waiting
        assert self.memory.raw.held == 0
        assert not self.cache._pending
        self.cache.resident_prefixes.clear()
        assert len(self.cache.prefixes) == 0, "a prefix is in use"
        staging = [self.memory.reserved_blocks] + [0] * (len(self.memory.packed) - 1)
        for pool, kept in zip(self.memory.packed, staging, strict=True):
            assert pool.held == kept
            assert pool.available == pool.capacity - kept


def engine_config(
    *,
    codec: str = "raw",
    backend: str = "auto",
    max_batch_tokens: int = 512,
    max_sequences: int = 8,
    max_waiting: int = 1024,
    pool_gib: float = 0.03,
    max_context: int | None = None,
    rope_override: str | None = None,
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
) -> EngineConfig:
    """Steps may take a minute: what a step computes must not depend on how busy the machine is."""
    return EngineConfig(
        model=ModelConfig(
            attention_backend=backend,
            max_context=max_context,
            rope_override=rope_override,
            dtype=dtype,
        ),
        cache=CacheConfig(kv_codec=codec, force_codec=True, device_pool_gib=pool_gib),
        scheduler=SchedulerConfig(
            max_batch_tokens=max_batch_tokens,
            max_sequences=min(max_sequences, max_batch_tokens),
            max_waiting=max_waiting,
            target_step_ms=60_000,
        ),
    )


def build_engine(folder: Path, *, ranks: Ranks | None = None, **options: Any) -> RecordedEngine:
    return RecordedEngine(engine_config(**options), folder, ranks)


def gib_of_blocks(
    blocks: int, layers: int = BASE["num_hidden_layers"], *, codec: str = "raw"
) -> float:
    """Return the `device_pool_gib` of so many blocks of a tiny float32 model without windows."""
    shape = KVShape(kv_heads=BASE["num_key_value_heads"], head_dim=HEAD_DIM, dtype=torch.float32)
    return (blocks + 1) * layers * CODECS[codec](shape).page_bytes / GIB


def some_ids(length: int, seed: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(5, VOCAB_SIZE, (length,), generator=generator).tolist())


def ask(
    name: str,
    *pieces: Sequence[int] | str,
    max_tokens: int = 8,
    temperature: float = 0.0,
    seed: int | None = None,
    n: int = 1,
    salt: str = "",
    request_class: RequestClass = RequestClass.INTERACTIVE,
    ignore_eos: bool = True,
) -> Request:
    """Make a request; a piece is literal token ids, or the name of a document."""
    return Request(
        request_id=name,
        segments=tuple(
            Segment(document_id=piece)
            if isinstance(piece, str)
            else Segment(token_ids=tuple(piece))
            for piece in pieces
        ),
        sampling=SamplingParams(
            max_tokens=max_tokens, temperature=temperature, seed=seed, n=n, ignore_eos=ignore_eos
        ),
        request_class=request_class,
        salt=salt,
    )


class Eager:
    """Runs transformers' own float32 forward pass; the same tokens are computed once."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, attn_implementation="eager", dtype=torch.float32, **changes
        )
        self._model = model.eval()
        self._rows: dict[tuple[int, ...], Tensor] = {}

    def rows(self, tokens: Sequence[int]) -> Tensor:
        """Return logits [tokens, vocab]."""
        name = tuple(tokens)
        if name not in self._rows:
            with torch.inference_mode():
                logits = self._model(torch.tensor([name]), use_cache=False).logits[0]
            self._rows[name] = logits.float()
        return self._rows[name]


def assert_equals_eager(engine: RecordedEngine, eager: Eager, tolerance: float = 1e-4) -> None:
    """Compare all logits that were sampled from, and greedy tokens unless two are as good."""
    assert engine.logits
    for name, sampled in engine.logits.items():
        tokens = engine.tokens_of(name)
        rows = eager.rows(tokens)
        for length, row in sampled.items():
            difference = float((row - rows[length - 1]).abs().max())
            assert difference < tolerance, (name, length, difference)
            if length < len(tokens):
                best, chosen = rows[length - 1].max(), rows[length - 1][tokens[length]]
                assert best - chosen <= 2 * tolerance, (name, length)
    assert not any(answered.errors for answered in engine.answered.values())
