"""`/v1/messages`: Anthropic's Messages API, on the same conversations as `/v1/chat/completions`."""

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from api.anthropic.bodies import CountTokensRequest, MessagesRequest
from api.anthropic.marks import Mark, MarkedConversation
from api.anthropic.question import NAMES, Translator, chat_request
from api.anthropic.reply import MessageReply
from api.anthropic.writer import BlockWriter
from api.completions.answering import Answering
from api.completions.chat import ChatRoutes
from api.completions.conversation import Conversation
from api.http.auth import tenant_of
from api.http.errors import ApiError, in_words_of, renamed
from api.http.message_bodies import FileReference, Message
from api.http.read_body import read_json
from api.http.refusals import anthropic_body
from api.http.sse import EventForm, EventStream, JSONObject, encode_named_event, while_connected

# With the user's turn that follows, templates write all of a system's.
ANYTHING = Message(role="user", content="?")


def _failure(error: ApiError) -> JSONObject:
    return anthropic_body(renamed(error, NAMES))


EVENTS = EventForm(
    encode=encode_named_event,
    ping=b'event: ping\ndata: {"type": "ping"}\n\n',
    last=b"",
    failure=_failure,
)


class MessageRoutes:
    """The endpoints of `/v1/messages`. Errors have Anthropic's shape there (`refusals.py`)."""

    def __init__(self, chat: ChatRoutes, *, ping_seconds: float) -> None:
        self.chat = chat
        self.ping_seconds = ping_seconds

    async def create(self, request: Request) -> Response:
        """Answers Anthropic's messages, in one piece or as server-sent events."""
        wanted = await read_json(request, MessagesRequest)
        with in_words_of(NAMES):
            return await self._create(request, wanted)

    async def count_tokens(self, request: Request) -> Response:
        """Counts the tokens of Anthropic's messages, also those of their documents."""
        wanted = await read_json(request, CountTokensRequest)
        with in_words_of(NAMES):
            answering, _ = await self._asked(wanted, tenant_of(request))
            count = await while_connected(request, answering.count())
        return JSONResponse({"input_tokens": count})

    async def _create(self, request: Request, wanted: MessagesRequest) -> Response:
        answering, marked = await self._asked(wanted, tenant_of(request))
        names = [tool.name for tool in answering.wanted.offered]
        form = self.chat.tokenizer.tool_form if names else None
        reply = MessageReply(answering, marked, BlockWriter(form, names))
        answering.check()
        if not wanted.stream:
            return JSONResponse(await while_connected(request, reply.whole()))
        await answering.prepare()
        return EventStream(reply.events(), ping_seconds=self.ping_seconds, form=EVENTS)

    async def _asked(
        self, wanted: CountTokensRequest, tenant: str
    ) -> tuple[Answering, MarkedConversation]:
        async def find_file(reference: FileReference) -> str:
            return (await self.chat.attachments.find(tenant, reference)).id

        question = await Translator(find_file).question(wanted)
        answering = await self.chat.ask(chat_request(wanted, question.messages), tenant)
        conversation = answering.prompt_source
        assert isinstance(conversation, Conversation)
        marks = []
        for until, control in question.marks:
            only_system = all(message.role == "system" for message in until)
            read, _ = await self.chat.read([*until, ANYTHING] if only_system else until, tenant)
            marks.append(Mark(read, control))
        marked = MarkedConversation(conversation, marks, self.chat.retention, tenant)
        answering.prompt_source = marked
        return answering, marked
