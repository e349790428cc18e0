"""Why blocks are no longer in a tier, so that `cache_explain` can say so."""

from collections import OrderedDict

from offload.key import GroupKey

_REMEMBERED = 10_000  # blocks


class EvictionLog:
    """The reasons for which the latest 10,000 blocks left a tier; the oldest are forgotten first.

    It belongs to one tier, which holds its lock around each call.
    """

    def __init__(self) -> None:
        self._reasons: OrderedDict[GroupKey, str] = OrderedDict()

    def record(self, block: GroupKey, reason: str) -> None:
        """Note that the block left: evicted, expired, corrupt, deleted or flushed."""
        self._reasons.pop(block, None)
        self._reasons[block] = reason
        if len(self._reasons) > _REMEMBERED:
            self._reasons.popitem(last=False)

    def forget(self, block: GroupKey) -> None:
        """Note that the block is there again."""
        self._reasons.pop(block, None)

    def reason(self, block: GroupKey) -> str | None:
        """Return why the block left last; None where that is not known."""
        return self._reasons.get(block)
