"""Finds how deep into a chain of blocks a prompt can continue, given which blocks exist.

Global layers need every block; layers with a window need only those of the last window
before the point. So the deepest point is not where the first block is missing: it may lie before,
where a window was kept (a checkpoint).
"""

from collections.abc import Callable, Sequence

from longctx.kv.layout import Layout
from longctx.kv.memory import LayerGroup

Available = Callable[[int, int], bool]  # (layer group, block) -> is it there?


def deepest(
    groups: Sequence[LayerGroup], layout: Layout, available: Available, *, begin: int, limit: int
) -> int:
    """Return the largest depth in blocks, at most `limit`, at which everything needed exists.

    Say one group is global, one has a window of 128 tokens, blocks 0 to 39 exist in the global
    group and only 30, 31, 38 in the other: depth 40 needs window blocks 38 and 39, depth 39 needs
    37 and 38, ... and depth 32 needs 30 and 31, so the answer is 32.

    The first `begin` blocks of global layers are known to exist.
    """
    depth = min(begin, limit)
    if groups[0].window is None:
        while depth < limit and available(0, depth):
            depth += 1
    else:
        depth = limit
    missing: int | None = depth
    while missing is not None:
        depth = missing
        missing = _missing_from_windows(groups, layout, available, depth)
    return depth


def _missing_from_windows(
    groups: Sequence[LayerGroup], layout: Layout, available: Available, depth: int
) -> int | None:
    """Return the depth to try next: the lowest of the last blocks that a window lacks, or None."""
    missing = None
    for index, group in enumerate(groups):
        if group.window is not None:
            for block in range(depth - 1, layout.first_needed(group.window, depth) - 1, -1):
                if not available(index, block):
                    missing = block if missing is None else min(missing, block)
                    break
    return missing
