"""How fast the ranks reach each other: what the choice between passing keys or queries goes by."""

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from longctx.ring.transport import Transport

SMALL_BYTES, SMALL_ROUNDS = 64, 50
LARGE_BYTES, LARGE_ROUNDS = 4 << 20, 8


@dataclass(frozen=True, slots=True)
class Link:
    """What a message between two ranks costs: `latency_seconds`, and its bytes at this speed."""

    latency_seconds: float
    bytes_per_second: float

    def seconds(self, messages: int, size_bytes: int) -> float:
        return messages * self.latency_seconds + size_bytes / self.bytes_per_second


def measure(transport: Transport, device: torch.device) -> Link:
    """The slowest link of the ring, while all of them carry something. All ranks call it together.

    Every rank comes to the same figures.
    """
    small = _least_seconds(transport, SMALL_BYTES, SMALL_ROUNDS, device)
    large = _least_seconds(transport, LARGE_BYTES, LARGE_ROUNDS, device)
    own = torch.tensor([small, large], dtype=torch.float64, device=device)
    slowest = torch.stack(_gathered(transport, own)).amax(dim=0)
    latency, whole = slowest.tolist()
    return Link(latency, LARGE_BYTES / max(whole - latency, 1e-9))


def _least_seconds(
    transport: Transport, size_bytes: int, rounds: int, device: torch.device
) -> float:
    """Of sending so much to the next rank while as much comes from the one before."""
    sent = torch.zeros(size_bytes, dtype=torch.uint8, device=device)
    received = torch.empty_like(sent)
    after = (transport.rank + 1) % transport.size
    before = (transport.rank - 1) % transport.size
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        transport.begin([(after, sent)], [(before, received)]).wait()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return min(times)  # whatever else the machine does only adds to it


def _gathered(transport: Transport, own: Tensor) -> list[Tensor]:
    """Every rank's tensor."""
    parts = [own if rank == transport.rank else own.clone() for rank in range(transport.size)]
    others = [rank for rank in range(transport.size) if rank != transport.rank]
    transport.begin(
        [(rank, own) for rank in others], [(rank, parts[rank]) for rank in others]
    ).wait()
    return parts
