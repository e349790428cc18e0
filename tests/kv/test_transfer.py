"""Copies out of a GPU are made on a stream of that GPU, whichever is the current one."""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from longctx.kv import copy_streams, transfer
from longctx.kv.transfer import PageTransfer


class PagesOfTheThirdGpu:
    """Of one layer; what a GPU would do is done at once."""

    is_cuda = True
    device = torch.device("cuda:2")
    shape = (4, 8)

    def __getitem__(self, pages: torch.Tensor) -> torch.Tensor:
        return torch.arange(32, dtype=torch.uint8).view(4, 8)[pages]


class Stream:
    """It knows its device, and for which streams it waits."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.waits: list[Any] = []

    def wait_stream(self, other: Any) -> None:
        self.waits.append(other)


class Event:
    stream: Any = "not recorded"

    def record(self, stream: Any = "the current device's") -> None:
        self.stream = stream

    def query(self) -> Any:
        return self.stream


def test_a_copy_waits_for_the_device_of_its_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    empty, tensor = torch.empty, torch.tensor
    cuda = SimpleNamespace(
        Event=Event,
        Stream=Stream,
        stream=lambda _: nullcontext(),
        current_stream=lambda device: f"that of {device}",
    )
    monkeypatch.setattr(copy_streams.torch, "cuda", cuda)
    monkeypatch.setattr(transfer.torch, "tensor", lambda pages, device: tensor(pages))
    monkeypatch.setattr(
        transfer.torch, "empty", lambda shape, dtype, pin_memory: empty(shape, dtype=dtype)
    )
    pool: Any = SimpleNamespace(pages=[PagesOfTheThirdGpu(), PagesOfTheThirdGpu()])
    slots, ready = PageTransfer(pool, staged=True).outgoing([3, 1])
    side: Any = ready()
    assert side.device == torch.device("cuda:2")
    assert side.waits == ["that of cuda:2"]
    for array in slots.arrays:
        assert array[:, 0].tolist() == [24, 8]
