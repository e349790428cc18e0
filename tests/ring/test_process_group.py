"""Real processes joined by gloo exchange tensors exactly as virtual ranks do."""

import multiprocessing
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from longctx.errors import PeerLost
from longctx.ring.link import measure_link
from longctx.ring.process_group import ProcessGroupTransport
from longctx.ring.transport import Transport, VirtualLinks, VirtualTransport
from tests.support.waiting import patient

CPU = torch.device("cpu")

Work = Callable[[Transport], Any]


def exchange(transport: Transport) -> tuple[list[bytes], int]:
    """Send from all to all: several types and sizes, many transfers at once, in order."""
    rank, size = transport.rank, transport.size
    others = [other for other in range(size) if other != rank]
    received: list[Tensor] = []
    waiting = []
    for turn in range(3):
        for dtype in (torch.uint8, torch.bfloat16, torch.float32, torch.int64):
            sends = [(to, message(rank, to, turn, dtype)) for to in others]
            receives = [(by, torch.empty_like(message(by, rank, turn, dtype))) for by in others]
            received += [tensor for _, tensor in receives]
            waiting.append(transport.begin(sends, receives))
    for transfer in waiting:
        transfer.wait()
    link = measure_link(transport, CPU)
    assert link.latency_seconds > 0 and link.bytes_per_second > 0
    return [tensor.view(-1).view(torch.uint8).numpy().tobytes() for tensor in received], (
        transport.bytes_sent
    )


def message(source: int, target: int, turn: int, dtype: torch.dtype) -> Tensor:
    """Make a tensor that some pairs of ranks have much of, and some nothing."""
    rows = (source + target + turn) % 3 * 7000
    return (torch.arange(rows * 3).view(rows, 3) + source * 100 + target * 10 + turn).to(dtype)


def lose(transport: Transport) -> str:
    """Let rank 1 end without a message while rank 0 waits for one."""
    if transport.rank == 1:
        return ""
    try:
        transport.begin([], [(1, torch.empty(8))]).wait()
    except PeerLost as error:
        return str(error)
    return "received what nobody sent"


def virtual(work: Work, size: int) -> list[Any]:
    links, results = VirtualLinks(size), [None] * size

    def run(rank: int) -> None:
        results[rank] = work(VirtualTransport(links, rank))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(patient())
    return results


def real(work: Work, size: int, folder: Path) -> list[Any]:
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    processes = [
        context.Process(target=_process, args=(work, rank, size, folder / "store", results))
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    found = dict(results.get() for _ in processes)
    for process in processes:
        process.join(patient())
        assert process.exitcode == 0
    return [found[rank] for rank in range(size)]


def _process(work: Work, rank: int, size: int, store: Path, results: Any) -> None:
    torch.set_num_threads(1)
    transport = ProcessGroupTransport(dist.FileStore(str(store), size), rank, size, CPU)
    try:
        results.put((rank, work(transport)))
    finally:
        transport.close()


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_exchange_what_virtual_ranks_do(size: int, tmp_path: Path) -> None:
    assert real(exchange, size, tmp_path) == virtual(exchange, size)


def test_a_rank_that_ends_is_noticed_by_who_waits_for_it(tmp_path: Path) -> None:
    waited, _ = real(lose, 2, tmp_path)
    assert "closed" in waited or "reset" in waited, waited
