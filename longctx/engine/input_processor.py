"""Turns a request into a sequence: checks that it can be served, and finds and names its tokens.

Whatever can never be answered is refused here, at once. Documents are known by id, so that a
question carries only its own tokens.
"""

import secrets
import time
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from compress.codec import Codec
from compress.shape import BLOCK_TOKENS
from longctx.engine.modules import Module
from longctx.engine.prompt import Prompt
from longctx.engine.prompt_resolver import PromptResolver
from longctx.engine.sampler import SamplingState
from longctx.engine.sequence import Sequence, preemption_key
from longctx.engine_info import ContextLimits
from longctx.errors import ContextTooLong, InvalidRequest
from longctx.kv.cache_manager import KVCacheManager
from longctx.kv.layout import CachedChain, Layout
from longctx.kv.lookup_trace import LookupTrace
from longctx.kv.sequence_blocks import SequenceBlocks
from longctx.model.spec import ModelSpec
from longctx.request import Piece, Request
from longctx.text.detokenizer import TextStream
from longctx.text.tokenizer import Tokenizer
from offload.key import BlockKey, namespace


class InputProcessor:
    """Opens documents and modules, and makes the first sequence of each request.

    Everything that can be known of a request before it runs is checked here: ids, token ids,
    lengths, positions, ranks and room. A request that passes may still fail, but never wait for
    something that cannot come. Documents and modules are opened before requests name them, and
    closed when they are to be forgotten. Only the engine's thread calls it.
    """

    def __init__(
        self,
        spec: ModelSpec,
        cache: KVCacheManager,
        tokenizer: Tokenizer,
        limits: ContextLimits,
        *,
        max_sequences: int,
    ) -> None:
        self.prompts = PromptResolver(
            cache.prefixes,
            by_piece=any(group.window is not None for group in cache.memory.groups),
            root_of=lambda salt: self.namespace(salt, cache.memory.codecs[0]),
            check=lambda ids: self._check_ids(
                np.array(ids, dtype=np.int64), "the prompt", "prompt"
            ),
        )
        self._spec = spec
        self._cache = cache
        self._tokenizer = tokenizer
        self._limits = limits
        self._max_sequences = max_sequences
        self._arrivals = 0

    def open_document(self, document_id: str, token_ids: NDArray[np.int32]) -> bool:
        """Make a document known; return whether it replaces other tokens under this id.

        Raises InvalidRequest for token ids outside the vocabulary, or the id of a module.
        """
        self._check_ids(token_ids, f"document {document_id}", "document_id")
        if document_id in self.prompts.modules:
            raise InvalidRequest(f"{document_id} is a module; close it first", param="document_id")
        known = self.prompts.documents.get(document_id)
        self.prompts.documents[document_id] = token_ids
        return known is not None and not np.array_equal(known, token_ids)

    def open_module(
        self, module_id: str, pieces: Items[Piece], sources: tuple[str, ...] = ()
    ) -> bool:
        """Make a module known; return whether it replaces other pieces under this id.

        `sources` are ids of documents whose text is among the pieces'. Raises InvalidRequest or
        ContextTooLong where it can never be encoded.
        """
        self._check_ranks()
        if module_id in self.prompts.documents:
            raise InvalidRequest(f"{module_id} is a document; close it first", param="module_id")
        module = replace(Module.of(module_id, pieces), sources=sources)
        self._check_ids(module.token_ids, f"module {module_id}", "pieces")
        end = module.layout.runs[-1]
        self._check_positions(end.position)
        self._check_blocks(end.block, f"module {module_id}")
        return self.prompts.modules.open(module)

    def close(self, owner: str) -> None:
        """Forget a document or module; an unknown id is ignored."""
        self.prompts.documents.pop(owner, None)
        self.prompts.modules.forget(owner)

    def sequence(self, request: Request) -> Sequence:
        """Make the sequence of a request's first choice.

        Raises InvalidRequest, ContextTooLong or DocumentMissing where it can never be served.
        """
        return self._sequence(request, self.prompts.resolve(request))

    def prefill_of(self, chain: CachedChain, request: Request) -> Sequence:
        """Make a sequence that computes a chain, so that others can reuse it.

        `request` says for which tenant, and in which class. Raises DocumentMissing where the
        chain's module or document was closed.
        """
        ingested = self.prompts.modules.ingested(chain.owner, request.salt)
        if ingested is not None and ingested.name == chain.name:
            request = replace(request, segments=ingested.segments)
            return self._sequence(request, self.prompts.resolve(request))
        return self._sequence(request, self.prompts.modules.prompt_of(chain))

    def _sequence(self, request: Request, prompt: Prompt) -> Sequence:
        sampling = request.sampling
        if sampling.n > self._max_sequences:
            raise InvalidRequest(
                f"n={sampling.n} is more than the {self._max_sequences} sequences that may run at "
                "once; lower it or raise --max-sequences",
                param="n",
            )
        tokens, layout = prompt.tokens, prompt.layout
        prompt_tokens = len(tokens)
        if prompt_tokens == 0:
            raise InvalidRequest("the prompt is empty; give at least one token", param="prompt")
        self._check_ids(np.array(list(sampling.logit_bias), np.int64), "logit_bias", "logit_bias")
        if sampling.prompt_logprobs is not None:
            self._check_scored(layout)
        if layout.plain:
            max_tokens = self._answer_tokens(prompt_tokens, sampling.max_tokens)
        else:
            self._check_ranks()
            self._check_shifts(layout)
            max_tokens = self._answer_beside_reused(layout, prompt_tokens, sampling.max_tokens)
        self._arrivals += 1
        seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        sequence = Sequence(
            request=request,
            index=0,
            arrival=self._arrivals,
            arrival_seconds=time.monotonic(),
            sampling_state=SamplingState(
                sampling, seed=seed, prompt_token_ids=_prompt_token_ids(prompt)
            ),
            seed=seed,
            text=TextStream(self._tokenizer, stop=sampling.stop, shown=sampling.shown_tokens),
            blocks=SequenceBlocks(
                tokens=tokens,
                prompt_tokens=prompt_tokens,
                namespace=self.namespace(request.salt, self._cache.memory.codecs[0]),
                preemption_key=preemption_key(request, self._arrivals, 0),
                layout=layout,
                sources=self._sources(request),
                document_ends=prompt.ends,
                prefill_only=request.keeps_prompt,
                in_memory=request.in_memory,
                fresh_from=None if sampling.prompt_logprobs is None else 0,
                trace=LookupTrace() if request.explain else None,
            ),
            max_tokens=max_tokens,
            linked_tokens=prompt.linked_tokens,
        )
        # A sequence that fits never streams, so that others can use what it computes.
        if layout.plain:
            longest = prompt_tokens + max_tokens
            sequence.blocks.offload.streams = longest > self._limits.capacity_tokens
        return sequence

    def _sources(self, request: Request) -> tuple[tuple[int, str], ...]:
        """Return the ids of all that the prompt has text of, and where each begins.

        That is in own tokens. After the first module, or document that is reused, there may be
        fewer of them: then all that follow count from there.
        """
        begin, plain = 0, True
        found: list[tuple[int, str]] = [(0, source) for source in request.sources]
        for segment in request.segments:
            source = segment.document_id or segment.module_id or segment.encodes
            if source is not None:
                found.append((begin, source))
                module = self.prompts.modules.find(source)
                found += [] if module is None else [(begin, name) for name in module.sources]
            plain &= segment.module_id is None and segment.link_tokens is None
            if plain:
                document = self.prompts.documents.get(segment.document_id or "", ())
                begin += len(segment.token_ids) + len(document)
        return tuple(dict.fromkeys(found))

    def namespace(self, salt: str, codec: Codec) -> BlockKey:
        """Return the root of all keys of what this model stores by that codec for a tenant."""
        return block_namespace(self._spec, codec, salt=salt)

    def _check_ranks(self) -> None:
        ranks = self._cache.memory.packed[0].ranks
        if ranks > 1:
            raise InvalidRequest(
                f"stored prompts, modules and the reuse of files elsewhere are for one rank, and "
                f"this server has {ranks}; start it without --ranks"
            )

    def _check_scored(self, layout: Layout) -> None:
        if self._cache.memory.packed[0].ranks > 1:
            raise InvalidRequest(
                "log-probabilities of prompts are for one rank; start the server without --ranks, "
                "or ask without echo",
                param="prompt_logprobs",
            )
        if not layout.plain:
            raise InvalidRequest(
                "what a prompt reuses has no log-probabilities; use modules and files with exact "
                "reuse, or ask without log-probabilities of the prompt",
                param="prompt_logprobs",
            )

    def _answer_tokens(self, prompt_tokens: int, wanted: int | None) -> int:
        """Return how long the answer may become; raise ContextTooLong where there is no room."""
        limits = self._limits
        room = limits.answer_tokens(prompt_tokens)
        max_tokens = max(1, room) if wanted is None else wanted
        if prompt_tokens + max_tokens > limits.longest_tokens:
            raise ContextTooLong(
                f"the prompt has {prompt_tokens} tokens and the answer may have {max_tokens}, "
                f"together more than the limit of {limits.longest_tokens}; shorten the prompt, "
                f"lower max_tokens or {limits.cure}",
                param="messages",
            )
        if max_tokens > room:
            raise ContextTooLong(
                f"max_tokens={max_tokens} is more than the {room} tokens of an answer that the "
                "device holds; lower it or raise --device-pool-gib",
                param="max_tokens",
            )
        return max_tokens

    def _answer_beside_reused(self, layout: Layout, prompt_tokens: int, wanted: int | None) -> int:
        """As `_answer_tokens`, for a prompt that reuses rows: these lie in the device beside it."""
        reused: dict[str, int] = {}
        for chain in layout.chains:
            reused[chain.owner] = max(len(chain.keys), reused.get(chain.owner, 0))
        beside = 1 + sum(reused.values())
        if wanted is None:
            blocks = max(1, self._cache.memory.capacity_blocks - beside + 1)
            positions = self._limits.max_context_tokens - layout.position(prompt_tokens)
            wanted = max(1, min(positions, layout.tokens(blocks) - 1 - prompt_tokens))
        self._check_positions(layout.position(prompt_tokens) + wanted)
        blocks = layout.blocks(prompt_tokens + wanted) + beside
        self._check_blocks(blocks, "the prompt with what it reuses")
        return wanted

    def _check_positions(self, end: int) -> None:
        limit = self._limits.max_context_tokens
        if end > limit:
            raise ContextTooLong(
                f"the last token would be at position {end - 1}, beyond the limit of {limit}; "
                "shorten the prompt or raise --max-context where the model allows it",
                param="messages",
            )

    def _check_shifts(self, layout: Layout) -> None:
        relocation = self._spec.relocation
        if not relocation.shiftable and any(reused.rotation for reused in layout.reused):
            raise InvalidRequest(
                "a part of the prompt is at another position than it was encoded at, which this "
                f"model does not allow: {relocation.reason}; leave it where it was encoded, or use "
                "it with exact reuse",
                param="position",
            )

    def _check_blocks(self, blocks: int, what: str) -> None:
        """Raise ContextTooLong for more than the device holds; reused rows never stream."""
        capacity = self._cache.memory.capacity_blocks
        if blocks > capacity:
            raise ContextTooLong(
                f"{what} takes {blocks} blocks of {BLOCK_TOKENS} tokens, the device holds "
                f"{capacity}; shorten it or raise --device-pool-gib",
                param="messages",
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


def block_namespace(spec: ModelSpec, codec: Codec, *, salt: str) -> BlockKey:
    """Return the parent of a tenant's first blocks; it is equal only for equal KV."""
    return namespace(
        fingerprint=spec.fingerprint,
        dtype=str(spec.dtype),
        rope=spec.rope_identity,
        codec=codec.name,
        codec_version=codec.version,
        salt=salt,
    )


def _prompt_token_ids(prompt: Prompt) -> Callable[[], NDArray[np.int32]]:
    """Return a function of the tokens that penalties count: the prompt's, without its answer."""
    tokens, prompt_tokens = prompt.tokens, len(prompt.tokens)
    return lambda: np.concatenate([tokens.slice(0, prompt_tokens), *prompt.reused_ids])
