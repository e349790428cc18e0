"""Erases what was closed, once nothing uses it: requests that were asked before, and transfers.

A question that runs when its document is closed goes on, so that it is answered; what it computes
until then stems from the document, and goes with it. Until then the document's own blocks stay
retained: one that waits, or is preempted, would have to compute all of it again.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace

from longctx.kv.cache_manager import KVCacheManager
from longctx.request import Erasure
from offload.stats import Cleared
from offload.tier_names import TierName


class Leaving:
    """Holds the ids of documents and modules that were closed and are not erased yet.

    The engine calls `close`, then `erase` after each step, until nothing is left; `stay` where an
    id is opened again, and `replace` where it means other tokens now. Only the engine's thread
    calls it.
    """

    def __init__(self, cache: KVCacheManager, uses: Callable[[str], int]) -> None:
        """`uses(id)` counts the requests that have it in their prompt."""
        self._cache = cache
        self._uses = uses
        self._closed: set[str] = set()  # and not opened again, ever since the engine was started
        self._waiting: set[str] = set()  # for requests and transfers
        self._erasing: dict[str, Erasure] = {}  # by the store; with what the device had
        self._ended: dict[str, Erasure] = {}

    def __bool__(self) -> bool:
        return bool(self._waiting or self._erasing)

    def close(self, owner: str) -> Erasure:
        """Erase what stems from a document or module, now or later; return how far that is."""
        self._closed.add(owner)
        self._waiting.add(owner)
        self.erase()
        ended = self._ended.pop(owner, None)
        if ended is not None:
            return ended
        if owner in self._erasing:
            return self._erasing[owner]
        return Erasure(requests=self._uses(owner), transfers=self._transfers(owner))

    def note_use(self, sources: Iterable[str]) -> None:
        """Note a request that came when some of its sources were closed: they leave after it."""
        self._waiting.update(source for source in sources if source in self._closed)

    def stay(self, owner: str) -> None:
        """Keep what is not erased yet: the document or module is open again."""
        self._closed.discard(owner)
        if owner in self._waiting:
            self._waiting.remove(owner)
            self._ended[owner] = Erasure()

    def replace(self, owner: str) -> None:
        """Erase what an id has owned, of which other tokens are about to be computed."""
        self._cache.erase(owner, sources=False)

    def erase(self) -> None:
        """Begin to erase what nothing uses any more, and note what the store has done."""
        for owner in [each for each in self._waiting if not self._is_used(each)]:
            self._waiting.remove(owner)
            device = self._cache.erase(owner)
            tiers: dict[TierName, Cleared] = {"device": device}
            if self._cache.offloader is None:
                self._ended[owner] = Erasure(tiers=tiers)
            else:
                self._erasing[owner] = Erasure(tiers=tiers, transfers=1)
        if self._cache.offloader is not None:
            erased, self._cache.offloader.erased = self._cache.offloader.erased, {}
            for owner, below in erased.items():
                begun = self._erasing.pop(owner, None)
                if begun is not None:
                    tiers = {**begun.tiers, **below.tiers}
                    self._ended[owner] = replace(begun, tiers=tiers, transfers=0, left=below.left)

    def take_ended(self) -> dict[str, Erasure]:
        """Return the erasures that have ended since the last call, by id."""
        ended, self._ended = self._ended, {}
        return ended

    def _is_used(self, owner: str) -> bool:
        return bool(self._uses(owner) or self._transfers(owner))

    def _transfers(self, owner: str) -> int:
        offloader = self._cache.offloader
        return 0 if offloader is None else offloader.transfers_of(owner)
