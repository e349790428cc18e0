"""Turns the segments of a request into its prompt; documents and modules are found by id.

Read `PromptResolver.resolve` first.
"""

from collections.abc import Callable
from collections.abc import Sequence as Items

import numpy as np
from numpy.typing import NDArray

from compress.shape import BLOCK_TOKENS
from longctx.engine.modules import Ingested, Modules
from longctx.engine.prompt import Prompt, PromptBuilder
from longctx.errors import DocumentMissing, InvalidRequest
from longctx.kv.layout import PLAIN
from longctx.kv.prefix_index import PrefixIndex, PrefixName, document_name
from longctx.kv.sequence_blocks import TokenIds
from longctx.request import Request, Segment
from offload.key import BlockKey


class PromptResolver:
    """Knows the documents and modules that are open, and turns requests into prompts.

    A request is resolved in one of three ways: as the encoding of a module, as an ordinary prompt,
    or, from its first segment with a module, a position, a link or a cut on, by a `PromptBuilder`.
    Only the engine's thread calls it.
    """

    def __init__(
        self,
        prefixes: PrefixIndex,
        *,
        by_piece: bool,
        root_of: Callable[[str], BlockKey],
        check: Callable[[Items[int]], None],
    ) -> None:
        """`root_of(salt)` is a tenant's namespace; `check(token_ids)` raises InvalidRequest."""
        self.documents: dict[str, NDArray[np.int32]] = {}
        self.modules = Modules(by_piece=by_piece)
        self._prefixes = prefixes
        self._root_of = root_of
        self._check = check

    def resolve(self, request: Request) -> Prompt:
        """Return what a request says. Raises InvalidRequest or DocumentMissing."""
        segments = request.segments
        if any(segment.encodes is not None for segment in segments):
            if len(segments) > 1 or request.sampling.max_tokens != 0:
                raise InvalidRequest(
                    "a module is encoded alone, and without an answer", param="prompt"
                )
            assert segments[0].encodes is not None
            salt = request.salt
            return self.modules.encoding_prompt(segments[0].encodes, salt, self._root_of(salt))
        ordinary = [_is_ordinary(segment) for segment in segments]
        if all(ordinary):
            return self._plain(segments, request.salt)
        return self._assembled(request, ordinary.index(False))

    def _assembled(self, request: Request, plain: int) -> Prompt:
        """Build a prompt of which the first `plain` segments are as in an ordinary one."""
        start = self._plain(request.segments[:plain], request.salt)
        builder = PromptBuilder(start.tokens.upto(len(start.tokens)), start.ends)
        for number, segment in enumerate(request.segments[plain:], plain + 1):
            if segment.cut:
                builder.cut()
            if segment.module_id is not None:
                self._add_piece(builder, segment, request.salt)
            elif segment.document_id is not None:
                last = number == len(request.segments)
                self._add_document(builder, segment, request.salt, last=last)
            else:
                self._check(segment.token_ids)
                builder.compute(segment.token_ids, segment.position)
        prompt = builder.prompt()
        self.modules.count_hits({chain.owner for chain in prompt.layout.chains})
        return prompt

    def _add_piece(self, builder: PromptBuilder, segment: Segment, salt: str) -> None:
        assert segment.module_id is not None
        module, piece = self.modules.piece(segment.module_id, segment.piece)
        position = piece.position if segment.position is None else segment.position
        size = len(piece.token_ids)
        computed = size if segment.link_tokens is None else min(size, segment.link_tokens)
        builder.cut()
        builder.compute(piece.token_ids[:computed], position)
        builder.cut()
        if segment.link_tokens is None:
            return
        builder.count_linked(computed)
        if computed < size:
            end = module.ends[segment.piece]
            begin = end - size + computed
            chain = self.modules.chain(module, segment.piece, salt, self._root_of(salt))
            builder.reuse(chain, begin, module.token_ids[begin:end], position + computed)

    def _add_document(
        self, builder: PromptBuilder, segment: Segment, salt: str, *, last: bool
    ) -> None:
        """Reuse the rows that the document has in full blocks of the prompt it was ingested under.

        A document of 200 tokens that was ingested after 7 others fills blocks up to token 192 of
        that prompt: its first 185 tokens can be reused, and the other 15 are computed here.
        """
        document_id = segment.document_id
        assert document_id is not None
        tokens = self._document(document_id)
        if segment.link_tokens is None or last:
            builder.compute(tokens.tolist(), segment.position)
            return
        ingested = self.modules.ingested(document_id, salt)
        if ingested is None:
            raise InvalidRequest(
                f"document {document_id} has not been ingested, so there is nothing to reuse of "
                "it; upload it again, or leave reuse out",
                param="reuse",
            )
        chain = ingested.chain(self._keys(ingested, salt))
        before = ingested.before_tokens
        end = chain.layout.tokens(len(chain.keys)) - before
        link = max(0, min(end, segment.link_tokens))
        builder.cut()
        builder.compute(tokens[:link].tolist(), segment.position)
        builder.cut()
        builder.count_linked(link)
        if link < end:
            position = segment.position if link == 0 else None
            builder.reuse(chain, before + link, tokens[link:end], position)
        rest = tokens[max(end, 0) :]
        builder.compute(rest.tolist(), None if end > 0 else segment.position)
        builder.count_linked(len(rest))

    def _keys(self, ingested: Ingested, salt: str) -> tuple[BlockKey, ...]:
        """Return the keys of the full blocks up to the end of a document."""
        keys = self._prefixes.known_keys(ingested.name)
        if not keys:
            tokens = self._plain(ingested.segments, salt).tokens
            blocks = ingested.ends[-1][0] // BLOCK_TOKENS
            keys = tuple(PLAIN.keys(tokens.slice, 0, blocks, ingested.root))
            self._prefixes.know(ingested.name, keys)
        return keys

    def _document(self, document_id: str) -> NDArray[np.int32]:
        """Return a document's tokens. Raises DocumentMissing where it is not open."""
        if document_id not in self.documents:
            raise DocumentMissing(f"document {document_id} is not open")
        return self.documents[document_id]

    def _plain(self, segments: tuple[Segment, ...], salt: str) -> Prompt:
        """Return an ordinary prompt, with the end and the name of each document.

        Up to the last document its tokens are an array that is shared, not copied, with earlier
        prompts that began alike.
        """
        name: PrefixName = (salt,)
        ends: list[tuple[int, PrefixName]] = []
        length, beyond = 0, 0
        for number, segment in enumerate(segments, 1):
            if segment.document_id is None:
                self._check(segment.token_ids)
                name = (*name, segment.token_ids)
                length += len(segment.token_ids)
            else:
                length += len(self._document(segment.document_id))
                name = (*name, document_name(segment.document_id))
                ends.append((length, name))
                beyond = number
        known = self._prefixes.get(ends[-1][1]) if ends else None
        base = self._concatenate(segments[:beyond]) if known is None else known.token_ids
        tail = [token for segment in segments[beyond:] for token in segment.token_ids]
        return Prompt(TokenIds(base, tail), ends=tuple(ends))

    def _concatenate(self, segments: tuple[Segment, ...]) -> NDArray[np.int32]:
        parts = [
            np.array(segment.token_ids, dtype=np.int32)
            if segment.document_id is None
            else self.documents[segment.document_id]
            for segment in segments
        ]
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int32)


def _is_ordinary(segment: Segment) -> bool:
    """Whether it is literal tokens or a document, follows on and is computed in context."""
    apart = segment.module_id is not None or segment.position is not None
    return not (apart or segment.link_tokens is not None or segment.cut)
