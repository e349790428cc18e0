"""The name of a block, which is made of what it says, after what, under which conditions.

    key = blake2b-256(parent key, first position, token ids)

The parent of a chain's first block is its namespace: model, types, rotary choice, codec and tenant.
Equal text after equal text in an equal namespace has an equal key, in any tier, on any day.
"""

import hashlib
from typing import NewType

import numpy as np
from numpy.typing import NDArray

BlockKey = NewType("BlockKey", bytes)  # 32 bytes
GroupKey = tuple[int, BlockKey]  # a layer group has blocks of its own: (group, key) names one


def namespace(
    *, fingerprint: str, dtype: str, rope: str, codec: str, codec_version: int, salt: str
) -> BlockKey:
    """Return the root of all chains whose blocks may be shared."""
    parts = (fingerprint, dtype, rope, codec, str(codec_version), salt)
    digest = hashlib.blake2b(digest_size=32, person=b"longctx-space")
    for part in parts:
        raw = part.encode()
        digest.update(len(raw).to_bytes(8, "little") + raw)  # lengths: no two tuples read alike
    return BlockKey(digest.digest())


def chain_keys(
    parent: BlockKey, token_ids: NDArray[np.int32], *, first_position: int, block_tokens: int
) -> list[BlockKey]:
    """Return the keys of the full blocks of `token_ids`, each of which is the parent of the next.

    With 64 tokens to a block, 150 tokens have two keys; the last 22 have none yet.
    """
    assert token_ids.dtype == np.int32
    raw = np.ascontiguousarray(token_ids).tobytes()
    stride = block_tokens * 4
    keys: list[BlockKey] = []
    for begin in range(0, len(raw) - stride + 1, stride):
        parent = _key(parent, first_position + begin // 4, raw[begin : begin + stride])
        keys.append(parent)
    return keys


def short_key(parent: BlockKey, token_ids: NDArray[np.int32], *, first_position: int) -> BlockKey:
    """Return the key of a block that was sealed before it was full."""
    assert token_ids.dtype == np.int32 and len(token_ids)
    return _key(parent, first_position, np.ascontiguousarray(token_ids).tobytes())


def _key(parent: BlockKey, first_position: int, token_bytes: bytes) -> BlockKey:
    digest = hashlib.blake2b(parent + first_position.to_bytes(8, "little"), digest_size=32)
    digest.update(token_bytes)
    return BlockKey(digest.digest())
