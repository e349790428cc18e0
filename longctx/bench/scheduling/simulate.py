"""Runs a scheduler without a model: each step takes, in virtual time, what the cost model says.

The scheduler and the cache manager are those that serve; only the pages hold nothing.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random

import numpy as np
import torch

from compress.shape import BLOCK_TOKENS
from longctx.bench.scheduling.traces import Arrival
from longctx.config import SchedulerConfig
from longctx.embedded import model_path
from longctx.engine.cost_model import Coefficients, CostModel, StepWork
from longctx.engine.parts import step_blocks
from longctx.engine.sampler import SamplingState
from longctx.engine.scheduler import Scheduler, step_work
from longctx.engine.sequence import Sequence as EngineSequence
from longctx.engine.sequence import SequenceState, preemption_key
from longctx.errors import LongctxError
from longctx.kv.cache_manager import KVCacheManager
from longctx.kv.memory import KVMemory
from longctx.kv.sequence_blocks import SequenceBlocks, TokenIds
from longctx.model.spec import LayerSpec
from longctx.request import Request, SamplingParams, Segment
from longctx.text.detokenizer import TextStream
from longctx.text.tokenizer import Tokenizer
from offload.key import namespace

LAYER = LayerSpec(heads=1, kv_heads=1, head_dim=8, window=None)
SPACE = namespace(fingerprint="", dtype="", rope="", codec="raw", codec_version=1, salt="")
PAGE_BYTES = 2 * 8 * BLOCK_TOKENS * 2
MOST_TOKENS = 4096  # that a request allows its answer; how long it will be nobody knows


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What the simulated engine runs on, and how it is configured."""

    coefficients: Coefficients
    target_seconds: float
    pool_tokens: int
    batch_tokens: int = 512
    max_sequences: int = 64
    noise: float = 0.1  # standard deviation of the logarithm of a step's time; see `noisy`

    def noisy(self, seconds: float, choose: Random) -> float:
        """Draw what a step takes that takes so long on average.

        One longer than the objective varies as so many steps in a row do: less. Else one draw would
        decide about the hours of a whole document.
        """
        deviation = self.noise / math.sqrt(max(1.0, seconds / self.target_seconds))
        return seconds * choose.lognormvariate(-(deviation**2) / 2, deviation)


@dataclass(slots=True)
class Outcome:
    """What became of the requests of a trace; all times in seconds."""

    first_seconds: dict[int, float] = field(default_factory=dict)  # by index in the trace
    intervals: list[float] = field(default_factory=list)  # between tokens of answers
    ended_seconds: dict[int, float] = field(default_factory=dict)
    step_seconds: list[float] = field(default_factory=list)
    span_seconds: float = 0.0
    tokens: int = 0  # of prompts and answers
    computed_tokens: int = 0
    preemptions: int = 0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.span_seconds


class KnownCosts(CostModel):
    """Predicts by given coefficients and learns nothing: so much is known after some minutes."""

    def observe(self, work: StepWork, seconds: float) -> None:
        return


MakeScheduler = Callable[..., Scheduler]


class Simulation:
    """One run of one scheduler over one trace."""

    def __init__(self, machine: Machine, scheduler: MakeScheduler, *, seed: int = 0) -> None:
        self.machine = machine
        self.now = 0.0
        self._noise = Random(seed)
        config = SchedulerConfig(
            max_batch_tokens=machine.batch_tokens,
            max_sequences=machine.max_sequences,
            max_waiting=1_000_000,
        )
        memory = KVMemory(
            (LAYER,),
            dtype=torch.float16,
            device=torch.device("meta"),
            codec="raw",
            pool_bytes=machine.pool_tokens // BLOCK_TOKENS * PAGE_BYTES,
            step_blocks=step_blocks(config, machine.batch_tokens),
        )
        self.cost = KnownCosts(machine.coefficients)
        self.scheduler = scheduler(
            config,
            KVCacheManager(memory),
            batch_tokens=machine.batch_tokens,
            target_seconds=machine.target_seconds,
            cost=self.cost,
            clock=lambda: self.now,
        )
        self._tokenizer = Tokenizer(model_path("needle"))
        self._answer_tokens: dict[EngineSequence, int] = {}
        self._index: dict[EngineSequence, int] = {}
        self._last_token: dict[EngineSequence, float] = {}

    def run(self, trace: Sequence[Arrival]) -> Outcome:
        """Let all requests come and end. Raises LongctxError where one can never run."""
        outcome = Outcome()
        scheduler, coming = self.scheduler, 0
        while coming < len(trace) or scheduler.running or scheduler.waiting:
            if not scheduler.running and not scheduler.waiting:
                self.now = max(self.now, trace[coming].seconds)
            while coming < len(trace) and trace[coming].seconds <= self.now:
                self._add(coming, trace[coming])
                coming += 1
            if self._step(outcome) == 0:
                if coming == len(trace):
                    stuck = len(scheduler.waiting) + len(scheduler.running)
                    raise LongctxError(
                        f"{stuck} requests need more room than a pool of "
                        f"{self.machine.pool_tokens} tokens has; raise --pool-tokens"
                    )
                self.now = max(self.now, trace[coming].seconds)
        outcome.span_seconds = self.now - trace[0].seconds
        outcome.tokens = sum(each.prompt_tokens + each.answer_tokens for each in trace)
        outcome.preemptions = scheduler.preemptions
        return outcome

    def _add(self, index: int, arrival: Arrival) -> None:
        ids = np.full(arrival.prompt_tokens, index, dtype=np.int32)
        most = MOST_TOKENS if arrival.answer_tokens else 0
        sampling = SamplingParams(max_tokens=most)
        request = Request(
            request_id=f"{index}",
            segments=(Segment(token_ids=(arrival.form,)),),
            sampling=sampling,
            request_class=arrival.request_class,
        )
        sequence = EngineSequence(
            request=request,
            index=0,
            arrival=index,
            arrival_seconds=arrival.seconds,
            sampling_state=SamplingState(sampling, seed=0, prompt_token_ids=lambda: ids),
            seed=0,
            text=TextStream(self._tokenizer, stop=()),
            blocks=SequenceBlocks(
                tokens=TokenIds(ids, []),
                prompt_tokens=len(ids),
                namespace=SPACE,
                preemption_key=preemption_key(request, index, 0),
                prefill_only=not arrival.answer_tokens,
            ),
            max_tokens=most,
        )
        self._answer_tokens[sequence] = arrival.answer_tokens
        self._index[sequence] = index
        self.scheduler.add(sequence)

    def _step(self, outcome: Outcome) -> int:
        """Run one step; return how many chunks it had."""
        output = self.scheduler.schedule()
        if not output.chunks:
            return 0
        seconds = self.cost.seconds(step_work(output.chunks))
        seconds = self.machine.noisy(seconds, self._noise)
        self.now += seconds
        outcome.step_seconds.append(seconds)
        outcome.computed_tokens += output.num_tokens
        sampling = [chunk.sequence for chunk in output.chunks if chunk.samples]
        self.scheduler.update(output, seconds)
        for sequence in sampling:
            sequence.blocks.tokens.append(0)
            if sequence in self._last_token:
                outcome.intervals.append(self.now - self._last_token[sequence])
            else:
                outcome.first_seconds[self._index[sequence]] = self.now - sequence.arrival_seconds
            self._last_token[sequence] = self.now
        for chunk in output.chunks:
            if self._is_done(chunk.sequence):
                self._end(chunk.sequence, outcome)
        return len(output.chunks)

    def _is_done(self, sequence: EngineSequence) -> bool:
        prefilled = sequence.blocks.computed >= sequence.blocks.prompt_tokens
        enough = sequence.completion_tokens >= self._answer_tokens[sequence]
        return prefilled and enough and sequence.state is not SequenceState.FINISHED

    def _end(self, sequence: EngineSequence, outcome: Outcome) -> None:
        self.scheduler.remove(sequence)
        outcome.ended_seconds[self._index[sequence]] = self.now - sequence.arrival_seconds
        self._last_token.pop(sequence, None)
        del self._answer_tokens[sequence], self._index[sequence]
