"""From the fields `prompt_cache` and `reuse` of a request to what a conversation begins with."""

from api.errors import ApiError
from api.library import Entry, Library
from api.opening import NoOpening, Opening, PromptOpening, SchemaOpening
from api.prompt_library import PromptLibrary
from api.schema_library import SchemaLibrary
from api.wire import PromptCache
from longctx.client import EngineClient
from longctx.prompt import FilePart
from prompt_cache.level import EXACT, Level, parse_level


class Openings:
    def __init__(
        self,
        schemas: SchemaLibrary,
        prompts: PromptLibrary,
        library: Library,
        engine: EngineClient,
        *,
        level: Level,
    ) -> None:
        """`level`: of requests that name none."""
        self._schemas = schemas
        self._prompts = prompts
        self._library = library
        self._engine = engine
        self._level = level

    def of(self, wanted: PromptCache | None, tenant: str) -> tuple[Opening, list[Entry]]:
        """And the files in it. Raises ApiError: 404 for an unknown prompt, schema or file, 400 for
        a schema that cannot be used; and SchemaError for what is no level."""
        if wanted is None:
            return NoOpening(), []
        if wanted.prompt is not None:
            return self._prompt(wanted.prompt, tenant)
        assert wanted.schema_name is not None
        entry = self._schemas.find(tenant, wanted.schema_name, param="prompt_cache.schema")
        self._schemas.check(entry)
        level, reason = self._level, "the server's default"
        if wanted.level is not None:
            level = parse_level(wanted.level, param="prompt_cache.level")
            reason = "as asked for"
        opening = SchemaOpening(
            self._schemas,
            entry,
            tuple(wanted.modules or ()),
            dict(wanted.parameters or {}),
            level,
            reason,
        )
        return opening, []

    def reuse(self, text: str | None) -> Level:
        """Of a file. Raises SchemaError for what is no level, ApiError where it cannot be had."""
        if text is None:
            return EXACT
        level = parse_level(text, param="reuse")
        info = self._engine.info
        if level != EXACT and not info.shiftable:
            raise ApiError(
                400,
                f"this model's cached text cannot be used at another position: "
                f"{info.shiftable_reason}; leave reuse out, or set it to exact",
                param="reuse",
                code="unsupported_value",
            )
        return level

    def _prompt(self, name: str, tenant: str) -> tuple[Opening, list[Entry]]:
        entry = self._prompts.find(tenant, name, param="prompt_cache.prompt")
        files = [
            self._library.find(tenant, file_id, param="prompt_cache.prompt")
            for file_id in entry.record.file_ids
        ]
        parts = tuple(FilePart(f.document.id, f.document.filename) for f in files)
        return PromptOpening(entry, parts), files
