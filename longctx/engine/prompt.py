"""From the segments of a prompt to its own tokens, and what it borrows between them.

An ordinary prompt is one run of tokens. A prompt with pieces of modules, positions or cuts is built
run by run: what is computed here is appended to its own tokens, what is borrowed only names the
rows of another chain. The last token is always its own, so that there is a row to draw from.
Read `Prompts.read` first.
"""

from collections.abc import Callable
from collections.abc import Sequence as Items

import numpy as np
from numpy.typing import NDArray

from compress.shape import BLOCK_TOKENS
from longctx.engine.modules import Ingested, Modules
from longctx.engine.sequence import Prompt, TokenIds
from longctx.errors import DocumentMissing, InvalidRequest
from longctx.kv.layout import PLAIN, Borrowed, Layout, Run, Source
from longctx.kv.prefix_index import PrefixIndex, PrefixName, document_name
from longctx.request import Request, Segment
from offload.key import BlockKey


class Assembly:
    """One prompt in the making; call in reading order, then `prompt`."""

    def __init__(
        self, base: NDArray[np.int32], ends: tuple[tuple[int, PrefixName], ...] = ()
    ) -> None:
        """`base`: tokens that it begins with, as an ordinary prompt would."""
        self._base = base
        self._ends = ends
        self._tail: list[int] = []
        self._runs = [Run()] if len(base) else []
        self._borrowed: list[Borrowed] = []
        self._position = len(base)
        self._cut = not self._runs
        self._linked_tokens = 0
        self._borrowed_ids: list[NDArray[np.int32]] = []

    @property
    def _own_tokens(self) -> int:
        return len(self._base) + len(self._tail)

    def cut(self) -> None:
        """The block ends here."""
        self._cut = True

    def compute(self, token_ids: Items[int], position: int | None = None) -> None:
        """Tokens of its own. Raises InvalidRequest where the position is taken."""
        position = self._check(position)
        if not len(token_ids):
            return
        if self._cut or position != self._position:
            block, entry = self._reached()
            self._runs.append(Run(self._own_tokens, block, position, entry))
            self._cut = False
        self._tail += token_ids
        self._position = position + len(token_ids)

    def borrow(
        self, source: Source, begin: int, token_ids: NDArray[np.int32], position: int | None
    ) -> None:
        """The tokens of a source from `begin` on, which say `token_ids`.

        Raises InvalidRequest where the position is taken.
        """
        position = self._check(position)
        end = begin + len(token_ids)
        if begin < end:
            self._borrowed_ids.append(token_ids)
            _, entry = self._reached()
            self._borrowed.append(Borrowed(source, begin, end, position, entry))
            self._cut = True
            self._position = position + end - begin

    def link(self, tokens: int) -> None:
        """So many of the tokens that were computed would else have been borrowed."""
        self._linked_tokens += tokens

    def prompt(self) -> Prompt:
        if self._borrowed and (not self._runs or self._last_entry > self._runs[-1].entry):
            last = self._borrowed.pop()
            self._position -= 1
            if last.end - last.begin > 1:
                shorter = Borrowed(last.source, last.begin, last.end - 1, last.position, last.entry)
                self._borrowed.append(shorter)
            self._linked_tokens += 1
            token_ids = self._borrowed_ids.pop()
            self._borrowed_ids.append(token_ids[:-1])
            self.compute(token_ids[-1:].tolist())
        return Prompt(
            TokenIds(self._base, self._tail),
            Layout(tuple(self._runs) or (Run(),), tuple(self._borrowed)),
            self._ends,
            self._linked_tokens,
            tuple(self._borrowed_ids),
        )

    @property
    def _last_entry(self) -> int:
        return self._borrowed[-1].entry + len(self._borrowed[-1].blocks)

    def _reached(self) -> tuple[int, int]:
        """Own blocks so far, where the last run ends here; and entries."""
        block = entry = 0
        if self._runs:
            run = self._runs[-1]
            blocks = -(-(self._own_tokens - run.token) // BLOCK_TOKENS)
            block, entry = run.block + blocks, run.entry + blocks
        if self._borrowed:
            entry = max(entry, self._last_entry)
        return block, entry

    def _check(self, position: int | None) -> int:
        if position is None:
            return self._position
        if position < self._position:
            raise InvalidRequest(
                f"a segment is to stand at position {position}, but what stands before it ends at "
                f"{self._position}; positions may leave gaps and never go back",
                param="position",
            )
        return position


class Prompts:
    def __init__(
        self,
        prefixes: PrefixIndex,
        *,
        by_piece: bool,
        root_of: Callable[[str], BlockKey],
        check: Callable[[Items[int]], None],
    ) -> None:
        """`root_of(salt)`: the namespace of a tenant. `check(token_ids)` raises InvalidRequest."""
        self.documents: dict[str, NDArray[np.int32]] = {}
        self.modules = Modules(by_piece=by_piece)
        self._prefixes = prefixes
        self._root_of = root_of
        self._check = check

    def read(self, request: Request) -> Prompt:
        """What a request says. Raises InvalidRequest or DocumentMissing."""
        segments = request.segments
        if any(segment.encodes is not None for segment in segments):
            if len(segments) > 1 or request.sampling.max_tokens:
                raise InvalidRequest(
                    "a module is encoded alone, and without an answer", param="prompt"
                )
            assert segments[0].encodes is not None
            salt = request.salt
            return self.modules.whole(segments[0].encodes, salt, self._root_of(salt))
        ordinary = [_is_ordinary(segment) for segment in segments]
        if all(ordinary):
            return self._plain(segments, request.salt)
        return self._assembled(request, ordinary.index(False))

    def _assembled(self, request: Request, plain: int) -> Prompt:
        """A prompt of which the first `plain` segments are as in an ordinary one."""
        start = self._plain(request.segments[:plain], request.salt)
        assembly = Assembly(start.tokens.upto(len(start.tokens)), start.ends)
        for number, segment in enumerate(request.segments[plain:], plain + 1):
            if segment.cut:
                assembly.cut()
            if segment.module_id is not None:
                self._add_piece(assembly, segment, request.salt)
            elif segment.document_id is not None:
                last = number == len(request.segments)
                self._add_document(assembly, segment, request.salt, last=last)
            else:
                self._check(segment.token_ids)
                assembly.compute(segment.token_ids, segment.position)
        prompt = assembly.prompt()
        self.modules.count({source.owner for source in prompt.layout.sources})
        return prompt

    def _add_piece(self, assembly: Assembly, segment: Segment, salt: str) -> None:
        assert segment.module_id is not None
        module, piece = self.modules.piece(segment.module_id, segment.piece)
        position = piece.position if segment.position is None else segment.position
        size = len(piece.token_ids)
        computed = size if segment.link_tokens is None else min(size, segment.link_tokens)
        assembly.cut()
        assembly.compute(piece.token_ids[:computed], position)
        assembly.cut()
        if segment.link_tokens is None:
            return
        assembly.link(computed)
        if computed < size:
            end = module.ends[segment.piece]
            begin = end - size + computed
            source = self.modules.source(module, segment.piece, salt, self._root_of(salt))
            assembly.borrow(source, begin, module.token_ids[begin:end], position + computed)

    def _add_document(self, assembly: Assembly, segment: Segment, salt: str, *, last: bool) -> None:
        """The rows that it has in full blocks of the prompt that it was ingested under."""
        document_id = segment.document_id
        assert document_id is not None
        tokens = self._document(document_id)
        if segment.link_tokens is None or last:
            assembly.compute(tokens.tolist(), segment.position)
            return
        ingested = self.modules.ingested(document_id, salt)
        if ingested is None:
            raise InvalidRequest(
                f"document {document_id} has not been ingested, so there is nothing to reuse of "
                "it; upload it again, or leave reuse out",
                param="reuse",
            )
        source = ingested.source(self._keys(ingested, salt))
        before = ingested.before_tokens
        end = source.layout.tokens(len(source.keys)) - before
        link = max(0, min(end, segment.link_tokens))
        assembly.cut()
        assembly.compute(tokens[:link].tolist(), segment.position)
        assembly.cut()
        assembly.link(link)
        if link < end:
            position = segment.position if link == 0 else None
            assembly.borrow(source, before + link, tokens[link:end], position)
        rest = tokens[max(end, 0) :]
        assembly.compute(rest.tolist(), None if end > 0 else segment.position)
        assembly.link(len(rest))

    def _keys(self, ingested: Ingested, salt: str) -> tuple[BlockKey, ...]:
        """Of the blocks up to the end of a document."""
        keys = self._prefixes.known_keys(ingested.name)
        if not keys:
            tokens = self._plain(ingested.segments, salt).tokens
            blocks = ingested.ends[-1][0] // BLOCK_TOKENS
            keys = tuple(PLAIN.keys(tokens.slice, 0, blocks, ingested.root))
            self._prefixes.know(ingested.name, keys)
        return keys

    def _document(self, document_id: str) -> NDArray[np.int32]:
        """Raises DocumentMissing."""
        if document_id not in self.documents:
            raise DocumentMissing(f"document {document_id} is not open")
        return self.documents[document_id]

    def _plain(self, segments: tuple[Segment, ...], salt: str) -> Prompt:
        """The tokens of an ordinary prompt, and where each document ends under which name.

        Up to the last document they are an array that is shared, not copied, with earlier prompts
        that began alike.
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
    """Literal tokens or a document that follow on and are computed in context."""
    apart = segment.module_id is not None or segment.position is not None
    return not (apart or segment.link_tokens is not None or segment.cut)
