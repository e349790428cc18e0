"""What lies between the products of a layer, each as one Triton kernel for GPUs.

RMS norms, with the addition that most of them follow; the rotation of queries and keys, in place;
and the gates of gated linear units. All compute in float32, whatever the type of rows, and round
once to that type, or where a model itself does (`TWICE`).

Under `TRITON_INTERPRET=1` the same code runs on a CPU, slowly, and is tested there.
"""

import triton
import triton.language as tl

HALVES, NEIGHBORS, NEIGHBORS_TWICE = (tl.constexpr(style) for style in range(3))
SILU, GELU_TANH, GELU = (tl.constexpr(kind) for kind in range(3))


@triton.jit
def rms_norm(
    rows,  # [rows, width]
    added,  # the same, read where ADDS
    factors,  # float32 [width]
    sums,  # rows + added, written where ADDS
    out,  # [rows, width]
    width,
    epsilon,
    WIDTH_PAD: tl.constexpr,  # a power of two
    ADDS: tl.constexpr,
    TWICE: tl.constexpr,  # round before the factors too
    BITS: tl.constexpr,
):
    """Normalize one row, or one row of the sum; grid (row,)."""
    d = tl.arange(0, WIDTH_PAD)
    there = d < width
    place = tl.program_id(0).to(tl.int64) * width + d
    numbers = tl.load(rows + place, mask=there, other=0.0)
    if ADDS:
        more = tl.load(added + place, mask=there, other=0.0)
        numbers = _rounded(numbers.to(tl.float32) + more.to(tl.float32), numbers.dtype, BITS)
        tl.store(sums + place, numbers, mask=there)
    wide = numbers.to(tl.float32)
    normed = _normed(wide, tl.sum(wide * wide, 0), width, epsilon)
    if TWICE:
        normed = _rounded(normed, numbers.dtype, BITS).to(tl.float32)
    normed = normed * tl.load(factors + d, mask=there, other=0.0)
    tl.store(out + place, _rounded(normed, numbers.dtype, BITS), mask=there)


@triton.jit(do_not_specialize=["slot_begin"])
def turn_heads(
    rows,  # [tokens, row_stride]: of each token HEADS query heads of D numbers, then those of keys,
    # then those of values
    row_stride,
    cosines,  # [tokens, TURNED]
    sines,
    factors,  # float32 [2, D]: of the norms of query heads and of key heads, read where NORMS
    epsilon,
    pool,  # [slots, 2, KV_HEADS, D]: where keys and values are put as well where PLACED
    slots,  # int64 [tokens], read where LISTED; else they begin at `slot_begin`
    slot_begin,
    HEADS: tl.constexpr,  # of queries alone
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    TURNED: tl.constexpr,  # the first dims of a head are turned, 0: none
    PAIRS_PAD: tl.constexpr,  # powers of two
    REST_PAD: tl.constexpr,
    STYLE: tl.constexpr,  # which dims are pairs, and where their angles are
    NORMS: tl.constexpr,
    TWICE: tl.constexpr,
    PLACED: tl.constexpr,
    LISTED: tl.constexpr,
    BITS: tl.constexpr,
):
    """Turn one head of one token in place, normalized first where NORMS; grid (token, head).

    Heads of values stay as they are.
    """
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place = rows + token * row_stride + head * D
    turns = head < HEADS + KV_HEADS
    i, e = tl.arange(0, PAIRS_PAD), TURNED + tl.arange(0, REST_PAD)
    paired, resting = i < TURNED // 2, e < D
    if STYLE == HALVES:
        first, second, angle = i, i + TURNED // 2, i
    elif STYLE == NEIGHBORS:
        first, second, angle = 2 * i, 2 * i + 1, i
    else:
        first, second, angle = 2 * i, 2 * i + 1, 2 * i
    a = tl.load(place + first, mask=paired, other=0.0)
    b = tl.load(place + second, mask=paired, other=0.0)
    c = tl.load(place + e, mask=resting, other=0.0)
    x, y, z = a.to(tl.float32), b.to(tl.float32), c.to(tl.float32)
    if NORMS:
        squares = tl.sum(x * x, 0) + tl.sum(y * y, 0) + tl.sum(z * z, 0)
        mine = factors + tl.where(head < HEADS, 0, D)
        x, y = _normed(x, squares, D, epsilon), _normed(y, squares, D, epsilon)
        z = _normed(z, squares, D, epsilon)
        if TWICE:
            x = _rounded(x, a.dtype, BITS).to(tl.float32)
            y = _rounded(y, a.dtype, BITS).to(tl.float32)
            z = _rounded(z, a.dtype, BITS).to(tl.float32)
        x = _rounded(x * tl.load(mine + first, mask=paired, other=0.0), a.dtype, BITS)
        y = _rounded(y * tl.load(mine + second, mask=paired, other=0.0), a.dtype, BITS)
        z = _rounded(z * tl.load(mine + e, mask=resting, other=0.0), a.dtype, BITS)
        x, y = x.to(tl.float32), y.to(tl.float32)
        c = tl.where(turns, z, c)
        tl.store(place + e, c, mask=resting)
    angles = token * TURNED + angle
    cosine = tl.load(cosines + angles, mask=paired, other=1.0).to(tl.float32)
    sine = tl.load(sines + angles, mask=paired, other=0.0).to(tl.float32)
    a = tl.where(turns, _rounded(x * cosine - y * sine, a.dtype, BITS), a)
    b = tl.where(turns, _rounded(y * cosine + x * sine, b.dtype, BITS), b)
    tl.store(place + first, a, mask=paired)
    tl.store(place + second, b, mask=paired)
    if PLACED:
        slot = slot_begin + token
        if LISTED:
            slot = tl.load(slots + token)
        target = pool + slot * (2 * KV_HEADS * D) + (head - HEADS) * D
        pairs = tl.where(head >= HEADS, TURNED // 2, 0)
        tl.store(target + first, a, mask=i < pairs)
        tl.store(target + second, b, mask=i < pairs)
        tl.store(target + e, c, mask=e < tl.where(head >= HEADS, D, 0))


@triton.jit
def gate_rows(
    both,  # [rows, 2 * width]: gates, then what they let through
    out,  # [rows, width]
    width,
    BLOCK: tl.constexpr,
    KIND: tl.constexpr,
    BITS: tl.constexpr,
):
    """Let each gate's activation scale its number; grid (row, block of numbers)."""
    row, d = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = d < width
    place = both + row * 2 * width + d
    gates = tl.load(place, mask=there, other=0.0)
    passed = tl.load(place + width, mask=there, other=0.0).to(tl.float32)
    x = gates.to(tl.float32)
    if KIND == SILU:
        active = x / (1.0 + tl.exp(-x))
    elif KIND == GELU_TANH:  # 0.5 (1 + tanh(u)) is 1 / (1 + exp(-2u))
        active = x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    else:
        active = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    tl.store(out + row * width + d, _rounded(active * passed, gates.dtype, BITS), mask=there)


@triton.jit
def _normed(wide, squares, width, epsilon):
    return wide * (1.0 / tl.sqrt(squares / width + epsilon))


@triton.jit
def _rounded(wide, dtype: tl.constexpr, BITS: tl.constexpr):
    """Float32 numbers in another type, to nearest; by their bits in the interpreter, which cuts."""
    if BITS and dtype == tl.bfloat16:
        bits = wide.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        wide = tl.where(wide == wide, bits.to(tl.float32, bitcast=True), wide)
    return wide.to(dtype)
