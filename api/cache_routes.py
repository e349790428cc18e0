"""`/v1/cache`: what each tier holds, how often it helped, and how to clear the tiers in memory.

The numbers of tiers are of all tenants together; documents are those of the tenant who asks. A hit
or a miss is one block of 64 tokens. Clearing evicts only what nobody uses, and loses nothing that
is durable: a document whose blocks left memory is read back from disk when it is asked about.
"""

import math
from collections.abc import Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from api.engine_metrics import Sample, samples, values
from api.files.document import Document
from api.files.document_library import DocumentLibrary
from api.http.auth import tenant_of
from api.http.bodies import ClearRequest
from api.http.errors import ApiError
from api.http.openapi import JSON, Body
from api.http.read_body import read_json
from longctx.process.client import EngineClient
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
        found = list(samples(stats))
        tenant = tenant_of(request)
        return JSONResponse(
            {
                "object": "cache",
                "tiers": {tier: self._tier(tier, found) for tier in TIERS},
                "write_queue_bytes": int(stats.get("store_queue_bytes", 0)),
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

    def _tier(self, tier: TierName, found: Sequence[Sample]) -> dict[str, Any] | None:
        """Describes one tier; None for one that this server does not have."""
        own = [sample for sample in found if sample.labels.get("tier") == tier]
        if not own:
            return None
        stats = {sample.metric.name: sample.value for sample in own}
        hits, misses = stats["kv_hits_total"], stats["kv_misses_total"]
        capacity = stats["kv_capacity_bytes"]
        described: dict[str, Any] = {
            "bytes": int(stats["kv_bytes"]),
            "capacity_bytes": int(capacity) if math.isfinite(capacity) else None,
            "capacity_tokens": self.engine.info.tier_capacity_tokens[tier],
            "blocks": int(stats["kv_blocks"]),
            "hits": int(hits),
            "misses": int(misses),
            "hit_rate": round(hits / (hits + misses), 4) if hits + misses else None,
            "evictions": {
                reason: int(count)
                for reason, count in values(own, "kv_evictions_total", "reason").items()
            },
        }
        if tier == "device":
            described["blocks_in_use"] = int(stats["kv_blocks_in_use"])
        if tier == "disk":
            described |= {
                "extents": int(stats["kv_extents"]),
                "checksum_failures": int(stats["kv_checksum_failures_total"]),
                "quarantine_files": int(stats["kv_quarantine_files"]),
                "quarantine_bytes": int(stats["kv_quarantine_bytes"]),
                "writes_off": bool(stats["kv_writes_off"]),
                "incidents": {
                    kind: int(count)
                    for kind, count in values(own, "kv_incidents_total", "kind").items()
                    if count
                },
            }
        return described

    def _document(self, document: Document) -> dict[str, Any]:
        return {
            "id": document.id,
            "filename": document.record.filename,
            "state": self.library.state(document),
            "tokens": document.record.tokens,
            "durable_tokens": self.library.durable_tokens(document),
        }
