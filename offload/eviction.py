"""Who leaves a full tier: LRU, or GreedyDual-Size-Frequency (GDSF).

A tier tells its policy of each thing that it holds and may evict (on disk a file, in host memory a
block) and asks for a victim when it needs room. Two rules hold for every policy: leaves leave
before their parents, since a block without the blocks before it is of no use; and what a document
retains leaves last. Calls are O(log n) in the number of things held.

To add a policy, write a subclass of `LeafHeap` and add a line to `POLICIES`.
"""

import heapq
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from offload.key import GroupKey

Name = TypeVar("Name", bound=Hashable)

_STALE_SHARE = 2  # the heap is rebuilt when it is this many times larger than the entries


@dataclass(frozen=True, slots=True)
class Evictable(Generic[Name]):
    """One thing that a tier holds, and can only evict as a whole.

    `blocks` are what it holds; its parent is whatever holds the block `parent`. `cost_seconds` is
    what getting the blocks again would take.
    """

    name: Name
    size_bytes: int
    cost_seconds: float
    blocks: tuple[GroupKey, ...]
    parent: GroupKey | None
    retained: bool = False


class EvictionPolicy(Protocol[Name]):
    """Names what leaves a tier next. Nothing is evicted here: the tier does that, and tells.

    Things may be added in any order, a child before its parent too. A policy belongs to one tier,
    which holds its lock around each call.
    """

    def added(self, entry: Evictable[Name]) -> None:
        """Note that the tier holds something new, which counts as used now."""
        ...

    def used(self, name: Name) -> None:
        """Note a use."""
        ...

    def retain(self, name: Name) -> None:
        """Name this only when nothing else is left."""
        ...

    def release(self, name: Name) -> None:
        """End what `retain` began."""
        ...

    def removed(self, name: Name) -> None:
        """Note that the tier no longer holds it, for whatever reason."""
        ...

    def victim(self) -> Name | None:
        """Return what should leave next, retained things last; None if nothing is held."""
        ...


@dataclass(slots=True)
class Held(Generic[Name]):
    """What a `LeafHeap` knows of one thing that is held."""

    entry: Evictable[Name]
    retained: bool
    priority: float = 0.0
    uses: int = 0
    stamp: int | None = None  # of its valid item in the heap
    children: int = 0  # how many begin after one of its blocks; 0: a leaf


class LeafHeap(ABC, Generic[Name]):
    """What the policies share: a heap of the leaves by (retained, priority), lowest first.

    A leaf is pushed again when its priority changes, and its old item stays in the heap. So an item
    counts only if it has the latest stamp of what it names; others are passed over when they come
    up. Say a leaf is pushed with stamp 5, used, and pushed with stamp 9: (False, 0.3, 5, "a") is
    stale, (False, 0.7, 9, "a") counts.
    """

    def __init__(self) -> None:
        self._held: dict[Name, Held[Name]] = {}
        self._holders: dict[GroupKey, list[Name]] = {}  # overlapping window checkpoints: several
        self._children: dict[GroupKey, int] = {}  # by parent block, which may not be held (yet)
        self._heap: list[tuple[bool, float, int, Name]] = []
        self._stamp = 0  # unique, so the heap never compares names

    def __len__(self) -> int:
        return len(self._held)

    def added(self, entry: Evictable[Name]) -> None:
        assert entry.name not in self._held, f"added twice: {entry.name}"
        held = Held(entry, entry.retained)
        self._held[entry.name] = held
        for block in entry.blocks:
            self._holders.setdefault(block, []).append(entry.name)
            held.children += self._children.get(block, 0)
        if entry.parent is not None:
            self._children[entry.parent] = self._children.get(entry.parent, 0) + 1
            for name in self._holders.get(entry.parent, ()):
                self._held[name].children += 1
        self.used(entry.name)

    def used(self, name: Name) -> None:
        held = self._held[name]
        held.uses += 1
        held.priority = self.priority_of(held)
        self._push(held)

    def retain(self, name: Name) -> None:
        self._set_retained(name, True)

    def release(self, name: Name) -> None:
        self._set_retained(name, False)

    def removed(self, name: Name) -> None:
        entry = self._held.pop(name).entry
        for block in entry.blocks:
            holders = self._holders[block]
            holders.remove(name)
            if not holders:
                del self._holders[block]
        if entry.parent is not None:
            self._children[entry.parent] -= 1
            if not self._children[entry.parent]:
                del self._children[entry.parent]
            for holder in self._holders.get(entry.parent, ()):
                parent = self._held[holder]
                parent.children -= 1
                self._push(parent)

    def victim(self) -> Name | None:
        while self._heap:
            _, priority, stamp, name = self._heap[0]
            held = self._held.get(name)
            if held is not None and held.stamp == stamp and not held.children:
                self.on_victim(priority)
                return name
            heapq.heappop(self._heap)
        assert not self._held, "entries are each other's parents"
        return None

    def _set_retained(self, name: Name, retained: bool) -> None:
        held = self._held[name]
        if held.retained != retained:
            held.retained = retained
            self._push(held)

    def _push(self, held: Held[Name]) -> None:
        """Push a leaf. Others are pushed once they become leaves: using a chain costs one push."""
        if held.children:
            return
        self._stamp += 1
        held.stamp = self._stamp
        item = (held.retained, held.priority, held.stamp, held.entry.name)
        heapq.heappush(self._heap, item)
        if len(self._heap) > _STALE_SHARE * len(self._held) + 64:
            self._heap = [item for item in self._heap if self._is_current(item)]
            heapq.heapify(self._heap)

    def _is_current(self, item: tuple[bool, float, int, Name]) -> bool:
        held = self._held.get(item[3])
        return held is not None and held.stamp == item[2]

    @abstractmethod
    def priority_of(self, held: Held[Name]) -> float:
        """Return the priority of what is used now; the lowest one leaves first."""

    @abstractmethod
    def on_victim(self, priority: float) -> None:
        """Note that a leaf of this priority was named the victim."""


class LRU(LeafHeap[Name]):
    """Names the least recently used leaf."""

    def __init__(self) -> None:
        super().__init__()
        self._uses = 0

    def priority_of(self, held: Held[Name]) -> float:
        self._uses += 1
        return self._uses

    def on_victim(self, priority: float) -> None:
        """Nothing changes: the number of a use is its age."""


class GDSF(LeafHeap[Name]):
    """Names the leaf whose bytes save the least time: age + uses * cost_seconds / size_bytes.

    `age` is the priority of the latest victim, and each use starts from the age at its time. So
    what is no longer used is overtaken. With three files of 1 MB each, in microseconds per byte:

        A cost 2.0 s, used once, at age 0               0 + 1 * 2.0 = 2.0
        B cost 0.5 s, used three times, at age 0        0 + 3 * 0.5 = 1.5    the victim; age is 1.5
        C cost 1.0 s, comes then                      1.5 + 1 * 1.0 = 2.5    A is next, not C

    A tier below which there is another one puts the time to read from there in place of the cost.
    Source: Cherkasova, 1998, https://www.hpl.hp.com/techreports/98/HPL-98-69R1.html
    """

    def __init__(self) -> None:
        super().__init__()
        self._age = 0.0

    def priority_of(self, held: Held[Name]) -> float:
        entry = held.entry
        return self._age + held.uses * entry.cost_seconds / max(entry.size_bytes, 1)

    def on_victim(self, priority: float) -> None:
        self._age = max(self._age, priority)


POLICIES: dict[str, Callable[[], EvictionPolicy[Any]]] = {"lru": LRU, "gdsf": GDSF}
