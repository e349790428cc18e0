"""`/v1beta/cachedContents`: contents that are kept computed until they expire."""

import datetime
import secrets
import time
from dataclasses import replace
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from api.completions.attachments import Attachments
from api.completions.chat import ChatRoutes
from api.gemini.bodies import CachedContentRequest, Content, ExpiryRequest, FileData
from api.gemini.content_routes import cached_name, model_name
from api.gemini.paging import page_of
from api.gemini.questions import check_media, filename_of, messages, standard_base64, tool_fields
from api.gemini.times import expiry, written
from api.http.auth import tenant_of
from api.http.bodies import ChatRequest
from api.http.errors import ApiError
from api.http.message_bodies import FileReference
from api.http.read_body import read_json
from api.http.sse import JSONObject, while_connected
from api.stored_prompts.cached_contents import CachedContent, CachedContents
from api.stored_prompts.records import CachedRecord

TTL_SECONDS = 3600.0  # where nothing else is asked for, as Google has it
PAGE_ITEMS = 100
MOST_PAGE_ITEMS = 1000
CHANGEABLE = {"ttl": "ttl", "expire_time": "expire_time", "expireTime": "expire_time"}


class CachedRoutes:
    """The endpoints of cached contents. Each tenant sees only its own."""

    def __init__(
        self, chat: ChatRoutes, attachments: Attachments, cached_contents: CachedContents
    ) -> None:
        self.chat = chat
        self.attachments = attachments
        self.cached_contents = cached_contents

    async def create(self, request: Request) -> Response:
        """Keeps contents, a system instruction and tools, and has them computed. Waits until files
        in them are read, not until they are computed."""
        wanted = await read_json(request, CachedContentRequest)
        cached = await while_connected(request, self._create(wanted, tenant_of(request)))
        return JSONResponse(_resource(cached))

    async def page(self, request: Request) -> Response:
        """Lists the caller's cached contents, the youngest first, page by page."""
        found = tuple(self.cached_contents.of_tenant(tenant_of(request)))
        page, token = page_of(
            request,
            found,
            lambda cached: (cached.record.created_at, cached.record.name),
            default=PAGE_ITEMS,
            most=MOST_PAGE_ITEMS,
        )
        body: JSONObject = {"cachedContents": [_resource(cached) for cached in page]}
        return JSONResponse(body if token is None else {**body, "nextPageToken": token})

    async def retrieve(self, request: Request) -> Response:
        """Returns a cached content's object, which tells when it expires."""
        return JSONResponse(_resource(self._find(request)))

    async def update(self, request: Request) -> Response:
        """Gives a cached content a new end, by `ttl` or `expireTime`."""
        cached = self._find(request)
        wanted = await read_json(request, ExpiryRequest)
        record = cached.record
        if wanted.name is not None and cached_name(wanted.name) != record.name:
            raise ApiError(400, "name is not that of the path; leave it out", param="name")
        given = {"ttl": wanted.ttl, "expire_time": wanted.expire_time}
        mask = request.query_params.get("updateMask", request.query_params.get("update_mask"))
        if mask is not None:
            given = _masked(given, mask)
        moment = expiry(given["ttl"], given["expire_time"])
        if moment is None:
            raise ApiError(400, "either ttl or expireTime is required", param="ttl")
        await self.cached_contents.expire_at(cached, moment)
        return JSONResponse(_resource(self._find(request)))

    async def delete(self, request: Request) -> Response:
        """Deletes a cached content, with what is computed of it in every tier, and the files that
        came inside it."""
        cached = self._find(request)
        await self.cached_contents.remove(cached.record.tenant, cached.record.name)
        return JSONResponse({})

    async def _create(self, wanted: CachedContentRequest, tenant: str) -> CachedContent:
        self.chat.generation.check_model(model_name(wanted.model))
        expires = expiry(wanted.ttl, wanted.expire_time)
        owned: list[str] = []
        try:
            contents = await self._with_files(wanted.contents, tenant, owned)
            return await self._keep(wanted, contents, tenant, owned, expires)
        except BaseException:
            await self.cached_contents.release(tenant, owned)
            raise

    async def _keep(
        self,
        wanted: CachedContentRequest,
        contents: list[Content],
        tenant: str,
        owned: list[str],
        expires: float | None,
    ) -> CachedContent:
        chat = ChatRequest.model_validate(
            {
                "messages": messages(contents, wanted.system_instruction),
                **tool_fields(wanted.tools, wanted.tool_config),
            }
        )
        self.chat.check_tools(chat.offered)
        said, files = await self.chat.read(chat.messages, tenant)
        now = time.time()
        record = CachedRecord(
            tenant=tenant,
            name=secrets.token_hex(12),
            created_at=now,
            updated_at=now,
            expires_at=now + TTL_SECONDS if expires is None else expires,
            model=model_name(wanted.model),
            display_name=wanted.display_name,
            # Under this date a file is computed already, where it comes first.
            date=files[0].record.date if files else datetime.date.today().isoformat(),
            messages=tuple(said),
            fields=tool_fields(wanted.tools, wanted.tool_config),
            file_ids=tuple(file.id for file in files),
            owned_file_ids=tuple(owned),
        )
        tokens = await self.cached_contents.count(record)
        return await self.cached_contents.add(replace(record, tokens=tokens))

    async def _with_files(
        self, contents: list[Content], tenant: str, owned: list[str]
    ) -> list[Content]:
        """Stores the documents that travel inside the contents, and names them in their place.

        Those that were not known before are added to `owned`: they go with the cached content.
        """
        found = []
        for content in contents:
            parts = []
            for part in content.parts:
                if (blob := part.inline_data) is not None:
                    check_media(blob.mime_type)
                    reference = FileReference(
                        file_data=f"data:{blob.mime_type};base64,{standard_base64(blob.data)}",
                        filename=blob.display_name or filename_of(blob.mime_type),
                    )
                    document, is_new = await self.attachments.keep(tenant, reference)
                    if (is_new or self.cached_contents.owns(document.id)) and (
                        document.id not in owned
                    ):
                        owned.append(document.id)
                    named = FileData(file_uri=f"files/{document.id}")
                    part = part.model_copy(update={"inline_data": None, "file_data": named})
                parts.append(part)
            found.append(content.model_copy(update={"parts": parts}))
        return found

    def _find(self, request: Request) -> CachedContent:
        return self.cached_contents.find(tenant_of(request), request.path_params["name"])


def _masked(given: dict[str, str | None], mask: str) -> dict[str, str | None]:
    """Returns what the mask names of the changes. Raises ApiError for what cannot be changed."""
    names = {name.strip() for name in mask.split(",")}
    if names == {"*"}:
        return given
    if others := sorted(names - CHANGEABLE.keys()):
        raise ApiError(
            400,
            f"updateMask names {others[0][:64]!r}; only ttl and expireTime can be changed",
            param="updateMask",
        )
    chosen = {CHANGEABLE[name] for name in names}
    return {name: value if name in chosen else None for name, value in given.items()}


def _resource(cached: CachedContent) -> dict[str, Any]:
    record = cached.record
    named = {} if record.display_name is None else {"displayName": record.display_name}
    return {
        "name": f"cachedContents/{record.name}",
        "model": f"models/{record.model}",
        **named,
        "createTime": written(record.created_at),
        "updateTime": written(record.updated_at),
        "expireTime": written(record.expires_at),
        "usageMetadata": {"totalTokenCount": record.tokens},
    }
