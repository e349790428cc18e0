"""How fast the ranks reach each other, on which the choice between keys and queries depends."""

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from longctx.ring.transport import Transport

SMALL_BYTES, SMALL_ROUNDS = 64, 50
LARGE_BYTES, LARGE_ROUNDS = 4 << 20, 8


@dataclass(frozen=True, slots=True)
class Link:
    """What a message between two ranks costs: a latency, and its bytes at a constant bandwidth."""

    latency_seconds: float
    bytes_per_second: float

    def seconds(self, messages: int, size_bytes: int) -> float:
        """Return the time that `messages` one after the other take, `size_bytes` in all.

        With 1 ms and 1 GB/s, 3 messages of 5 MB in all take 8 ms.
        """
        return messages * self.latency_seconds + size_bytes / self.bytes_per_second


def measure_link(transport: Transport, device: torch.device) -> Link:
    """Measure the slowest link of the ring, while all links are in use.

    All ranks call it together, and every rank returns the same figures. Raises PeerLost.
    """
    small = _least_seconds(transport, SMALL_BYTES, SMALL_ROUNDS, device)
    large = _least_seconds(transport, LARGE_BYTES, LARGE_ROUNDS, device)
    own = torch.tensor([small, large], dtype=torch.float64, device=device)
    slowest = torch.stack(_all_gather(transport, own)).amax(dim=0)
    latency, whole = slowest.tolist()
    return Link(latency, LARGE_BYTES / max(whole - latency, 1e-9))


def _least_seconds(
    transport: Transport, size_bytes: int, rounds: int, device: torch.device
) -> float:
    """Time a message to the next rank while one of the same size comes from the rank before."""
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


def _all_gather(transport: Transport, own: Tensor) -> list[Tensor]:
    """Return every rank's tensor, in the order of the ranks."""
    tensors = [own if rank == transport.rank else own.clone() for rank in range(transport.size)]
    others = [rank for rank in range(transport.size) if rank != transport.rank]
    sends = [(rank, own) for rank in others]
    receives = [(rank, tensors[rank]) for rank in others]
    transport.begin(sends, receives).wait()
    return tensors
