"""Measures levels of exactness against `exact`, teacher-forced: the same prompts in one engine.

A prompt is what the chat template puts before a file, two modules (another text, and the beginning
of this one), and then what is computed at every level: the rest of this text, a question, and the
answer. With `exact` the model answers (sampled at temperature 1); the other levels read what it
said. Two kinds of rows are compared, as for codecs: the rest of the text, and the model's own
answer. Where 16 bits serve, a float32 pass reads all of it too, and what counts is how much
farther from it a level is than `exact` in the type that serves. Modules are at the positions where
they were encoded, as those of a schema are. Read `measure_levels`.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compress.codec import CODECS
from compress.shape import BLOCK_TOKENS, KVShape
from longctx.attention.registry import BACKENDS
from longctx.config import CacheConfig, SchedulerConfig
from longctx.engine.batch import Batch
from longctx.engine.cost_model import CostModel
from longctx.engine.engine import Engine
from longctx.engine.model_runner import ModelRunner
from longctx.engine.parts import one_rank_parts
from longctx.engine_info import Measured
from longctx.errors import LongctxError
from longctx.model.exact import exact_twin
from longctx.model.loader import LoadedModel
from longctx.quality.damage import DamageMeter, compare
from longctx.quality.measure import frame_of
from longctx.quality.replay import Replay
from longctx.quality.texts import TEXTS, Text
from longctx.request import FinishReason, Piece, Request, SamplingParams, Segment
from offload.units import GIB
from prompt_cache.level import EXACT, Level

POOL_BLOCKS = 256
STEP_TOKENS = 128  # every row of a step has logits
NO_ANSWER = SamplingParams(max_tokens=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class LevelWorkload:
    """How much is computed for `exact` and for each level, and when to stop if it takes longer."""

    module_tokens: int = 224  # of each of two modules
    text_tokens: int = 96  # that follow on the second one
    own_tokens: int = 32
    limit_seconds: float | None = 30.0


@dataclass(frozen=True, slots=True)
class _Prompt:
    """A prompt in its three parts; the first `text` tokens of `tail` are judged as text."""

    before: tuple[int, ...]
    modules: tuple[tuple[int, ...], ...]
    tail: tuple[int, ...]
    text: int


def measure_levels(
    serving: Engine,
    levels: Sequence[Level],
    *,
    workload: LevelWorkload,
    texts: Sequence[Text] = TEXTS,
    seed: int = 0,
) -> dict[Level, Measured]:
    """Measure what each of `levels` does to the model of an engine.

    Another engine with the same model, codec and backend is measured, so the serving one is
    undisturbed but for its time. Another `seed` lets the model give other answers.
    """
    began = time.monotonic()
    watched = _Watched(serving)
    twin = exact_twin(serving.model)
    exact_pass = None if twin is serving.model else _ExactPass(serving, twin)
    text = {level: DamageMeter() for level in levels}
    own = {level: DamageMeter() for level in levels}
    for number, prompt in enumerate(_prompts(serving, workload, texts)):
        sampling = SamplingParams(
            max_tokens=workload.own_tokens, temperature=1.0, seed=seed + number
        )
        tail_rows = len(prompt.tail) if prompt.text else 1
        served, answer = watched.read(prompt, EXACT, (), sampling, tail_rows=tail_rows)
        exact = None
        if exact_pass is not None:
            exact = exact_pass.read(prompt, answer[:-1], rows=len(served))
        targets = torch.tensor((*prompt.tail, *answer)[len(prompt.tail) - tail_rows + 1 :])
        for level in levels:
            once = replace(sampling, max_tokens=1)
            found, _ = watched.read(prompt, level, answer[:-1], once, tail_rows=tail_rows)
            rows = compare(served, found, targets.to(served.device), exact=exact)
            text[level].add(rows[: max(0, prompt.text - 1)])
            own[level].add(rows[tail_rows - 1 :])
        late = workload.limit_seconds is not None
        if late and time.monotonic() - began > (workload.limit_seconds or 0):
            break
    seconds = time.monotonic() - began
    return {
        level: Measured(text=text[level].damage(), own=own[level].damage(), seconds=seconds)
        for level in levels
    }


def _prompts(engine: Engine, workload: LevelWorkload, texts: Sequence[Text]) -> Iterator[_Prompt]:
    """Yield every text with its first question, then with its second; a text is judged once."""
    tokenizer, max_context = engine.tokenizer, engine.info.max_context_tokens
    bodies = [tokenizer.encode(text.body) for text in texts]
    for number in range(max(len(text.questions) for text in texts)):
        for index, text in enumerate(texts):
            if number >= len(text.questions):
                continue
            before, after = frame_of(tokenizer, text, text.questions[number])
            room = max_context - len(before) - len(after) - workload.own_tokens
            module = min(workload.module_tokens, (room - workload.text_tokens) // 2)
            body, other = bodies[index], bodies[index - 1]
            rest = body[module : module + workload.text_tokens]
            if module >= BLOCK_TOKENS and len(rest) > 1:
                yield _Prompt(
                    before=before,
                    modules=(tuple(other[:module]), tuple(body[:module])),
                    tail=(*rest, *after),
                    text=0 if number else len(rest),
                )


class _ExactPass:
    """The model in float32 with raw KV, which reads prompts with their modules in place."""

    def __init__(self, serving: Engine, twin: LoadedModel) -> None:
        self._serving = serving
        self._twin = twin

    def read(self, prompt: _Prompt, answer: Sequence[int], *, rows: int) -> Tensor:
        """Return the logits [rows, vocab] after the last tokens of the prompt and its answer."""
        modules = (token for module in prompt.modules for token in module)
        tokens = (*prompt.before, *modules, *prompt.tail, *answer)
        cache = Replay(
            self._twin,
            self._serving.tokenizer,
            BACKENDS[self._serving.info.backend],
            codec="raw",
            blocks=len(tokens) // BLOCK_TOKENS + 1,
            sequences=1,
            chunk_tokens=max(STEP_TOKENS, rows),
        )
        sequence = cache.admit(tokens)
        while (remaining := sequence.blocks.remaining) > rows:
            cache.feed([(sequence, min(STEP_TOKENS, remaining - rows))], [0])
        (logits,) = cache.feed([(sequence, rows)], [rows])
        return logits


class _Watched:
    """Another engine with the serving one's model, which runs one prompt at a time.

    Its runner keeps the logits of every row that is asked for.
    """

    def __init__(self, serving: Engine) -> None:
        model, info = serving.model, serving.info
        block_bytes = sum(
            CODECS[info.kv_codec](
                KVShape(kv_heads=layer.kv_heads, head_dim=layer.head_dim, dtype=model.spec.dtype)
            ).page_bytes
            for layer in model.spec.layers
        )
        parts = one_rank_parts(
            model,
            serving.tokenizer,
            codec=info.codec_choice,
            backend=info.backend,
            cache=CacheConfig(device_pool_gib=POOL_BLOCKS * block_bytes / GIB),
            scheduler=SchedulerConfig(max_batch_tokens=STEP_TOKENS, max_sequences=2),
            cost=CostModel(),
        )
        assert isinstance(parts.runner, ModelRunner)
        self._runner = _WatchedRunner(model, parts.memory, parts.runner.backend)
        self._engine = Engine(replace(parts, runner=self._runner))
        self._asked = 0

    def read(
        self,
        prompt: _Prompt,
        level: Level,
        answer: Sequence[int],
        sampling: SamplingParams,
        *,
        tail_rows: int,
    ) -> tuple[Tensor, list[int]]:
        """Return logits [rows, vocab] and the sampled tokens.

        There is a row after each of the last `tail_rows` tokens of the prompt, and after each
        token of the answer, first those given and then those sampled, but for the last one: it is
        sampled and never computed.
        """
        self._asked += 1
        salt = level.name  # levels find nothing of each other
        segments = [Segment(token_ids=prompt.before)] if prompt.before else []
        position = len(prompt.before)
        names: list[str] = []
        for module in prompt.modules:
            names.append(f"module-{self._asked}-{len(names)}")
            self._engine.open_module(names[-1], [Piece(token_ids=module, position=position)])
            segments.append(Segment(module_id=names[-1], link_tokens=level.link_tokens))
            position += len(module)
            if level != EXACT:
                self._run(Segment(encodes=names[-1]), salt=salt)
        segments.append(Segment(token_ids=(*prompt.tail, *answer)))
        self._runner.watch(tail_rows + len(answer) + (sampling.max_tokens or 0))
        sampled = self._run(*segments, salt=salt, sampling=sampling)
        for name in names:
            self._engine.close_module(name)
        rows = tail_rows + len(answer) + len(sampled) - 1
        return torch.cat(self._runner.seen)[-rows:], sampled

    def _run(
        self,
        *segments: Segment,
        salt: str,
        sampling: SamplingParams = NO_ANSWER,
    ) -> list[int]:
        self._engine.submit(
            Request(
                request_id=f"watched-{self._asked}", segments=segments, salt=salt, sampling=sampling
            )
        )
        sampled: list[int] = []
        while self._engine.has_work:
            for output in self._engine.step():
                if output.finish_reason is FinishReason.ERROR:
                    raise LongctxError(output.error)
                sampled += output.token_ids
        return sampled


class _WatchedRunner(ModelRunner):
    """Computes the logits of every row, and keeps those of at least the latest `rows`."""

    rows = 0
    seen: tuple[Tensor, ...] = ()  # [rows, vocab] of each step

    def watch(self, rows: int) -> None:
        """Forget what was kept, and keep the latest `rows` from now on."""
        self.rows, self.seen = rows, ()

    def run(self, batch: Batch) -> Tensor:
        every_row = torch.arange(len(batch.token_ids), device=batch.token_ids.device)
        logits = super().run(replace(batch, logits_rows=every_row, last_chunks=batch.chunks))
        self.seen = (*self.seen, logits)
        while sum(map(len, self.seen[1:])) >= self.rows:
            self.seen = self.seen[1:]
        return logits[batch.logits_rows]
