"""Knows what can be reused: modules that were opened, and documents that were ingested.

A module is a row of pieces, literal tokens at positions. It is encoded as a prompt of its own. A
block ends with each piece, since what comes between two of them changes from prompt to prompt. Its
blocks have the keys of an ordinary prompt of the same pieces, so they are found, stored and shared
like any others. Nothing here holds a block: a `CachedChain` says only what its blocks are called.
"""

from collections.abc import Iterable
from collections.abc import Sequence as Items
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from compress.shape import BLOCK_TOKENS
from longctx.engine.prompt import Prompt
from longctx.engine.sequence import Sequence
from longctx.errors import DocumentMissing, InvalidRequest
from longctx.kv.layout import PLAIN, CachedChain, Layout, Run
from longctx.kv.prefix_index import PrefixName, module_name, owner_of, tokens_before
from longctx.kv.sequence_blocks import TokenIds
from longctx.request import Piece, Segment
from offload.key import BlockKey


@dataclass(slots=True, eq=False)
class Module:
    """A module that is open: its pieces, and the layout of the prompt that encodes it.

    `token_ids` are those of all pieces, and `ends` counts them up to the end of each piece. Pieces
    of 100 and 20 tokens at positions 0 and 150 have `ends` (100, 120), and take blocks 0 and 1
    (the second with 36 rows), and block 2 (with 20 rows, at positions 150 to 169).
    """

    module_id: str
    pieces: tuple[Piece, ...]
    token_ids: NDArray[np.int32]
    ends: tuple[int, ...]
    layout: Layout
    sources: tuple[str, ...] = ()  # documents whose text is in it
    chains: dict[tuple[BlockKey, int], CachedChain] = field(default_factory=dict)
    hits: int = 0  # prompts that have reused a part of it

    @classmethod
    def of(cls, module_id: str, pieces: Items[Piece]) -> "Module":
        """Lay out the pieces. Raises InvalidRequest for empty ones or positions that go back."""
        runs: list[Run] = []
        token, block, position = 0, 0, 0
        ends = []
        for number, piece in enumerate(pieces):
            if not piece.token_ids:
                raise InvalidRequest(
                    f"piece {number} of module {module_id} is empty; leave it out", param="pieces"
                )
            if piece.position < position:
                raise InvalidRequest(
                    f"piece {number} of module {module_id} begins at position {piece.position}, "
                    f"before the end of what precedes it at {position}",
                    param="pieces",
                )
            runs.append(Run(token, block, piece.position, block))
            token += len(piece.token_ids)
            block += -(-len(piece.token_ids) // BLOCK_TOKENS)
            position = piece.position + len(piece.token_ids)
            ends.append(token)
        if not runs:
            raise InvalidRequest(f"module {module_id} has no pieces; give one", param="pieces")
        runs.append(Run(token, block, position, block))
        ids = np.concatenate([np.array(piece.token_ids, dtype=np.int32) for piece in pieces])
        layout = Layout(tuple(runs), closed=True)
        return cls(module_id, tuple(pieces), ids, tuple(ends), layout)

    def chain(self, salt: str, root: BlockKey, pieces: int) -> CachedChain:
        """Return the chain of the first `pieces` pieces in the namespace `root`, named once."""
        chain = self.chains.get((root, pieces))
        if chain is None:
            end = self.ends[pieces - 1]
            last = self.pieces[pieces - 1]
            block = self.layout.blocks(end)
            after = Run(end, block, last.position + len(last.token_ids), block)
            layout = Layout((*self.layout.runs[:pieces], after), closed=True)
            keys = layout.keys(lambda first, stop: self.token_ids[first:stop], 0, block, root)
            name = (salt, module_name(self.module_id), keys[-1].hex())
            chain = CachedChain(name, layout, tuple(keys), root)
            self.chains[root, pieces] = chain
        return chain


@dataclass(frozen=True, slots=True)
class Ingested:
    """The prompt that a document was ingested under, which ends with the document.

    `ends` are the token counts and names up to the end of each of the prompt's documents.
    """

    segments: tuple[Segment, ...]
    ends: tuple[tuple[int, PrefixName], ...]
    root: BlockKey

    @property
    def name(self) -> PrefixName:
        """The name of the prompt up to the end of the document."""
        return self.ends[-1][1]

    @property
    def before_tokens(self) -> int:
        """Tokens of the prompt before the document."""
        return tokens_before(self.ends)

    def chain(self, keys: tuple[BlockKey, ...]) -> CachedChain:
        """Return the chain of the prompt's full blocks, which have these keys."""
        return CachedChain(self.name, PLAIN, keys, self.root)


class Modules:
    """Modules and ingested documents by id, and the prompts and chains that they make.

    `open` and `note_ingested` make something known, `forget` ends that. Only the engine's thread
    calls it.
    """

    def __init__(self, *, by_piece: bool) -> None:
        """`by_piece` is for models with windows, whose rows are kept at the end of each piece.

        A piece is then reused from a chain that ends with it; else from that of the whole module.
        """
        self._by_piece = by_piece
        self._modules: dict[str, Module] = {}
        self._ingested: dict[tuple[str, str], Ingested] = {}  # by salt and document

    def __contains__(self, module_id: str) -> bool:
        return module_id in self._modules

    def __len__(self) -> int:
        return len(self._modules)

    def open(self, module: Module) -> bool:
        """Make a module known; return whether it replaces other pieces under this id."""
        known = self._modules.get(module.module_id)
        if known is not None and known.pieces == module.pieces:
            return False
        self._modules[module.module_id] = module
        return known is not None

    def forget(self, owner: str) -> None:
        """Forget a module or document that is closed."""
        self._modules.pop(owner, None)
        for salt, document_id in list(self._ingested):
            if document_id == owner:
                del self._ingested[salt, document_id]

    def get(self, module_id: str) -> Module:
        """Return a module. Raises DocumentMissing where it is not open."""
        if module_id not in self._modules:
            raise DocumentMissing(f"module {module_id} is not open")
        return self._modules[module_id]

    def find(self, module_id: str) -> Module | None:
        """Return a module, or None where it is not open."""
        return self._modules.get(module_id)

    def count_hits(self, owners: Iterable[str]) -> None:
        """Count a prompt that reuses these; ids of documents are passed over."""
        for module in filter(None, map(self._modules.get, owners)):
            module.hits += 1

    def piece(self, module_id: str, piece: int) -> tuple[Module, Piece]:
        """Return a piece. Raises DocumentMissing, or InvalidRequest for a number without one."""
        module = self.get(module_id)
        if not 0 <= piece < len(module.pieces):
            raise InvalidRequest(
                f"module {module_id} has pieces 0 to {len(module.pieces) - 1}, not {piece}",
                param="piece",
            )
        return module, module.pieces[piece]

    def chain(self, module: Module, piece: int, salt: str, root: BlockKey) -> CachedChain:
        """Return the chain from which a piece is reused."""
        return module.chain(salt, root, piece + 1 if self._by_piece else len(module.pieces))

    def encoding_prompt(self, module_id: str, salt: str, root: BlockKey) -> Prompt:
        """Return the prompt that encodes a module. Raises DocumentMissing where it is not open."""
        module = self.get(module_id)
        first = 1 if self._by_piece else len(module.pieces)
        ends = [
            (module.ends[count - 1], module.chain(salt, root, count).name)
            for count in range(first, len(module.pieces) + 1)
        ]
        return Prompt(TokenIds(module.token_ids, []), module.layout, tuple(ends))

    def prompt_of(self, chain: CachedChain) -> Prompt:
        """Return the prompt that computes a chain. Raises DocumentMissing where it was closed."""
        module = self._modules.get(chain.owner)
        if module is None or chain not in module.chains.values():
            raise DocumentMissing(
                f"{chain.owner} was closed while a request waited to reuse it; open it again"
            )
        token_ids = module.token_ids[: chain.tokens]
        ends = ((len(token_ids), chain.name),)
        return Prompt(TokenIds(token_ids, []), chain.layout, ends)

    # -- documents --------------------------------------------------------------------------------

    def note_ingested(self, sequence: Sequence) -> None:
        """Note that a prompt is computed to be kept: its last document can be reused from it."""
        if sequence.blocks.document_ends and sequence.blocks.layout.plain:
            ends = sequence.blocks.document_ends
            ingested = Ingested(sequence.request.segments, ends, sequence.blocks.namespace)
            self._ingested[sequence.request.salt, owner_of(ends[-1][1])] = ingested

    def ingested(self, document_id: str, salt: str) -> Ingested | None:
        """Return the prompt that a tenant's document was ingested under, if it was."""
        return self._ingested.get((salt, document_id))
