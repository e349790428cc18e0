"""`/v1/cache`: what each tier holds, how often it helped, and how to clear the tiers in memory.

The numbers of tiers are of all tenants together; documents are those of the tenant who asks. A hit
or a miss is one block of 64 tokens. Clearing evicts only what nobody uses, and loses nothing that
is durable: a document whose blocks left memory is read back from disk when it is asked about.
"""

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from api.files.document import Document
from api.files.document_library import DocumentLibrary
from api.http.auth import tenant_of
from api.http.bodies import ClearRequest
from api.http.errors import ApiError
from api.http.openapi import JSON, Body
from api.http.read_body import read_json
from longctx.process.client import EngineClient
from offload.stats import TierStats
from offload.tier_names import MEMORY_TIERS, TIERS, TierName

CLEAR_BODY = Body(content={JSON: ClearRequest}, required=False)


class CacheRoutes:
    """The endpoints of `/v1/cache`. They ask the engine between two of its steps."""

    def __init__(self, engine: EngineClient, library: DocumentLibrary) -> None:
        self.engine = engine
        self.library = library

    async def retrieve(self, request: Request) -> Response:
        """Returns what each tier holds, and the caller's documents with where they are."""
        stats = await self.engine.stats()
        tenant = tenant_of(request)
        return JSONResponse(
            {
                "object": "cache",
                "tiers": {tier: self._tier(tier, stats.tiers.get(tier)) for tier in TIERS},
                "write_queue_bytes": 0 if stats.store is None else stats.store.queued_bytes,
                "documents": [
                    self._document(document, stats.document_tiers.get(document.id))
                    for document in self.library.documents()
                    if document.record.tenant == tenant
                ],
            }
        )

    async def clear(self, request: Request) -> Response:
        """Evicts what nobody uses from the tiers in memory. Nothing durable is lost."""
        wanted = await read_json(request, ClearRequest, if_empty=b"{}")
        capacity = self.engine.info.tier_capacity_tokens
        present = [tier for tier in MEMORY_TIERS if capacity[tier]]
        tiers = present if wanted.tier == "all" else [wanted.tier]
        if not set(tiers) <= set(present):
            raise ApiError(
                400,
                f"this server has no {wanted.tier} tier; --host-pool-gib makes one in RAM",
                param="tier",
                code="unsupported_value",
            )
        cleared = await self.engine.clear(tuple(tiers))
        return JSONResponse(
            {
                "object": "cache.flush",
                "freed": {
                    tier: {"blocks": freed.blocks, "bytes": freed.num_bytes}
                    for tier, freed in cleared.items()
                },
            }
        )

    def _tier(self, tier: TierName, stats: TierStats | None) -> dict[str, Any] | None:
        """Describes one tier; None for one that this server does not have."""
        if stats is None:
            return None
        asked = stats.hits + stats.misses
        described: dict[str, Any] = {
            "bytes": stats.held_bytes,
            "capacity_bytes": stats.capacity_bytes,
            "capacity_tokens": self.engine.info.tier_capacity_tokens[tier],
            "blocks": stats.blocks,
            "hits": stats.hits,
            "misses": stats.misses,
            "hit_rate": round(stats.hits / asked, 4) if asked else None,
            "evictions": dict(stats.evictions),
        }
        if tier == "device":
            described["blocks_in_use"] = stats.blocks_in_use
        if tier == "disk":
            described |= {
                "extents": stats.extents,
                "checksum_failures": stats.corrupt_files,
                "quarantine_files": stats.quarantine_files,
                "quarantine_bytes": stats.quarantine_bytes,
                "writes_off": stats.writes_off,
                "incidents": {kind: count for kind, count in stats.incidents.items() if count},
            }
        return described

    def _document(self, document: Document, tier: TierName | None) -> dict[str, Any]:
        return {
            "id": document.id,
            "filename": document.record.filename,
            "state": self.library.state(document),
            "tokens": document.record.tokens,
            "tier": tier,  # the fastest that has it, after its own prompt
            "durable_tokens": self.library.durable_tokens(document),
        }
