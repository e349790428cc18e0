// Each byte equals that of compress/: operations are in the same order, and none is contracted or
// reassociated (this file is compiled with -ffp-contract=off). The docstrings of the codecs have
// the layouts.
#include "encode.h"

#include <immintrin.h>

#include <cmath>
#include <cstring>

namespace longctx {
namespace {

constexpr int LARGEST_DIM = 256;
constexpr uint16_t NAN_BF16 = 0x7fc0;
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

// Applies `hadamard` of compress/hadamard.py in place. Runs are of at least 8 dims.
void hadamard(float* wide, int dim) {
    int run = dim & -dim;
    const __m256 sign1 = _mm256_setr_ps(0.f, -0.f, 0.f, -0.f, 0.f, -0.f, 0.f, -0.f);
    const __m256 sign2 = _mm256_setr_ps(0.f, 0.f, -0.f, -0.f, 0.f, 0.f, -0.f, -0.f);
    const __m256 sign4 = _mm256_setr_ps(0.f, 0.f, 0.f, 0.f, -0.f, -0.f, -0.f, -0.f);
    for (int d = 0; d < dim; d += 8) {
        __m256 x = _mm256_loadu_ps(wide + d);
        x = _mm256_add_ps(_mm256_permute_ps(x, 0xb1), _mm256_xor_ps(x, sign1));
        x = _mm256_add_ps(_mm256_permute_ps(x, 0x4e), _mm256_xor_ps(x, sign2));
        x = _mm256_add_ps(_mm256_permute2f128_ps(x, x, 1), _mm256_xor_ps(x, sign4));
        _mm256_storeu_ps(wide + d, x);
    }
    for (int half = 8; half < run; half *= 2)
        for (int begin = 0; begin < dim; begin += 2 * half)
            for (int d = begin; d < begin + half; d += 8) {
                __m256 a = _mm256_loadu_ps(wide + d), b = _mm256_loadu_ps(wide + d + half);
                _mm256_storeu_ps(wide + d, _mm256_add_ps(a, b));
                _mm256_storeu_ps(wide + d + half, _mm256_sub_ps(a, b));
            }
    float scale = float(1 / std::sqrt(double(run)));
    for (int d = 0; d < dim; ++d) wide[d] *= scale;
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

void int8_rows(const Side& side, uint8_t* rows, uint16_t* scales) {
    const int dim = side.dim;
    float wide[LARGEST_DIM];
    for (int t = 0; t < BLOCK; ++t) {
        uint8_t* codes = rows + t * dim;
        side.widen(t, wide);
        int32_t largest = 0; // magnitudes are in the order of their bits, and NaN beyond infinity
        for (int d = 0; d < dim; ++d) {
            int32_t magnitude = bits(wide[d]) & 0x7fffffff;
            largest = magnitude > largest ? magnitude : largest;
        }
        if (largest >= INFINITE) {
            scales[t] = NAN_BF16;
            memset(codes, 0, size_t(dim));
            continue;
        }
        scales[t] = bf16(from_bits(largest) * float(1.0 / 127));
        float step = scales[t] ? from_bf16(scales[t]) : 1.f;
        for (int d = 0; d < dim; ++d) {
            int32_t code = nearest(wide[d] / step);
            code = code < -127 ? -127 : code;
            codes[d] = uint8_t(code > 127 ? 127 : code);
        }
    }
}

void int8_record(const Side& keys, const Side& values, uint8_t* record) {
    const int dim = keys.dim;
    alignas(32) uint8_t rows[BLOCK * LARGEST_DIM];
    uint16_t* scales = (uint16_t*)(record + 2 * dim * BLOCK);
    int8_rows(keys, rows, scales);
    uint32_t* lanes = (uint32_t*)record;
    transpose(rows, dim / 4, lanes);
    int8_rows(values, rows, scales + BLOCK);
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

void int4_group(const float* wide, int dims, uint8_t* codes, uint16_t* scale, uint16_t* minimum) {
    int32_t low = ordered(bits(wide[0])), high = low; // NaN is beyond infinity, of either sign
    for (int d = 0; d < dims; ++d) {
        int32_t x = ordered(bits(wide[d]));
        low = x < low ? x : low;
        high = x > high ? x : high;
    }
    float least = rounded_down(from_bits(ordered(low)));
    float span = from_bits(ordered(high)) - least + 0.f;
    if ((bits(span) & 0x7fffffff) >= INFINITE) {
        *scale = *minimum = NAN_BF16;
        memset(codes, 0, size_t(dims));
        return;
    }
    *scale = bf16(span * float(1.0 / 15));
    *minimum = bf16(least);
    float step = *scale ? from_bf16(*scale) : 1.f;
    for (int d = 0; d < dims; ++d) {
        int32_t code = nearest((wide[d] - least) / step);
        codes[d] = uint8_t(code > 15 ? 15 : code);
    }
}

void int4_rows(const Side& side, bool transformed, uint8_t* rows, uint16_t* numbers) {
    int dim = side.dim, group = 64;
    while (dim % group) group -= 8;
    uint16_t* minimums = numbers + dim / group * BLOCK;
    float wide[LARGEST_DIM];
    for (int t = 0; t < BLOCK; ++t) {
        side.widen(t, wide);
        if (transformed) hadamard(wide, dim);
        for (int g = 0; g < dim / group; ++g)
            int4_group(wide + g * group, group, rows + t * dim + g * group,
                       numbers + g * BLOCK + t, minimums + g * BLOCK + t);
    }
}

void int4_record(const Side& keys, const Side& values, uint8_t* record, size_t record_bytes) {
    const int dim = keys.dim;
    alignas(32) uint8_t rows[BLOCK * LARGEST_DIM];
    size_t packed_bytes = size_t(dim) * BLOCK;
    uint16_t* numbers = (uint16_t*)(record + packed_bytes);
    int4_rows(keys, true, rows, numbers);
    for (int i = 0; i < BLOCK * dim / 8; ++i) { // in place: it writes only what it has read
        uint32_t eight[2];
        memcpy(eight, rows + 8 * i, 8);
        eight[0] |= eight[1] << 4;
        memcpy(rows + 4 * i, eight, 4);
    }
    uint32_t* lanes = (uint32_t*)record;
    transpose(rows, dim / 8, lanes);
    int4_rows(values, false, rows, numbers + (record_bytes - packed_bytes) / 4);
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
