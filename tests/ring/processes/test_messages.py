"""Messages between leader and followers mean the same at both ends, errors included."""

import errno
from types import ModuleType

import pytest

from longctx.ring.processes.messages import (
    PagesReply,
    ReadPages,
    WritePages,
    decode_from_leader,
    decode_to_leader,
    encode,
)
from offload.disk import extent_file, extent_header, extent_io
from offload.disk.extent_file import LayoutDiffers
from offload.disk.extent_header import ExtentMeta, OtherVersion
from tests.offload.extents import run_of


def errors_of(*modules: ModuleType) -> list[type[Exception]]:
    """Return every type of error that these modules define."""
    found = (kind for module in modules for kind in vars(module).values())
    kinds = {kind for kind in found if isinstance(kind, type) and issubclass(kind, Exception)}
    assert OtherVersion in kinds and LayoutDiffers in kinds
    return sorted(kinds, key=lambda kind: kind.__name__)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "no space left"),
        FileNotFoundError(errno.ENOENT, "gone"),
        *(kind("what is wrong") for kind in errors_of(extent_header, extent_file, extent_io)),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_goes_wrong_on_a_rank_is_raised_at_the_leader(error: Exception) -> None:
    reply = decode_to_leader(encode(PagesReply.failed(3, error)))
    assert isinstance(reply, PagesReply)
    with pytest.raises(type(error)) as raised:
        reply.raise_failure()
    assert getattr(raised.value, "errno", None) == getattr(error, "errno", None)


def test_requests_are_decoded_as_they_were_encoded() -> None:
    run = run_of("a", 3, 2)
    meta = ExtentMeta(run=run, cost_seconds=1.5, created_at=2.5, retained=True)
    requests = (WritePages(1, "/x", meta, [4, 5]), ReadPages(2, "/x", run, [0], [7]))
    assert tuple(decode_from_leader(encode(request)) for request in requests) == requests
