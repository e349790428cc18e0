"""Copies beside a GPU's computing: on a stream of their own, ordered by events where they touch.

Two queues of work go on at once: what steps ask of the device, and copies to and from host memory.
Each wait is for a reason that `transfer.py` gives. `tests/support/queued_streams.py` is the same on
a CPU, which does the work in every order that the waits permit, so that a missing one is seen.
"""

from collections.abc import Callable
from typing import Protocol

import torch


class CopyStreams(Protocol):
    """The order of copies and of what else a device does; called by the engine's thread."""

    def wait_for_steps(self) -> None:
        """Let copies from now on come after all that steps have asked of the device until now."""
        ...

    def copy(self, work: Callable[[], None]) -> None:
        """Queue copies: whatever `work` asks of the device goes to their stream."""
        ...

    def copied(self) -> Callable[[], bool]:
        """Return a callable: have all copies been made that were queued until now?"""
        ...

    def wait_for_copies(self) -> None:
        """Let what steps ask from now on come after all copies that were queued until now."""
        ...


class CUDAStreams:
    """The `CopyStreams` of one GPU; steps are what its current stream has."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def wait_for_steps(self) -> None:
        self._side.wait_stream(torch.cuda.current_stream(self._device))

    def copy(self, work: Callable[[], None]) -> None:
        with torch.cuda.stream(self._side):
            work()

    def copied(self) -> Callable[[], bool]:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._side)
        query: Callable[[], bool] = event.query
        return query

    def wait_for_copies(self) -> None:
        torch.cuda.current_stream(self._device).wait_stream(self._side)


class AtOnce:
    """Where memory is copied by the thread that asks for it, nothing waits."""

    def wait_for_steps(self) -> None:
        pass

    def copy(self, work: Callable[[], None]) -> None:
        work()

    def copied(self) -> Callable[[], bool]:
        return _true

    def wait_for_copies(self) -> None:
        pass


def streams_for(device: torch.device) -> CopyStreams:
    """Return the streams of a device: on a GPU copies go on beside its steps."""
    return CUDAStreams(device) if device.type == "cuda" else AtOnce()


def _true() -> bool:
    return True
