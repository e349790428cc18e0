// Pages whose values are floating point: `raw` rows of any type, and `bf16` records.
//
// A page kind has, for decode, `scores` (query rows times all keys) and `add` (weights times all
// values), which read it in place; and for prefill `widen`, which lays it out as float32.
// Query rows have a stride of `row_floats(head_dim)` and are zero beyond head_dim.
//
// Worked example: a raw page of 2 key heads of 64 bfloat16 values has 64 rows of 512 bytes, each
// [key 0, key 1, value 0, value 1]; the keys of head 1 begin at byte 128, its values at byte 384. A
// bf16 page has one record after another, 16,384 bytes for each key head: 8,192 of keys, where
// dims 0 and 1 of all 64 tokens come first (4 bytes for each token), then 8,192 of values.
#pragma once

#include "attention/attend.h"

namespace {

using namespace longctx;

constexpr int min_of(int a, int b) { return a < b ? a : b; }
constexpr int max_of(int a, int b) { return a < b ? b : a; }
inline int round_up(int x, int to) { return (x + to - 1) / to * to; }
constexpr int LANES_MAX = 16;
constexpr int PANELS = 2 * LANES_MAX; // tiles are padded to whole panels of any vector width
inline int row_floats(int head_dim) { return round_up(head_dim, PANELS); }

inline float bf16_to_float(uint16_t x) {
    union {
        uint32_t bits;
        float value;
    } u = {(uint32_t)x << 16};
    return u.value;
}

// One key head of a page, and the rows that count (only raw pages leave out the others).
struct Head {
    const uint8_t* keys;
    const uint8_t* values;
    int64_t keys_ahead, values_ahead; // the distance to the bytes that are to be fetched meanwhile
    int head_dim, begin, end;
    int64_t row_bytes; // from token to token, in raw pages only
};

// Computing on some bytes takes long enough to fetch as many others that follow each other in
// memory. They go into the second-level cache, which waits for more lines at once than the first.
inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

template <class V, Dtype D> struct Value;
template <class V> struct Value<V, Dtype::float32> {
    using type = float;
    static typename V::F load(const float* p) { return V::load(p); }
};
template <class V> struct Value<V, Dtype::bfloat16> {
    using type = uint16_t;
    static typename V::F load(const uint16_t* p) { return V::load_bf16(p); }
};
template <class V> struct Value<V, Dtype::float16> {
    using type = uint16_t;
    static typename V::F load(const uint16_t* p) { return V::load_f16(p); }
};

// Loads the first `count` values from `p`, then zeros; it never touches more.
template <class V, Dtype D> typename V::F load_some(const typename Value<V, D>::type* p, int count) {
    if (count >= V::W)
        return Value<V, D>::load(p);
    typename Value<V, D>::type padded[V::W] = {};
    for (int i = 0; i < count; ++i)
        padded[i] = p[i];
    return Value<V, D>::load(padded);
}

template <class V, Dtype D> struct RawPage {
    using F = typename V::F;
    using T = typename Value<V, D>::type;
    static constexpr int W = V::W;
    static constexpr int VECTOR_BYTES = W * sizeof(T);
    static const T* row(const uint8_t* rows, const Head& head, int token) {
        return (const T*)(rows + token * head.row_bytes);
    }

    template <int R> static void scores(const Head& head, const float* query, float* out) {
        constexpr int TOKENS = R == 1 ? 8 : R == 2 ? 4 : 2; // up to 8 sums at once
        const int stride = row_floats(head.head_dim);
        const uint8_t* ahead = head.keys + head.keys_ahead;
        for (int t = head.begin; t < head.end; t += TOKENS) {
            const T* key[TOKENS];
            for (int i = 0; i < TOKENS; ++i)
                key[i] = row(head.keys, head, min_of(t + i, head.end - 1));
            F sums[8];
            for (auto& sum : sums)
                sum = V::zero();
            int d = 0;
            for (; d + W <= head.head_dim; d += W) {
                F k[TOKENS];
#pragma GCC unroll 8
                for (int i = 0; i < TOKENS; ++i) {
                    if (i * VECTOR_BYTES % 64 == 0)
                        prefetch(ahead + i * VECTOR_BYTES);
                    k[i] = Value<V, D>::load(key[i] + d);
                }
                ahead += TOKENS * VECTOR_BYTES;
#pragma GCC unroll 4
                for (int r = 0; r < R; ++r) {
                    F q = V::load(query + r * stride + d);
#pragma GCC unroll 8
                    for (int i = 0; i < TOKENS; ++i)
                        sums[r * TOKENS + i] = V::fma(q, k[i], sums[r * TOKENS + i]);
                }
            }
            if (d < head.head_dim)
                for (int i = 0; i < TOKENS; ++i) {
                    F k = load_some<V, D>(key[i] + d, head.head_dim - d);
                    for (int r = 0; r < R; ++r) {
                        F q = V::load(query + r * stride + d);
                        sums[r * TOKENS + i] = V::fma(q, k, sums[r * TOKENS + i]);
                    }
                }
            alignas(32) float flat[8];
            _mm256_store_ps(flat, V::sums(sums));
            for (int r = 0; r < R; ++r)
                for (int i = 0; i < TOKENS; ++i)
                    if (t + i < BLOCK)
                        out[r * BLOCK + t + i] = flat[r * TOKENS + i];
        }
    }

    template <int R, int N>
    static void add_panel(const Head& head, const float* weights, const float* factor, float* out,
                          int d, int count) {
        const int stride = row_floats(head.head_dim);
        F acc[R][N];
        for (int r = 0; r < R; ++r)
            for (int n = 0; n < N; ++n)
                acc[r][n] = V::mul(V::load(out + r * stride + d + n * W), V::set1(factor[r]));
        const uint8_t* ahead = head.values + head.values_ahead + d * BLOCK * sizeof(T);
        for (int t = head.begin; t < head.end; ++t, ahead += N * VECTOR_BYTES) {
            const T* value = row(head.values, head, t) + d;
            F v[N];
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n) {
                if (n * VECTOR_BYTES % 64 == 0)
                    prefetch(ahead + n * VECTOR_BYTES);
                v[n] = count < W ? load_some<V, D>(value, count) : Value<V, D>::load(value + n * W);
            }
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                F w = V::set1(weights[r * BLOCK + t]);
#pragma GCC unroll 8
                for (int n = 0; n < N; ++n)
                    acc[r][n] = V::fma(w, v[n], acc[r][n]);
            }
        }
        for (int r = 0; r < R; ++r)
            for (int n = 0; n < N; ++n)
                V::store(out + r * stride + d + n * W, acc[r][n]);
    }

    template <int R>
    static void add(const Head& head, const float* weights, const float* factor, float* out) {
        constexpr int N = R == 1 ? 8 : R == 2 ? 4 : 2;
        int d = 0;
        for (; d + N * W <= head.head_dim; d += N * W)
            add_panel<R, N>(head, weights, factor, out, d, W);
        for (; d < head.head_dim; d += W)
            add_panel<R, 1>(head, weights, factor, out, d, min_of(W, head.head_dim - d));
    }

    // Lays the head out as keys [panels][head_dim][2 W tokens] and values [panels][BLOCK][2 W
    // dims].
    static void widen(const Head& head, float* keys, float* values) {
        for (int d = 0; d < head.head_dim; d += W) {
            const int count = min_of(W, head.head_dim - d);
            for (int t = 0; t < head.end; t += W) {
                F x[W];
                for (int i = 0; i < W; ++i)
                    x[i] = t + i < head.end
                               ? load_some<V, D>(row(head.keys, head, t + i) + d, count)
                               : V::zero();
                V::transpose(x);
                float* to = keys + t / (2 * W) * head.head_dim * 2 * W + t % (2 * W);
                for (int i = 0; i < count; ++i)
                    V::store(to + (d + i) * 2 * W, x[i]);
            }
            float* to = values + d / (2 * W) * BLOCK * 2 * W + d % (2 * W);
            for (int t = 0; t < head.end; ++t)
                V::store(to + t * 2 * W, load_some<V, D>(row(head.values, head, t) + d, count));
        }
    }
};

// A record has keys [head_dim / 2, BLOCK, 2], then values [BLOCK / 2, head_dim, 2].
template <class V> struct Bf16Page {
    using F = typename V::F;
    using I = typename V::I;
    static constexpr int W = V::W;

    // Adds to acc[r][n] the sum over `pairs` of weights[r][2 j, 2 j + 1] times the pairs in the
    // lanes. The bytes `ahead` are fetched in turns from two places, `apart` bytes from each other:
    // memory gives more that way than from one place.
    template <int R, int N>
    static void dot(const uint8_t* p, int64_t step, int pairs, int lanes, const float* weights,
                    int stride, const uint8_t* ahead, int64_t apart, F (&acc)[R][N]) {
        for (int j = 0; j < pairs; ++j, p += step) {
            const uint8_t* fetched = ahead + j / 2 * N * 4 * W + j % 2 * apart;
            I x[N];
            F lanes_of[N];
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n) {
                if (n * 4 * W % 64 == 0)
                    prefetch(fetched + n * 4 * W);
                x[n] = lanes < W ? V::iload_lanes(p, lanes) : V::iload(p + n * 4 * W);
                lanes_of[n] = V::even_bf16(x[n]);
            }
            // Rows are the outer loop: one weight at a time is in a register, and no sum leaves its
            // own.
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                const F w = V::set1(weights[r * stride + 2 * j]);
#pragma GCC unroll 8
                for (int n = 0; n < N; ++n)
                    acc[r][n] = V::fma(w, lanes_of[n], acc[r][n]);
            }
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n)
                lanes_of[n] = V::odd_bf16(x[n]);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                const F w = V::set1(weights[r * stride + 2 * j + 1]);
#pragma GCC unroll 8
                for (int n = 0; n < N; ++n)
                    acc[r][n] = V::fma(w, lanes_of[n], acc[r][n]);
            }
        }
    }

    template <int R> static void scores(const Head& head, const float* query, float* out) {
        constexpr int N = min_of(BLOCK / W, R == 1 ? 8 : R == 2 ? 4 : 2);
        const int stride = row_floats(head.head_dim);
        for (int t = 0; t < BLOCK; t += N * W) {
            F acc[R][N];
            for (auto& row : acc)
                for (auto& sum : row)
                    sum = V::zero();
            dot<R, N>(head.keys + t * 4, 4 * BLOCK, head.head_dim / 2, W, query, stride,
                      head.keys + head.keys_ahead + t * head.head_dim, BLOCK * head.head_dim, acc);
            for (int r = 0; r < R; ++r)
                for (int n = 0; n < N; ++n)
                    V::store(out + r * BLOCK + t + n * W, acc[r][n]);
        }
    }

    template <int R, int N>
    static void add_panel(const Head& head, const float* weights, const float* factor, float* out,
                          int d, int lanes) {
        const int stride = row_floats(head.head_dim);
        F acc[R][N];
        for (int r = 0; r < R; ++r)
            for (int n = 0; n < N; ++n)
                acc[r][n] = V::mul(V::load(out + r * stride + d + n * W), V::set1(factor[r]));
        dot<R, N>(head.values + d * 4, 4 * head.head_dim, BLOCK / 2, lanes, weights, BLOCK,
                  head.values + head.values_ahead + d * BLOCK, BLOCK * head.head_dim, acc);
        for (int r = 0; r < R; ++r)
            for (int n = 0; n < N; ++n)
                V::store(out + r * stride + d + n * W, acc[r][n]);
    }

    template <int R>
    static void add(const Head& head, const float* weights, const float* factor, float* out) {
        constexpr int N = R == 1 ? 8 : R == 2 ? 4 : 2;
        int d = 0;
        for (; d + N * W <= head.head_dim; d += N * W)
            add_panel<R, N>(head, weights, factor, out, d, W);
        for (; d < head.head_dim; d += W)
            add_panel<R, 1>(head, weights, factor, out, d, min_of(W, head.head_dim - d));
    }

    static void widen(const Head& head, float* keys, float* values) {
        const int head_dim = head.head_dim;
        for (int t = 0; t < BLOCK; t += W) {
            float* to = keys + t / (2 * W) * head_dim * 2 * W + t % (2 * W);
            for (int d = 0; d < head_dim; d += 2) {
                I x = V::iload(head.keys + (d / 2 * BLOCK + t) * 4);
                V::store(to + d * 2 * W, V::even_bf16(x));
                V::store(to + (d + 1) * 2 * W, V::odd_bf16(x));
            }
        }
        for (int d = 0; d < head_dim; d += W) {
            float* to = values + d / (2 * W) * BLOCK * 2 * W + d % (2 * W);
            for (int t = 0; t < BLOCK; t += 2) {
                I x = V::iload_lanes(head.values + (t / 2 * head_dim + d) * 4, head_dim - d);
                V::store(to + t * 2 * W, V::even_bf16(x));
                V::store(to + (t + 1) * 2 * W, V::odd_bf16(x));
            }
        }
    }
};

} // namespace
