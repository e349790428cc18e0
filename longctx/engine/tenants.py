"""Counts how many seconds of the engine each tenant was given, so that the least served is next.

Source: the virtual token counter of "Fairness in Serving Large Language Models",
https://arxiv.org/abs/2401.00588. Differs: it counts the seconds that a chunk takes by the cost
model's measure instead of tokens, since a token deep in a document costs many times one of a chat.
"""

import math


class Tenants:
    """Counts seconds by tenant; a tenant that was away does not save them up.

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
        if present:
            self._served.setdefault(tenant, least)

    def charge(self, tenant: str, seconds: float) -> None:
        self._served[tenant] = self._served.get(tenant, 0.0) + seconds

    def served_seconds(self, tenant: str) -> float:
        return self._served.get(tenant, 0.0)
