"""How deep into a chain of blocks a prompt can go on, given which blocks there are.

Layers that see everything need every block; layers with a window need only those of the last window
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
    """The largest depth in blocks, at most `limit`, at which everything needed is there.

    The first `begin` blocks of global layers are known to be there.
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
    """The last block that a window before `depth` lacks in some group."""
    missing = None
    for index, group in enumerate(groups):
        if group.window is not None:
            for block in range(depth - 1, layout.first_needed(group.window, depth) - 1, -1):
                if not available(index, block):
                    missing = block if missing is None else min(missing, block)
                    break
    return missing
