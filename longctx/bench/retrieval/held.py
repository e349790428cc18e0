"""How an engine holds a text that is asked about: as one document, or as a row of modules."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from longctx.bench.module_text import TextModule, asking, assembled, cut_text
from longctx.bench.timing import Stopwatch
from longctx.llm import KEPT, LLM
from longctx.request import Piece, RequestClass, Segment
from longctx.text.chat_template import ChatPrompts, FilePart, Message
from prompt_cache.level import EXACT, Level

MODULES = 4  # of one text: nearly nothing comes before the first, so one alone would lose little
TITLE = "document"


@dataclass(frozen=True, slots=True)
class Taken:
    """What reading a text took: its tokens, and those that were in the cache already."""

    tokens: int
    cached_tokens: int


class Held(Protocol):
    """One text in one engine, from `open` or `read` to `close`."""

    def open(self) -> None:
        """Make the text known to the engine; nothing of it is computed."""

    def read(self) -> Taken:
        """Make it known, and compute it."""

    def segments(self, question: str) -> tuple[Segment, ...]:
        """Make the prompt that asks about it."""

    def close(self) -> None:
        """Forget it, and erase what was computed of it."""


class HeldDocument:
    """A text as users upload it."""

    def __init__(self, llm: LLM, prompts: ChatPrompts, text: str) -> None:
        self._llm, self._prompts, self._text = llm, prompts, text
        self._part = FilePart("unread", TITLE)

    def open(self) -> None:
        engine = self._llm.engine
        token_ids = np.array(engine.tokenizer.encode(self._text), dtype=np.int32)
        engine.open_document(self._part.document_id, token_ids)

    def read(self) -> Taken:
        document = self._llm.document_from_text(self._text, title=TITLE)
        self._part = document.part
        return Taken(document.tokens, document.usage.cached_tokens)

    def segments(self, question: str) -> tuple[Segment, ...]:
        return self._prompts.render([Message("user", (self._part, question))])

    def close(self) -> None:
        self._llm.close_document(self._part.document_id)


class HeldModules:
    """A text as a prompt schema has it: modules at their positions, used at one level.

    At `exact` they are computed where they stand, as plain text.
    """

    def __init__(
        self, llm: LLM, prompts: ChatPrompts, text: str, level: Level, *, name: str
    ) -> None:
        """`name` tells the modules from those of any other text that is open."""
        self._llm, self._prompts, self._level = llm, prompts, level
        self._opening = prompts.document_prefix(None, title=TITLE)
        self._pieces: dict[TextModule, Piece] = {}
        position = len(self._opening)
        for number, part in enumerate(cut_text(text, MODULES)):
            token_ids = tuple(llm.engine.tokenizer.encode(part))
            module = TextModule(f"{name}, module {number}", len(token_ids))
            self._pieces[module] = Piece(token_ids=token_ids, position=position)
            position += len(token_ids)

    def open(self) -> None:
        for module, piece in self._pieces.items():
            self._llm.engine.open_module(module.name, [piece])

    def read(self) -> Taken:
        self.open()
        if self._level == EXACT:
            parts = assembled(tuple(self._pieces), EXACT, len(self._opening))
            opening = [Segment(token_ids=self._opening)] if self._opening else []
            prompts = [(*opening, *parts)]
        else:
            prompts = [(Segment(encodes=module.name),) for module in self._pieces]
        # As what is uploaded: it goes to the disk, however short it is
        stopwatch, ingest = Stopwatch(self._llm.engine), RequestClass.INGEST
        answers = [stopwatch.ask(each, KEPT, request_class=ingest) for each in prompts]
        cached = sum(answer.usage.cached_tokens for answer in answers)
        return Taken(sum(module.tokens for module in self._pieces), cached)

    def segments(self, question: str) -> tuple[Segment, ...]:
        return asking(self._prompts, tuple(self._pieces), self._level, question)

    def close(self) -> None:
        for module in self._pieces:
            self._llm.close_module(module.name)
