"""Holds prompts that end in a document whole: the reason that a question costs only itself.

The blocks of a document could be found one by one through their keys, but at a million tokens even
that walk costs more than the answer. A `Prefix` keeps the tokens, keys and block-table entries of
everything up to the end of a document in a few arrays, and holds one reference to each block for
all its users together. Looking it up costs the same at any length.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from offload.key import BlockKey

# What a prompt says up to the end of a document: tenant salt, then literal token ids or document.
# Of a module: salt, module, and the key of its last block, which says what the pieces were.
PrefixName = tuple[str | tuple[int, ...] | tuple[str, str], ...]


def document_name(document_id: str) -> tuple[str, str]:
    """Return a document's part of a `PrefixName`; it never equals literal token ids."""
    return ("document", document_id)


def module_name(module_id: str) -> tuple[str, str]:
    """Return a module's part of a `PrefixName`, which says beside it where the prefix ends."""
    return ("module", module_id)


def contains(name: PrefixName, owner: str) -> bool:
    """Whether the document or module with that id is part of the prompt."""
    return document_name(owner) in name or module_name(owner) in name


def owner_of(name: PrefixName) -> str:
    """Return the id of the module, or of the document that ends the prompt."""
    for part in reversed(name):
        if part[:1] == ("module",) or part[:1] == ("document",):
            assert isinstance(part[1], str)
            return part[1]
    raise AssertionError(f"neither a module nor a document: {name}")


def tokens_before(ends: Sequence[tuple[int, PrefixName]]) -> int:
    """Count the tokens of a prompt before its last document; `ends`: each one's end and name."""
    name = ends[-1][1]
    earlier, earlier_name = ends[-2] if len(ends) > 1 else (0, name[:1])
    return earlier + sum(len(literal) for literal in name[len(earlier_name) : -1])


@dataclass(slots=True)
class Prefix:
    """The full blocks of a prompt's beginning, resident in the device pools.

    `tables` [blocks, columns], one per layer group. A group with a window holds only the blocks of
    the last window (from `window_begin[group]`); the others are listed but not held.
    """

    name: PrefixName
    token_ids: NDArray[np.int32]  # up to the end of the document, beyond the last full block
    keys: tuple[BlockKey, ...]  # one per full block
    tables: tuple[NDArray[np.int64], ...]
    window_begin: tuple[int, ...]
    users: int = 0
    closed: bool = False  # its document is gone: it is freed with the last user

    @property
    def blocks(self) -> int:
        return len(self.keys)


class PrefixIndex:
    """Finds prefixes by name, and keeps idle ones in the order of their last use.

    The keys of documents that are kept are known also while no block is resident. `get` a prefix,
    `acquire` it, and count `users` down when done (`ResidentPrefixes.leave`). The engine's thread
    makes all calls.
    """

    def __init__(self) -> None:
        self._prefixes: OrderedDict[PrefixName, Prefix] = OrderedDict()
        self._keys: dict[PrefixName, tuple[BlockKey, ...]] = {}

    def __len__(self) -> int:
        return len(self._prefixes)

    def __contains__(self, name: PrefixName) -> bool:
        return name in self._prefixes

    def get(self, name: PrefixName) -> Prefix | None:
        return self._prefixes.get(name)

    def know(self, name: PrefixName, keys: tuple[BlockKey, ...]) -> None:
        """Remember the keys of the full blocks up to a document's end: none is hashed again."""
        self._keys[name] = keys

    def known_keys(self, name: PrefixName) -> tuple[BlockKey, ...]:
        """Return the keys of its full blocks, none where they are not known."""
        prefix = self._prefixes.get(name)
        return self._keys.get(name, ()) if prefix is None else prefix.keys

    def names(self) -> Iterator[PrefixName]:
        """Iterate over the names of all known prefixes, resident or not."""
        return iter(dict.fromkeys((*self._prefixes, *self._keys)))

    def add(self, prefix: Prefix) -> None:
        assert prefix.name not in self._prefixes
        self._prefixes[prefix.name] = prefix

    def acquire(self, prefix: Prefix) -> None:
        prefix.users += 1
        if prefix.name in self._prefixes:
            self._prefixes.move_to_end(prefix.name)

    def take(self, name: PrefixName) -> Prefix:
        """Acquire and return the prefix of that name."""
        prefix = self._prefixes[name]
        self.acquire(prefix)
        return prefix

    def idle(self) -> Iterator[Prefix]:
        """Iterate over prefixes without users, the least recently used first."""
        return (prefix for prefix in self._prefixes.values() if prefix.users == 0)

    def pop_idle(self) -> Prefix | None:
        """Remove and return the idle prefix that was least recently used."""
        prefix = next(self.idle(), None)
        if prefix is not None:
            del self._prefixes[prefix.name]
        return prefix

    def pop_document(self, document_id: str) -> list[Prefix]:
        """Remove and return all prefixes that contain the document or module, in use or not."""
        self._keys = {n: keys for n, keys in self._keys.items() if not contains(n, document_id)}
        names = [name for name in self._prefixes if contains(name, document_id)]
        return [self._prefixes.pop(name) for name in names]
