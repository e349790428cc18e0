"""Attention over block tables as one Triton kernel, for GPUs: it reads packed pages as they are.

The rows of a step are cut into tiles of rows that share one own block, and a tile's query heads of
one key head into the rows of one product: [M, head_dim] by [head_dim, 64] for each page. A page's
codes go into the product without being laid out anew, since a sum does not care for the order of
its terms: the dims of a key are taken in *planes* (plane p of int8 has dims p, 4 + p, 8 + p, ...),
each of which is one byte of every 32-bit lane; likewise the tokens of values.

Few rows over many pages would leave most of a GPU idle, so `SPLITS` programs share the pages of a
tile; `combine` merges their parts. Sources: FlashAttention, https://arxiv.org/abs/2205.14135;
Flash-Decoding for the splits.

Under `TRITON_INTERPRET=1` the same code runs on a CPU, slowly, and is tested there.
"""

import triton
import triton.language as tl

BLOCK = tl.constexpr(64)  # tokens of a page
RAW, BF16, INT8, INT4 = (tl.constexpr(code) for code in range(4))
KEY_MIDDLE = tl.constexpr(7.5)  # the code of 4 bits that means a key's offset

TILE_COLUMNS = 9
ENTRY_COLUMNS = 4  # of `entries`: page, first row, rows, first position


@triton.jit(do_not_specialize=["out_rows"])
def attend_tiles(
    query,  # [tokens, heads, D] by its strides
    query_row_stride,
    query_head_stride,
    pages,  # packed pages: int32 words, or rows of the model's type where CODEC is RAW
    page_stride,  # in elements of `pages`
    own,  # raw pool: [raw pages * 64, 2, KV_HEADS, D]
    tiles,  # int32 [tiles, 9]: first row, rows, position, own page or -1, own row, the range of
    # entries, 1 where `out` and `lse` hold what earlier entries gave, and the first row of these
    entries,  # int32 [entries, 4]
    out,  # [SPLITS, out_rows, heads, D]: float32, or what the result is rounded to
    lse,  # float32 [SPLITS, out_rows, heads]
    out_rows,
    scaling,
    softcap,
    window,
    GROUP: tl.constexpr,  # query heads of a key head
    M: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,  # a power of two
    KV_HEADS: tl.constexpr,
    SPLITS: tl.constexpr,
    CODEC: tl.constexpr,
    VALUE_GROUP: tl.constexpr,  # dims of a value that share a scale, INT4 only
    HAS_CAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    DOT: tl.constexpr,  # the type in which products are made
):
    """Attend one tile's rows of one key head to one split of its pages; grid (tile, head, split).

    The last split has the own block as well. Parts without any key get out 0 and lse -inf.
    """
    tile, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    line = tiles + tile * 9
    first_row, rows, position = tl.load(line), tl.load(line + 1), tl.load(line + 2)
    own_page, own_row = tl.load(line + 3).to(tl.int64), tl.load(line + 4)
    begin, end = tl.load(line + 5), tl.load(line + 6)

    m, d, t = tl.arange(0, M), tl.arange(0, D_PAD), tl.arange(0, BLOCK)
    row = m // GROUP
    query_head = head * GROUP + m % GROUP
    real = row < rows
    at = position + row
    queries = (
        query
        + (first_row + row).to(tl.int64) * query_row_stride
        + query_head.to(tl.int64) * query_head_stride
    )
    PLANES: tl.constexpr = 1 if CODEC == RAW else (2 if CODEC == BF16 else 4)
    LANES: tl.constexpr = D_PAD if PLANES == 1 else max(16, D_PAD // PLANES)
    r = tl.arange(0, LANES)
    q0 = _query_plane(queries, real, 0, r, D, PLANES)
    q1, q2, q3 = q0, q0, q0
    if PLANES > 1:
        q1 = _query_plane(queries, real, 1, r, D, PLANES)
    if PLANES > 2:
        q2 = _query_plane(queries, real, 2, r, D, PLANES)
        q3 = _query_plane(queries, real, 3, r, D, PLANES)

    out_row = tl.load(line + 8) + row
    place = (split.to(tl.int64) * out_rows + out_row) * (KV_HEADS * GROUP) + query_head
    kept = real[:, None] & (d < D)[None, :]
    begun = row < rows * tl.load(line + 7)
    peak = tl.load(lse + place, mask=begun, other=float("-inf"))
    total = tl.where(peak == float("-inf"), 0.0, 1.0)
    before = begun[:, None] & (d < D)[None, :]
    mixed = tl.load(out + place[:, None] * D + d[None, :], mask=before, other=0.0).to(tl.float32)
    share = tl.cdiv(end - begin, SPLITS)
    low = begin + split * share
    for index in range(low, tl.minimum(end, low + share)):
        entry = entries + index * 4
        page = tl.load(entry).to(tl.int64)
        row_begin, count, entry_at = tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3)
        seen = ((t >= row_begin) & (t < row_begin + count))[None, :] & real[:, None]
        if HAS_WINDOW:
            seen = seen & ((entry_at + t - row_begin)[None, :] > (at - window)[:, None])
        if CODEC == RAW:
            rows_at = pages + page * page_stride + head * D
            scores, values = _raw_block(q0, rows_at, d, t, D, KV_HEADS, DOT)
            weights, peak, total, scale = _softmax_step(
                scores, seen, peak, total, scaling, softcap, HAS_CAP
            )
            mixed = mixed * scale[:, None]
            mixed = tl.dot(weights.to(DOT), values, acc=mixed, input_precision="ieee")
        else:
            record = pages + page * page_stride + head * (page_stride // KV_HEADS)
            scores = tl.zeros([M, BLOCK], tl.float32)
            shift = tl.zeros([M], tl.float32)
            scores, shift = _key_plane(
                scores, shift, q0, record, 0, r, t, D, PLANES, CODEC, VALUE_GROUP, DOT
            )
            scores, shift = _key_plane(
                scores, shift, q1, record, 1, r, t, D, PLANES, CODEC, VALUE_GROUP, DOT
            )
            if PLANES > 2:
                scores, shift = _key_plane(
                    scores, shift, q2, record, 2, r, t, D, PLANES, CODEC, VALUE_GROUP, DOT
                )
                scores, shift = _key_plane(
                    scores, shift, q3, record, 3, r, t, D, PLANES, CODEC, VALUE_GROUP, DOT
                )
            scores += shift[:, None]
            if CODEC != BF16:  # a token that broke has no scale
                value_scale = tl.load(_numbers(record, D, CODEC) + t).to(tl.float32)
                scores = tl.where((value_scale != value_scale)[None, :], float("nan"), scores)
            weights, peak, total, scale = _softmax_step(
                scores, seen, peak, total, scaling, softcap, HAS_CAP
            )
            mixed = mixed * scale[:, None]
            if CODEC == INT8:
                whole = tl.where(value_scale == value_scale, value_scale, 0.0)
                largest = tl.maximum(tl.max(whole, 0), 1e-30)
                part = _packed_values(
                    weights * (whole / largest)[None, :],
                    record,
                    d,
                    D,
                    PLANES,
                    CODEC,
                    VALUE_GROUP,
                    DOT,
                    D_PAD,
                    M,
                )
                mixed += part * largest
            else:
                mixed += _packed_values(
                    weights, record, d, D, PLANES, CODEC, VALUE_GROUP, DOT, D_PAD, M
                )

    if split == SPLITS - 1:  # noqa: SIM102 (Triton has no `and` of scalars)
        if own_page >= 0:
            seen = (t[None, :] <= (own_row + row)[:, None]) & real[:, None]
            if HAS_WINDOW:
                seen = seen & ((position - own_row + t)[None, :] > (at - window)[:, None])
            whole_query = tl.load(queries[:, None] + d[None, :], mask=kept, other=0.0)
            rows_at = own + own_page * (BLOCK * 2 * KV_HEADS * D) + head * D
            scores, values = _raw_block(whole_query, rows_at, d, t, D, KV_HEADS, DOT)
            weights, peak, total, scale = _softmax_step(
                scores, seen, peak, total, scaling, softcap, HAS_CAP
            )
            mixed = mixed * scale[:, None]
            mixed = tl.dot(weights.to(DOT), values, acc=mixed, input_precision="ieee")

    total = tl.where(total == 0, 1.0, total)  # of rows that see nothing, whose peak is -inf
    mixed = mixed / total[:, None]
    tl.store(out + place[:, None] * D + d[None, :], mixed, mask=kept)
    tl.store(lse + place, peak + tl.log(total), mask=real)


@triton.jit(do_not_specialize=["part_rows"])
def combine(
    parts,  # float32 [SPLITS, part_rows, heads, D]
    part_lse,  # float32 [SPLITS, part_rows, heads]
    rows,  # int32 [part_rows]: which row of `out` each is
    out,  # [tokens, heads, D]: float32, or what the result is rounded to
    lse,  # float32 [tokens, heads]
    part_rows,
    heads,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Merge the splits of one row and head; grid (row, head)."""
    row, head = tl.program_id(0), tl.program_id(1)
    place = tl.load(rows + row).to(tl.int64) * heads + head
    s, d = tl.arange(0, SPLITS), tl.arange(0, D_PAD)
    several = (s.to(tl.int64) * part_rows + row) * heads + head
    each = tl.load(part_lse + several)
    peak = tl.max(each, 0)
    shares = tl.exp(each - tl.where(peak == float("-inf"), 0.0, peak))
    total = tl.sum(shares, 0)
    total = tl.where(total == 0, 1.0, total)
    mask = (s >= 0)[:, None] & (d < D)[None, :]
    values = tl.load(parts + several[:, None] * D + d[None, :], mask=mask, other=0.0)
    merged = tl.sum(values * shares[:, None], 0) / total
    tl.store(out + place * D + d, merged, mask=d < D)
    tl.store(lse + place, peak + tl.log(total))


@triton.jit
def _query_plane(queries, real, p: tl.constexpr, r, D: tl.constexpr, PLANES: tl.constexpr):
    there = real[:, None] & (r < D // PLANES)[None, :]
    return tl.load(queries[:, None] + (PLANES * r + p)[None, :], mask=there, other=0.0)


@triton.jit
def _numbers(record, D: tl.constexpr, CODEC: tl.constexpr):
    """Where the bfloat16 numbers of a record begin: behind its codes."""
    words: tl.constexpr = 32 * D if CODEC == INT8 else 16 * D
    return (record + words).to(tl.pointer_type(tl.bfloat16))


@triton.jit
def _key_plane(
    scores,
    shift,
    q,
    record,
    p: tl.constexpr,
    r,
    t,
    D: tl.constexpr,
    PLANES: tl.constexpr,
    CODEC: tl.constexpr,
    VALUE_GROUP: tl.constexpr,
    DOT: tl.constexpr,
):
    """Add what plane `p` of the keys gives: to `scores` [M, 64], and to `shift` [M] the offsets."""
    codes, scales, offsets = _key_codes(record, p, r, t, D, PLANES, CODEC, VALUE_GROUP)
    scaled = q
    if CODEC != BF16:
        wide = q.to(tl.float32)
        scaled = wide * scales[None, :]
        shift += tl.sum(wide * offsets[None, :], 1)
    scores = tl.dot(scaled.to(DOT), codes.to(DOT), acc=scores, input_precision="ieee")
    return scores, shift


@triton.jit
def _softmax_step(scores, seen, peak, total, scaling, softcap, HAS_CAP: tl.constexpr):
    """One step of the running softmax: weights [M, 64], new peak and total, and the old's scale."""
    scores *= scaling
    if HAS_CAP:
        scores = softcap * (2.0 / (1.0 + tl.exp(-2.0 * scores / softcap)) - 1.0)
    scores = tl.where(seen, scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, 1))
    finite = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    weights = tl.exp(scores - finite[:, None])
    scale = tl.exp(peak - finite)
    return weights, new_peak, total * scale + tl.sum(weights, 1), scale


@triton.jit
def _raw_block(q, rows_at, d, t, D: tl.constexpr, KV_HEADS: tl.constexpr, DOT: tl.constexpr):
    """Scores [M, 64] of a block of the model's own rows, and its values [64, D_PAD].

    A value that is not finite becomes 0 and its score NaN: 0 times NaN would be NaN for rows that
    do not see it.
    """
    token = t * (2 * KV_HEADS * D)
    keys = tl.load(rows_at + d[:, None] + token[None, :], mask=(d < D)[:, None], other=0.0)
    values = tl.load(
        rows_at + KV_HEADS * D + token[:, None] + d[None, :], mask=(d < D)[None, :], other=0.0
    )
    wide = values.to(tl.float32)
    finite = wide - wide == 0
    broken = tl.max(tl.where(finite, 0, 1), 1)
    scores = tl.dot(q.to(DOT), keys.to(DOT), input_precision="ieee")
    scores = tl.where((broken != 0)[None, :], float("nan"), scores)
    return scores, tl.where(finite, wide, 0.0).to(DOT)


@triton.jit
def _packed_values(
    weights,
    record,
    d,
    D: tl.constexpr,
    PLANES: tl.constexpr,
    CODEC: tl.constexpr,
    VALUE_GROUP: tl.constexpr,
    DOT: tl.constexpr,
    D_PAD: tl.constexpr,
    M: tl.constexpr,
):
    """Mix the values of a packed page by `weights` [M, 64] in the order of tokens: [M, D_PAD].

    The weights are cut into planes of tokens as the values are.
    """
    mixed = tl.zeros([M, D_PAD], tl.float32)
    if CODEC == BF16:
        even, odd = tl.split(tl.reshape(weights, [M, BLOCK // 2, 2]))
        mixed = _value_plane(mixed, even, record, 0, d, D, CODEC, VALUE_GROUP, DOT)
        mixed = _value_plane(mixed, odd, record, 1, d, D, CODEC, VALUE_GROUP, DOT)
    else:
        even, odd = tl.split(tl.reshape(weights, [M, BLOCK // 4, 2, 2]))
        w0, w2 = tl.split(even)
        w1, w3 = tl.split(odd)
        mixed = _value_plane(mixed, w0, record, 0, d, D, CODEC, VALUE_GROUP, DOT)
        mixed = _value_plane(mixed, w1, record, 1, d, D, CODEC, VALUE_GROUP, DOT)
        mixed = _value_plane(mixed, w2, record, 2, d, D, CODEC, VALUE_GROUP, DOT)
        mixed = _value_plane(mixed, w3, record, 3, d, D, CODEC, VALUE_GROUP, DOT)
    return mixed


@triton.jit
def _value_plane(
    mixed,
    weights,
    record,
    p: tl.constexpr,
    d,
    D: tl.constexpr,
    CODEC: tl.constexpr,
    VALUE_GROUP: tl.constexpr,
    DOT: tl.constexpr,
):
    """Add the tokens of plane `p`: `weights` [M, 64 / planes] times their values."""
    values = _values(record, p, d, D, CODEC, VALUE_GROUP)
    if CODEC == INT4:
        values = tl.where(values == values, values, 0.0)  # the scores are NaN already
    return tl.dot(weights.to(DOT), values.to(DOT), acc=mixed, input_precision="ieee")


@triton.jit
def _values(
    record, p: tl.constexpr, d, D: tl.constexpr, CODEC: tl.constexpr, VALUE_GROUP: tl.constexpr
):
    """The values of plane `p`, float32 [64 / planes, D_PAD]; of INT8 without their scales."""
    there = (d < D)[None, :]
    if CODEC == BF16:
        i = tl.arange(0, BLOCK // 2)
        words = tl.load(record + 32 * D + i[:, None] * D + d[None, :], mask=there, other=0)
        bits = (words << 16) if p == 0 else (words & -65536)
        values = bits.to(tl.float32, bitcast=True)
    elif CODEC == INT8:
        i = tl.arange(0, BLOCK // 4)
        words = tl.load(record + 16 * D + i[:, None] * D + d[None, :], mask=there, other=0)
        values = ((words << (24 - 8 * p)) >> 24).to(tl.float32)
    else:
        i = tl.arange(0, BLOCK // 4)
        words = tl.load(record + 8 * D + (i // 2)[:, None] * D + d[None, :], mask=there, other=0)
        codes = ((words >> (8 * p + 4 * (i % 2))[:, None]) & 15).to(tl.float32)
        GROUPS: tl.constexpr = D // VALUE_GROUP
        numbers = _numbers(record, D, CODEC) + 4 * i + p
        scales, least = tl.zeros_like(codes), tl.zeros_like(codes)
        for group in tl.static_range(GROUPS):
            scale = tl.load(numbers + group * BLOCK).to(tl.float32)
            minimum = tl.load(numbers + (GROUPS + group) * BLOCK).to(tl.float32)
            here = (d // VALUE_GROUP == group)[None, :]
            scales = tl.where(here, scale[:, None], scales)
            least = tl.where(here, minimum[:, None], least)
        values = codes * scales + least
    return values


@triton.jit
def unpack(
    pages,  # packed pages, int32 words
    page_stride,
    entries,  # int32 [entries, 4]
    rows,  # [entries * 64, 2, KV_HEADS, D] of the model's type
    largest,  # number of that type: what is beyond saturates
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    KV_HEADS: tl.constexpr,
    CODEC: tl.constexpr,
    VALUE_GROUP: tl.constexpr,
):
    """Decode the page of each entry to rows, which long chunks read many times; grid (entry, head).

    A token that broke has NaN for key and value.
    """
    index, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    page = tl.load(entries + index * 4).to(tl.int64)
    record = pages + page * page_stride + head * (page_stride // KV_HEADS)
    d, t = tl.arange(0, D_PAD), tl.arange(0, BLOCK)
    base = rows + index * (BLOCK * 2 * KV_HEADS * D) + head * D
    PLANES: tl.constexpr = 2 if CODEC == BF16 else 4
    LANES: tl.constexpr = D_PAD // PLANES
    r = tl.arange(0, LANES)
    broken = t < 0
    if CODEC != BF16:
        first_scale = tl.load(_numbers(record, D, CODEC) + t).to(tl.float32)
        broken = first_scale != first_scale
    k0 = _keys(record, 0, r, t, D, PLANES, CODEC, VALUE_GROUP)
    k1 = _keys(record, 1, r, t, D, PLANES, CODEC, VALUE_GROUP)
    if PLANES == 2:
        keys = tl.reshape(tl.join(k0, k1), [BLOCK, D_PAD])
    else:
        k2 = _keys(record, 2, r, t, D, PLANES, CODEC, VALUE_GROUP)
        k3 = _keys(record, 3, r, t, D, PLANES, CODEC, VALUE_GROUP)
        keys = tl.reshape(tl.join(tl.join(k0, k2), tl.join(k1, k3)), [BLOCK, D_PAD])
    keys = tl.where(broken[:, None], float("nan"), _saturated(keys, largest))
    places = t[:, None] * (2 * KV_HEADS * D) + d[None, :]
    tl.store(base + places, keys.to(rows.dtype.element_ty), mask=(d < D)[None, :])
    i = tl.arange(0, BLOCK // PLANES)
    for p in tl.static_range(PLANES):
        values = _values(record, p, d, D, CODEC, VALUE_GROUP)
        if CODEC == INT8:
            values *= tl.load(_numbers(record, D, CODEC) + PLANES * i + p).to(tl.float32)[:, None]
        places = ((PLANES * i + p) * 2 + 1)[:, None] * (KV_HEADS * D) + d[None, :]
        values = _saturated(values, largest)
        tl.store(base + places, values.to(rows.dtype.element_ty), mask=(d < D)[None, :])


@triton.jit
def _saturated(wide, largest):
    """Clamp to what a type holds; NaN stays."""
    clamped = tl.minimum(tl.maximum(wide, -largest), largest)
    return tl.where(wide == wide, clamped, wide)


@triton.jit
def _keys(
    record,
    p: tl.constexpr,
    r,
    t,
    D: tl.constexpr,
    PLANES: tl.constexpr,
    CODEC: tl.constexpr,
    VALUE_GROUP: tl.constexpr,
):
    """Plane `p` of the keys of a page, float32 [64, lanes]."""
    codes, scales, offsets = _key_codes(record, p, r, t, D, PLANES, CODEC, VALUE_GROUP)
    keys = tl.trans(codes)
    if CODEC != BF16:
        keys = keys * scales[None, :] + offsets[None, :]
    return keys


@triton.jit
def _key_codes(
    record,
    p: tl.constexpr,
    r,
    t,
    D: tl.constexpr,
    PLANES: tl.constexpr,
    CODEC: tl.constexpr,
    VALUE_GROUP: tl.constexpr,
):
    """Plane `p` of a page's keys: codes float32 [lanes, 64], and their scales and offsets [lanes].

    A key is offset + scale * code; of BF16 it is the code.
    """
    there = r < D // PLANES
    lane = r // 2 if CODEC == INT4 else r  # a lane of 4 bits is taken twice, for half its dims each
    words = tl.load(record + lane[:, None] * BLOCK + t[None, :], mask=there[:, None], other=0)
    if CODEC == BF16:
        bits = (words << 16) if p == 0 else (words & -65536)
        codes = bits.to(tl.float32, bitcast=True)
        scales = tl.zeros_like(r).to(tl.float32)
        offsets = scales
    else:
        if CODEC == INT8:
            codes = ((words << (24 - 8 * p)) >> 24).to(tl.float32)
        else:
            codes = ((words >> (8 * p + 4 * (r % 2))[:, None]) & 15).to(tl.float32)
        # Numbers of values come before those of keys
        behind: tl.constexpr = BLOCK if CODEC == INT8 else 2 * (D // VALUE_GROUP) * BLOCK
        of_keys = _numbers(record, D, CODEC) + behind + PLANES * r + p
        scales = tl.load(of_keys, mask=there, other=0.0).to(tl.float32)
        offsets = tl.load(of_keys + D, mask=there, other=0.0).to(tl.float32)
        if CODEC == INT4:
            offsets -= KEY_MIDDLE * scales
    return codes, scales, offsets
