// Each byte equals that of compress/: operations are in the same order, and none is contracted or
// reassociated (this file is compiled with -ffp-contract=off). The docstrings of the codecs have
// the layouts.
#include "attention/encode.h"

#include <immintrin.h>

#include <cstring>

namespace longctx {
namespace {

constexpr int LARGEST_DIM = 256;
constexpr uint16_t NAN_BF16 = 0x7fc0;
constexpr float BF16_LARGEST = 0x1.fep127f;
constexpr int32_t INFINITE = 0x7f800000; // bits of the first magnitude that is not finite

int32_t bits(float x) {
    int32_t b;
    memcpy(&b, &x, 4);
    return b;
}

float from_bits(int32_t b) {
    float x;
    memcpy(&x, &b, 4);
    return x;
}

// Rounds to the nearest, ties to even.
uint16_t bf16(float x) {
    uint32_t b = uint32_t(bits(x));
    bool is_nan = (b & 0x7fffffff) > uint32_t(INFINITE);
    return is_nan ? NAN_BF16 : uint16_t((b + 0x7fff + (b >> 16 & 1)) >> 16);
}

float from_bf16(uint16_t x) { return from_bits(int32_t(uint32_t(x) << 16)); }

// The rows of one key head, keys or values, in the raw pool.
struct Side {
    const uint8_t* first;
    int64_t row_bytes;
    Dtype dtype;
    int dim;

    const uint8_t* row(int token) const { return first + token * row_bytes; }

    void widen(int token, float* wide) const {
        const uint8_t* from = row(token);
        if (dtype == Dtype::float32) {
            memcpy(wide, from, size_t(dim) * 4);
        } else if (dtype == Dtype::bfloat16) {
            const uint16_t* narrow = (const uint16_t*)from;
            for (int d = 0; d < dim; ++d) wide[d] = from_bf16(narrow[d]);
        } else {
            for (int d = 0; d < dim; d += 8) {
                __m128i narrow = _mm_loadu_si128((const __m128i*)(from + 2 * d));
                _mm256_storeu_ps(wide + d, _mm256_cvtph_ps(narrow));
            }
        }
    }
};

// Transposes [BLOCK][count] quads of bytes into lanes [count][BLOCK].
void transpose(const void* rows, int count, uint32_t* lanes) {
    const uint8_t* from = (const uint8_t*)rows;
    for (int t = 0; t < BLOCK; t += 16) // writes then fill whole cache lines
        for (int j = 0; j < count; ++j)
            for (int i = t; i < t + 16; ++i)
                memcpy(lanes + j * BLOCK + i, from + 4 * (i * count + j), 4);
}

// Joins four bytes, `stride` apart, to a lane.
uint32_t quad(const uint8_t* first, int stride) {
    return first[0] | uint32_t(first[stride]) << 8 | uint32_t(first[2 * stride]) << 16 |
           uint32_t(first[3 * stride]) << 24;
}

// Rounds x to an integer: adding 1.5 * 2^23 leaves a small integer in the low bits.
int32_t nearest(float x) { return bits(x + 12582912.f) - bits(12582912.f); }

void bf16_rows(const Side& side, uint16_t* rows) {
    const int dim = side.dim;
    float wide[LARGEST_DIM];
    for (int t = 0; t < BLOCK; ++t) {
        uint16_t* narrow = rows + t * dim;
        if (side.dtype == Dtype::bfloat16) {
            memcpy(narrow, side.row(t), size_t(dim) * 2);
            continue;
        }
        side.widen(t, wide);
        for (int d = 0; d < dim; ++d) narrow[d] = bf16(wide[d]);
    }
}

void bf16_record(const Side& keys, const Side& values, uint8_t* record) {
    const int dim = keys.dim;
    alignas(32) uint16_t rows[BLOCK * LARGEST_DIM];
    bf16_rows(keys, rows);
    uint32_t* lanes = (uint32_t*)record;
    transpose(rows, dim / 2, lanes);
    bf16_rows(values, rows);
    lanes += dim / 2 * BLOCK;
    for (int t = 0; t < BLOCK; t += 2, lanes += dim) {
        const uint16_t *even = rows + t * dim, *odd = even + dim;
        for (int d = 0; d < dim; ++d) lanes[d] = even[d] | uint32_t(odd[d]) << 16;
    }
}

// The keys of one head, as `channels` of compress/channels.py measures them.
struct Channels {
    alignas(32) float steps[BLOCK * LARGEST_DIM]; // [BLOCK, head_dim], not rounded yet
    bool whole[BLOCK];                            // tokens whose key is finite

    Channels(const Side& keys, float largest_step, uint16_t* scales, uint16_t* offsets) {
        const int dim = keys.dim;
        alignas(32) float high[LARGEST_DIM], low[LARGEST_DIM];
        bool some = false;
        for (int d = 0; d < dim; ++d) {
            high[d] = -from_bits(INFINITE);
            low[d] = from_bits(INFINITE);
        }
        for (int t = 0; t < BLOCK; ++t) {
            float* wide = steps + t * dim;
            keys.widen(t, wide);
            int32_t largest = 0; // magnitudes are in the order of their bits, and NaN beyond infinity
            for (int d = 0; d < dim; ++d) {
                int32_t magnitude = bits(wide[d]) & 0x7fffffff;
                largest = magnitude > largest ? magnitude : largest;
            }
            whole[t] = largest < INFINITE;
            if (!whole[t]) {
                memset(wide, 0, size_t(dim) * 4);
                continue;
            }
            some = true;
            for (int d = 0; d < dim; ++d) {
                high[d] = wide[d] > high[d] ? wide[d] : high[d];
                low[d] = wide[d] < low[d] ? wide[d] : low[d];
            }
        }
        alignas(32) float offset[LARGEST_DIM], divisor[LARGEST_DIM];
        for (int d = 0; d < dim; ++d) {
            if (!some) high[d] = low[d] = 0;
            float middle = high[d] * 0.5f + low[d] * 0.5f + 0.f;
            middle = middle > BF16_LARGEST ? BF16_LARGEST : middle;
            middle = middle < -BF16_LARGEST ? -BF16_LARGEST : middle;
            offsets[d] = bf16(middle);
            offset[d] = from_bf16(offsets[d]);
            float above = high[d] - offset[d], below = offset[d] - low[d];
            float reach = (above > below ? above : below) + 0.f;
            scales[d] = bf16(reach * float(1.0 / double(largest_step)));
            divisor[d] = scales[d] ? from_bf16(scales[d]) : 1.f;
        }
        for (int t = 0; t < BLOCK; ++t) {
            if (!whole[t]) continue;
            float* wide = steps + t * dim;
            for (int d = 0; d < dim; ++d) wide[d] = (wide[d] - offset[d]) / divisor[d];
        }
    }
};

uint8_t int8_code(float step) {
    int32_t code = nearest(step);
    code = code < -127 ? -127 : code;
    return uint8_t(code > 127 ? 127 : code);
}

void int8_values(const Side& side, const bool* whole, uint8_t* rows, uint16_t* scales) {
    const int dim = side.dim;
    float wide[LARGEST_DIM];
    for (int t = 0; t < BLOCK; ++t) {
        uint8_t* codes = rows + t * dim;
        side.widen(t, wide);
        int32_t largest = 0;
        for (int d = 0; d < dim; ++d) {
            int32_t magnitude = bits(wide[d]) & 0x7fffffff;
            largest = magnitude > largest ? magnitude : largest;
        }
        if (largest >= INFINITE || !whole[t]) {
            scales[t] = NAN_BF16;
            memset(codes, 0, size_t(dim));
            continue;
        }
        scales[t] = bf16(from_bits(largest) * float(1.0 / 127));
        float step = scales[t] ? from_bf16(scales[t]) : 1.f;
        for (int d = 0; d < dim; ++d) codes[d] = int8_code(wide[d] / step);
    }
}

void int8_record(const Side& keys, const Side& values, uint8_t* record) {
    const int dim = keys.dim;
    alignas(32) uint8_t rows[BLOCK * LARGEST_DIM];
    uint16_t* value_scales = (uint16_t*)(record + 2 * dim * BLOCK);
    uint16_t* key_scales = value_scales + BLOCK;
    const Channels channels(keys, 127, key_scales, key_scales + dim);
    for (int i = 0; i < BLOCK * dim; ++i) rows[i] = int8_code(channels.steps[i]);
    uint32_t* lanes = (uint32_t*)record;
    transpose(rows, dim / 4, lanes);
    int8_values(values, channels.whole, rows, value_scales);
    lanes += dim / 4 * BLOCK;
    for (int t = 0; t < BLOCK; t += 4, lanes += dim) {
        for (int d = 0; d < dim; ++d) lanes[d] = quad(rows + t * dim + d, dim);
    }
}

// Returns the nearest bfloat16 that is not above x, and never -0.
float rounded_down(float x) {
    int32_t b = bits(x + 0.f);
    return from_bits(int32_t(uint32_t(x < 0 ? b + 0xffff : b) & 0xffff0000u));
}

// Turns the bits of a float into an integer that has the order of floats, and back.
int32_t ordered(int32_t b) { return b ^ (b >> 31 & 0x7fffffff); }

// Returns whether the group can be stored; `scale` and `minimum` are what it is stored by.
bool int4_group(const float* wide, int dims, uint8_t* codes, uint16_t* scale, uint16_t* minimum) {
    int32_t low = ordered(bits(wide[0])), high = low; // NaN is beyond infinity, of either sign
    for (int d = 0; d < dims; ++d) {
        int32_t x = ordered(bits(wide[d]));
        low = x < low ? x : low;
        high = x > high ? x : high;
    }
    float least = rounded_down(from_bits(ordered(low)));
    float span = from_bits(ordered(high)) - least + 0.f;
    if ((bits(span) & 0x7fffffff) >= INFINITE) return false;
    *scale = bf16(span * float(1.0 / 15));
    *minimum = bf16(least);
    float step = *scale ? from_bf16(*scale) : 1.f;
    for (int d = 0; d < dims; ++d) {
        int32_t code = nearest((wide[d] - least) / step);
        codes[d] = uint8_t(code > 15 ? 15 : code);
    }
    return true;
}

void int4_values(const Side& side, const bool* whole, uint8_t* rows, uint16_t* scales) {
    int dim = side.dim, group = 64;
    while (dim % group) group -= 8;
    const int groups = dim / group;
    uint16_t* minimums = scales + groups * BLOCK;
    float wide[LARGEST_DIM];
    for (int t = 0; t < BLOCK; ++t) {
        side.widen(t, wide);
        bool stored = whole[t];
        for (int g = 0; g < groups && stored; ++g)
            stored = int4_group(wide + g * group, group, rows + t * dim + g * group,
                                scales + g * BLOCK + t, minimums + g * BLOCK + t);
        if (stored) continue;
        memset(rows + t * dim, 0, size_t(dim));
        for (int g = 0; g < groups; ++g)
            scales[g * BLOCK + t] = minimums[g * BLOCK + t] = NAN_BF16;
    }
}

void int4_record(const Side& keys, const Side& values, uint8_t* record, size_t record_bytes) {
    const int dim = keys.dim;
    alignas(32) uint8_t rows[BLOCK * LARGEST_DIM];
    uint16_t* value_scales = (uint16_t*)(record + dim * BLOCK);
    uint16_t* key_scales = (uint16_t*)(record + record_bytes) - 2 * dim;
    const Channels channels(keys, 7.5f, key_scales, key_scales + dim);
    for (int i = 0; i < BLOCK * dim; ++i) {
        int32_t code = nearest(channels.steps[i] + 7.5f);
        code = code < 0 ? 0 : code;
        rows[i] = uint8_t(code > 15 ? 15 : code);
    }
    for (int i = 0; i < BLOCK * dim / 8; ++i) { // in place: it writes only what it has read
        uint32_t eight[2];
        memcpy(eight, rows + 8 * i, 8);
        eight[0] |= eight[1] << 4;
        memcpy(rows + 4 * i, eight, 4);
    }
    uint32_t* lanes = (uint32_t*)record;
    transpose(rows, dim / 8, lanes);
    int4_values(values, channels.whole, rows, value_scales);
    lanes += dim / 8 * BLOCK;
    for (int t = 0; t < BLOCK; t += 8, lanes += dim) {
        const uint8_t *low = rows + t * dim, *high = low + 4 * dim;
        for (int d = 0; d < dim; ++d) lanes[d] = quad(low + d, dim) | quad(high + d, dim) << 4;
    }
}

void encode_head(const Layer& layer, const uint8_t* raw, uint8_t* page, int head) {
    int64_t value_bytes = layer.dtype == Dtype::float32 ? 4 : 2;
    int64_t side_bytes = layer.kv_heads * layer.head_dim * value_bytes;
    const uint8_t* first = raw + head * layer.head_dim * value_bytes;
    Side keys{first, 2 * side_bytes, layer.dtype, layer.head_dim};
    Side values{first + side_bytes, 2 * side_bytes, layer.dtype, layer.head_dim};
    int64_t record_bytes = layer.packed_page_bytes / layer.kv_heads;
    uint8_t* record = page + head * record_bytes;
    if (layer.codec == Codec::bf16) bf16_record(keys, values, record);
    if (layer.codec == Codec::int8) int8_record(keys, values, record);
    if (layer.codec == Codec::int4) int4_record(keys, values, record, size_t(record_bytes));
}

} // namespace

void encode(const Layer& layer, const int64_t* raw_pages, const int64_t* packed_pages,
            int64_t blocks) {
    uint8_t* packed = const_cast<uint8_t*>(layer.packed); // everybody else only reads it
    bool copied = layer.codec == Codec::raw;
    int heads = copied ? 1 : layer.kv_heads;
#pragma omp parallel for collapse(2)
    for (int64_t block = 0; block < blocks; ++block)
        for (int head = 0; head < heads; ++head) {
            const uint8_t* raw = layer.raw + raw_pages[block] * layer.raw_page_bytes;
            uint8_t* page = packed + packed_pages[block] * layer.packed_page_bytes;
            if (copied)
                memcpy(page, raw, size_t(layer.raw_page_bytes));
            else
                encode_head(layer, raw, page, head);
        }
}

} // namespace longctx
