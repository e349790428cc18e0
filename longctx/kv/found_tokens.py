"""Counts by tier what was found of a prompt: a question on a document costs what its tier costs.

What is on the device when a sequence is admitted was there before, or was loaded for it; only the
load knows from where.
"""

from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as Items
from itertools import groupby

from longctx.kv.sequence_blocks import SequenceBlocks
from offload.tier_names import TIERS, TierName

TierOf = Callable[[int], TierName | None]  # of a block of the first layer group


def note_load(
    sequence: SequenceBlocks,
    depth: int,
    missing: Items[int],
    tiers: Items[TierName | None],
    *,
    windows_only: bool,
) -> None:
    """Remember from which tiers a load brings `missing` blocks of the first layer group.

    It begins at `depth`: what an earlier load was to bring from there on did not come. Where all
    layers have windows, the blocks before the last window are neither missing nor there, and count
    as what follows them.
    """
    kept = [(tier, begin, min(end, depth)) for tier, begin, end in sequence.offload.loaded]
    runs = [run for run in kept if run[1] < run[2]]
    before = depth if windows_only else None
    for tier, members in groupby(zip(missing, tiers, strict=True), key=lambda pair: pair[1]):
        blocks = [block for block, _ in members]
        if tier is not None:
            runs += _stretches(tier, blocks if before is None else [*range(before, blocks[-1] + 1)])
        before = None
    sequence.offload.loaded = runs


def _stretches(tier: TierName, blocks: Items[int]) -> list[tuple[TierName, int, int]]:
    """Return each run of consecutive blocks: 3 4 5 9 give (3, 6) and (9, 10)."""
    runs: list[tuple[TierName, int, int]] = []
    for block in blocks:
        if runs and runs[-1][2] == block:
            runs[-1] = (tier, runs[-1][1], block + 1)
        else:
            runs.append((tier, block, block + 1))
    return runs


def note_admitted(sequence: SequenceBlocks, depth: int, tier_of: TierOf) -> None:
    """Count the tokens of the first `depth` blocks, and of what the prompt reuses, by the tier
    that had them when the prompt came; again after a preemption they do not count."""
    if sequence.offload.streams:  # what is read step by step is where it is now
        note_in_place(sequence, depth, tier_of)
    elif sequence.found_tokens is None:
        layout = sequence.layout
        counts: Counter[TierName] = Counter()
        for tier, begin, end in sequence.offload.loaded:
            if begin < (end := min(end, depth)):
                counts[tier] += layout.tokens(end) - layout.tokens(begin)
        here = layout.tokens(depth) - counts.total()
        counts["device"] += here + sequence.reused_tokens
        sequence.found_tokens = {tier: counts[tier] for tier in TIERS}
    sequence.offload.loaded = []


def note_in_place(sequence: SequenceBlocks, depth: int, tier_of: TierOf) -> None:
    """Count the tokens of the first `depth` blocks by the tier where they are now."""
    if sequence.found_tokens is not None:
        return
    layout = sequence.layout
    counts: Counter[TierName] = Counter({"device": sequence.reused_tokens})
    for block in range(depth):
        counts[tier_of(block) or "device"] += layout.tokens(block + 1) - layout.tokens(block)
    sequence.found_tokens = {tier: counts[tier] for tier in TIERS}
