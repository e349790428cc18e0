"""Who wants which keys kept: documents and stored prompts retain keys under their ids."""

from collections.abc import Iterable

from offload.key import BlockKey


class Owners:
    """Counts the owners of each key. A key is free once its last owner has released it.

    `retain` and `release` are for the engine's thread alone; `in` may be asked from any.
    """

    def __init__(self) -> None:
        self._keys: dict[str, set[BlockKey]] = {}
        self._counts: dict[BlockKey, int] = {}

    def __contains__(self, key: BlockKey) -> bool:
        return key in self._counts

    def retain(self, owner: str, keys: Iterable[BlockKey]) -> list[BlockKey]:
        """Add to what the owner retains; return those keys that nobody retained before."""
        held = self._keys.setdefault(owner, set())
        new = set(keys) - held
        held |= new
        first = [key for key in new if key not in self._counts]
        for key in new:
            self._counts[key] = self._counts.get(key, 0) + 1
        return first

    def keys(self, owner: str) -> list[BlockKey]:
        """Return all that the owner retains, in no particular order."""
        return list(self._keys.get(owner, ()))

    def release(self, owner: str) -> list[BlockKey]:
        """Forget the owner; return those of its keys that nobody retains any more."""
        free = []
        counts = self._counts
        for key in self._keys.pop(owner, ()):
            if counts[key] == 1:
                del counts[key]
                free.append(key)
            else:
                counts[key] -= 1
        return free
