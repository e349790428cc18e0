"""Preambles: what a conversation begins with before its own messages.

That is nothing, a named prompt, or modules of a schema.
"""

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass

from api.completions.waiting import Waitable
from api.http.errors import ApiError
from api.http.sse import JSONObject
from api.stored_prompts.module_keeper import StoredModules
from api.stored_prompts.prompt_library import StoredPrompt
from api.stored_prompts.schema_library import SchemaLibrary, StoredSchema, segments_of
from longctx.errors import InvalidRequest
from longctx.request import Segment
from longctx.text.chat_template import FilePart, Message, PromptPiece, frames_of
from prompt_cache.errors import SchemaError
from prompt_cache.level import Level

REPORT_SECONDS = 1.0  # a stream that waits tells so this often


@dataclass(frozen=True, slots=True)
class SplitPrompt:
    """Holds a rendered conversation: the preamble as segments, and the pieces that follow it."""

    segments: tuple[Segment, ...]
    rest: tuple[PromptPiece, ...]
    tokens: int = 0  # of `segments`
    gap_tokens: int = 0  # positions left out among them


class Preamble(Waitable):
    """Begins a conversation with nothing, unless a subclass says otherwise.

    It is used in this order: `messages`, `waiting`, `split`.
    """

    @property
    def date(self) -> str | None:
        """The date that the template takes for today; None stands for the first file's or today."""
        return None

    @property
    def prompt_cache(self) -> JSONObject:
        """The answer's object `prompt_cache`: how the preamble was used. Without one, empty."""
        return {}

    @property
    def sources(self) -> tuple[str, ...]:
        """The ids of stored modules whose text is in the prompt, as `Request.sources`."""
        return ()

    def messages(self, messages: Sequence[Message]) -> list[Message]:
        """Puts the preamble before the messages. Raises ApiError where they do not go together."""
        return list(messages)

    async def split(self, pieces: tuple[PromptPiece, ...]) -> SplitPrompt:
        """Splits those messages, rendered as `pieces`. Raises ApiError and InvalidRequest."""
        return SplitPrompt((), pieces)


@dataclass(slots=True)
class PromptPreamble(Preamble):
    """Begins with a named prompt, as messages: its blocks are found like those of any prefix."""

    stored: StoredPrompt
    files: tuple[FilePart, ...]

    @property
    def date(self) -> str | None:
        return self.stored.record.date

    @property
    def prompt_cache(self) -> JSONObject:
        return {"prompt": self.stored.record.name}

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.stored.modules.id,)

    def messages(self, messages: Sequence[Message]) -> list[Message]:
        record = self.stored.record
        first, *others = messages
        if first.role != "user":
            raise _begins_otherwise(f"prompt {record.name!r}", first.role, "its text")
        system = [] if record.system is None else [Message("system", (record.system,))]
        return [*system, Message("user", (*self.files, *first.content)), *others]

    async def split(self, pieces: tuple[PromptPiece, ...]) -> SplitPrompt:
        self.stored.uses += 1
        return SplitPrompt((), pieces)


@dataclass(slots=True)
class SchemaPreamble(Preamble):
    """Begins with modules of a schema, with arguments, at a level of exactness."""

    library: SchemaLibrary
    stored: StoredSchema
    modules: tuple[str, ...]
    arguments: dict[str, str]
    level: Level
    reason: str  # why that level

    @property
    def date(self) -> str | None:
        return self.stored.record.date

    @property
    def prompt_cache(self) -> JSONObject:
        return {
            "schema": self.stored.record.name,
            "modules": list(self.modules),
            "level": self.level.name,
            "level_reason": self.reason,
        }

    @property
    def sources(self) -> tuple[str, ...]:
        return () if self._modules is None else (self._modules.id,)

    @property
    def is_ready(self) -> bool:
        modules = self._modules
        return modules is None or modules.opened.is_set()

    async def waiting(self) -> AsyncGenerator[JSONObject, None]:
        while (modules := self._modules) is not None and not modules.opened.is_set():
            if not await modules.wait_opened(timeout_seconds=REPORT_SECONDS):
                yield {"waiting_for": {"schema": self.stored.record.name}}

    def messages(self, messages: Sequence[Message]) -> list[Message]:
        name = f"schema {self.stored.record.name!r}"
        first, *others = messages
        if first.role == "system":
            raise _begins_otherwise(name, first.role, "the schema, as <system>")
        text = self.stored.last_text
        if text is None:
            return [*self.stored.preamble(), *messages]
        if first.role != "user":
            raise _begins_otherwise(name, first.role, "a role of the schema")
        return [*self.stored.preamble(), Message("user", (text, *first.content)), *others]

    async def split(self, pieces: tuple[PromptPiece, ...]) -> SplitPrompt:
        # The schema may have been deleted or replaced while it was waited for.
        record = self.stored.record
        stored = self.library.find(record.tenant, record.name, param="prompt_cache.schema")
        self.stored = stored
        try:
            assembly = await self.library.assemble(stored, self.modules, self.arguments)
        except SchemaError as error:
            raise InvalidRequest(str(error), param=f"prompt_cache.{error.param}") from error
        frames, rest = frames_of(pieces)
        if frames != stored.frames:
            raise InvalidRequest(
                "the model's chat template writes something else around this conversation than "
                f"around the schema {stored.record.name!r} alone, so its modules do not fit; use "
                "messages that the template takes as they are",
                param="messages",
            )
        tokens = len(assembly.token_ids)
        gaps = assembly.end - tokens if self.level.link_tokens is not None else 0
        return SplitPrompt(segments_of(stored, assembly, self.level), rest, tokens, gaps)

    @property
    def _modules(self) -> StoredModules | None:
        return self.stored.modules


def _begins_otherwise(what: str, role: str, where: str) -> ApiError:
    return ApiError(
        400,
        f"the conversation begins with {what}, so the first message must be the user's, not the "
        f"{role}'s; put that text into {where}, or leave it out",
        param="messages",
        code="invalid_value",
    )
