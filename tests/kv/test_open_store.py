"""What the tiers below the device are made of."""

import pytest
import torch

from longctx.kv.open_store import pinned
from offload.eviction import LRU
from offload.host import HostTier
from offload.key import GroupKey
from tests.offload.memory_disk import PAGE_BYTES, chain, filled_slots


@pytest.mark.skipif(torch.cuda.is_available(), reason="memory can be pinned here")
def test_a_tier_that_cannot_pin_keeps_nothing_and_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    host = HostTier(
        capacity_bytes=1 << 20, page_bytes=PAGE_BYTES, policy=LRU[GroupKey](), allocate=pinned
    )
    run = chain(1, 2)
    slots = filled_slots(run)
    stored = host.put(
        run.group, run.keys, slots, parent=run.parent, cost_seconds=1.0, retained=False
    )
    assert stored == 0
    assert host.stats().capacity_bytes == 0
    assert "could be allocated" in caplog.text
