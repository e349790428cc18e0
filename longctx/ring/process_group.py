"""The transport of ranks that are processes: PyTorch's process group, with gloo or NCCL.

Gloo joins CPUs, NCCL joins GPUs.
"""

from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import Store, Work  # type: ignore[attr-defined]

from longctx.errors import PeerLost

# A rank that ends closes its connections and one that hangs misses its heartbeats, so this limit is
# for what neither shows.
TIMEOUT = timedelta(seconds=120)


class ProcessGroupTransport:
    """A `Transport` over the default process group, of which a process has one, until `close`.

    All methods are for the one thread that runs the rank.
    """

    def __init__(self, store: Store, rank: int, size: int, device: torch.device) -> None:
        """Join the group; all ranks do so at the same time, with the same store.

        Raises PeerLost where one of them does not.
        """
        self.rank, self.size, self.bytes_sent = rank, size, 0
        backend = "nccl" if device.type == "cuda" else "gloo"
        try:
            dist.init_process_group(
                backend,
                store=store,
                rank=rank,
                world_size=size,
                timeout=TIMEOUT,
                device_id=device if backend == "nccl" else None,
            )
        except RuntimeError as error:
            raise PeerLost(f"rank {rank} did not find the others: {error}") from error
        # NCCL launches them at once: one by one, two ranks might wait for each other.
        self._is_batched = backend == "nccl"

    def begin(
        self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]]
    ) -> "_Transfer":
        """As `Transport.begin`; empty tensors are not sent."""
        sends = [(target, tensor) for target, tensor in sends if tensor.numel()]
        receives = [(source, tensor) for source, tensor in receives if tensor.numel()]
        tensors = [tensor for _, tensor in (*sends, *receives)]
        assert all(tensor.is_contiguous() for tensor in tensors)
        self.bytes_sent += sum(tensor.nbytes for _, tensor in sends)
        try:
            if self._is_batched:
                operations = [dist.P2POp(dist.isend, _bytes(each), to) for to, each in sends]
                operations += [dist.P2POp(dist.irecv, _bytes(each), by) for by, each in receives]
                works: list[Work | None] = list(
                    dist.batch_isend_irecv(operations) if operations else ()
                )
            else:
                works = [dist.isend(_bytes(each), to) for to, each in sends]
                works += [dist.irecv(_bytes(each), by) for by, each in receives]
        except RuntimeError as error:
            raise PeerLost(str(error)) from error
        return _Transfer(works, tensors)

    def close(self) -> None:
        """Leave the process group."""
        dist.destroy_process_group()


class _Transfer:
    def __init__(self, works: Sequence[Work | None], tensors: Sequence[Tensor]) -> None:
        self._works = works
        self._tensors = tensors  # held until received: gloo knows only their addresses

    def wait(self) -> None:
        try:
            for work in self._works:
                if work is not None:
                    work.wait()
        except RuntimeError as error:
            raise PeerLost(str(error)) from error
        self._works, self._tensors = (), ()


def _bytes(tensor: Tensor) -> Tensor:
    """View the tensor's memory as uint8, since gloo does not know every type."""
    return tensor.view(-1).view(torch.uint8)
