"""Makes pools, sequences and a scheduler without a model; steps take the time they are told."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from compress.shape import BLOCK_TOKENS, KVShape
from longctx.config import SchedulerConfig
from longctx.engine.cost_model import CostModel
from longctx.engine.sampler import SamplingState
from longctx.engine.scheduler import Scheduler, SchedulerOutput
from longctx.engine.sequence import Sequence as EngineSequence
from longctx.engine.sequence import preemption_key
from longctx.kv.cache_manager import KVCacheManager
from longctx.kv.memory import KVMemory
from longctx.kv.prefix_index import document_name
from longctx.kv.sequence_blocks import SequenceBlocks, TokenIds
from longctx.model.spec import LayerSpec
from longctx.request import Request, RequestClass, SamplingParams, Segment
from longctx.text.detokenizer import TextStream
from longctx.text.tokenizer import Tokenizer
from offload.key import namespace

GLOBAL = LayerSpec(heads=1, kv_heads=1, head_dim=8, window=None)
SHAPE = KVShape(kv_heads=1, head_dim=8, dtype=torch.float32)
SPACE = namespace(fingerprint="", dtype="", rope="", codec="raw", codec_version=1, salt="")


def window_of(tokens: int) -> LayerSpec:
    return LayerSpec(heads=1, kv_heads=1, head_dim=8, window=tokens)


def bare_cache(
    *, blocks: int, layers: Sequence[LayerSpec] = (GLOBAL,), step_blocks: int = 16
) -> KVCacheManager:
    """Make a cache; `blocks` fit into the global pool if all layers are global, fewer otherwise."""
    page_bytes = SHAPE.values_per_page * SHAPE.dtype.itemsize
    memory = KVMemory(
        layers,
        dtype=SHAPE.dtype,
        device=torch.device("cpu"),
        codec="raw",
        pool_bytes=(blocks + 1) * page_bytes * len(layers),
        step_blocks=step_blocks,
    )
    return KVCacheManager(memory)


@dataclass
class Bench:
    """A scheduler whose steps compute nothing, and take `seconds_of` what they would compute."""

    tokenizer: Tokenizer
    cache: KVCacheManager
    batch_tokens: int = 128
    max_sequences: int = 8
    seconds_of: Callable[[SchedulerOutput], float] = lambda output: 0.01
    max_waiting: int = 1024
    target_seconds: float = 0.25
    cost: CostModel = field(default_factory=CostModel)
    now: float = 0.0
    arrivals: "itertools.count[int]" = field(default_factory=lambda: itertools.count(1))

    def __post_init__(self) -> None:
        config = SchedulerConfig(
            max_batch_tokens=self.batch_tokens,
            max_sequences=self.max_sequences,
            max_waiting=self.max_waiting,
        )
        self.scheduler = Scheduler(
            config,
            self.cache,
            batch_tokens=self.batch_tokens,
            target_seconds=self.target_seconds,
            cost=self.cost,
            clock=lambda: self.now,
        )

    def sequence(
        self,
        token_ids: Sequence[int],
        *,
        request_class: RequestClass = RequestClass.INTERACTIVE,
        max_tokens: int = 1,
        salt: str = "",
        n: int = 1,
        document: tuple[str, int] | None = None,
    ) -> EngineSequence:
        """Make a sequence; `document` is an id, and the prompt tokens up to the document's end."""
        arrival = next(self.arrivals)
        sampling = SamplingParams(max_tokens=max_tokens, n=n)
        tokens = TokenIds(np.array(token_ids, dtype=np.int32), [])
        ends = ()
        if document is not None:
            ends = ((document[1], ("", document_name(document[0]))),)
        request = Request(
            request_id=f"{arrival}",
            segments=(Segment(token_ids=tuple(token_ids)),),
            sampling=sampling,
            request_class=request_class,
            salt=salt,
        )
        return EngineSequence(
            request=request,
            index=0,
            arrival=arrival,
            arrival_seconds=self.now,
            sampling_state=SamplingState(
                sampling, seed=0, prompt_token_ids=lambda: np.array(token_ids, dtype=np.int32)
            ),
            seed=0,
            text=TextStream(self.tokenizer, stop=()),
            blocks=SequenceBlocks(
                tokens=tokens,
                prompt_tokens=len(token_ids),
                namespace=SPACE,
                preemption_key=preemption_key(request, arrival, 0),
                sources=() if document is None else ((0, document[0]),),
                document_ends=ends,
                prefill_only=max_tokens == 0,
            ),
            max_tokens=max_tokens,
        )

    def add(self, token_ids: Sequence[int], **options: object) -> EngineSequence:
        sequence = self.sequence(token_ids, **options)  # type: ignore[arg-type]
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> SchedulerOutput:
        """Schedule, pass the time, sample token 7 where a token is due, end what is done."""
        output = self.scheduler.schedule()
        seconds = self.seconds_of(output)
        self.now += seconds
        sampling_sequences = [chunk.sequence for chunk in output.chunks if chunk.samples]
        self.scheduler.update(output, seconds)
        for sequence in sampling_sequences:
            sequence.blocks.tokens.append(7)
        for chunk in output.chunks:
            sequence = chunk.sequence
            prefilled = sequence.blocks.computed >= sequence.blocks.prompt_tokens
            if prefilled and sequence.completion_tokens >= sequence.request.sampling.max_tokens:
                self.scheduler.remove(sequence)
        return output

    def finish(self, *, steps: int = 2000) -> None:
        while self.scheduler.running or self.scheduler.waiting:
            self.step()
            steps -= 1
            assert steps > 0, "the scheduler does not come to an end"


def numbers(count: int, begin: int = 0) -> list[int]:
    return list(range(begin, begin + count))


def blocks(count: int, begin: int = 0) -> list[int]:
    """Return the tokens of `count` full blocks."""
    return numbers(count * BLOCK_TOKENS, begin)
