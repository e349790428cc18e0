"""The messages between the HTTP process and the engine process: msgpack, never pickle.

A frame is four bytes of length, little-endian, and one message. Calls that want an answer carry a
ticket; `Done` with the same ticket is the answer.
"""

from pathlib import Path
from typing import Any

import msgspec

from longctx.config import EngineConfig
from longctx.engine_info import EngineInfo
from longctx.errors import (
    ContextTooLong,
    DocumentMissing,
    EngineDied,
    InvalidRequest,
    LongctxError,
    ModelRefused,
    Overloaded,
    PeerLost,
)
from longctx.request import LevelVerdict, ModuleState, Piece, Request, RequestOutput
from prompt_cache.level import Level


class Message(msgspec.Struct, frozen=True, tag=True):
    """Any message; its class name travels with it."""


class Fault(msgspec.Struct, frozen=True):
    """A `LongctxError` on the wire."""

    kind: str
    message: str
    param: str | None = None

    @classmethod
    def of(cls, error: LongctxError) -> "Fault":
        param = error.param if isinstance(error, InvalidRequest) else None
        return cls(type(error).__name__, str(error), param)

    def error(self) -> LongctxError:
        kind = _FAULTS.get(self.kind, LongctxError)
        if issubclass(kind, InvalidRequest):
            return kind(self.message, param=self.param)
        return kind(self.message)


class RankJoined(Message, frozen=True):
    """The first word of a rank that was started by a launcher.

    `address`: where rank 0 waits for the others. `pid`: where it can be killed.
    """

    rank: int
    ranks: int
    pid: int
    address: str = ""


class LeaderAddress(Message, frozen=True):
    """The answer to `RankJoined` of another rank than 0: where rank 0 is; or why not."""

    address: str
    fault: Fault | None = None


class Start(Message, frozen=True):
    """The answer to `RankJoined` of rank 0, and the first word to an engine that is alone."""

    config: EngineConfig
    model_folder: str
    cache_dir: str


class Submit(Message, frozen=True):
    request: Request


class Abort(Message, frozen=True):
    request_id: str


class OpenDocument(Message, frozen=True):
    ticket: int
    document_id: str
    tokens: str  # file of little-endian int32 token ids
    keep: Request | None = None


class CloseDocument(Message, frozen=True):
    ticket: int
    document_id: str


class OpenModule(Message, frozen=True):
    ticket: int
    module_id: str
    pieces: tuple[Piece, ...]
    keep: Request | None = None


class CloseModule(Message, frozen=True):
    ticket: int
    module_id: str


class GetModules(Message, frozen=True):
    """The states of these modules, as far as they are open; they come as `modules`."""

    ticket: int
    module_ids: tuple[str, ...]


class JudgeLevel(Message, frozen=True):
    """What the gate says of a level of exactness; it comes as `level`."""

    ticket: int
    level: Level


class GetStats(Message, frozen=True):
    ticket: int


class Clear(Message, frozen=True):
    """Let go of what is cached in these tiers; what that was comes as `stats`."""

    ticket: int
    tiers: tuple[str, ...]


class Stop(Message, frozen=True):
    """End the process; whoever still waits has been told."""


class Loaded(Message, frozen=True):
    """Answer to `Start`: ready, or why not."""

    info: EngineInfo | None
    fault: Fault | None = None


class Rejected(Message, frozen=True):
    """The request was refused at once and will have no outputs."""

    request_id: str
    fault: Fault


class Outputs(Message, frozen=True):
    outputs: list[RequestOutput]


class Durable(Message, frozen=True):
    """Tokens on stable storage, of documents where that has changed."""

    documents: dict[str, int]


class Heartbeat(Message, frozen=True):
    """A rank that computes for long is still there."""


class RanksLost(Message, frozen=True):
    """Why the ranks are about to end and to be started again."""

    reason: str


class Done(Message, frozen=True):
    ticket: int
    fault: Fault | None = None
    stats: dict[str, float] | None = None
    modules: dict[str, ModuleState] | None = None
    level: LevelVerdict | None = None


Command = (
    LeaderAddress
    | Start
    | Submit
    | Abort
    | OpenDocument
    | CloseDocument
    | OpenModule
    | CloseModule
    | GetModules
    | JudgeLevel
    | GetStats
    | Clear
    | Stop
)
Event = RankJoined | Heartbeat | RanksLost | Loaded | Rejected | Outputs | Durable | Done

_FAULTS: dict[str, type[LongctxError]] = {
    kind.__name__: kind
    for kind in (
        ContextTooLong,
        DocumentMissing,
        EngineDied,
        InvalidRequest,
        ModelRefused,
        Overloaded,
        PeerLost,
    )
}


def encode_hook(value: Any) -> Any:
    """For msgspec: what a message may hold beside plain types."""
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} cannot be sent")


def decode_hook(kind: type, value: Any) -> Any:
    """The inverse of `encode_hook`."""
    if issubclass(kind, Path):
        return kind(value)
    raise TypeError(f"{kind.__name__} cannot be received")


_ENCODER = msgspec.msgpack.Encoder(enc_hook=encode_hook)
_COMMANDS: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command, dec_hook=decode_hook)
_EVENTS: msgspec.msgpack.Decoder[Event] = msgspec.msgpack.Decoder(Event, dec_hook=decode_hook)


def encode(message: Command | Event) -> bytes:
    return _ENCODER.encode(message)


def decode_command(body: bytes) -> Command:
    return _COMMANDS.decode(body)


def decode_event(body: bytes) -> Event:
    return _EVENTS.decode(body)
