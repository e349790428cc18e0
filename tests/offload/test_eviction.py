"""What every eviction policy promises, and each one beside a twin that looks at everything held."""

import random
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.eviction import GDSF, LRU, POLICIES, Evictable, EvictionPolicy
from offload.key import GroupKey
from tests.offload.memory_disk import key


def block(number: int) -> GroupKey:
    return (0, key(number))


def entry(
    name: str,
    blocks: tuple[int, ...],
    parent: int | None = None,
    *,
    cost_seconds: float = 1.0,
    size_bytes: int = 100,
    retained: bool = False,
) -> Evictable[str]:
    parent_block = None if parent is None else block(parent)
    return Evictable(
        name, size_bytes, cost_seconds, tuple(map(block, blocks)), parent_block, retained
    )


@dataclass
class Plain(ABC):
    """Slow and obvious: priorities in a dictionary, and leaves by looking at everything."""

    entries: dict[str, Evictable[str]] = field(default_factory=dict)
    kept: set[str] = field(default_factory=set)
    uses: dict[str, int] = field(default_factory=dict)
    priorities: dict[str, float] = field(default_factory=dict)
    moment: int = 0
    age: float = 0.0

    def added(self, entry: Evictable[str]) -> None:
        self.entries[entry.name] = entry
        self.uses[entry.name] = 0
        if entry.retained:
            self.kept.add(entry.name)
        self.used(entry.name)

    def used(self, name: str) -> None:
        self.moment += 1
        self.uses[name] += 1
        self.priorities[name] = self.priority(self.entries[name])

    @abstractmethod
    def priority(self, entry: Evictable[str]) -> float: ...

    def removed(self, name: str) -> None:
        for table in (self.entries, self.uses, self.priorities):
            del table[name]
        self.kept.discard(name)

    def leaves(self) -> list[str]:
        parents = {entry.parent for entry in self.entries.values()}
        return [name for name, entry in self.entries.items() if not parents & set(entry.blocks)]

    def victims(self) -> set[str]:
        """Return all that may leave next: several where priorities are equal."""
        order = {name: (name in self.kept, self.priorities[name]) for name in self.leaves()}
        lowest = min(order.values())
        self.age = max(self.age, lowest[1])
        return {name for name, place in order.items() if place == lowest}


class PlainLRU(Plain):
    def priority(self, entry: Evictable[str]) -> float:
        return self.moment


class PlainGDSF(Plain):
    def priority(self, entry: Evictable[str]) -> float:
        return self.age + self.uses[entry.name] * entry.cost_seconds / entry.size_bytes


TWINS: dict[str, type[Plain]] = {"lru": PlainLRU, "gdsf": PlainGDSF}


@pytest.mark.parametrize("name", sorted(TWINS))
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), steps=st.integers(1, 150))
def test_policy_names_the_victim_that_its_plain_twin_names(
    name: str, seed: int, steps: int
) -> None:
    rng = random.Random(seed)
    policy: EvictionPolicy[str] = POLICIES[name]()
    plain = TWINS[name]()
    for number in range(steps):
        held = list(plain.entries)
        match rng.choice(("add", "add", "add", "use", "use", "evict", "remove", "retain")):
            case "add":
                first = rng.randrange(1, 60)  # overlapping and in any order, as files may be
                blocks = tuple(range(first, first + rng.randrange(1, 5)))
                new = entry(
                    f"e{number}",
                    blocks,
                    first - 1,
                    cost_seconds=rng.choice((0.0, 1.0, 7.0)),
                    size_bytes=rng.choice((1, 100, 300)),
                    retained=rng.random() < 0.2,
                )
                policy.added(new)
                plain.added(new)
            case "use" if held:
                used = rng.choice(held)
                policy.used(used)
                plain.used(used)
            case "evict" if held:
                victim = policy.victim()
                assert victim in plain.victims()
                policy.removed(victim)
                plain.removed(victim)
            case "remove" if held:
                gone = rng.choice(held)
                policy.removed(gone)
                plain.removed(gone)
            case "retain" if held:
                kept = rng.choice(held)
                if kept in plain.kept:
                    policy.release(kept)
                    plain.kept.remove(kept)
                else:
                    policy.retain(kept)
                    plain.kept.add(kept)
    while plain.entries:
        victim = policy.victim()
        assert victim in plain.victims()
        policy.removed(victim)
        plain.removed(victim)
    assert policy.victim() is None


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_leaves_leave_before_their_parents(name: str) -> None:
    policy: EvictionPolicy[str] = POLICIES[name]()
    policy.added(entry("leaf", (33,), 32, cost_seconds=9.0))  # a child may be known first
    policy.added(entry("root", tuple(range(1, 17))))
    policy.added(entry("middle", tuple(range(17, 33)), 16))
    policy.added(entry("branch", (90,), 5, cost_seconds=8.0))
    left = []
    while (victim := policy.victim()) is not None:
        left.append(victim)
        policy.removed(victim)
    assert left.index("leaf") < left.index("middle") < left.index("root")
    assert left[-1] == "root"


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_what_is_retained_leaves_last(name: str) -> None:
    policy: EvictionPolicy[str] = POLICIES[name]()
    policy.added(entry("kept", (1,), cost_seconds=0.1, retained=True))
    policy.added(entry("free", (9,), cost_seconds=5.0))
    assert policy.victim() == "free"
    policy.retain("free")
    policy.release("kept")
    assert policy.victim() == "kept"


def test_lru_evicts_what_was_not_used_for_longest() -> None:
    policy = LRU[str]()
    for number, name in enumerate("abc"):
        policy.added(entry(name, (number,)))
    policy.used("a")
    assert policy.victim() == "b"


def test_gdsf_keeps_what_costs_much_to_compute_per_byte() -> None:
    policy = GDSF[str]()
    policy.added(entry("late block of a long document", (1,), cost_seconds=8.0))
    policy.added(entry("early block", (5,), cost_seconds=1.0))
    policy.used("early block")
    assert policy.victim() == "early block"
    for _ in range(8):
        policy.used("early block")
    assert policy.victim() == "late block of a long document"


def test_the_example_in_the_docstring_of_gdsf_is_true() -> None:
    policy = GDSF[str]()
    policy.added(entry("A", (1,), cost_seconds=2.0, size_bytes=1_000_000))
    policy.added(entry("B", (5,), cost_seconds=0.5, size_bytes=1_000_000))
    policy.used("B")
    policy.used("B")
    assert policy.victim() == "B"
    policy.removed("B")
    policy.added(entry("C", (9,), cost_seconds=1.0, size_bytes=1_000_000))
    assert policy.victim() == "A"


def test_gdsf_lets_go_in_time_of_what_was_popular_once() -> None:
    policy = GDSF[str]()
    policy.added(entry("old", (0,), cost_seconds=20.0))
    for number in range(1, 100):
        policy.added(entry(f"new {number}", (2 * number,), cost_seconds=1.0))
        victim = policy.victim()
        assert victim is not None
        policy.removed(victim)
        if victim == "old":
            return
    raise AssertionError("it never left")


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_a_call_takes_microseconds_among_many_entries(name: str) -> None:
    policy: EvictionPolicy[str] = POLICIES[name]()
    count = 20_000
    for number in range(count):
        policy.added(entry(f"e{number}", (number,), number - 1 if number % 16 else None))
    begin = time.process_time()
    for number in range(count):
        policy.used(f"e{number}")
        victim = policy.victim()
        if number % 4 == 0 and victim is not None and victim != f"e{number + 1}":
            policy.removed(victim)
            policy.added(entry(victim, (count + number,)))
    assert time.process_time() - begin < 5  # 0.1 s; looking at all entries takes minutes
