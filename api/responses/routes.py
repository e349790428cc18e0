"""`/v1/responses`: OpenAI's Responses API, on the same conversations as `/v1/chat/completions`.

A response that is stored can be asked for again, also after a restart, and gone on from.
"""

import json
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from api.completions.answering import Answering
from api.completions.chat import ChatRoutes
from api.completions.logprobs import ChatLogprobs
from api.http.auth import tenant_of
from api.http.errors import ApiError, api_error, in_words_of, invalid_body, logger, renamed
from api.http.message_bodies import FileReference, RequestBody, neutral
from api.http.read_body import read_json
from api.http.sse import EventForm, EventStream, JSONObject, encode_named_event, while_connected
from api.responses.bodies import Included, InputTokensRequest, ResponseQuestion, ResponseRequest
from api.responses.items import FunctionCallOutputItem, InputFile, InputText, Item, OutputText
from api.responses.question import NAMES, STORED, chat_request, items_of, kept, new_id
from api.responses.response import ResponseReply
from api.responses.writer import ItemWriter
from api.stored_responses.library import StoredResponses
from api.stored_responses.records import ResponseRecord


def _failure(error: ApiError) -> JSONObject:
    """Return the event of a stream that fails before its response is begun, after a ping."""
    told = renamed(error, NAMES)
    said = {"code": told.code, "message": told.message, "param": told.param}
    return {"type": "error", **said, "sequence_number": 0}


EVENTS = EventForm(encode=encode_named_event, last=b"", failure=_failure)


class RetrieveQuery(RequestBody):
    include: list[Included] | None = None  # what can be included always is
    include_obfuscation: str | None = None  # harmless
    stream: Annotated[Any, neutral(None, "false")] = None
    starting_after: Annotated[Any, neutral(None)] = None


class ItemsQuery(RequestBody):
    after: str | None = None
    include: list[Included] | None = None
    limit: Annotated[int, Field(ge=1, le=100, strict=False)] = 20
    order: Literal["asc", "desc"] = "desc"


class ResponseRoutes:
    """The endpoints of `/v1/responses`. Each tenant sees only its own responses."""

    def __init__(self, chat: ChatRoutes, stored: StoredResponses, *, ping_seconds: float) -> None:
        self.chat = chat
        self.stored = stored
        self.ping_seconds = ping_seconds

    async def create(self, request: Request) -> Response:
        """Answers a list of items, in one piece or as server-sent events, and stores the answer."""
        wanted = await read_json(request, ResponseRequest)
        tenant = tenant_of(request)
        with in_words_of(NAMES):
            return await self._create(request, wanted, tenant)

    async def input_tokens(self, request: Request) -> Response:
        """Counts the tokens of a response's input, also those of its files."""
        wanted = await read_json(request, InputTokensRequest)
        tenant = tenant_of(request)
        with in_words_of(NAMES):
            _, _, answering = await self._asked(wanted, tenant)
            count = await while_connected(request, answering.count())
        return JSONResponse({"object": "response.input_tokens", "input_tokens": count})

    async def retrieve(self, request: Request) -> Response:
        """Returns a stored response."""
        _query(request, RetrieveQuery)
        record = await self._find(request)
        return Response(record.response, media_type="application/json")

    async def input_items(self, request: Request) -> Response:
        """Lists the input items of a stored response, page by page: its own, not those of the
        responses that it goes on from."""
        query = _query(request, ItemsQuery)
        record = await self._find(request)
        items: list[JSONObject] = json.loads(record.input)
        if query.order == "desc":
            items.reverse()
        if query.after is not None:
            ids = [item["id"] for item in items]
            if query.after not in ids:
                raise ApiError(404, f"there is no item {query.after!r}", param="after")
            items = items[ids.index(query.after) + 1 :]
        page = items[: query.limit]
        return JSONResponse(
            {
                "object": "list",
                "data": page,
                "has_more": len(items) > len(page),
                "first_id": page[0]["id"] if page else None,
                "last_id": page[-1]["id"] if page else None,
            }
        )

    async def delete(self, request: Request) -> Response:
        """Deletes a stored response, with what was computed for it; `longctx` is a receipt, as that
        of a file."""
        name = request.path_params["response_id"]
        receipt = await self.stored.delete(tenant_of(request), name)
        told = {"id": name, "object": "response", "deleted": True, "longctx": receipt.body()}
        return JSONResponse(told)

    async def _find(self, request: Request) -> ResponseRecord:
        return await self.stored.find(tenant_of(request), request.path_params["response_id"])

    async def _create(self, request: Request, wanted: ResponseRequest, tenant: str) -> Response:
        own, thread, answering = await self._asked(wanted, tenant)
        name = new_id("resp")

        async def store(response: JSONObject) -> JSONObject:
            if not wanted.is_stored:
                return response
            record = ResponseRecord(
                id=name,
                tenant=tenant,
                created_at=response["created_at"],
                previous=wanted.previous_response_id,
                thread=thread,
                response=json.dumps(response),
                input=json.dumps(kept(own)),
            )
            try:
                await self.stored.add(record)
            except Exception as error:  # the answer is complete, and not to be taken back
                logger.error("storing %s failed", name, exc_info=error)
                why = api_error(error).message
                told = {**response["longctx"], "not_stored": why}
                return {**response, "store": False, "longctx": told}
            return response

        logprobs = ChatLogprobs(self.chat.tokenizer) if wanted.tells_logprobs else None
        names = [] if wanted.tool_choice == "none" else [each.name for each in wanted.tools or ()]
        form = self.chat.tokenizer.tool_form if names else None
        writer = ItemWriter(form, names, logprobs)
        reply = ResponseReply(name, wanted, answering, writer, store)
        answering.check()
        if not wanted.stream:
            return JSONResponse(await while_connected(request, reply.whole()))
        await answering.prepare()
        return EventStream(reply.events(), ping_seconds=self.ping_seconds, form=EVENTS)

    async def _asked(
        self, wanted: ResponseQuestion, tenant: str
    ) -> tuple[list[Item], str, Answering]:
        """Returns the request's own items, their thread, and the question, ready to be asked."""
        before: list[Item] = []
        thread: str | None = None
        if wanted.previous_response_id is not None:
            chain = await self.stored.chain(tenant, wanted.previous_response_id)
            thread = chain[-1].thread
            for record in chain:
                before += STORED.validate_json(record.input)
                before += _output(record)
        own = [await self._with_files_found(item, tenant) for item in items_of(wanted)]
        stores = isinstance(wanted, ResponseRequest) and wanted.is_stored
        sources = () if thread is None and not stores else (thread or self.stored.new_thread(),)
        asked = chat_request(wanted, [*before, *own])
        answering = await self.chat.ask(asked, tenant, sources=sources)
        return own, sources[0] if sources else "", answering

    async def _with_files_found(self, item: Item, tenant: str) -> Item:
        """Replaces files that came inside an item by their ids."""
        name = "output" if isinstance(item, FunctionCallOutputItem) else "content"
        parts = getattr(item, name, "")
        if isinstance(parts, str):
            return item
        return item.model_copy(update={name: [await self._found(part, tenant) for part in parts]})

    async def _found(
        self, part: InputText | InputFile | OutputText, tenant: str
    ) -> InputText | InputFile | OutputText:
        if not isinstance(part, InputFile) or part.file_data is None:
            return part
        reference = FileReference(file_data=part.file_data, filename=part.filename)
        document = await self.chat.attachments.find(tenant, reference)
        return InputFile(type="input_file", file_id=document.id, filename=document.record.filename)


def _output(record: ResponseRecord) -> list[Item]:
    try:
        return STORED.validate_python(json.loads(record.response)["output"])
    except ValidationError as error:  # the model is free to call a function with anything
        raise ApiError(
            400,
            f"response {record.id!r} cannot be gone on from: it calls a function with arguments "
            "that are no JSON object; send the conversation as input, without that call",
            param="previous_response_id",
        ) from error


def _query(request: Request, kind: type[Any]) -> Any:
    """Reads the query as `kind`. Raises ApiError 400 for what is not known."""
    given = request.query_params
    parameters: JSONObject = {name: given[name] for name in given if name.rstrip("[]") == name}
    included = [*given.getlist("include"), *given.getlist("include[]")]
    unknown = [name for name in given if name.rstrip("[]") != name and name != "include[]"]
    parameters |= dict.fromkeys(unknown)
    if included:
        parameters["include"] = included
    try:
        return kind.model_validate(parameters)
    except ValidationError as error:
        raise invalid_body(error, parameters) from None
