"""`/v1/cache`: what each tier holds, how often it helped, and letting go of it on purpose.

Figures of tiers are of all tenants together; documents are those of who asks. A hit or a miss is
one block of 64 tokens. Flushing loses nothing that is durable: a document whose blocks left memory
is read back from disk when it is asked about.
"""

import math
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from api.files.document import Document
from api.files.document_library import DocumentLibrary
from api.http.auth import tenant_of
from api.http.bodies import ClearRequest, read_json
from api.http.errors import ApiError
from api.http.openapi import JSON, Body
from api.metrics import EVICTIONS, OF_TIER, TIER
from longctx.process.client import EngineClient
from offload.tier_names import MEMORY_TIERS, TIERS, TierName

CLEAR_BODY = Body(content={JSON: ClearRequest}, required=False)


class CacheRoutes:
    def __init__(self, engine: EngineClient, library: DocumentLibrary) -> None:
        self.engine = engine
        self.library = library

    async def retrieve(self, request: Request) -> Response:
        """Returns what each tier holds, and the caller's documents with where they are."""
        figures = await self.engine.stats()
        tenant = tenant_of(request)
        return JSONResponse(
            {
                "object": "cache",
                "tiers": {tier: self._tier(tier, figures) for tier in TIERS},
                "write_queue_bytes": int(figures.get("store_queue_bytes", 0)),
                "documents": [
                    self._document(document)
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
        freed = await self.engine.clear(tuple(tiers))
        return JSONResponse(
            {
                "object": "cache.flush",
                "freed": {
                    tier: {kind: int(freed[f"{tier}_{kind}"]) for kind in ("blocks", "bytes")}
                    for tier in tiers
                },
            }
        )

    def _tier(self, tier: TierName, figures: dict[str, float]) -> dict[str, Any] | None:
        """None for a tier that this server does not have."""
        own = {
            found[2]: value
            for name, value in figures.items()
            if (found := TIER.fullmatch(name)) and found[1] == tier
        }
        if not own:
            return None
        hits, misses = own["hits_total"], own["misses_total"]
        capacity = own["capacity_bytes"]
        described: dict[str, Any] = {
            "bytes": int(own["bytes"]),
            "capacity_bytes": int(capacity) if math.isfinite(capacity) else None,
            "capacity_tokens": self.engine.info.tier_capacity_tokens[tier],
            "blocks": int(own["blocks"]),
            "hits": int(hits),
            "misses": int(misses),
            "hit_rate": round(hits / (hits + misses), 4) if hits + misses else None,
            "evictions": {
                found[1]: int(value)
                for name, value in own.items()
                if (found := EVICTIONS.fullmatch(name))
            },
        }
        if tier == "device":
            described["blocks_in_use"] = int(own["blocks_held"])
        if tier == "disk":
            described |= {
                "extents": int(own["extents"]),
                "checksum_failures": int(own["corrupt_files_total"]),
                "quarantine_files": int(own["quarantine_files"]),
                "quarantine_bytes": int(own["quarantine_bytes"]),
                "writes_off": bool(own["writes_off"]),
                "incidents": {
                    name.removesuffix("_total"): int(value)
                    for name, value in own.items()
                    if name.endswith("_total") and name not in OF_TIER and value
                    if not EVICTIONS.fullmatch(name)
                },
            }
        return described

    def _document(self, document: Document) -> dict[str, Any]:
        return {
            "id": document.record.id,
            "filename": document.record.filename,
            "state": self.library.state(document),
            "tokens": document.record.tokens,
            "durable_tokens": self.library.durable_tokens(document),
        }
