"""Asking a `KVStore` as the engine does, and waiting for the answer."""

import time

from offload.block_run import BlockRun, PageSlots
from offload.store import Event, KVStore, Late, Written
from tests.offload.memory_disk import filled_slots


def offer(store: KVStore, run: BlockRun, slots: PageSlots | None = None) -> int:
    return store.offer(run, slots or filled_slots(run), cost_seconds=1.0, retained=False)


def ended(store: KVStore, ticket: int) -> Event:
    """Wait for a ticket's last event and return it; the events of other tickets are lost."""
    end = time.monotonic() + 10
    while time.monotonic() < end:
        for event in store.poll():
            if event.ticket == ticket and not isinstance(event, Late):
                return event
        store.wait(0.1)
    raise AssertionError(f"ticket {ticket} did not end")


def write(store: KVStore, run: BlockRun) -> None:
    ticket = offer(store, run)
    assert ended(store, ticket) == Written(ticket, True)
