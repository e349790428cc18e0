"""Computes a prompt made of modules as plainly as can be: a dense mask and transformers' own pass.

Every module is a chain of rows that see nothing but the rows before them in the module. A prompt is
a chain too; its rows see the rows that it reuses and its own, as far as they come before them in
the prompt. All chains go through the model in one row, float32, eager.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from compress.shape import BLOCK_TOKENS
from longctx.request import Piece, Request, RequestClass, SamplingParams, Segment
from tests.support.recorded_engine import RecordedEngine, some_ids

Pieces = Sequence[Piece]


@dataclass
class Rows:
    """The rows of all chains; `seen[i]` are those before row i that it sees."""

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    seen: list[list[int]] = field(default_factory=list)

    def add(self, token: int, position: int, seen: list[int]) -> int:
        self.tokens.append(token)
        self.positions.append(position)
        self.seen.append(list(seen))
        return len(self.tokens) - 1


@dataclass
class Assembled:
    """All rows of a prompt; `own` are those that the prompt computes, in order."""

    rows: Rows
    own: list[int]


def assembled(
    segments: Sequence[Segment],
    modules: Mapping[str, Pieces],
    answer: Sequence[int] = (),
    documents: Mapping[str, tuple[Sequence[int], Sequence[int]]] = MappingProxyType({}),
) -> Assembled:
    """Return the rows of one prompt and of what it reuses.

    `documents` are the tokens that each was ingested after, and its own.
    """
    rows, own = Rows(), list[int]()
    visible: list[int] = []
    chains: dict[tuple[str, int], list[list[int]]] = {}
    position = 0

    def compute(tokens: Sequence[int], at: int) -> int:
        for offset, token in enumerate(tokens):
            row = rows.add(token, at + offset, visible)
            visible.append(row)
            own.append(row)
        return at + len(tokens)

    for number, segment in enumerate(segments, 1):
        if segment.document_id is not None:
            opening, tokens = documents[segment.document_id]
            at = position if segment.position is None else segment.position
            filled = (len(opening) + len(tokens)) // BLOCK_TOKENS * BLOCK_TOKENS - len(opening)
            link = 0 if segment.link_tokens is None else segment.link_tokens
            end = max(0, link if segment.link_tokens is None else filled)
            compute(tokens[: min(link, end)], at)
            if link < end:
                piece = Piece(token_ids=(*opening, *tokens), position=0)
                (chain,) = _encode(rows, [piece], at - len(opening))
                visible += chain[len(opening) + link : len(opening) + end]
            position = compute(tokens[end:], at + end)
            continue
        if segment.module_id is None:
            at = position if segment.position is None else segment.position
            position = compute(segment.token_ids, at)
            continue
        piece = modules[segment.module_id][segment.piece]
        at = piece.position if segment.position is None else segment.position
        size = len(piece.token_ids)
        link = size if segment.link_tokens is None else min(size, segment.link_tokens)
        end = size - (number == len(segments) and link < size)
        compute(piece.token_ids[:link], at)
        name = segment.module_id, at - piece.position
        if link < end and name not in chains:
            chains[name] = _encode(rows, modules[segment.module_id], at - piece.position)
        if link < end:
            visible += chains[name][segment.piece][link:end]
        compute(piece.token_ids[max(link, end) :], at + max(link, end))
        position = at + size
    compute(answer, position)
    return Assembled(rows, own)


def _encode(rows: Rows, pieces: Pieces, shift: int) -> list[list[int]]:
    """Add the rows of a module's pieces; return those of each piece."""
    seen: list[int] = []
    found = []
    for piece in pieces:
        first = len(seen)
        for offset, token in enumerate(piece.token_ids):
            seen.append(rows.add(token, piece.position + shift + offset, seen))
        found.append(seen[first:])
    return found


class DenseModel:
    """Runs transformers' own float32 forward pass under a mask that is written out."""

    def __init__(self, folder: Path) -> None:
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, attn_implementation="eager", dtype=torch.float32
        )
        self._model = model.eval()
        self._by_type = "causal_mask_mapping" in inspect.getsource(type(model.base_model).forward)

    def logits(self, rows: Rows) -> Tensor:
        """Return logits [rows, vocab]."""
        count = len(rows.tokens)
        full = torch.full((count, count), torch.finfo(torch.float32).min)
        for row, seen in enumerate(rows.seen):
            full[row, [*seen, row]] = 0
        position = torch.tensor(rows.positions)
        mask: Any = full[None, None]
        window = getattr(self._model.config, "sliding_window", None)
        if window is not None:
            far = position[:, None] - position[None] >= window
            narrow = full.masked_fill(far, torch.finfo(torch.float32).min)[None, None]
            mask = (
                {"full_attention": mask, "sliding_attention": narrow} if self._by_type else narrow
            )
        elif self._by_type:
            mask = {"full_attention": mask}
        with torch.inference_mode():
            output = self._model(
                torch.tensor([rows.tokens]),
                position_ids=position[None],
                attention_mask=mask,
                use_cache=False,
            )
        logits: Tensor = output.logits[0]
        return logits


MODULES: dict[str, Sequence[Piece]] = {
    "a": [Piece(token_ids=some_ids(100, 11), position=0)],
    "b": [
        Piece(token_ids=some_ids(65, 12), position=100),
        Piece(token_ids=some_ids(20, 13), position=180),
    ],
    "c": [Piece(token_ids=some_ids(3, 14), position=210)],
    "d": [Piece(token_ids=some_ids(128, 15), position=213)],
}


def literal(length: int, seed: int, position: int | None = None, *, cut: bool = False) -> Segment:
    return Segment(token_ids=some_ids(length, seed), position=position, cut=cut)


def reused(
    module_id: str, piece: int = 0, *, link: int | None = 0, position: int | None = None
) -> Segment:
    return Segment(module_id=module_id, piece=piece, link_tokens=link, position=position)


def prompt(
    name: str, *segments: Segment, max_tokens: int | None = 4, n: int = 1, salt: str = ""
) -> Request:
    return Request(
        request_id=name,
        segments=segments,
        sampling=SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True, n=n),
        salt=salt,
    )


def encode(module_id: str, *, salt: str = "") -> Request:
    return Request(
        request_id=f"encode {module_id} {salt}",
        segments=(Segment(encodes=module_id),),
        sampling=SamplingParams(max_tokens=0),
        request_class=RequestClass.INGEST,
        salt=salt,
    )


def with_modules(engine: RecordedEngine, modules: Mapping[str, Pieces]) -> RecordedEngine:
    for module_id, pieces in modules.items():
        engine.open_module(module_id, pieces)
    return engine


def assert_equals_dense_pass(
    engine: RecordedEngine,
    model: DenseModel,
    modules: Mapping[str, Pieces],
    *requests: Request,
    tolerance: float = 2e-4,
    documents: Mapping[str, tuple[Sequence[int], Sequence[int]]] = MappingProxyType({}),
) -> None:
    """Assert that all logits that were sampled from equal those of the dense twin."""
    for request in requests:
        answer = engine.answered[request.request_id].answer
        assert not engine.answered[request.request_id].errors
        twin = assembled(request.segments, modules, answer, documents)
        rows = model.logits(twin.rows)[twin.own]
        sampled = engine.logits[request.request_id, 0]
        assert sampled, "nothing was sampled"
        for own_tokens, row in sampled.items():
            difference = float((row - rows[own_tokens - 1]).abs().max())
            assert difference < tolerance, (request.request_id, own_tokens, difference)
