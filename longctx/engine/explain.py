"""Explains why the cache had as much of a prompt as it had, and no more, to requests that ask.

In which tier the blocks were is in the prompt's `LookupTrace`. Why the next one was not found
follows from what the tiers remember of blocks that left, and from comparing tokens: with the
prompts that the same tenant sent lately, and with its documents. Another tenant's are never looked
at.
"""

from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from compress.codec import CODECS, Codec
from compress.shape import BLOCK_TOKENS, ShapeRefused
from longctx.engine.sequence import Sequence
from longctx.kv.cache_manager import KVCacheManager
from longctx.kv.lookup_trace import LookupTrace
from longctx.kv.prefix_index import PrefixName
from longctx.request import CacheExplanation, Divergence
from longctx.text.tokenizer import Tokenizer
from offload.key import BlockKey, chain_keys
from offload.tier_names import TIERS, TierName

RECENT_PROMPTS = 32  # of each tenant
RECENT_TOKENS = 1 << 21  # of all tenants together, documents not counted
SHOWN_TOKENS = 12  # of a divergence

# Why the first block that was computed was not found. `{subject}` is the tier that lost it, the
# document or the codec.
REASONS = {
    "below_block": "the rest fills no block of 64 tokens, or is the block of the last token, and "
    "is computed always",
    "never_seen": "what follows was never seen after the text before it, under this model, KV "
    "codec and API key; or so long ago that nothing remembers it",
    "other_prefix": "document {subject} is known after other text than it follows here",
    "other_codec": "the text is stored by KV codec {subject}, which is not the one in use",
    "evicted": "the next block left the {subject} to make room",
    "expired": "the next block was stored and not used for longer than --disk-ttl-days",
    "corrupt": "the next block was stored, but what the {subject} gave back was damaged",
    "deleted": "the next block was deleted with its document, or its file was removed",
    "flushed": "the {subject} was emptied on request",
    "slow": "the next block is stored, but the {subject} has not answered in time lately",
    "recomputed": "reading the next blocks would have taken longer than computing them",
    "checkpoint": "layers with a sliding window keep their blocks only where prompts, documents "
    "and extents end, and none ends later that this prompt shares",
}

TokenArray = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class _Known:
    """Tokens to compare a prompt with; documents are named by id, so none of theirs is kept."""

    pieces: tuple[TokenArray | str, ...]
    covered_tokens: int  # whose blocks have been computed or found
    name: str  # the document's id, or "prompt"


class Explainer:
    """Remembers recent prompts, and explains to a request what the cache had of its own.

    The engine calls `explain` for the sequences of each step (only the first call for a sequence
    that asks does anything), `finished` when a choice ends, and `forget` when a document is closed.
    It remembers the last 32 prompts of each tenant, 2 million tokens in all. Only the engine's
    thread calls it.
    """

    def __init__(
        self,
        cache: KVCacheManager,
        documents: Mapping[str, TokenArray],
        tokenizer: Tokenizer,
        namespace_of: Callable[[str, Codec], BlockKey],
    ) -> None:
        self._cache = cache
        self._documents = documents
        self._tokenizer = tokenizer
        self._namespace_of = namespace_of
        self._recent: OrderedDict[BlockKey, deque[_Known]] = OrderedDict()
        self._recent_tokens = 0

    def finished(self, sequence: Sequence) -> None:
        """Remember the tokens of a prompt and its answer, to compare later ones with."""
        blocks = sequence.blocks
        covered = (sequence.cached_tokens or 0) + sequence.computed_tokens
        if sequence.index or not covered or not blocks.layout.plain:
            return
        answer = blocks.tokens.slice(blocks.prompt_tokens, len(blocks.tokens))
        known = _Known(
            (*_pieces(sequence), answer), min(covered, len(blocks.tokens)), name="prompt"
        )
        recent = self._recent.setdefault(blocks.namespace, deque())
        self._recent.move_to_end(blocks.namespace)
        recent.append(known)
        self._recent_tokens += _own_tokens(known)
        if len(recent) > RECENT_PROMPTS:
            self._forget_oldest(blocks.namespace)
        while self._recent_tokens > RECENT_TOKENS:
            self._forget_oldest(next(iter(self._recent)))

    def forget(self, document_id: str) -> None:
        """Forget the prompts with a document that is closed or has other tokens now."""
        for namespace, recent in list(self._recent.items()):
            kept = deque(known for known in recent if document_id not in _documents(known))
            self._recent_tokens -= sum(map(_own_tokens, recent)) - sum(map(_own_tokens, kept))
            self._recent[namespace] = kept
            if not kept:
                del self._recent[namespace]

    def explain(self, sequence: Sequence, others: Iterable[Sequence]) -> None:
        """Put an explanation into the trace of a sequence that was just admitted.

        Its prompt is compared with those of the running sequences `others` as well.
        """
        blocks = sequence.blocks
        trace = blocks.trace
        if trace is None or trace.explanation is not None or sequence.cached_tokens is None:
            return
        layout = blocks.layout
        depth = layout.blocks(sequence.cached_tokens)
        limit = layout.blocks(blocks.prompt_tokens - 1)
        if trace.first is None:  # it is all durable, and was not admitted
            trace.note([self._cache.tier_of(blocks, 0, block) for block in range(depth)])
        counts, waited = self._found(trace, sequence, depth)
        reason, subject, divergence = "below_block", "", None
        if depth < limit:
            covered, divergence = self._compare(sequence, others)
            reason, subject = self._why(sequence, depth, covered)
        trace.explanation = CacheExplanation(
            prompt_tokens=blocks.prompt_tokens + blocks.reused_tokens,
            found_tokens={tier: counts[tier] for tier in TIERS},
            waited_tokens=waited,
            reused_tokens=blocks.reused_tokens,
            linked_tokens=sequence.linked_tokens,
            reason=reason,
            detail=_reuse_detail(sequence)
            + f"found up to token {layout.tokens(depth)}; "
            + REASONS[reason].format(subject=subject),
            divergence=divergence,
        )

    def _found(
        self, trace: LookupTrace, sequence: Sequence, depth: int
    ) -> tuple[Counter[TierName], int]:
        """Count the tokens that were found by tier, and those that another computed meanwhile."""
        assert trace.first is not None
        counts: Counter[TierName] = Counter()
        waited = 0
        layout = sequence.blocks.layout
        windows_only = self._cache.memory.groups[0].window is not None
        tier: TierName = "device"
        for block in reversed(range(depth)):
            last = trace.last[block]
            # Layers with windows neither have nor miss the blocks before the last window.
            tier = last or (tier if windows_only else "device")
            tokens = layout.tokens(block + 1) - layout.tokens(block)
            counts[tier] += tokens
            waited += tokens if trace.first[block] is None and not windows_only else 0
        return counts, waited

    def _why(self, sequence: Sequence, depth: int, covered_tokens: int) -> tuple[str, str]:
        """Return the reason why block `depth` was not found, and the subject in its text."""
        blocks = sequence.blocks
        groups, layout = self._cache.memory.groups, blocks.layout
        needed = [
            (index, block)
            for index, group in enumerate(groups)
            for block in range(
                depth if group.window is None else layout.first_needed(group.window, depth + 1),
                depth + 1,
            )
        ]
        missing = [
            (group, block)
            for group, block in needed
            if self._cache.tier_of(blocks, group, block) is None
        ]
        offloader = self._cache.offloader
        if offloader is not None:
            if not missing:
                return "recomputed", ""
            for group, block in missing:
                reason = offloader.store.explain(group, blocks.key(block))
                if reason in REASONS:
                    return reason, offloader.store.lowest
        if groups[0].window is None and all(group for group, _ in missing):
            return "checkpoint", ""
        if covered_tokens >= layout.tokens(depth + 1):
            return "evicted", "device"
        return self._never_here(sequence, depth)

    def _never_here(self, sequence: Sequence, depth: int) -> tuple[str, str]:
        blocks = sequence.blocks
        known = list(self._names(sequence))
        for end, name in blocks.document_ends:
            others = any(other[-1] == name[-1] and other != name for other in known)
            if end > blocks.layout.tokens(depth) and name not in known and others:
                document_id = name[-1][1]
                assert isinstance(document_id, str)
                return "other_prefix", document_id
        codec = self._other_codec(sequence) if depth == 0 else None
        return ("never_seen", "") if codec is None else ("other_codec", codec)

    def _other_codec(self, sequence: Sequence) -> str | None:
        """Return another codec by which the prompt's first block is stored, if there is one."""
        if self._cache.offloader is None:
            return None
        used = self._cache.memory.codecs[0]
        token_ids = sequence.blocks.tokens.slice(0, BLOCK_TOKENS)
        for name, make in CODECS.items():
            try:
                codec = make(used.shape)
            except ShapeRefused:
                continue
            root = self._namespace_of(sequence.request.salt, codec)
            (key,) = chain_keys(root, token_ids, first_position=0, block_tokens=BLOCK_TOKENS)
            if codec.name != used.name and self._cache.offloader.store.has(0, key):
                return name
        return None

    def _compare(
        self, sequence: Sequence, others: Iterable[Sequence]
    ) -> tuple[int, Divergence | None]:
        """Compare the prompt with known ones that begin alike.

        Returns how many of its first tokens were computed before, and where it parts from the one
        that it shares most with.
        """
        if not sequence.blocks.layout.plain:
            return 0, None  # what it reuses cannot be compared token by token
        own = self._resolve(_pieces(sequence))
        best: tuple[int, list[TokenArray], str] = (0, [], "")
        covered = 0
        for known in self._candidates(sequence, others):
            pieces = self._resolve(known.pieces)
            shared = common_tokens(own, pieces)
            covered = max(covered, min(shared, known.covered_tokens))
            if shared > best[0]:
                best = shared, pieces, known.name
        shared, pieces, name = best
        text, known_text = self._text(own, shared), self._text(pieces, shared)
        if not shared or not text or not known_text:  # one of the two ends there
            return covered, None
        divergence = Divergence(position=shared, text=text, known_text=known_text, known=name)
        return covered, divergence

    def _candidates(self, sequence: Sequence, others: Iterable[Sequence]) -> Iterator[_Known]:
        blocks = sequence.blocks
        yield from reversed(self._recent.get(blocks.namespace, ()))
        for other in others:
            apart = other.request is not sequence.request and other.blocks.layout.plain
            if apart and other.blocks.namespace == blocks.namespace:
                yield _Known(_pieces(other), other.blocks.computed, "prompt")
        for name in self._names(sequence):
            pieces = tuple(
                part[1] if _is_document(part) else np.array(part, dtype=np.int32)
                for part in name[1:]
            )
            yield _Known(pieces, 0, str(name[-1][1]))  # type: ignore[arg-type]

    def _names(self, sequence: Sequence) -> Iterator[PrefixName]:
        """Return the names of the tenant's documents, each with the text that it is known after."""
        salt = sequence.request.salt
        names = self._cache.prefixes.names()
        return (name for name in names if name[0] == salt and _is_document(name[-1]))

    def _resolve(self, pieces: Iterable[TokenArray | str]) -> list[TokenArray]:
        """Return the pieces as tokens, up to the first document that is closed."""
        found: list[TokenArray] = []
        for piece in pieces:
            tokens = self._documents.get(piece) if isinstance(piece, str) else piece
            if tokens is None:
                break
            found.append(tokens)
        return found

    def _text(self, pieces: Items[TokenArray], begin: int) -> str:
        """Decode the first few tokens from token `begin` on."""
        shown: list[int] = []
        for piece in pieces:
            shown += piece[begin : begin + SHOWN_TOKENS - len(shown)].tolist()
            begin = max(0, begin - len(piece))
        return self._tokenizer.decode(shown)

    def _forget_oldest(self, namespace: BlockKey) -> None:
        recent = self._recent[namespace]
        self._recent_tokens -= _own_tokens(recent.popleft())
        if not recent:
            del self._recent[namespace]


def common_tokens(a: Items[TokenArray], b: Items[TokenArray]) -> int:
    """Return how many tokens two texts share from their beginning; each is a list of pieces."""
    same = i = j = at_a = at_b = 0
    while i < len(a) and j < len(b):
        size = min(len(a[i]) - at_a, len(b[j]) - at_b)
        if not (a[i] is b[j] and at_a == at_b):
            differs = a[i][at_a : at_a + size] != b[j][at_b : at_b + size]
            if differs.any():
                return same + int(differs.argmax())
        same, at_a, at_b = same + size, at_a + size, at_b + size
        if at_a == len(a[i]):
            i, at_a = i + 1, 0
        if at_b == len(b[j]):
            j, at_b = j + 1, 0
    return same


def _pieces(sequence: Sequence) -> tuple[TokenArray | str, ...]:
    return tuple(
        np.array(segment.token_ids, dtype=np.int32)
        if segment.document_id is None
        else segment.document_id
        for segment in sequence.request.segments
    )


def _reuse_detail(sequence: Sequence) -> str:
    blocks = sequence.blocks
    reused, linked = blocks.reused_tokens, sequence.linked_tokens
    if not reused:
        return ""
    module_prefills = blocks.offload.module_prefills
    fetched = (
        f" ({module_prefills} of its parts were not on the device and came first)"
        if module_prefills
        else ""
    )
    return (
        f"{reused} tokens are used as they were encoded elsewhere{fetched}, and {linked} of the "
        "same parts are computed in context; of the rest, "
    )


def _own_tokens(known: _Known) -> int:
    return sum(len(piece) for piece in known.pieces if not isinstance(piece, str))


def _documents(known: _Known) -> set[str]:
    return {piece for piece in known.pieces if isinstance(piece, str)}


def _is_document(part: object) -> bool:
    return isinstance(part, tuple) and part[:1] == ("document",)
