"""Copies beside steps: what is read and written is what the engine meant, in every order.

And each wait is needed: without any one of them, some order gives something else.
"""

from collections.abc import Callable

import pytest
import torch

from longctx.kv.transfer import PageTransfer
from offload.block_pool import BlockPool
from tests.support.queued_streams import Queue, QueuedStreams

ORDERS: tuple[Queue, Queue] = ("steps", "copies")
Scene = Callable[[QueuedStreams, BlockPool, PageTransfer], list[bool]]


def writes(pool: BlockPool, page: int, number: int) -> Callable[[], None]:
    def work() -> None:
        for layer in pool.pages:
            layer[page] = number

    return work


def has(pool: BlockPool, page: int, number: int, results: list[bool]) -> Callable[[], None]:
    return lambda: results.append(all(bool((layer[page] == number).all()) for layer in pool.pages))


def a_sealed_page_goes_out(
    streams: QueuedStreams, pool: BlockPool, transfer: PageTransfer
) -> list[bool]:
    streams.step(writes(pool, 3, 7))
    slots, ready = transfer.outgoing([3])
    assert ready()
    return [bool((array[0] == 7).all()) for array in slots.arrays]


def a_copy_is_of_what_was_there_before_the_next_step(
    streams: QueuedStreams, pool: BlockPool, transfer: PageTransfer
) -> list[bool]:
    streams.step(writes(pool, 3, 7))
    slots, ready = transfer.copies([2, 3])
    streams.step(writes(pool, 3, 8))
    assert ready()
    streams.finish()
    return [bool((array[1] == 7).all()) for array in slots.arrays]


def a_page_that_comes_in_is_read_after_it_is_there(
    streams: QueuedStreams, pool: BlockPool, transfer: PageTransfer
) -> list[bool]:
    """An earlier step still reads what the page held before, for another sequence."""
    results: list[bool] = []
    streams.step(writes(pool, 1, 5))
    streams.step(has(pool, 1, 5, results))
    slots = transfer.incoming([1])
    for array in slots.arrays:
        array[:] = 9
    transfer.arrived(slots, [1])
    streams.step(has(pool, 1, 9, results))
    streams.finish()
    return results


def a_page_goes_out_and_another_takes_its_place(
    streams: QueuedStreams, pool: BlockPool, transfer: PageTransfer
) -> list[bool]:
    """The copy that goes out is made before what comes in lands on the same page."""
    streams.step(writes(pool, 2, 4))
    slots, ready = transfer.copies([2])
    incoming = transfer.incoming([2])
    for array in incoming.arrays:
        array[:] = 6
    transfer.arrived(incoming, [2])
    results: list[bool] = []
    streams.step(has(pool, 2, 6, results))
    streams.finish()
    assert ready()
    return [*results, *(bool((array[0] == 4).all()) for array in slots.arrays)]


SCENES: tuple[Scene, ...] = (
    a_sealed_page_goes_out,
    a_copy_is_of_what_was_there_before_the_next_step,
    a_page_that_comes_in_is_read_after_it_is_there,
    a_page_goes_out_and_another_takes_its_place,
)
NEEDED = {0: 1, 1: 2, 2: 2}  # waits of the first three scenes; the last one has spare ones


def played(scene: Scene, first: Queue, ignored: int | None = None) -> tuple[bool, int]:
    """Play a scene; return whether everything was as it should be, and how many waits it had."""
    pool = BlockPool(page_bytes=[8, 24], num_pages=5, device=torch.device("cpu"))
    for layer in pool.pages:
        layer.zero_()
    streams = QueuedStreams(first, ignored)
    results = scene(streams, pool, PageTransfer(pool, staged=True, streams=streams))
    assert results
    return all(results), streams.waits


@pytest.mark.parametrize("first", ORDERS)
@pytest.mark.parametrize("scene", SCENES)
def test_every_order_gives_what_was_meant(scene: Scene, first: Queue) -> None:
    assert played(scene, first)[0]


@pytest.mark.parametrize("number", NEEDED)
def test_without_any_one_wait_some_order_gives_something_else(number: int) -> None:
    scene = SCENES[number]
    _, waits = played(scene, "steps")
    assert waits == NEEDED[number]
    for ignored in range(waits):
        assert not all(played(scene, first, ignored)[0] for first in ORDERS), ignored
