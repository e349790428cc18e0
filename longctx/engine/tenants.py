"""Counts how many seconds of the engine each tenant was given, so that the least served is next.

Source: the virtual token counter of "Fairness in Serving Large Language Models",
https://arxiv.org/abs/2401.00588. Differs: it counts the seconds that a chunk takes by the cost
model's measure instead of tokens, since a token deep in a document costs many times one of a chat.
"""

import math


class Tenants:
    """Counts seconds by tenant; a tenant that was away does not save them up.

    Each class of requests has its own count: who takes much of one has a share of the others too.
    Tenants are told apart by the salt of their requests. Only the scheduler's thread uses it.
    """

    def __init__(self) -> None:
        self._served: dict[str, float] = {}

    def join(self, tenant: str, present: set[str]) -> None:
        """Let a tenant that had no work begin no lower than the least served of those `present`.

        Who is away and would begin there as well is forgotten, and everybody when all are away.
        """
        if tenant in present:
            return
        least = min((self.served_seconds(each) for each in present), default=math.inf)
        self._served = {each: s for each, s in self._served.items() if each in present or s > least}
        self._served.setdefault(tenant, least if present else 0.0)

    def charge(self, tenant: str, seconds: float) -> None:
        self._served[tenant] = self.served_seconds(tenant) + seconds

    def served_seconds(self, tenant: str) -> float:
        """Return what it was given; of one that has not joined, as much as the least served."""
        return self._served.get(tenant, min(self._served.values(), default=0.0))
