"""Resolves the fields `prompt_cache` and `reuse` of a request to what a conversation begins with.

A level of exactness is refused where the gate found that it costs this model too much
(`longctx/quality/level_gate.py`), unless the server was told to force it.
"""

import asyncio

from api.completions.preamble import Preamble, PromptPreamble, SchemaPreamble
from api.files.document import Document
from api.files.document_library import DocumentLibrary
from api.http.bodies import PromptCache
from api.http.errors import ApiError
from api.stored_prompts.prompt_library import PromptLibrary
from api.stored_prompts.schema_library import SchemaLibrary
from longctx.process.client import EngineClient
from longctx.request import LevelVerdict
from longctx.text.chat_template import FilePart
from prompt_cache.level import EXACT, Level, parse_level


class PreambleResolver:
    """Finds schemas, prompts and files, and asks the gate about levels, once for each level."""

    def __init__(
        self,
        schemas: SchemaLibrary,
        prompts: PromptLibrary,
        library: DocumentLibrary,
        engine: EngineClient,
        *,
        level: Level,
        force_level: bool,
    ) -> None:
        """Requests that name no level get `level`. `force_level`: none is measured or refused."""
        self._schemas = schemas
        self._prompts = prompts
        self._library = library
        self._engine = engine
        self._level = level
        self._force_level = force_level
        self._verdicts: dict[Level, LevelVerdict] = {}
        self._judging = asyncio.Lock()

    async def resolve(
        self, wanted: PromptCache | None, tenant: str
    ) -> tuple[Preamble, list[Document]]:
        """Returns the preamble that a request asks for, and the files in it.

        Raises ApiError: 404 for an unknown prompt, schema or file, 400 for a schema that cannot be
        used; and SchemaError for what is no level.
        """
        if wanted is None:
            return Preamble(), []
        if wanted.prompt is not None:
            return self._prompt(wanted.prompt, tenant)
        assert wanted.schema_name is not None
        stored = self._schemas.find(tenant, wanted.schema_name, param="prompt_cache.schema")
        self._schemas.check(stored)
        level, reason = await self._chosen(wanted.level)
        preamble = SchemaPreamble(
            self._schemas,
            stored,
            tuple(wanted.modules or ()),
            dict(wanted.parameters or {}),
            level,
            reason,
        )
        return preamble, []

    async def reuse(self, text: str | None) -> Level:
        """Returns the level at which a file is reused. Raises SchemaError for what is no level, and
        ApiError where this model cannot have it."""
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
        await self._allowed(level, "reuse")
        return level

    async def _chosen(self, text: str | None) -> tuple[Level, str]:
        """Returns the level at which a schema's modules are used, and why that one."""
        if text is not None:
            level = parse_level(text, param="prompt_cache.level")
            return level, await self._allowed(level, "prompt_cache.level")
        verdict = await self._verdict(self._level)
        if verdict.passed:
            return self._level, f"the server's default; {verdict.reason}"
        return EXACT, f"the server's default, {self._level.name}, is not used: {verdict.reason}"

    async def _allowed(self, level: Level, param: str) -> str:
        """Returns the gate's reason to allow the level. Raises ApiError where it is refused."""
        verdict = await self._verdict(level)
        if not verdict.passed:
            raise ApiError(
                400,
                f"level {level.name} is refused for this model: {verdict.reason}; ask for exact or "
                "a link:K with more tokens, or start the server with --force-level",
                param=param,
                code="level_refused",
            )
        return f"as asked for; {verdict.reason}"

    async def _verdict(self, level: Level) -> LevelVerdict:
        if level == EXACT:
            return LevelVerdict(level=level.name, passed=True, reason="it is exact")
        if self._force_level:
            return LevelVerdict(level=level.name, passed=True, reason="forced, not measured")
        async with self._judging:  # the first time takes a while
            if level not in self._verdicts:
                self._verdicts[level] = await self._engine.judge_level(level)
        return self._verdicts[level]

    def _prompt(self, name: str, tenant: str) -> tuple[Preamble, list[Document]]:
        stored = self._prompts.find(tenant, name, param="prompt_cache.prompt")
        files = [
            self._library.find(tenant, file_id, param="prompt_cache.prompt")
            for file_id in stored.record.file_ids
        ]
        parts = tuple(FilePart(file.id, file.record.filename) for file in files)
        return PromptPreamble(stored, parts), files
