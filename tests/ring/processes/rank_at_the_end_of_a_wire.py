"""One of two ranks that measure the wire between them; rank 0 prints what it has found, as JSON.

python rank_at_the_end_of_a_wire.py RANK STORE
"""

import json
import sys
import time
from collections.abc import Callable

import torch
from torch.distributed import FileStore  # type: ignore[attr-defined]

from longctx.ring.link import measure_link
from longctx.ring.process_group import ProcessGroupTransport

SENT_BYTES = 16 << 20


def main(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    transport = ProcessGroupTransport(FileStore(store, 2), rank, 2, torch.device("cpu"))
    link = measure_link(transport, torch.device("cpu"))
    sent = torch.zeros(SENT_BYTES, dtype=torch.uint8)
    received = torch.empty_like(sent)
    matrix = torch.ones(512, 512)

    def transfer(compute: Callable[[], None]) -> float:
        began = time.perf_counter()
        under_way = transport.begin([(1 - rank, sent)], [(1 - rank, received)])
        compute()
        under_way.wait()
        return time.perf_counter() - began

    def work() -> None:
        end = time.perf_counter() + transfer_seconds
        while time.perf_counter() < end:
            torch.mm(matrix, matrix)

    transfer_seconds = min(transfer(lambda: None) for _ in range(3))
    # Only one works: the wire is a process too, and needs a core.
    both = min(transfer(work if rank == 0 else lambda: None) for _ in range(3))
    transport.close()
    if rank == 0:
        print(
            json.dumps(
                {
                    "latency_seconds": link.latency_seconds,
                    "bytes_per_second": link.bytes_per_second,
                    "transfer_seconds": transfer_seconds,
                    "both_seconds": both,
                }
            )
        )


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
