"""How long prompts and answers may be, where there is a disk below a small device."""

import pytest

from compress.shape import BLOCK_TOKENS
from longctx.engine.info import context_limits
from tests.support.bare_cache import bare_cache


@pytest.mark.parametrize("step_blocks", [8, 9])
def test_the_disk_counts_where_the_device_holds_the_blocks_of_a_step(step_blocks: int) -> None:
    memory = bare_cache(blocks=8, step_blocks=step_blocks).memory
    assert memory.capacity_blocks == 8
    limits = context_limits(100_000, memory, below_tokens=50_000)
    assert limits.longest_tokens == (50_000 if step_blocks == 8 else 8 * BLOCK_TOKENS)
