"""Runs requests step by step; the engine process, the library and tests all use this class.

    engine.submit(request)
    while engine.has_work:
        for output in engine.step(): ...

`submit` refuses at once what can never be answered. Whatever happens later, every request ends in
one output with `finished`. Read `step` first.
"""

import time
from collections.abc import Iterable
from collections.abc import Sequence as Items
from dataclasses import replace
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from longctx.engine.explain import Explainer
from longctx.engine.grammars import Grammars
from longctx.engine.ingestion import Ingestion
from longctx.engine.input_processor import InputProcessor
from longctx.engine.logprobs import sampled_logprobs, score_prompt
from longctx.engine.module_prefill import ModulePrefills
from longctx.engine.module_status import document_tiers, module_states
from longctx.engine.parts import EngineParts
from longctx.engine.request_state import RequestState
from longctx.engine.sampler import SamplingError, sample
from longctx.engine.scheduler import SchedulerOutput
from longctx.engine.sequence import Sequence
from longctx.engine.stats import EndedRequests, StepSeconds, device_stats, group_stats
from longctx.engine_stats import EngineStats
from longctx.errors import BlocksLost, InvalidRequest, PeerLost
from longctx.kv.clear import clear_tiers
from longctx.kv.leaving import Leaving
from longctx.request import (
    Erasure,
    FinishReason,
    ModuleState,
    Piece,
    Request,
    RequestOutput,
    TokenLogprob,
)
from offload.stats import Cleared

# A sequence whose streamed blocks are lost more often ends: no tier keeps its context.
MAX_RETRIES = 3
IDLE_SECONDS = 0.005  # the longest wait of a step that can only wait for a lower tier


_SampledToken: TypeAlias = tuple[Sequence, int | SamplingError, tuple[TokenLogprob, ...]]


class _Sampled(NamedTuple):
    """What one step has sampled: the scores of prompts, and tokens with their log-probabilities."""

    prompts: list[RequestOutput]
    tokens: list[_SampledToken]


class Engine:
    """Runs requests: `submit` them, call `step` while there is work, hand on what it returns.

    One thread owns an engine and makes all calls. Documents and modules are opened before requests
    name them, and closed when they are to be forgotten; `close` comes last.
    """

    def __init__(self, parts: EngineParts) -> None:
        self.model, self.tokenizer, self.info = parts.model, parts.tokenizer, parts.info
        self._cache, self._store, self._offloader = parts.cache, parts.store, parts.offloader
        self._runner, self._scheduler = parts.runner, parts.scheduler
        self._ingestion = None if parts.store is None else Ingestion(parts.cache, parts.store)
        self._inputs = InputProcessor(
            parts.model.spec,
            parts.cache,
            parts.tokenizer,
            parts.info.limits,
            max_sequences=parts.scheduler.max_sequences,
        )
        self._module_prefills = ModulePrefills(
            self._cache, self._inputs, self._scheduler, self._ingestion
        )
        self._explainer = Explainer(
            self._cache, self._inputs.prompts.documents, self.tokenizer, self._inputs.namespace
        )
        self._grammars = Grammars(parts.tokenizer, vocab_size=parts.model.spec.vocab_size)
        self._ended = EndedRequests()
        self._requests: dict[str, RequestState] = {}
        self._steps = 0
        self._seconds = parts.runner.seconds or StepSeconds()
        self._between_steps: list[RequestOutput] = []  # outputs that the next step returns
        self._leaving = Leaving(self._cache, self._uses)

    # -- requests -------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to compute or return."""
        return bool(self._requests or self._between_steps)

    @property
    def has_transfers(self) -> bool:
        """Whether blocks are on their way to or from a lower tier; `step` notes what arrives."""
        return self._offloader is not None and self._offloader.busy

    def submit(self, request: Request) -> None:
        """Queue a request; its outputs come from `step`.

        Raises InvalidRequest, ContextTooLong, DocumentMissing or Overloaded; then it is not queued.
        """
        if request.request_id in self._requests:
            raise InvalidRequest(f"request id {request.request_id} is in use", param="request_id")
        sequence = self._inputs.sequence(request)
        self._scheduler.add(sequence)
        if request.sampling.grammar is not None and sequence.max_tokens:
            self._grammars.begin(sequence, request.sampling.grammar)
        self._requests[request.request_id] = RequestState(request, [sequence])
        self._leaving.note_use(request.sources)
        if request.keeps_prompt:
            self._inputs.prompts.modules.note_ingested(sequence)
            if self._ingestion is not None and self._ingestion.register(sequence):
                self._explainer.explain(sequence, ())
                self._between_steps += self._finish(sequence, FinishReason.LENGTH)

    def abort(self, request_id: str) -> None:
        """End a request; blocks that it has sealed stay cached. Unknown ids are ignored."""
        state = self._requests.get(request_id)
        if state is None:
            return
        for sequence in [s for s in state.sequences if s.finish_reason is None]:
            self._between_steps += self._finish(sequence, FinishReason.ABORT)

    def open_document(
        self, document_id: str, token_ids: NDArray[np.int32], *, keep: Request | None = None
    ) -> None:
        """Make a document known by its tokens; requests may then name it as a segment.

        `keep` is the request for no answer that will be submitted to compute it. What the tiers
        have of its prompt is retained from now on, and leaves them when the document is closed.
        Raises as `submit` does.
        """
        if self._inputs.open_document(document_id, token_ids):  # the id had other tokens before
            self._forget(document_id)
            self._leaving.replace(document_id)
        self._leaving.stay(document_id)
        self._retain(keep)

    def close_document(self, document_id: str) -> Erasure:
        """Forget a document and erase what stems from it, but for what others own too.

        Requests that use it go on, and are waited for. What is returned tells how far that is;
        where it `waits`, `take_erased` tells when it has ended. The document need not be open:
        whatever the tiers have of its text is erased, of whatever model.
        """
        self._inputs.close(document_id)
        self._forget(document_id)
        return self._leaving.close(document_id)

    def open_module(
        self,
        module_id: str,
        pieces: Items[Piece],
        *,
        keep: Request | None = None,
        sources: tuple[str, ...] = (),
    ) -> None:
        """Make a module known; requests may then encode it, and use its pieces as segments.

        `sources` are ids of the documents whose text is in it: closing one of them erases what no
        open module owns of it. `keep` is as in `open_document`, and so are the errors; it raises
        ContextTooLong as well.
        """
        if self._inputs.open_module(module_id, pieces, sources):
            self._forget(module_id)
            self._leaving.replace(module_id)
        self._leaving.stay(module_id)
        self._retain(keep)

    def close_module(self, module_id: str) -> Erasure:
        """Forget a module, as a document; prompts that still wait to reuse it end with an error."""
        return self.close_document(module_id)

    def take_erased(self) -> dict[str, Erasure]:
        """Return what was erased of documents and modules whose erasure has ended meanwhile."""
        return self._leaving.take_ended()

    def module_states(self, module_ids: Iterable[str]) -> dict[str, ModuleState]:
        """Return the states of those modules that are open, by id."""
        modules = self._inputs.prompts.modules
        return module_states(modules, module_ids, self._cache, self._store, self._ingestion)

    def durable_changes(self) -> dict[str, int]:
        """Return the durable token counts of the documents whose count changed since the last call.

        Ids of modules are among them. A count falls where the disk has lost blocks.
        """
        return {} if self._ingestion is None else self._ingestion.durable_changes()

    def close(self, *, flush_seconds: float = 0.0) -> None:
        """Abort all requests, and wait up to `flush_seconds` for what they sealed to be written.

        What was closed and could not be erased before is erased now.
        """
        deadline = time.monotonic() + flush_seconds
        for request_id in list(self._requests):
            self.abort(request_id)
        self._grammars.close()
        if self._offloader is not None:
            if self._leaving:
                self._offloader.flush(flush_seconds)
                self._leaving.erase()
            self._offloader.close(max(0.0, deadline - time.monotonic()))
        self._scheduler.cost.save()

    def _retain(self, keep: Request | None) -> None:
        if keep is not None and self._ingestion is not None:
            self._ingestion.register(self._inputs.sequence(keep))

    def _uses(self, source: str) -> int:
        """Count the requests that have a document or module in their prompt."""
        return sum(
            any(s.finish_reason is None and s.blocks.has_source(source) for s in state.sequences)
            for state in self._requests.values()
        )

    def _forget(self, document_id: str) -> None:
        for state in self._requests.values():
            for sequence in state.sequences:
                sequence.blocks.forget_document(document_id)
        self._cache.close_document(document_id)
        self._explainer.forget(document_id)
        if self._ingestion is not None:
            self._ingestion.forget(document_id)

    # -- steps ----------------------------------------------------------------------------------

    def step(self) -> list[RequestOutput]:
        """Compute one batch; return its outputs, and those of calls since the last step.

        `_step` says how. Then what was closed and nothing uses any more is erased.
        """
        outputs = self._step()
        self._leaving.erase()
        return outputs

    def _step(self) -> list[RequestOutput]:
        """Compute one batch and return its outputs.

        In order: take note of transfers and end what is durable or failed; schedule, and prefill
        what is missing; compute the batch and sample; append the tokens, and end the choices that
        have come to their end. A step without chunks waits a moment for the lower tiers instead.
        Raises PeerLost where another rank is gone, and torch.AcceleratorError where the device
        failed: this process must end. Any other failure ends the step's requests.
        """
        outputs, self._between_steps = self._between_steps, []
        self._seconds.begin()
        transferred = self._cache.poll_transfers()
        if self._ingestion is not None:
            for sequence in self._ingestion.take_durable(transferred=transferred):
                outputs += self._finish(sequence, FinishReason.LENGTH)
        for sequence, refusal in self._grammars.take_done():
            if sequence.finish_reason is None:
                last = RequestOutput(
                    request_id=sequence.request.request_id, error_param=refusal.param
                )
                outputs += self._finish(sequence, FinishReason.ERROR, last, error=str(refusal))
        for sequence, failure in self._scheduler.failed():
            outputs += self._finish(sequence, FinishReason.ERROR, error=failure)
        scheduled = self._scheduler.schedule()
        prefills = self._module_prefills.begin()
        self._requests |= prefills
        if prefills and not scheduled.chunks:
            scheduled = self._scheduler.schedule()
        for sequence in scheduled.complete:
            outputs += self._prefilled(sequence)
        if scheduled.chunks:
            self._steps += 1
            for chunk in scheduled.chunks:
                self._explainer.explain(chunk.sequence, self._scheduler.running)
            self._seconds.lap("schedule")
            try:
                sampled = self._compute(scheduled)
            except (PeerLost, torch.AcceleratorError):
                raise  # after the latter nothing works any more on that device
            except BlocksLost as error:
                self._retry(scheduled, str(error))
                return outputs
            except Exception as error:  # whatever it is, it ends these requests, not the engine
                return outputs + self._fail(scheduled, f"{type(error).__name__}: {error}")
            for state in self._requests.values():
                outputs += state.progress(self._cache, self._scheduler.cost)
            outputs += sampled.prompts
            for sequence, token, logprobs in sampled.tokens:
                outputs += self._advance(sequence, token, logprobs)
            for chunk in scheduled.chunks:
                if chunk.sequence.blocks.remaining == 0 and chunk.sequence.finish_reason is None:
                    outputs += self._prefilled(chunk.sequence)
            self._seconds.lap("output")
        elif not outputs and self._offloader is not None and self._offloader.busy:
            self._offloader.store.wait(IDLE_SECONDS)
        elif not outputs and self._grammars.busy:
            self._grammars.wait(IDLE_SECONDS)
        return outputs

    def _prefilled(self, sequence: Sequence) -> list[RequestOutput]:
        """Let a computed prompt without an answer wait until it is durable, which ends it; one that
        was computed for its log-probabilities ends at once."""
        if self._ingestion is None or not sequence.request.keeps_prompt:
            return self._finish(sequence, FinishReason.LENGTH)
        self._scheduler.remove(sequence)
        self._ingestion.wait_durable(sequence)
        return []

    def _compute(self, scheduled: SchedulerOutput) -> "_Sampled":
        """Run the batch; return the sequences that sample, each with its next token."""
        began = time.perf_counter()
        chunks = scheduled.chunks
        logits = self._runner.run_chunks(chunks)
        self._seconds.lap("layers")
        rows = torch.split(logits, [chunk.logits_rows for chunk in chunks])
        scores: list[RequestOutput] = []
        failed: dict[Sequence, SamplingError] = {}
        for chunk, own in zip(chunks, rows, strict=True):
            if chunk.sequence.scores_prompt:
                told = score_prompt(chunk, own)
                if isinstance(told, SamplingError):
                    failed[chunk.sequence] = told
                else:
                    request_id = chunk.sequence.request.request_id
                    scores.append(RequestOutput(request_id=request_id, prompt_logprobs=told))
        sampling = [
            (chunk.sequence, own[-1:])
            for chunk, own in zip(chunks, rows, strict=True)
            if chunk.samples and chunk.sequence not in failed
        ]
        self._seconds.lap("sample")
        self._scheduler.update(scheduled, time.perf_counter() - began)
        self._seconds.lap("commit")
        for chunk in chunks:
            chunk.sequence.note_scored()
        # The choices of a request fork here: they share the prompt and sample from the same row.
        families = [[sequence, *self._fork(sequence)] for sequence, _ in sampling]
        failures: list[_SampledToken] = [
            (sequence, error, ()) for sequence, error in failed.items()
        ]
        if not families:
            return _Sampled(scores, failures)
        if len(sampling) < len(logits) or any(len(family) > 1 for family in families):
            logits = torch.cat(
                [
                    row.expand(len(family), -1)
                    for family, (_, row) in zip(families, sampling, strict=True)
                ]
            )
        members = [sequence for family in families for sequence in family]
        tokens = sample(logits, [sequence.sampling_state for sequence in members])
        logprobs = sampled_logprobs(logits, members, tokens)
        self._seconds.lap("sample")
        return _Sampled(scores, [*failures, *zip(members, tokens, logprobs, strict=True)])

    def _fork(self, first: Sequence) -> list[Sequence]:
        """Make the other choices of a request whose prompt is computed, unless that was done."""
        forks = []
        for index in range(1, first.width):
            fork = first.fork(index, first.text.another())
            self._cache.fork(first.blocks, fork.blocks)
            self._scheduler.add_fork(fork)
            self._requests[first.request.request_id].sequences.append(fork)
            forks.append(fork)
        first.forked = True
        return forks

    def _advance(
        self, sequence: Sequence, token: int | SamplingError, logprobs: tuple[TokenLogprob, ...]
    ) -> list[RequestOutput]:
        """Append a sampled token, and end the choice where the token or a limit says so."""
        if isinstance(token, SamplingError):
            return self._finish(sequence, FinishReason.ERROR, error=str(token))
        sampling = sequence.request.sampling
        sequence.blocks.tokens.append(token)
        sequence.sampling_state.observe(token)
        request_id, index = sequence.request.request_id, sequence.index
        output = RequestOutput(
            request_id=request_id, index=index, token_ids=(token,), logprobs=logprobs
        )
        if token in sampling.stop_token_ids:
            return self._finish(sequence, FinishReason.STOP, replace(output, stop_reason=token))
        if token in self.tokenizer.eos_token_ids and not sampling.ignore_eos:
            return self._finish(sequence, FinishReason.STOP, output)
        delta = sequence.text.push(token)
        output = replace(output, text=delta.text)
        if delta.stopped_by is not None:
            output = replace(output, stop_reason=delta.stopped_by)
            return self._finish(sequence, FinishReason.STOP, output)
        mask = sequence.sampling_state.mask
        if mask is not None and mask.complete:
            return self._finish(sequence, FinishReason.STOP, output)
        position = sequence.blocks.layout.position(len(sequence.blocks.tokens))
        full = position >= self.info.max_context_tokens
        if full or sequence.completion_tokens >= sequence.max_tokens:
            return self._finish(sequence, FinishReason.LENGTH, output)
        return [output]

    def _finish(
        self,
        sequence: Sequence,
        reason: FinishReason,
        last: RequestOutput | None = None,
        *,
        error: str | None = None,
    ) -> list[RequestOutput]:
        """End one choice, with `last` as far as that is known, and with the last open choice the
        request."""
        self._scheduler.remove(sequence)
        self._explainer.finished(sequence)
        sequence.finish_reason = reason
        state = self._requests[sequence.request.request_id]
        # n=4 that has not forked: choices 0 to 3 end together, with the same output.
        indices = range(sequence.index, sequence.index + sequence.width)
        state.open_choices -= len(indices)
        finished = state.open_choices == 0
        usage = state.usage() if finished else None
        if usage is not None:
            del self._requests[sequence.request.request_id]
        if state.internal:
            self._module_prefills.on_ended(sequence, error)
            return []
        if usage is not None:
            self._ended.count(reason, usage)
        last = last or RequestOutput(request_id=sequence.request.request_id)
        text = last.text + sequence.text.finish()
        last = replace(last, text=text, finish_reason=reason, error=error)
        outputs = [replace(last, index=index) for index in indices]
        outputs[-1] = replace(outputs[-1], finished=finished, usage=usage)
        return outputs

    def _retry(self, scheduled: SchedulerOutput, message: str) -> None:
        """Preempt the step's sequences after a tier lost blocks; they resume with what is left."""
        for chunk in scheduled.chunks:
            self._scheduler.preempt(chunk.sequence)
            tier = chunk.sequence.blocks.offload
            tier.retries += tier.streams
            if tier.retries > MAX_RETRIES:
                tier.failure = message

    def _fail(self, scheduled: SchedulerOutput, message: str) -> list[RequestOutput]:
        """End the requests of a step that failed, and no others."""
        failed = dict.fromkeys(chunk.sequence.request.request_id for chunk in scheduled.chunks)
        outputs: list[RequestOutput] = []
        for request_id in failed:
            for sequence in [
                s for s in self._requests[request_id].sequences if not s.finish_reason
            ]:
                outputs += self._finish(sequence, FinishReason.ERROR, error=message)
        return outputs

    def clear(self, tiers: Iterable[str]) -> dict[str, Cleared]:
        """Evict what is cached in `device` or `host` and not in use; return what that was, by tier.

        Documents stay on disk, and known. Raises InvalidRequest for a tier that there is not.
        """
        return clear_tiers(self._cache, self._store, tiers)

    def stats(self) -> EngineStats:
        """Return what the engine and its tiers hold now, and what they have counted so far."""
        return EngineStats(
            requests_running=len(self._scheduler.running),
            requests_waiting=len(self._scheduler.waiting),
            requests_ended=dict(self._ended.by_reason),
            prompt_tokens=self._ended.prompt_tokens,
            cached_tokens=self._ended.cached_tokens,
            prompt_tokens_by_source=dict(self._ended.by_source),
            generated_tokens=self._ended.generated_tokens,
            steps=self._steps,
            step_seconds=dict(self._seconds.totals),
            computed_tokens=self._runner.computed_tokens,
            preemptions=self._scheduler.preemptions,
            scheduler=self._scheduler.stats(),
            documents_open=len(self._inputs.prompts.documents),
            modules_open=len(self._inputs.prompts.modules),
            document_tiers=document_tiers(self._cache.prefixes, self._store),
            prefixes_held=len(self._cache.prefixes),
            raw_blocks_in_use=self._cache.memory.raw.held,
            groups=group_stats(self._cache.memory),
            device=device_stats(self._cache),
            store=None if self._store is None else self._store.stats(),
            ring=self._runner.ring_stats(),
        )
