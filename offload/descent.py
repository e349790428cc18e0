"""Which blocks stem from what is deleted: its own, and all that was computed after its text.

Blocks are named after what precedes them, so whatever follows a deleted block is of no use without
it. A block also knows the documents and modules of which its prompt had text, wherever that was:

    document A has blocks a1 a2, and its owner is A
    a question on it: a1 a2 q1        q1 follows a2, and has the source A
    the same after other text: s1 t1  t1 has the source A, and nothing of A's own blocks before it

Deleting A deletes a1, a2, q1 and t1. What somebody else owns stays, and what follows it.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from offload.block_run import BlockRun
from offload.key import BlockKey


@dataclass(frozen=True, slots=True)
class Stem:
    """Consecutive blocks, the key before them where it is known, and what their text is from."""

    keys: tuple[BlockKey, ...]
    parent: BlockKey | None
    sources: tuple[str, ...]

    @classmethod
    def of(cls, run: BlockRun) -> "Stem":
        return cls(run.keys, run.parent, run.sources)


def descendants(
    stems: Iterable[Stem],
    source: str | None,
    keys: Iterable[BlockKey],
    is_owned: Callable[[BlockKey], bool],
) -> set[BlockKey]:
    """Return `keys`, the blocks of stems that have the source, and all that follow one of these.

    Those that are owned are left out. A source `x` is also that of parts named `x/...`.
    """
    found = {key for key in keys if not is_owned(key)}
    after: dict[BlockKey, list[BlockKey]] = {}
    for stem in stems:
        of_source = source is not None and any(
            name == source or name.startswith(f"{source}/") for name in stem.sources
        )
        if of_source:
            found.update(key for key in stem.keys if not is_owned(key))
        parent = stem.parent
        for key in stem.keys:
            if parent is not None:
                after.setdefault(parent, []).append(key)
            parent = key
    queue = list(found)
    while queue:
        for key in after.get(queue.pop(), ()):
            if key not in found and not is_owned(key):
                found.add(key)
                queue.append(key)
    return found
