"""What a conversation begins with before its own messages: nothing, a named prompt, a schema."""

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from api.completions.reply import JSONObject
from api.http.errors import ApiError
from api.stored_prompts.module_keeper import StoredModules
from api.stored_prompts.prompt_library import StoredPrompt
from api.stored_prompts.schema_library import SchemaLibrary, StoredSchema, segments_of
from longctx.errors import InvalidRequest
from longctx.request import Segment
from longctx.text.chat_template import FilePart, Message, PromptPiece, frames_of
from prompt_cache.errors import SchemaError
from prompt_cache.level import Level

REPORT_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class SplitPrompt:
    """Segments that a prompt begins with, what of it was rendered and follows them."""

    segments: tuple[Segment, ...]
    rest: tuple[PromptPiece, ...]
    tokens: int = 0  # of `segments`
    gap_tokens: int = 0  # positions left out among them


class Preamble(Protocol):
    @property
    def date(self) -> str | None:
        """The template's today; None: the files', or today."""
        ...

    @property
    def prompt_cache(self) -> JSONObject:
        """For the answer."""
        ...

    @property
    def is_ready(self) -> bool: ...

    def waiting(self) -> AsyncGenerator[JSONObject, None]:
        """What is waited for, now and then."""
        ...

    def messages(self, messages: Sequence[Message]) -> list[Message]:
        """With what the conversation begins with. Raises ApiError where they do not go together."""
        ...

    async def split(self, pieces: tuple[PromptPiece, ...]) -> SplitPrompt:
        """`pieces`: of those messages, rendered. Raises ApiError and InvalidRequest."""
        ...


@dataclass(slots=True)
class NoPreamble:
    date: str | None = None
    prompt_cache: JSONObject = field(default_factory=dict)
    is_ready: bool = True

    async def waiting(self) -> AsyncGenerator[JSONObject, None]:
        return
        yield

    def messages(self, messages: Sequence[Message]) -> list[Message]:
        return list(messages)

    async def split(self, pieces: tuple[PromptPiece, ...]) -> SplitPrompt:
        return SplitPrompt((), pieces)


@dataclass(slots=True)
class PromptPreamble:
    """The named prompt's text as messages: its blocks are found like those of any prefix."""

    entry: StoredPrompt
    files: tuple[FilePart, ...]
    is_ready: bool = True

    @property
    def date(self) -> str | None:
        return self.entry.record.date

    @property
    def prompt_cache(self) -> JSONObject:
        return {"prompt": self.entry.record.name}

    async def waiting(self) -> AsyncGenerator[JSONObject, None]:
        return
        yield

    def messages(self, messages: Sequence[Message]) -> list[Message]:
        record = self.entry.record
        first, *others = messages
        if first.role != "user":
            raise _begins_otherwise(f"prompt {record.name!r}", first.role, "its text")
        system = [] if record.system is None else [Message("system", (record.system,))]
        return [*system, Message("user", (*self.files, *first.content)), *others]

    async def split(self, pieces: tuple[PromptPiece, ...]) -> SplitPrompt:
        self.entry.uses += 1
        return SplitPrompt((), pieces)


@dataclass(slots=True)
class SchemaPreamble:
    library: SchemaLibrary
    entry: StoredSchema
    modules: tuple[str, ...]
    arguments: dict[str, str]
    level: Level
    reason: str  # why that level

    @property
    def date(self) -> str | None:
        return self.entry.record.date

    @property
    def prompt_cache(self) -> JSONObject:
        return {
            "schema": self.entry.record.name,
            "modules": list(self.modules),
            "level": self.level.name,
            "level_reason": self.reason,
        }

    @property
    def is_ready(self) -> bool:
        modules = self._modules
        return modules is None or modules.opened.is_set()

    async def waiting(self) -> AsyncGenerator[JSONObject, None]:
        while (modules := self._modules) is not None and not modules.opened.is_set():
            if not await modules.wait_opened(timeout_seconds=REPORT_SECONDS):
                yield {"waiting_for": {"schema": self.entry.record.name}}

    def messages(self, messages: Sequence[Message]) -> list[Message]:
        name = f"schema {self.entry.record.name!r}"
        first, *others = messages
        if first.role == "system":
            raise _begins_otherwise(name, first.role, "the schema, as <system>")
        place = self.entry.goes_on
        if place is None:
            return [*self.entry.preamble(), *messages]
        if first.role != "user":
            raise _begins_otherwise(name, first.role, "a role of the schema")
        return [*self.entry.preamble(), Message("user", (place, *first.content)), *others]

    async def split(self, pieces: tuple[PromptPiece, ...]) -> SplitPrompt:
        record = self.entry.record  # may have been deleted or replaced while it was waited for
        entry = self.library.find(record.tenant, record.name, param="prompt_cache.schema")
        self.entry = entry
        try:
            assembly = await self.library.assemble(entry, self.modules, self.arguments)
        except SchemaError as error:
            raise InvalidRequest(str(error), param=f"prompt_cache.{error.param}") from error
        frames, rest = frames_of(pieces)
        if frames != entry.frames:
            raise InvalidRequest(
                "the model's chat template writes something else around this conversation than "
                f"around the schema {entry.record.name!r} alone, so its modules do not fit; use "
                "messages that the template takes as they are",
                param="messages",
            )
        tokens = len(assembly.token_ids)
        gaps = assembly.end - tokens if self.level.link_tokens is not None else 0
        return SplitPrompt(segments_of(entry, assembly, self.level), rest, tokens, gaps)

    @property
    def _modules(self) -> StoredModules | None:
        return self.entry.modules


def _begins_otherwise(what: str, role: str, where: str) -> ApiError:
    return ApiError(
        400,
        f"the conversation begins with {what}, so the first message must be the user's, not the "
        f"{role}'s; put that text into {where}, or leave it out",
        param="messages",
        code="invalid_value",
    )
