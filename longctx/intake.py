"""From a request to a sequence: checked against what can be served, its tokens found and named.

Whatever can never be answered is refused here, at once. Documents are known by id, so that a
question carries only its own tokens.
"""

import secrets
import time

import numpy as np
from numpy.typing import NDArray

from compress.codec import Codec
from longctx.detokenizer import TextStream
from longctx.errors import ContextTooLong, DocumentMissing, InvalidRequest
from longctx.kv_cache import KVCacheManager
from longctx.limits import ContextLimits
from longctx.model import ModelSpec
from longctx.request import Request, Segment
from longctx.sampler import SamplingState
from longctx.sequence import Sequence, TokenIds
from longctx.tokenizer import Tokenizer
from longctx.trace import Trace
from offload.key import BlockKey, namespace
from prompt_cache.prefix import PrefixName, document_name


class Intake:
    def __init__(
        self,
        spec: ModelSpec,
        cache: KVCacheManager,
        tokenizer: Tokenizer,
        limits: ContextLimits,
        *,
        max_sequences: int,
    ) -> None:
        self.documents: dict[str, NDArray[np.int32]] = {}
        self._spec = spec
        self._cache = cache
        self._tokenizer = tokenizer
        self._limits = limits
        self._max_sequences = max_sequences
        self._arrivals = 0

    def open_document(self, document_id: str, token_ids: NDArray[np.int32]) -> bool:
        """Know a document by its tokens; whether it replaces other tokens under this id."""
        self._check_ids(token_ids, f"document {document_id}", "document_id")
        known = self.documents.get(document_id)
        self.documents[document_id] = token_ids
        return known is not None and not np.array_equal(known, token_ids)

    def close_document(self, document_id: str) -> None:
        self.documents.pop(document_id, None)

    def sequence(self, request: Request) -> Sequence:
        """The first choice of a request.

        Raises InvalidRequest, ContextTooLong or DocumentMissing where it can never be served.
        """
        sampling = request.sampling
        if sampling.n > self._max_sequences:
            raise InvalidRequest(
                f"n={sampling.n} is more than the {self._max_sequences} sequences that may run at "
                "once; lower it or raise --max-sequences",
                param="n",
            )
        tokens, ends = self._prompt(request)
        prompt_tokens = len(tokens)
        self._check_length(prompt_tokens, sampling.max_tokens)
        self._arrivals += 1
        seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        sequence = Sequence(
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
            text=TextStream(self._tokenizer, stop=sampling.stop),
            namespace=self.namespace(request.salt, self._cache.memory.codecs[0]),
            document_ends=ends,
            trace=Trace() if request.explain else None,
        )
        # A sequence that fits never streams, so that others can use what it computes.
        longest = prompt_tokens + sampling.max_tokens
        sequence.tier.streams = longest > self._limits.capacity_tokens
        return sequence

    def namespace(self, salt: str, codec: Codec) -> BlockKey:
        """The root of what this model stores by that codec for a tenant."""
        return namespace(
            fingerprint=self._spec.fingerprint,
            dtype=str(self._spec.dtype),
            rope=self._spec.rope_identity,
            codec=codec.name,
            codec_version=codec.version,
            salt=salt,
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
                self._check_ids(np.array(segment.token_ids, dtype=np.int64), "the prompt", "prompt")
                name = (*name, segment.token_ids)
                length += len(segment.token_ids)
            elif segment.document_id in self.documents:
                name = (*name, document_name(segment.document_id))
                length += len(self.documents[segment.document_id])
                ends.append((length, name))
                beyond = number
            else:
                raise DocumentMissing(f"document {segment.document_id} is not open")
        known = self._cache.prefixes.get(ends[-1][1]) if ends else None
        base = self._concatenate(request.segments[:beyond]) if known is None else known.token_ids
        tail = [token for segment in request.segments[beyond:] for token in segment.token_ids]
        return TokenIds(base, tail), tuple(ends)

    def _concatenate(self, segments: tuple[Segment, ...]) -> NDArray[np.int32]:
        parts = [
            np.array(segment.token_ids, dtype=np.int32)
            if segment.document_id is None
            else self.documents[segment.document_id]
            for segment in segments
        ]
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int32)

    def _check_length(self, prompt_tokens: int, max_tokens: int) -> None:
        if prompt_tokens == 0:
            raise InvalidRequest("the prompt is empty; give at least one token", param="prompt")
        limits = self._limits
        if prompt_tokens + max_tokens > limits.longest_tokens:
            raise ContextTooLong(
                f"the prompt has {prompt_tokens} tokens and the answer may have {max_tokens}, "
                f"together more than the limit of {limits.longest_tokens}; shorten the prompt, "
                f"lower max_tokens or {limits.cure}",
                param="messages",
            )
        room = limits.answer_tokens(prompt_tokens)
        if max_tokens > room:
            raise ContextTooLong(
                f"max_tokens={max_tokens} is more than the {room} tokens of an answer that the "
                "device holds; lower it or raise --device-pool-gib",
                param="max_tokens",
            )

    def _check_ids(
        self, token_ids: NDArray[np.int32] | NDArray[np.int64], where: str, param: str
    ) -> None:
        if len(token_ids) == 0:
            return
        low, high = int(token_ids.min()), int(token_ids.max())
        if low < 0 or high >= self._spec.vocab_size:
            raise InvalidRequest(
                f"{where} has token id {high if low >= 0 else low}, outside the vocabulary of "
                f"{self._spec.vocab_size}",
                param=param,
            )
