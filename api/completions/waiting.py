"""What may have to be waited for before a prompt can be made."""

from collections.abc import AsyncGenerator

from api.http.sse import JSONObject


class Waitable:
    """Is ready at once, unless a subclass says otherwise."""

    @property
    def is_ready(self) -> bool:
        """Whether nothing has to be waited for."""
        return True

    async def waiting(self) -> AsyncGenerator[JSONObject, None]:
        """Yields what is waited for, now and then, and ends once it is there."""
        nothing: tuple[JSONObject, ...] = ()
        for news in nothing:
            yield news
