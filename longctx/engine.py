"""The engine: requests in, steps, outputs out. One class for the engine process, tests and library.

    engine.submit(request)
    while engine.has_work:
        for output in engine.step(): ...

`submit` refuses at once what can never be answered. Whatever happens later, every request ends in
one output with `finished`. Read `step` first.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from compress.codec import CODECS
from compress.shape import BLOCK_TOKENS
from longctx.batch import Batch
from longctx.config import EngineConfig
from longctx.detokenizer import TextStream
from longctx.errors import InvalidRequest, ModelRefused
from longctx.intake import Intake
from longctx.kv_cache import KVCacheManager
from longctx.kv_memory import KVMemory, pool_bytes
from longctx.model import load_model
from longctx.request import (
    FinishReason,
    Progress,
    Request,
    RequestOutput,
    Usage,
)
from longctx.runner import BACKENDS, ModelRunner
from longctx.sampler import SamplingError, sample
from longctx.scheduler import Scheduler, SchedulerOutput
from longctx.sequence import Sequence
from longctx.tokenizer import Tokenizer

FINGERPRINTS = Path.home() / ".cache" / "longctx"  # checksums of weights, kept between starts


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """What a loaded engine says of itself."""

    model_name: str
    fingerprint: str
    max_context_tokens: int
    capacity_tokens: int  # tokens of KV that the device pool holds
    block_tokens: int
    kv_block_bytes: int  # one block in all layers that see everything
    kv_window_bytes: int  # what the layers with windows hold of a finished prompt
    kv_codec: str
    device: str
    dtype: str
    backend: str
    vocab_size: int

    def kv_bytes(self, tokens: int) -> int:
        """Device memory of a computed prompt of that many tokens; open blocks do not count."""
        blocks = tokens // self.block_tokens
        return blocks * self.kv_block_bytes + (self.kv_window_bytes if blocks else 0)


@dataclass(slots=True)
class _Answers:
    """The state of one request: its choices, and what its caller was told last."""

    request: Request
    sequences: list[Sequence]
    reported: int = -1  # prompt tokens in the last progress
    open_choices: int = field(init=False)

    def __post_init__(self) -> None:
        self.open_choices = self.request.sampling.n


class Engine:
    def __init__(self, config: EngineConfig, model_folder: Path) -> None:
        """Loads the model; raises ModelRefused. `config.model.model` may differ from the folder."""
        if config.model.threads is not None:
            torch.set_num_threads(config.model.threads)
        _check_name("attention_backend", config.model.attention_backend, BACKENDS)
        _check_name("kv_codec", config.cache.kv_codec, CODECS)
        self._config = config
        self.tokenizer = Tokenizer(model_folder)
        model = load_model(config.model, model_folder, cache_dir=FINGERPRINTS)
        self._spec = spec = model.spec
        scheduler = config.scheduler
        batch_tokens = scheduler.batch_tokens(spec.device.type)
        self._memory = KVMemory(
            spec.layers,
            dtype=spec.dtype,
            device=spec.device,
            codec=config.cache.kv_codec,
            pool_bytes=pool_bytes(config.cache.device_pool_gib, spec.device),
            step_blocks=batch_tokens // BLOCK_TOKENS + 1 + 2 * scheduler.max_sequences,
        )
        self._cache = KVCacheManager(self._memory)
        self._scheduler = Scheduler(scheduler, self._cache, batch_tokens=batch_tokens)
        backend = BACKENDS[config.model.attention_backend](self._memory)
        self._runner = ModelRunner(model, self._memory, backend)
        self._intake = Intake(
            spec,
            self._cache,
            self.tokenizer,
            max_sequences=scheduler.max_sequences,
        )
        self._requests: dict[str, _Answers] = {}
        self._steps = 0
        self._early: list[RequestOutput] = []  # outputs that arose between steps
        self.info = EngineInfo(
            model_name=spec.name,
            fingerprint=spec.fingerprint,
            max_context_tokens=spec.max_context,
            capacity_tokens=self._memory.capacity_tokens,
            block_tokens=BLOCK_TOKENS,
            kv_block_bytes=self._memory.block_bytes,
            kv_window_bytes=self._memory.window_bytes,
            kv_codec=config.cache.kv_codec,
            device=str(spec.device),
            dtype=str(spec.dtype).removeprefix("torch."),
            backend=config.model.attention_backend,
            vocab_size=spec.vocab_size,
        )

    # -- requests -------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        return bool(self._requests or self._early)

    def submit(self, request: Request) -> None:
        """Queue a request.

        Raises InvalidRequest, ContextTooLong, DocumentMissing or Overloaded; then it is forgotten.
        """
        if request.request_id in self._requests:
            raise InvalidRequest(f"request id {request.request_id} is in use", param="request_id")
        sequence = self._intake.sequence(request)
        self._scheduler.add(sequence)
        self._requests[request.request_id] = _Answers(request, [sequence])

    def abort(self, request_id: str) -> None:
        """End a request; what its prefill has sealed stays cached. Unknown ids are ignored."""
        answers = self._requests.get(request_id)
        if answers is None:
            return
        for sequence in list(answers.sequences):
            if sequence.finish_reason is None:
                self._early += self._finish(sequence, FinishReason.ABORT)

    def open_document(self, document_id: str, token_ids: NDArray[np.int32]) -> None:
        """Make a document known by its tokens; requests may then name it as a segment."""
        if self._intake.open_document(document_id, token_ids):
            self._forget_blocks(document_id)  # it said something else before

    def close_document(self, document_id: str) -> None:
        """Forget a document and free the blocks that only it uses."""
        self._intake.close_document(document_id)
        self._forget_blocks(document_id)

    def _forget_blocks(self, document_id: str) -> None:
        for answers in self._requests.values():
            for sequence in answers.sequences:
                sequence.forget_document(document_id)
        self._cache.close_document(document_id)

    # -- steps ----------------------------------------------------------------------------------

    def step(self) -> list[RequestOutput]:
        """Compute one batch; the outputs that it, or calls since the last one, brought about."""
        outputs, self._early = self._early, []
        scheduled = self._scheduler.schedule()
        if scheduled.chunks:
            self._steps += 1
            try:
                drawn = self._compute(scheduled)
            except Exception as error:  # of whatever kind: it ends these requests, not the engine
                return outputs + self._fail(scheduled, f"{type(error).__name__}: {error}")
            outputs += self._progress()
            for sequence, token in drawn:
                outputs += self._advance(sequence, token)
            for chunk in scheduled.chunks:
                if chunk.sequence.remaining == 0 and chunk.sequence.finish_reason is None:
                    outputs += self._finish(chunk.sequence, FinishReason.LENGTH)  # prefill only
        return outputs

    def _compute(self, scheduled: SchedulerOutput) -> list[tuple[Sequence, int | SamplingError]]:
        """Run the batch; each sequence that is to go on, with its next token."""
        began = time.perf_counter()
        drawing = [chunk.sequence for chunk in scheduled.chunks if chunk.draws]
        batch = Batch.build(scheduled.chunks, self._cache, device=self._memory.device)
        logits = self._runner.run(batch)
        self._scheduler.update(scheduled, time.perf_counter() - began)
        # The choices of a request part here: they share the prompt and draw from the same row.
        families = [[sequence, *self._fork(sequence)] for sequence in drawing]
        if not families:
            return []
        if any(len(family) > 1 for family in families):
            logits = logits[[row for row, family in enumerate(families) for _ in family]]
        members = [sequence for family in families for sequence in family]
        tokens = sample(logits, [sequence.sampling for sequence in members])
        return list(zip(members, tokens, strict=True))

    def _fork(self, first: Sequence) -> list[Sequence]:
        """The other choices of a request whose prompt is computed, if it has not begun yet."""
        forks = []
        for index in range(1, first.width):
            fork = Sequence(
                request=first.request,
                index=index,
                arrival=first.arrival,
                arrival_seconds=first.arrival_seconds,
                tokens=first.tokens.fork(),
                prompt_tokens=first.prompt_tokens,
                sampling=first.sampling.fork(first.seed + index),
                seed=first.seed + index,
                text=TextStream(self.tokenizer, stop=first.request.sampling.stop),
                namespace=first.namespace,
                document_ends=first.document_ends,
                cached_tokens=first.cached_tokens,
            )
            self._cache.fork(first, fork)
            self._scheduler.add_fork(fork)
            self._requests[first.request.request_id].sequences.append(fork)
            forks.append(fork)
        first.forked = True
        return forks

    def _advance(self, sequence: Sequence, token: int | SamplingError) -> list[RequestOutput]:
        """Append a drawn token; the choice ends here if it must."""
        if isinstance(token, SamplingError):
            return self._finish(sequence, FinishReason.ERROR, error=str(token))
        sampling = sequence.request.sampling
        sequence.tokens.append(token)
        sequence.sampling.observe(token)
        if token in sampling.stop_token_ids:
            return self._finish(sequence, FinishReason.STOP, token=token, stop_reason=token)
        if token in self.tokenizer.eos_token_ids and not sampling.ignore_eos:
            return self._finish(sequence, FinishReason.STOP, token=token)
        delta = sequence.text.push(token)
        if delta.stopped_by is not None:
            return self._finish(
                sequence,
                FinishReason.STOP,
                token=token,
                text=delta.text,
                stop_reason=delta.stopped_by,
            )
        full = len(sequence.tokens) >= self._spec.max_context
        if full or sequence.completion_tokens >= sampling.max_tokens:
            return self._finish(sequence, FinishReason.LENGTH, token=token, text=delta.text)
        return [
            RequestOutput(
                request_id=sequence.request.request_id,
                index=sequence.index,
                token_ids=(token,),
                text=delta.text,
            )
        ]

    def _finish(
        self,
        sequence: Sequence,
        reason: FinishReason,
        *,
        token: int | None = None,
        text: str = "",
        stop_reason: str | int | None = None,
        error: str | None = None,
    ) -> list[RequestOutput]:
        """End one choice, and with the last one the request."""
        self._scheduler.remove(sequence)
        sequence.finish_reason = reason
        answers = self._requests[sequence.request.request_id]
        # Choices that have not forked yet end with the first one.
        indices = range(sequence.index, sequence.index + sequence.width)
        answers.open_choices -= len(indices)
        finished = answers.open_choices == 0
        if finished:
            del self._requests[sequence.request.request_id]
        rest = sequence.text.finish()
        return [
            RequestOutput(
                request_id=sequence.request.request_id,
                index=index,
                token_ids=() if token is None else (token,),
                text=text + rest,
                finish_reason=reason,
                stop_reason=stop_reason,
                finished=finished and index == indices[-1],
                usage=_usage(answers) if finished and index == indices[-1] else None,
                error=error,
            )
            for index in indices
        ]

    def _fail(self, scheduled: SchedulerOutput, message: str) -> list[RequestOutput]:
        """A step broke: its requests end, the others go on."""
        failed = dict.fromkeys(chunk.sequence.request.request_id for chunk in scheduled.chunks)
        outputs: list[RequestOutput] = []
        for request_id in failed:
            for sequence in list(self._requests[request_id].sequences):
                if sequence.finish_reason is None:
                    outputs += self._finish(sequence, FinishReason.ERROR, error=message)
        return outputs

    def _progress(self) -> list[RequestOutput]:
        """News of prompts that are being computed, by their own sequence or by another's."""
        outputs = []
        for request_id, answers in self._requests.items():
            first = answers.sequences[0]
            owner = self._cache.computed_by(first)
            done = min(first.prompt_tokens, (owner or first).computed)
            if first.completion_tokens or done <= answers.reported:
                continue
            answers.reported = done
            progress = Progress(
                total=first.prompt_tokens,
                cache=first.cached_tokens or 0,
                processed=done,
                time_ms=1000 * (time.monotonic() - first.arrival_seconds),
            )
            outputs.append(RequestOutput(request_id=request_id, progress=progress))
        return outputs

    def stats(self) -> dict[str, float]:
        """Gauges and counters, by flat names."""
        numbers: dict[str, float] = {
            "requests_running": len(self._scheduler.running),
            "requests_waiting": len(self._scheduler.waiting),
            "steps_total": self._steps,
            "computed_tokens_total": self._runner.computed_tokens,
            "documents_open": len(self._intake.documents),
            "prefixes_held": len(self._cache.prefixes),
            "raw_blocks_held": self._memory.raw.held,
        }
        for index, pool in enumerate(self._memory.packed):
            numbers[f"group{index}_blocks_total"] = pool.capacity
            numbers[f"group{index}_blocks_held"] = pool.held
        return numbers


def _usage(answers: _Answers) -> Usage:
    first = answers.sequences[0]
    return Usage(
        prompt_tokens=first.prompt_tokens,
        cached_tokens=first.cached_tokens or 0,
        completion_tokens=sum(sequence.completion_tokens for sequence in answers.sequences),
        computed_tokens=sum(sequence.computed_tokens for sequence in answers.sequences),
    )


def _check_name(option: str, name: str, known: Iterable[str]) -> None:
    if name not in known:
        raise ModelRefused(f"{option} {name!r} is unknown; choose from {', '.join(sorted(known))}")
