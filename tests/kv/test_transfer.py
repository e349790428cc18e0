"""A copy out of a GPU may be read once that GPU has made it, whichever is the current one."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from longctx.kv import transfer
from longctx.kv.transfer import PageTransfer


class PagesOfTheThirdGpu:
    """Of one layer; what a GPU would do is done at once."""

    is_cuda = True
    device = torch.device("cuda:2")
    shape = (4, 8)

    def __getitem__(self, pages: torch.Tensor) -> torch.Tensor:
        return torch.arange(32, dtype=torch.uint8).view(4, 8)[pages]


class Event:
    stream = "not recorded"

    def record(self, stream: str = "the current device's") -> None:
        self.stream = stream

    def query(self) -> str:
        return self.stream


def test_a_copy_waits_for_the_device_of_its_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    empty, tensor = torch.empty, torch.tensor
    cuda = SimpleNamespace(Event=Event, current_stream=lambda device: f"that of {device}")
    monkeypatch.setattr(transfer.torch, "cuda", cuda)
    monkeypatch.setattr(transfer.torch, "tensor", lambda pages, device: tensor(pages))
    monkeypatch.setattr(
        transfer.torch, "empty", lambda shape, dtype, pin_memory: empty(shape, dtype=dtype)
    )
    pool: Any = SimpleNamespace(pages=[PagesOfTheThirdGpu(), PagesOfTheThirdGpu()])
    slots, ready = PageTransfer(pool, staged=True).outgoing([3, 1])
    assert ready() == "that of cuda:2"
    for array in slots.arrays:
        assert array[:, 0].tolist() == [24, 8]
