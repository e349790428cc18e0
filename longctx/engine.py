"""The engine: requests in, steps, outputs out. One class for the engine process, tests and library.

    engine.submit(request)
    while engine.has_work:
        for output in engine.step(): ...

`submit` refuses at once what can never be answered. Whatever happens later, every request ends in
one output with `finished`. Read `step` first.
"""

import os
import secrets
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
from longctx.errors import ContextTooLong, DocumentMissing, InvalidRequest, ModelRefused
from longctx.kv_cache import KVCacheManager
from longctx.kv_memory import KVMemory
from longctx.model import load_model
from longctx.request import (
    FinishReason,
    Progress,
    Request,
    RequestOutput,
    Segment,
    Usage,
)
from longctx.runner import BACKENDS, ModelRunner
from longctx.sampler import SamplingError, SamplingState, sample
from longctx.scheduler import Scheduler, SchedulerOutput
from longctx.sequence import Sequence, TokenIds
from longctx.tokenizer import Tokenizer
from offload.key import namespace
from prompt_cache.prefix import PrefixName, document_name

GIB = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """What a loaded engine says of itself."""

    model_name: str
    fingerprint: str
    max_context_tokens: int
    capacity_tokens: int  # tokens of KV that the device pool holds
    block_tokens: int
    kv_codec: str
    device: str
    dtype: str
    backend: str
    vocab_size: int


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
        model = load_model(config.model, model_folder)
        self._spec = spec = model.spec
        scheduler = config.scheduler
        chunk_blocks = -(-scheduler.max_batch_tokens // BLOCK_TOKENS)
        self._memory = KVMemory(
            spec.layers,
            dtype=spec.dtype,
            device=spec.device,
            codec=config.cache.kv_codec,
            pool_bytes=_pool_bytes(config.cache.device_pool_gib, spec.device),
            step_blocks=chunk_blocks + 2 * scheduler.max_sequences,
        )
        self._cache = KVCacheManager(self._memory)
        self._scheduler = Scheduler(scheduler, self._cache)
        backend = BACKENDS[config.model.attention_backend](self._memory)
        self._runner = ModelRunner(model, self._memory, backend)
        self._documents: dict[str, NDArray[np.int32]] = {}
        self._requests: dict[str, _Answers] = {}
        self._arrivals = 0
        self._steps = 0
        self._early: list[RequestOutput] = []  # outputs that arose between steps
        self.info = EngineInfo(
            model_name=spec.name,
            fingerprint=spec.fingerprint,
            max_context_tokens=spec.max_context,
            capacity_tokens=self._memory.capacity_tokens,
            block_tokens=BLOCK_TOKENS,
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
        if request.sampling.n > self._config.scheduler.max_sequences:
            raise InvalidRequest(
                f"n={request.sampling.n} is more than the {self._config.scheduler.max_sequences} "
                "sequences that may run at once; raise --max-sequences",
                param="n",
            )
        sequence = self._sequence(request)
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
        low, high = (int(token_ids.min()), int(token_ids.max())) if len(token_ids) else (0, 0)
        if low < 0 or high >= self._spec.vocab_size:
            raise InvalidRequest(
                f"document {document_id} has token id {high if low >= 0 else low}; the model's "
                f"vocabulary has {self._spec.vocab_size}",
                param="document_id",
            )
        self._documents[document_id] = token_ids

    def close_document(self, document_id: str) -> None:
        """Forget a document and free the blocks that only it uses."""
        self._documents.pop(document_id, None)
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
            for sequence, token in drawn:
                outputs += self._advance(sequence, token)
            for chunk in scheduled.chunks:
                if chunk.sequence.remaining == 0 and chunk.sequence.finish_reason is None:
                    outputs += self._finish(chunk.sequence, FinishReason.LENGTH)  # prefill only
        outputs += self._progress()
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
            "documents_open": len(self._documents),
            "prefixes_held": len(self._cache.prefixes),
            "raw_blocks_held": self._memory.raw.held,
        }
        for index, pool in enumerate(self._memory.packed):
            numbers[f"group{index}_blocks_total"] = pool.capacity
            numbers[f"group{index}_blocks_held"] = pool.held
        return numbers

    def _sequence(self, request: Request) -> Sequence:
        """The first choice of a request, checked against what can be served."""
        tokens, ends = self._prompt(request)
        prompt_tokens, sampling = len(tokens), request.sampling
        if prompt_tokens == 0:
            raise InvalidRequest("the prompt is empty; give at least one token", param="prompt")
        for limit, cure in (
            (self._spec.max_context, "raise --max-context where the model allows it"),
            (self._memory.capacity_tokens, "raise --device-pool-gib"),
        ):
            if prompt_tokens + sampling.max_tokens > limit:
                raise ContextTooLong(
                    f"the prompt has {prompt_tokens} tokens and the answer may have "
                    f"{sampling.max_tokens}, together more than the limit of {limit}; shorten the "
                    f"prompt, lower max_tokens or {cure}",
                    param="messages",
                )
        self._arrivals += 1
        seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        codec = self._memory.codecs[0]
        return Sequence(
            request=request,
            index=0,
            arrival=self._arrivals,
            arrival_seconds=time.monotonic(),
            tokens=tokens,
            prompt_tokens=prompt_tokens,
            sampling=SamplingState(
                sampling, seed=seed, prompt_token_ids=lambda: tokens.slice(0, prompt_tokens)
            ),
            seed=seed,
            text=TextStream(self.tokenizer, stop=sampling.stop),
            namespace=namespace(
                fingerprint=self._spec.fingerprint,
                dtype=self.info.dtype,
                rope=self._spec.rope_identity,
                codec=codec.name,
                codec_version=codec.version,
                salt=request.salt,
            ),
            document_ends=ends,
        )

    def _prompt(self, request: Request) -> tuple[TokenIds, tuple[tuple[int, PrefixName], ...]]:
        """The prompt's tokens, and where each document ends under which name.

        Up to the last document they are an array that is shared, not copied, with earlier prompts
        that began alike.
        """
        name: PrefixName = (request.salt,)
        ends: list[tuple[int, PrefixName]] = []
        length, beyond = 0, 0
        for number, segment in enumerate(request.segments, 1):
            if segment.document_id is None:
                self._check_ids(segment.token_ids)
                name = (*name, segment.token_ids)
                length += len(segment.token_ids)
            else:
                if segment.document_id not in self._documents:
                    raise DocumentMissing(f"document {segment.document_id} is not open")
                name = (*name, document_name(segment.document_id))
                length += len(self._documents[segment.document_id])
                ends.append((length, name))
                beyond = number
        known = self._cache.prefixes.get(ends[-1][1]) if ends else None
        base = self._concatenate(request.segments[:beyond]) if known is None else known.token_ids
        tail = [token for segment in request.segments[beyond:] for token in segment.token_ids]
        return TokenIds(base, tail), tuple(ends)

    def _concatenate(self, segments: tuple[Segment, ...]) -> NDArray[np.int32]:
        parts = [
            np.array(segment.token_ids, dtype=np.int32)
            if segment.document_id is None
            else self._documents[segment.document_id]
            for segment in segments
        ]
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int32)

    def _check_ids(self, token_ids: tuple[int, ...]) -> None:
        if not token_ids:
            return
        low, high = min(token_ids), max(token_ids)
        if low < 0 or high >= self._spec.vocab_size:
            raise InvalidRequest(
                f"token id {high if low >= 0 else low} is outside the vocabulary of "
                f"{self._spec.vocab_size}",
                param="prompt",
            )


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


def _pool_bytes(gib: float | None, device: torch.device) -> int:
    if gib is not None:
        return int(gib * GIB)
    if device.type == "cuda":
        free_bytes, _ = torch.cuda.mem_get_info(device)
        return int(0.85 * free_bytes)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4
