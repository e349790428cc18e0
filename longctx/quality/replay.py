"""Computes given tokens through the cache that serves: blocks that a codec seals, real attention.

Tokens come in chunks, long ones for a prompt and single ones for an answer. Unlike a step of the
engine, each returns the logits of any row.
"""

from collections.abc import Sequence as Items
from dataclasses import replace
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from compress.codec import CODECS
from compress.shape import BLOCK_TOKENS, KVShape
from longctx.attention.backend import BackendFactory
from longctx.engine.batch import Batch
from longctx.engine.model_runner import ModelRunner
from longctx.engine.sampler import SamplingState
from longctx.engine.scheduler import Chunk
from longctx.engine.sequence import Sequence
from longctx.kv.cache_manager import Admission, KVCacheManager
from longctx.kv.memory import KVMemory
from longctx.kv.sequence_blocks import SequenceBlocks, TokenIds
from longctx.model.loader import LoadedModel
from longctx.request import Request, SamplingParams, Segment
from longctx.text.detokenizer import TextStream
from longctx.text.tokenizer import Tokenizer
from offload.key import namespace

# The blocks are in pools of their own, so one namespace does for all.
NOT_SAMPLED = SamplingParams()  # who reads the logits chooses the tokens
OWN_SPACE = namespace(fingerprint="", dtype="", rope="", codec="", codec_version=0, salt="")


class Replay:
    """A model with a small cache, in which sequences share blocks as they do in an engine.

    `admit` a prompt, `feed` it in chunks until nothing remains, then append a token to its
    `blocks.tokens` and feed one token at a time. The pools are made for as many blocks and
    sequences as were stated; more is an assertion. One thread makes all calls.
    """

    def __init__(
        self,
        model: LoadedModel,
        tokenizer: Tokenizer,
        backend: BackendFactory,
        *,
        codec: str,
        blocks: int,
        sequences: int,
        chunk_tokens: int,
    ) -> None:
        """Make room for `blocks`, and for `sequences` that are fed `chunk_tokens` each at most."""
        spec = model.spec
        shapes = [
            KVShape(kv_heads=layer.kv_heads, head_dim=layer.head_dim, dtype=spec.dtype)
            for layer in spec.layers
        ]
        self._memory = KVMemory(
            spec.layers,
            dtype=spec.dtype,
            device=spec.device,
            codec=codec,
            pool_bytes=(blocks + 2) * sum(CODECS[codec](shape).page_bytes for shape in shapes),
            step_blocks=chunk_tokens // BLOCK_TOKENS + 1 + 2 * sequences,
        )
        self._cache = KVCacheManager(self._memory)
        self._runner = ModelRunner(model, self._memory, backend(self._memory))
        self._tokenizer = tokenizer
        self._admitted = 0

    def admit(self, token_ids: Items[int]) -> Sequence:
        """Admit a prompt; the first `blocks.computed` tokens of it were in the cache already."""
        ids = np.array(token_ids, dtype=np.int32)
        segments = (Segment(token_ids=tuple(token_ids)),)
        self._admitted += 1
        sequence = Sequence(
            request=Request(
                request_id=f"{self._admitted}", segments=segments, sampling=NOT_SAMPLED
            ),
            index=0,
            arrival=self._admitted,
            arrival_seconds=0.0,
            sampling_state=SamplingState(NOT_SAMPLED, seed=0, prompt_token_ids=lambda: ids),
            seed=0,
            text=TextStream(self._tokenizer, stop=()),
            blocks=SequenceBlocks(
                tokens=TokenIds(ids, []),
                prompt_tokens=len(ids),
                namespace=OWN_SPACE,
                preemption_key=(self._admitted,),
            ),
            max_tokens=0,
        )
        admitted = self._cache.admit(sequence.blocks, spare_blocks=0)
        assert admitted is Admission.ADMITTED, "the pool was made for these sequences"
        return sequence

    def release(self, sequence: Sequence) -> None:
        """Let go of a sequence; its sealed blocks stay for those that begin alike."""
        self._cache.release(sequence.blocks)

    def feed(self, chunks: Items[tuple[Sequence, int]], last_rows: Items[int]) -> list[Tensor]:
        """Compute the next tokens of sequences, as many of each as stated beside it.

        Returns for each of them the logits [rows, vocab] of its last `last_rows` tokens.
        """
        for sequence, num_tokens in chunks:
            allocated = self._cache.allocate(sequence.blocks, num_tokens)
            assert allocated, "the pool was made for these sequences"
        batch = Batch.build(
            [Chunk(sequence, num_tokens) for sequence, num_tokens in chunks],
            device=self._memory.device,
        )
        ends = accumulate(num_tokens for _, num_tokens in chunks)
        rows = [
            row for end, last in zip(ends, last_rows, strict=True) for row in range(end - last, end)
        ]
        wanted = torch.tensor(rows, dtype=torch.int64, device=self._memory.device)
        logits = self._runner.run(replace(batch, logits_rows=wanted, last_chunks=batch.chunks))
        for sequence, num_tokens in chunks:
            self._cache.commit(sequence.blocks, num_tokens)
        return list(torch.split(logits, list(last_rows)))
