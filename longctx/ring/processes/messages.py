"""The messages between the leader and a follower, beside tensors: msgpack, never pickle.

The leader asks for pages to be written, read or copied at any time, from any thread; the reply
carries the same ticket. Everything else follows in order: `JoinGroup`, `Ready`, `OpenRank`,
`Ready`, then `RunStep` and `StepDone` again and again.
"""

from pathlib import Path

import msgspec

from longctx.config import EngineConfig
from longctx.errors import LongctxError, PeerLost
from longctx.ipc.protocol import Fault, Heartbeat, Message, decode_hook, encode_hook
from longctx.ring.rank import RingMemorySpec
from offload.block_run import BlockRun
from offload.disk.extent_file import LayoutDiffers
from offload.disk.extent_header import ExtentMeta, ExtentUnreadable, OtherVersion


class FollowerJoined(Message, frozen=True):
    """A follower's first message to its leader. `pid`: its process, if on the same machine."""

    rank: int
    pid: int


class JoinGroup(Message, frozen=True):
    """All ranks are here: where the process group's store is, and what to load."""

    store: str  # file:PATH or HOST:PORT
    config: EngineConfig
    model_folder: Path
    cache_dir: Path


class Ready(Message, frozen=True):
    """The reply to `JoinGroup` (model loaded) and `OpenRank` (same weights), or why not."""

    fault: Fault | None = None


class OpenRank(Message, frozen=True):
    """Make a `Rank` with these pools. `fingerprint`: of the leader's model."""

    memory: RingMemorySpec
    fingerprint: str


class RunStep(Message, frozen=True):
    """Run this step."""

    body: bytes  # of a `RankStep`


class StepDone(Message, frozen=True):
    """The reply to `RunStep`.

    `sent_bytes`: to other ranks since the rank was started. `failure`: why the step failed and the
    rank ends.
    """

    sent_bytes: int
    failure: str | None = None


class EndRank(Message, frozen=True):
    """End the rank's process."""


class WritePages(Message, frozen=True):
    """Write an extent file, as `RankPages.write`."""

    ticket: int
    path: str
    meta: ExtentMeta
    pages: list[int]


class ReadPages(Message, frozen=True):
    """Read blocks of an extent file into pages, as `RankPages.read`."""

    ticket: int
    path: str
    run: BlockRun
    blocks: list[int]
    pages: list[int]


class CopyPages(Message, frozen=True):
    """Return the contents of pages, as `RankPages.copy`."""

    ticket: int
    group: int
    pages: list[int]


class PagesReply(Message, frozen=True):
    """The reply to the request with the same ticket, or why that failed.

    `found`: which blocks a read has found whole. `copies`: the contents of pages.
    """

    ticket: int
    found: list[bool] | None = None
    copies: list[bytes] | None = None
    failure: str | None = None
    kind: str = ""  # the name of the failure's type
    errno: int | None = None

    @classmethod
    def failed(cls, ticket: int, error: Exception) -> "PagesReply":
        """Return the reply that raises `error` at the leader."""
        if isinstance(error, OSError):
            return cls(ticket, failure=str(error), kind="OSError", errno=error.errno)
        return cls(ticket, failure=str(error), kind=type(error).__name__)

    def raise_failure(self) -> None:
        """Raise the failure, if any, as it was raised on the rank; LongctxError for a bug."""
        if self.failure is None:
            return
        if self.kind == "OSError":
            raise OSError(self.errno, self.failure)  # the subclass that the number stands for
        if self.kind in _FAILURES:
            raise _FAILURES[self.kind](self.failure)
        raise LongctxError(f"{self.kind}: {self.failure}")


PagesRequest = WritePages | ReadPages | CopyPages
FromLeader = JoinGroup | OpenRank | RunStep | EndRank | PagesRequest | Heartbeat
ToLeader = FollowerJoined | Ready | StepDone | PagesReply | Heartbeat

_FAILURES: dict[str, type[Exception]] = {
    kind.__name__: kind for kind in (ExtentUnreadable, OtherVersion, LayoutDiffers, PeerLost)
}

_ENCODER = msgspec.msgpack.Encoder(enc_hook=encode_hook)
_FROM_LEADER: msgspec.msgpack.Decoder[FromLeader] = msgspec.msgpack.Decoder(
    FromLeader, dec_hook=decode_hook
)
_TO_LEADER: msgspec.msgpack.Decoder[ToLeader] = msgspec.msgpack.Decoder(
    ToLeader, dec_hook=decode_hook
)


def encode(message: FromLeader | ToLeader) -> bytes:
    return _ENCODER.encode(message)


def decode_from_leader(body: bytes) -> FromLeader:
    return _FROM_LEADER.decode(body)


def decode_to_leader(body: bytes) -> ToLeader:
    return _TO_LEADER.decode(body)
