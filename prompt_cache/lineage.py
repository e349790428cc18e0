"""The name of what stands before a block, where not all of it was computed in one piece.

After an ordinary block comes its key. After a borrowed piece comes a hash of everything that the
keys and values of later rows depend on: what stands before the piece, which rows of which chain it
is, and where they stand. So two prompts that end in the same module never share what follows, and
two that are made of the same pieces do.
"""

import hashlib
import struct

from offload.key import BlockKey

_RANGE = struct.Struct("<QQQ")


def after_reused(
    before: BlockKey, *, last: BlockKey, begin: int, end: int, position: int
) -> BlockKey:
    """The parent of what follows a piece.

    `last` is the key of the last block that the piece has rows of, in the chain that it is borrowed
    from; `begin` and `end` are its tokens there; its first row stands at `position` here.
    """
    digest = hashlib.blake2b(digest_size=32, person=b"longctx-borrows")
    digest.update(before + last + _RANGE.pack(begin, end, position))
    return BlockKey(digest.digest())
