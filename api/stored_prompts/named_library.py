"""A library of what tenants have stored under names of their own, whatever kind of thing it is."""

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterator
from typing import ClassVar, Generic, Protocol, TypeVar

from api.background.endings import Receipt
from api.background.name_locks import NameLocks
from api.http.errors import ApiError
from api.stored_prompts.module_keeper import ModuleKeeper, StoredModules
from longctx.errors import InvalidRequest


class NamedRecord(Protocol):
    @property
    def tenant(self) -> str: ...
    @property
    def name(self) -> str: ...


class NamedItem(Protocol):
    """Has a record, and the modules that are kept computed for it: None where they cannot be."""

    @property
    def record(self) -> NamedRecord: ...
    @property
    def modules(self) -> StoredModules | None: ...


Item = TypeVar("Item", bound=NamedItem)


class NamedLibrary(ABC, Generic[Item]):
    """Holds the items of one kind, in order of storing. Its methods are called on the event loop.

    One change at a time is made to a name; each leaves memory and database alike.
    """

    kind: ClassVar[str]  # in messages, codes and paths, such as "schema"

    def __init__(self, keeper: ModuleKeeper) -> None:
        self._keeper = keeper
        self._items: dict[tuple[str, str], Item] = {}
        self._locks = NameLocks()

    def find(self, tenant: str, name: str, *, param: str | None = None) -> Item:
        """Returns the item. Raises ApiError 404 when the tenant has none of that name now."""
        item = self._items.get((tenant, name))
        if item is None or self._is_expired(item):
            raise ApiError(
                404,
                f"there is no {self.kind} {name!r}; GET /v1/prompt_cache/{self.kind}s lists those "
                "there are",
                param=param,
                code=f"{self.kind}_not_found",
            )
        return item

    def of_tenant(self, tenant: str) -> Iterator[Item]:
        """Yields the tenant's items, oldest first."""
        return (
            item
            for (owner, _), item in self._items.items()
            if owner == tenant and not self._is_expired(item)
        )

    async def remove(self, tenant: str, name: str) -> Receipt:
        """Removes whatever the tenant has under that name now; returns what that has erased."""
        async with self._locks.of(tenant, name):
            item = self._items.get((tenant, name))
            return Receipt() if item is None else await self._forget(item)

    @abstractmethod
    async def _remove_record(self, item: Item) -> None:
        """Removes the item from the database."""

    def _is_expired(self, item: Item) -> bool:
        return False

    def _take_up(self, item: Item) -> None:
        """Adds an item that is in the database already."""
        self._items[item.record.tenant, item.record.name] = item
        if item.modules is not None:
            self._keeper.keep(item.modules)

    async def _put(
        self, item: Item, modules: StoredModules, save: Callable[[], Awaitable[None]]
    ) -> None:
        """Puts a new item in the place of the tenant's item of that name, which goes once the new
        one is computed. Where `save` fails, all stays as it was. The caller holds the name's lock.
        """
        self._keeper.keep(modules)
        try:
            await save()
        except BaseException:
            await self._keeper.drop(modules)
            raise
        key = item.record.tenant, item.record.name
        known = self._items.pop(key, None)
        self._items[key] = item  # as the youngest
        if known is not None and known.modules is not None:
            await self._keeper.replace(known.modules, modules)

    async def _forget(self, item: Item) -> Receipt:
        """Removes the item from the database, then from memory and from the tiers."""
        await self._remove_record(item)  # first: where it fails, all is as it was
        del self._items[item.record.tenant, item.record.name]
        return Receipt() if item.modules is None else await self._keeper.drop(item.modules)


async def until_opened(modules: StoredModules, *, param: str) -> None:
    """Waits until the engine knows the modules. Raises InvalidRequest where it refuses them."""
    await modules.opened.wait()
    if modules.error is not None:
        raise InvalidRequest(modules.error, param=param)
