"""Locks for names, so that what a tenant has given a name is changed by one request at a time."""

import asyncio
from weakref import WeakValueDictionary


class NameLocks:
    """Has a lock for each name, for as long as somebody holds it or waits for it."""

    def __init__(self) -> None:
        self._locks: WeakValueDictionary[tuple[str, str], asyncio.Lock] = WeakValueDictionary()

    def of(self, tenant: str, name: str) -> asyncio.Lock:
        return self._locks.setdefault((tenant, name), asyncio.Lock())
