"""Who leaves a full tier: LRU, or GreedyDual-Size-Frequency.

A tier tells its policy of each entry that it holds (on disk a file, in host memory a block) and
asks for a victim when it needs room. Two rules hold for every policy: leaves leave before their
parents, since a block without the blocks before it is of no use; and what a document retains
leaves last. Calls are O(log n) in the number of entries. A policy belongs to one tier, which
holds its lock around each call.
"""

import heapq
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from offload.key import BlockKey

Block = tuple[int, BlockKey]  # layer group, key
Name = TypeVar("Name", bound=Hashable)

_STALE_SHARE = 2  # the heap is rebuilt when it is this many times larger than the entries


@dataclass(frozen=True, slots=True)
class Evictable(Generic[Name]):
    """`blocks` are what the entry holds; its parent is the entry that holds the block `parent`.

    `cost_seconds` is what computing the blocks again would take.
    """

    name: Name
    size_bytes: int
    cost_seconds: float
    blocks: tuple[Block, ...]
    parent: Block | None
    retained: bool = False


class EvictionPolicy(Protocol[Name]):
    """Entries may be added in any order, a child before its parent too."""

    def added(self, entry: Evictable[Name]) -> None:
        """The tier holds a new entry, which counts as used now."""
        ...

    def used(self, name: Name) -> None: ...

    def retain(self, name: Name) -> None: ...

    def release(self, name: Name) -> None: ...

    def removed(self, name: Name) -> None:
        """The tier no longer holds the entry, for whatever reason."""
        ...

    def victim(self) -> Name | None:
        """Who should leave next, for the tier to remove; retained ones last; None if empty."""
        ...


@dataclass(slots=True)
class _Held(Generic[Name]):
    entry: Evictable[Name]
    retained: bool
    priority: float = 0.0
    uses: int = 0
    stamp: int = -1  # of its valid item in the heap
    children: int = 0  # entries that begin after one of its blocks


class _LeafHeap(ABC, Generic[Name]):
    """What the policies share: leaves by (retained, priority), lowest first.

    The heap has stale items, which are passed over when they come up: a leaf is pushed again when
    its priority changes, so an item counts only with its entry's latest stamp.
    """

    def __init__(self) -> None:
        self._held: dict[Name, _Held[Name]] = {}
        self._holders: dict[Block, list[Name]] = {}  # overlapping window checkpoints: several
        self._children: dict[Block, int] = {}  # entries by parent block, held or not
        self._heap: list[tuple[bool, float, int, Name]] = []
        self._stamp = 0  # unique: names are never compared

    def __len__(self) -> int:
        return len(self._held)

    def added(self, entry: Evictable[Name]) -> None:
        assert entry.name not in self._held, f"added twice: {entry.name}"
        held = _Held(entry, entry.retained)
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
        held.priority = self._priority(held)
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
                self._evicting(priority)
                return name
            heapq.heappop(self._heap)
        assert not self._held, "entries are each other's parents"
        return None

    def _set_retained(self, name: Name, retained: bool) -> None:
        held = self._held[name]
        if held.retained != retained:
            held.retained = retained
            self._push(held)

    def _push(self, held: _Held[Name]) -> None:
        """Only leaves: so using a long chain costs one push."""
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
    def _priority(self, held: _Held[Name]) -> float:
        """Of an entry that is used now, the lowest leaves first."""

    @abstractmethod
    def _evicting(self, priority: float) -> None:
        """A leaf of this priority was named the victim."""


class LRU(_LeafHeap[Name]):
    """The least recently used leaf leaves first."""

    def __init__(self) -> None:
        super().__init__()
        self._uses = 0

    def _priority(self, held: _Held[Name]) -> float:
        self._uses += 1
        return self._uses

    def _evicting(self, priority: float) -> None:
        """Nothing ages: a use is as old as it is."""


class GDSF(_LeafHeap[Name]):
    """The leaf whose bytes save the least time leaves first: uses * cost / size, and its age.

    Priorities start from that of the latest victim, so what is no longer used is overtaken.
    Source: Cherkasova, 1998, https://www.hpl.hp.com/techreports/98/HPL-98-69R1.html
    """

    def __init__(self) -> None:
        super().__init__()
        self._age = 0.0

    def _priority(self, held: _Held[Name]) -> float:
        entry = held.entry
        return self._age + held.uses * entry.cost_seconds / max(entry.size_bytes, 1)

    def _evicting(self, priority: float) -> None:
        self._age = max(self._age, priority)


POLICIES: dict[str, Callable[[], EvictionPolicy[Any]]] = {"lru": LRU, "gdsf": GDSF}
