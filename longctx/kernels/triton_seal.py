"""Sealing as one Triton kernel, for GPUs: raw blocks into packed pages, to the bytes of `encode`.

A program seals one head of one block: the keys channel by channel, in the planes that make up the
bytes of a 32-bit lane (`compress.record`), then the values, a few tokens at a time. So little is
held at once, whatever the head's size.

To the same bytes as a CPU's means: divisions and sums are rounded as IEEE says, none is fused
(launch it with `enable_fp_fusion=False`), and bfloat16 is made by arithmetic on bits.
"""

import triton
import triton.language as tl

from longctx.kernels.triton_attention import BF16, BLOCK, INT8, RAW

WHOLE_NUMBERS = tl.constexpr(12582912.0)  # 1.5 * 2^23: float32 has no fractions beside it
BF16_LARGEST = tl.constexpr(3.3895313892515355e38)
NAN_BITS = tl.constexpr(0x7FC0)  # of bfloat16
DIMS_AT_ONCE = tl.constexpr(64)


@triton.jit(do_not_specialize=["raw_begin", "packed_begin"])
def seal_blocks(
    raw,  # raw pool: [raw pages * 64, 2, KV_HEADS, D]
    raw_pages,  # int64 [blocks], read where RAW_LISTED; else they begin at `raw_begin`
    raw_begin,
    packed,  # packed pages: int32 words, or rows of the model's type where CODEC is RAW
    page_stride,  # in elements of `packed`
    packed_pages,  # as `raw_pages`
    packed_begin,
    D: tl.constexpr,
    D_PAD: tl.constexpr,  # a power of two, at least 16
    KV_HEADS: tl.constexpr,
    CODEC: tl.constexpr,
    VALUE_GROUP: tl.constexpr,  # dims of a value that share a scale, INT4 only
    GROUPS_PAD: tl.constexpr,  # of these groups, and below of their dims: powers of two
    GROUP_PAD: tl.constexpr,
    RAW_LISTED: tl.constexpr,
    PACKED_LISTED: tl.constexpr,
):
    """Seal one head of one block; grid (block, head)."""
    index, head = tl.program_id(0), tl.program_id(1)
    source = raw_begin + index.to(tl.int64)
    if RAW_LISTED:
        source = tl.load(raw_pages + index)
    target = packed_begin + index.to(tl.int64)
    if PACKED_LISTED:
        target = tl.load(packed_pages + index)
    keys = raw + source * (BLOCK * 2 * KV_HEADS * D) + head * D
    values = keys + KV_HEADS * D
    ROW: tl.constexpr = 2 * KV_HEADS * D
    t = tl.arange(0, BLOCK)
    if CODEC == RAW:
        _copy(keys, packed + target * page_stride + head * D, t, D, D_PAD, ROW)
        _copy(values, packed + target * page_stride + (KV_HEADS + head) * D, t, D, D_PAD, ROW)
    else:
        record = packed + target * page_stride + head * (page_stride // KV_HEADS)
        whole = t >= 0
        if CODEC != BF16:
            whole = _whole_tokens(keys, t, D, D_PAD, ROW) != 0
        _seal_keys(keys, record, t, whole, D, D_PAD, CODEC, VALUE_GROUP, ROW)
        _seal_values(
            values, record, t, whole, D, D_PAD, CODEC, VALUE_GROUP, GROUPS_PAD, GROUP_PAD, ROW
        )


@triton.jit
def _copy(source, target, t, D: tl.constexpr, D_PAD: tl.constexpr, ROW: tl.constexpr):
    for begin in tl.static_range(0, D_PAD, DIMS_AT_ONCE):
        d = begin + tl.arange(0, min(DIMS_AT_ONCE, D_PAD))
        places, there = t[:, None] * ROW + d[None, :], (d < D)[None, :]
        there = there & (t >= 0)[:, None]
        tl.store(target + places, tl.load(source + places, mask=there), mask=there)


@triton.jit
def _whole_tokens(rows, t, D: tl.constexpr, D_PAD: tl.constexpr, ROW: tl.constexpr):
    """1 for each token whose row has neither NaN nor infinity: int32 [64]."""
    whole = tl.full([BLOCK], 1, tl.int32)
    for begin in tl.static_range(0, D_PAD, DIMS_AT_ONCE):
        d = begin + tl.arange(0, min(DIMS_AT_ONCE, D_PAD))
        there = (d < D)[None, :]
        wide = _wide(tl.load(rows + t[:, None] * ROW + d[None, :], mask=there, other=0.0))
        whole = tl.minimum(whole, tl.min(tl.where(wide - wide == 0, 1, 0), 1))
    return whole


@triton.jit
def _seal_keys(
    rows,
    record,
    t,
    whole,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    CODEC: tl.constexpr,
    VALUE_GROUP: tl.constexpr,
    ROW: tl.constexpr,
):
    """Round the keys channel by channel, as `compress.channels` does; a plane of dims at a time."""
    WIDTH: tl.constexpr = 2 if CODEC == BF16 else (4 if CODEC == INT8 else 8)
    LARGEST: tl.constexpr = 127.0 if CODEC == INT8 else 7.5
    r = tl.arange(0, D_PAD // WIDTH)
    there = r < D // WIDTH
    words = tl.zeros([D_PAD // WIDTH, BLOCK], tl.int32)
    some = tl.max(tl.where(whole, 1, 0), 0) != 0
    for p in tl.static_range(WIDTH):
        dims = WIDTH * r + p
        places = dims[:, None] + t[None, :] * ROW
        wide = _wide(tl.load(rows + places, mask=there[:, None], other=0.0))
        if CODEC == BF16:
            codes = _bf16_bits(wide)
        else:
            seen = whole[None, :]
            high = tl.max(tl.where(seen, wide, float("-inf")), 1)
            low = tl.min(tl.where(seen, wide, float("inf")), 1)
            high, low = tl.where(some, high, 0.0), tl.where(some, low, 0.0)
            middle = _unsigned_zero(high * 0.5 + low * 0.5)
            offset = _nearest(tl.minimum(tl.maximum(middle, -BF16_LARGEST), BF16_LARGEST))
            reach = _unsigned_zero(tl.maximum(high - offset, offset - low))
            scale = _nearest(reach * (1 / LARGEST))
            divisor = tl.where(scale > 0, scale, 1.0)
            steps = tl.math.div_rn(wide - offset[:, None], _like(divisor[:, None], wide))
            steps = tl.where(seen, steps, 0.0)
            if CODEC == INT8:
                codes = _rounded(steps, -127.0, 127.0) & 255
                numbers = record + 32 * D + BLOCK // 2
            else:
                codes = _rounded(steps + 7.5, 0.0, 15.0)
                numbers = record + 16 * D + (D // VALUE_GROUP) * BLOCK
            of_dims = numbers.to(tl.pointer_type(tl.int16)) + dims
            tl.store(of_dims, _bits(scale), mask=there)
            tl.store(of_dims + D, _bits(offset), mask=there)
        words |= codes << _shift(p, CODEC)
    tl.store(record + r[:, None] * BLOCK + t[None, :], words, mask=there[:, None])


@triton.jit
def _seal_values(
    rows,
    record,
    t,
    whole,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    CODEC: tl.constexpr,
    VALUE_GROUP: tl.constexpr,
    GROUPS_PAD: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    ROW: tl.constexpr,
):
    """Round the values token by token, a plane of tokens at a time.

    Dims are taken as [groups, dims of a group]; but for INT4 there is one group.
    """
    WIDTH: tl.constexpr = 2 if CODEC == BF16 else (4 if CODEC == INT8 else 8)
    LINES: tl.constexpr = BLOCK // WIDTH
    GROUPS: tl.constexpr = D // VALUE_GROUP
    i, g, e = tl.arange(0, LINES), tl.arange(0, GROUPS_PAD), tl.arange(0, GROUP_PAD)
    dims = (g[:, None] * VALUE_GROUP + e[None, :])[None, :, :]
    there = ((g < GROUPS)[:, None] & (e < VALUE_GROUP)[None, :])[None, :, :]
    of_group = (g < GROUPS)[None, :]
    words = tl.zeros([LINES, GROUPS_PAD, GROUP_PAD], tl.int32)
    numbers = (record + (32 * D if CODEC == INT8 else 16 * D)).to(tl.pointer_type(tl.int16))
    for p in tl.static_range(WIDTH):
        tokens = WIDTH * i + p
        places = tokens[:, None, None] * ROW + dims
        wide = _wide(tl.load(rows + places, mask=there, other=0.0))
        if CODEC == BF16:
            codes = _bf16_bits(wide)
        else:
            finite = tl.min(tl.min(tl.where(wide - wide == 0, 1, 0), 2), 1)
            mine = (t[None, :] == tokens[:, None]) & whole[None, :]
            finite = (finite != 0) & (tl.max(tl.where(mine, 1, 0), 1) != 0)
            if CODEC == INT8:
                least = tl.zeros([LINES, GROUPS_PAD], tl.float32)
                peak = tl.max(tl.abs(wide), 2)
                scale = _nearest(peak * (1 / 127.0))
            else:
                least = tl.min(tl.where(there, wide, float("inf")), 2)
                least = tl.where(of_group, _rounded_down(_unsigned_zero(least)), 0.0)
                most = tl.max(tl.where(there, wide, float("-inf")), 2)
                span = _unsigned_zero(tl.where(of_group, most, 0.0) - least)
                finite = finite & (tl.min(tl.where(span - span == 0, 1, 0), 1) != 0)
                scale = _nearest(span * (1 / 15.0))
            good = finite[:, None] & (g >= 0)[None, :]
            divisor = tl.where(good & (scale > 0), scale, 1.0)
            steps = tl.math.div_rn(wide - least[:, :, None], _like(divisor[:, :, None], wide))
            steps = tl.where(good[:, :, None], steps, 0.0)
            of_tokens = numbers + g[None, :] * BLOCK + tokens[:, None]
            tl.store(of_tokens, tl.where(good, _bits(scale), NAN_BITS), mask=of_group)
            if CODEC == INT8:
                codes = _rounded(steps, -127.0, 127.0) & 255
            else:
                codes = _rounded(steps, 0.0, 15.0)
                minimums = tl.where(good, _bits(least), NAN_BITS)
                tl.store(of_tokens + GROUPS * BLOCK, minimums, mask=of_group)
        words |= codes << _shift(p, CODEC)
    VALUES_AT: tl.constexpr = 32 * D if CODEC == BF16 else (16 * D if CODEC == INT8 else 8 * D)
    tl.store(record + VALUES_AT + i[:, None, None] * D + dims, words, mask=there)


@triton.jit
def _wide(numbers):
    """Numbers as float32; of bfloat16 by their bits, since the interpreter loses the smallest."""
    if numbers.dtype == tl.bfloat16:
        bits = numbers.to(tl.int16, bitcast=True).to(tl.int32) << 16
        wide = bits.to(tl.float32, bitcast=True)
    else:
        wide = numbers.to(tl.float32)
    return wide


@triton.jit
def _shift(p: tl.constexpr, CODEC: tl.constexpr):
    """Where number `p` of a lane lies: of eight of 4 bits, j and 4 + j share a byte."""
    return 16 * p if CODEC == BF16 else (8 * p if CODEC == INT8 else 8 * (p % 4) + 4 * (p // 4))


@triton.jit
def _like(numbers, other):
    """Broadcast to the shape of `other`, which a precise division does not do by itself."""
    numbers, _ = tl.broadcast(numbers, other)
    return numbers


@triton.jit
def _rounded(steps, least, most):
    """To the nearest whole number, ties to even, int32; `steps` are less than 2^22."""
    whole = (steps + WHOLE_NUMBERS) - WHOLE_NUMBERS
    return tl.minimum(tl.maximum(whole, least), most).to(tl.int32)


@triton.jit
def _unsigned_zero(wide):
    return tl.where(wide == 0, 0.0, wide)


@triton.jit
def _nearest(wide):
    """The nearest bfloat16 of finite numbers, ties to even, as float32."""
    bits = wide.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _rounded_down(wide):
    """The largest bfloat16 that is not above, as float32; see `compress.int4`."""
    bits = wide.to(tl.int32, bitcast=True)
    bits = tl.where(wide < 0, bits + 0xFFFF, bits) & -65536
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _bits(wide):
    """The bits of float32 numbers that are bfloat16 numbers."""
    return (wide.to(tl.int32, bitcast=True) >> 16).to(tl.int16)


@triton.jit
def _bf16_bits(wide):
    """The bits of the nearest bfloat16, int32 below 2^16; infinity and NaN stay what they are."""
    rounded = _nearest(wide).to(tl.int32, bitcast=True) >> 16
    return tl.where(wide == wide, rounded, NAN_BITS) & 0xFFFF
