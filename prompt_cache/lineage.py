"""The parent key of a block that follows a reused piece.

An ordinary block is named after the key of the block before it. A block after a reused piece is
named after a hash of everything that its keys and values depend on: what is before the piece, which
rows of which chain the piece is, and at which positions they are here. So two prompts that end in
the same module after different beginnings share nothing of what follows, and two that are made of
the same pieces share it all.
"""

import hashlib
import struct

from offload.key import BlockKey

_RANGE = struct.Struct("<QQQ")


def after_reused(
    before: BlockKey, *, last: BlockKey, begin: int, end: int, position: int
) -> BlockKey:
    """Return the parent key of what follows a reused piece; `before` is that of the piece itself.

    `last` is the key of the last block that the piece has rows of, in the chain that it is taken
    from. Its tokens are [begin, end) of that chain, and its first one is at `position` here.
    """
    digest = hashlib.blake2b(digest_size=32, person=b"longctx-borrows")
    digest.update(before + last + _RANGE.pack(begin, end, position))
    return BlockKey(digest.digest())
