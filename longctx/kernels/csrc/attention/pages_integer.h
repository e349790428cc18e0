// Pages of integer codes: `int8` and `int4` records, multiplied without widening them to floats.
//
// Each dim of a page's keys has a scale and an offset. So a query is multiplied with the page's
// scales and rounded, page by page, and what it makes of the offsets is the same for all tokens.
// Queries, and softmax weights times the scales of the values, are rounded to integers relative to
// the largest of their row: of 16 bits for int8 codes, of two planes of 7 for int4 codes.
#pragma once

#include "attention/pages_float.h"

namespace {

// Returns the largest magnitude of `count` numbers.
template <class V> float largest(const float* x, int count) {
    typename V::F most = V::zero();
    for (int i = 0; i < count; i += V::W)
        most = V::max(most, V::max(V::load(x + i), V::sub(V::zero(), V::load(x + i))));
    return V::reduce_max(most);
}

// The weights of one row times the scales of the values, and the factor that makes them integers of
// at most `limit`.
template <class V> struct Scaled {
    static constexpr int N = BLOCK / V::W;
    typename V::F x[N], inverse;
    float unit;

    Scaled(const float* weights, const typename V::F (&scales)[N], float limit) {
        typename V::F most = V::zero();
#pragma GCC unroll 8
        for (int i = 0; i < N; ++i) {
            x[i] = V::mul(V::load(weights + i * V::W), scales[i]);
            most = V::max(most, x[i]);
        }
        const float reached = V::reduce_max(most);
        inverse = V::set1(reached > 0 ? limit / reached : 0.f);
        unit = reached / limit;
    }
    typename V::I integers(int i) const { return V::to_int(V::mul(x[i], inverse)); }
};

// Fetches the scales of the record that is read next: they lie behind its codes, where nothing else
// would fetch them.
inline void prefetch_scales(const Head& head, int64_t codes, int64_t scales) {
    const uint8_t* next = head.values + head.values_ahead;
    for (int64_t byte = codes; byte < codes + scales; byte += 64)
        prefetch(next + byte);
}

// R queries times the scales of a page's keys, and the factor that makes each of them integers of at
// most `limit`; `offset` is what a query makes of the offsets of the keys.
template <class V, int R> struct Folded {
    using F = typename V::F;
    static constexpr int STRIDE = 256; // of head_dim at most
    alignas(64) float x[R * STRIDE];
    float inverse[R], unit[R], offset[R];

    Folded(const float* query, const uint16_t* scales, const uint16_t* offsets, int head_dim,
           float limit) {
        const int stride = row_floats(head_dim);
        F most[R], sum[R];
        for (int r = 0; r < R; ++r)
            most[r] = sum[r] = V::zero();
        for (int d = 0; d < head_dim; d += V::W) {
            const F scale = load_some<V, Dtype::bfloat16>(scales + d, head_dim - d);
            const F middle = load_some<V, Dtype::bfloat16>(offsets + d, head_dim - d);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                const F q = V::load(query + r * stride + d), folded = V::mul(q, scale);
                V::store(x + r * STRIDE + d, folded);
                most[r] = V::max(most[r], V::max(folded, V::sub(V::zero(), folded)));
                sum[r] = V::fma(q, middle, sum[r]);
            }
        }
        for (int r = 0; r < R; ++r) {
            const float reached = V::reduce_max(most[r]);
            inverse[r] = reached > 0 ? limit / reached : 0.f;
            unit[r] = reached / limit;
            offset[r] = V::reduce_add(sum[r]);
        }
    }
    typename V::I integers(int r, int d) const {
        return V::to_int(V::mul(V::load(x + r * STRIDE + d), V::set1(inverse[r])));
    }
};

// Returns 0, or NaN for tokens whose scale of values is NaN: their keys are not to be read either.
template <class V> typename V::F nan_of(const uint16_t* value_scales) {
    return V::mul(V::load_bf16(value_scales), V::zero());
}

// A record has codes of keys [head_dim / 4, BLOCK, 4] and of values [BLOCK / 4, head_dim, 4], then
// bfloat16 scales of values [BLOCK], scales of keys [head_dim] and offsets of keys [head_dim]. With
// a head_dim of 64 the byte of key dim 5 of token 3 is number 1 of the 4 at 4 * (64 * 1 + 3) = 268,
// which is byte 269.
template <class V> struct Int8Page {
    using F = typename V::F;
    using I = typename V::I;
    static constexpr int W = V::W;
    static constexpr float LIMIT = 32767.f;

    struct Scales {
        const uint16_t *value, *key, *key_offset;
    };
    static Scales scales_of(const Head& head) {
        const uint16_t* p = (const uint16_t*)(head.values + BLOCK * head.head_dim);
        return {p, p + BLOCK, p + BLOCK + head.head_dim};
    }

    template <int R, int N>
    static void dot(const uint8_t* p, int64_t step, int steps, bool half, const int16_t* rows,
                    int stride, const uint8_t* ahead, bool fetch, F (&sums)[R][N]) {
        constexpr int LINES = max_of(64, 4 * W * N);
        I acc[R][2 * N];
        for (auto& row : acc)
            for (auto& sum : row)
                sum = V::izero();
#pragma GCC unroll 4
        for (int j = 0; j < steps; ++j, p += step) {
            if (fetch)
                for (int byte = 0; byte < 4 * W * N; byte += 64)
                    prefetch(ahead + j * LINES + byte);
            I codes[2 * N];
#pragma GCC unroll 8
            for (int n = 0; n < 2 * N; ++n)
                codes[n] = half && n ? V::izero() : V::words(p + n * 2 * W);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                const I row = V::quad16(rows + r * stride + 4 * j);
#pragma GCC unroll 8
                for (int n = 0; n < 2 * N; ++n)
                    acc[r][n] = V::dot16(acc[r][n], codes[n], row);
            }
        }
        for (int r = 0; r < R; ++r)
            for (int n = 0; n < N; ++n)
                sums[r][n] = V::pair_sums(acc[r][2 * n], acc[r][2 * n + 1]);
    }

    template <int R> static void scores(const Head& head, const float* query, float* out) {
        constexpr int N = min_of(BLOCK / W, R == 1 ? 4 : R == 2 ? 2 : 1);
        const int head_dim = head.head_dim;
        const Scales scales = scales_of(head);
        const Folded<V, R> folded(query, scales.key, scales.key_offset, head_dim, LIMIT);
        alignas(64) int16_t rounded[R * Folded<V, R>::STRIDE];
        for (int r = 0; r < R; ++r)
            for (int d = 0; d < head_dim; d += W)
                V::store16(rounded + r * Folded<V, R>::STRIDE + d, folded.integers(r, d));
        for (int t = 0; t < BLOCK; t += N * W) {
            F sums[R][N];
            dot<R, N>(head.keys + t * 4, 4 * BLOCK, head_dim / 4, false, rounded,
                      Folded<V, R>::STRIDE, head.keys + head.keys_ahead + t * head_dim,
                      t * 4 % 64 == 0, sums);
            for (int n = 0; n < N; ++n) {
                const F broken = nan_of<V>(scales.value + t + n * W);
                for (int r = 0; r < R; ++r) {
                    const F offset = V::add(V::set1(folded.offset[r]), broken);
                    V::store(out + r * BLOCK + t + n * W,
                             V::fma(sums[r][n], V::set1(folded.unit[r]), offset));
                }
            }
        }
    }

    template <int R, int N>
    static void add_panel(const Head& head, const int16_t* weights, const float* units,
                          const float* factor, float* out, int d, bool half) {
        const int stride = row_floats(head.head_dim);
        F sums[R][N];
        dot<R, N>(head.values + d * 4, 4 * head.head_dim, BLOCK / 4, half, weights, BLOCK,
                  head.values + head.values_ahead + d * BLOCK, d * 4 % 64 == 0, sums);
        for (int r = 0; r < R; ++r)
            for (int n = 0; n < N; ++n) {
                float* to = out + r * stride + d + n * W;
                F kept = V::mul(V::load(to), V::set1(factor[r]));
                V::store(to, V::fma(sums[r][n], V::set1(units[r]), kept));
            }
    }

    template <int R>
    static void add(const Head& head, const float* weights, const float* factor, float* out) {
        constexpr int N = R == 1 ? 4 : R == 2 ? 2 : 1;
        const uint16_t* scales = scales_of(head).value;
        prefetch_scales(head, 2 * BLOCK * head.head_dim, 2 * BLOCK + 4 * head.head_dim);
        alignas(64) int16_t rounded[R * BLOCK];
        float units[R];
        F scale[BLOCK / W];
        for (int i = 0; i < BLOCK / W; ++i)
            scale[i] = V::load_bf16(scales + i * W);
        for (int r = 0; r < R; ++r) {
            const Scaled<V> row(weights + r * BLOCK, scale, LIMIT);
#pragma GCC unroll 8
            for (int i = 0; i < BLOCK / W; ++i)
                V::store16(rounded + r * BLOCK + i * W, row.integers(i));
            units[r] = row.unit;
        }
        int d = 0;
        for (; d + N * W <= head.head_dim; d += N * W)
            add_panel<R, N>(head, rounded, units, factor, out, d, false);
        for (; d < head.head_dim; d += W)
            add_panel<R, 1>(head, rounded, units, factor, out, d, d + W > head.head_dim);
    }

    static void widen(const Head& head, float* keys, float* values) {
        const int head_dim = head.head_dim;
        const Scales scales = scales_of(head);
        for (int t = 0; t < BLOCK; t += W) {
            float* to = keys + t / (2 * W) * head_dim * 2 * W + t % (2 * W);
            const F broken = nan_of<V>(scales.value + t);
            for (int d = 0; d < head_dim; d += 4) {
                I x = V::iload(head.keys + (d / 4 * BLOCK + t) * 4);
#pragma GCC unroll 4
                for (int i = 0; i < 4; ++i) {
                    F scale = V::set1(bf16_to_float(scales.key[d + i]));
                    F offset = V::add(V::set1(bf16_to_float(scales.key_offset[d + i])), broken);
                    V::store(to + (d + i) * 2 * W, V::fma(V::byte(x, i), scale, offset));
                }
            }
        }
        for (int d = 0; d < head_dim; d += W) {
            float* to = values + d / (2 * W) * BLOCK * 2 * W + d % (2 * W);
            for (int t = 0; t < BLOCK; t += 4) {
                I x = V::iload_lanes(head.values + (t / 4 * head_dim + d) * 4, head_dim - d);
#pragma GCC unroll 4
                for (int i = 0; i < 4; ++i) {
                    F scale = V::set1(bf16_to_float(scales.value[t + i]));
                    V::store(to + (t + i) * 2 * W, V::mul(V::byte(x, i), scale));
                }
            }
        }
    }
};

// The number of dims that share a scale and a minimum: the largest divisor of head_dim that is a
// multiple of 8 and at most 64.
inline int int4_group(int head_dim) {
    int group = min_of(head_dim, 64);
    while (head_dim % group || group % 8)
        --group;
    return group;
}

// A record has codes of keys [head_dim / 8, BLOCK, 4] and of values [BLOCK / 8, head_dim, 4], where
// the low four bits of byte i belong to number i of eight, the high ones to number 4 + i. Then come
// value scales and value minimums, each [groups, BLOCK], key scales and key offsets, each
// [head_dim]. A value is scale * code + minimum, a key scale * (code - 7.5) + offset.
template <class V> struct Int4Page {
    using F = typename V::F;
    using I = typename V::I;
    static constexpr int W = V::W;
    static constexpr float LIMIT = 127.f * 128; // a number is in two planes: 128 * high + low
    static constexpr float MIDDLE = 7.5f;       // of the codes of keys

    struct Scales {
        const uint16_t *value, *value_minimum, *key, *key_offset;
    };
    static Scales scales_of(const Head& head, int group) {
        const int count = head.head_dim / group * BLOCK;
        const uint16_t* p = (const uint16_t*)(head.keys + BLOCK * head.head_dim);
        return {p, p + count, p + 2 * count, p + 2 * count + head.head_dim};
    }

    // Multiplies with R `rows` of bytes, `stride` apart; of two planes the low one lies `low` bytes
    // behind the high one.
    template <int R, int PLANES>
    static void dot(const uint8_t* p, int64_t step, int steps, int lanes, const uint8_t* rows,
                    int stride, int low, const uint8_t* ahead, bool fetch, F (&sums)[R]) {
        I wide[R];
        for (auto& sum : wide)
            sum = V::izero();
        for (int begin = 0; begin < steps; begin += 4) {
            I narrow[PLANES][R];
            for (auto& plane : narrow)
                for (auto& sum : plane)
                    sum = V::izero();
            const int end = min_of(begin + 4, steps);
            for (int j = begin; j < end; ++j, p += step) {
                if (fetch)
                    prefetch(ahead + j * 64);
                I x = lanes < W ? V::iload_lanes(p, lanes) : V::iload(p);
                I first = V::low_nibbles(x), second = V::high_nibbles(x);
#pragma GCC unroll 4
                for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
                    for (int plane = 0; plane < PLANES; ++plane) {
                        const uint8_t* at = rows + r * stride + plane * low + 8 * j;
                        I& sum = narrow[plane][r];
                        sum = V::dot_u8s8(sum, first, V::quad8(at));
                        sum = V::dot_u8s8(sum, second, V::quad8(at + 4));
                        V::pin(sum);
                    }
            }
            for (int r = 0; r < R; ++r) {
                wide[r] = V::flush(wide[r], narrow[0][r], PLANES == 1 ? 1 : 128);
                if (PLANES == 2)
                    wide[r] = V::flush(wide[r], narrow[PLANES - 1][r], 1);
            }
        }
        for (int r = 0; r < R; ++r)
            sums[r] = V::to_float(wide[r]);
    }

    template <int R> static void scores(const Head& head, const float* query, float* out) {
        constexpr int STRIDE = Folded<V, R>::STRIDE;
        const int head_dim = head.head_dim;
        const Scales scales = scales_of(head, int4_group(head_dim));
        const Folded<V, R> folded(query, scales.key, scales.key_offset, head_dim, LIMIT);
        alignas(64) uint8_t parts[2 * R * STRIDE]; // high parts of each row, then low parts
        float offset[R];
        for (int r = 0; r < R; ++r) {
            F sum = V::zero();
            for (int d = 0; d < head_dim; d += W) {
                const I number = folded.integers(r, d);
                const int at = r * STRIDE + d;
                V::store_parts(parts + at, parts + R * STRIDE + at, number);
                sum = V::add(sum, V::to_float(number));
            }
            offset[r] = folded.offset[r] - MIDDLE * folded.unit[r] * V::reduce_add(sum);
        }
        for (int t = 0; t < BLOCK; t += W) {
            F sums[R];
            dot<R, 2>(head.keys + t * 4, 4 * BLOCK, head_dim / 8, W, parts, STRIDE, R * STRIDE,
                      head.keys + head.keys_ahead + t * head_dim / 2, t * 4 % 64 == 0, sums);
            const F broken = nan_of<V>(scales.value + t);
            for (int r = 0; r < R; ++r)
                V::store(out + r * BLOCK + t, V::fma(sums[r], V::set1(folded.unit[r]),
                                                     V::add(V::set1(offset[r]), broken)));
        }
    }

    template <int R>
    static void add(const Head& head, const float* weights, const float* factor, float* out) {
        constexpr int N = BLOCK / W;
        const int head_dim = head.head_dim, group = int4_group(head_dim);
        const int stride = row_floats(head_dim);
        const Scales scales = scales_of(head, group);
        prefetch_scales(head, BLOCK * head_dim, head_dim / group * 4 * BLOCK + 4 * head_dim);
        alignas(64) uint8_t parts[2 * R * BLOCK]; // high parts of each row, then low parts
        for (int g = 0; g < head_dim / group; ++g) {
            // A value is scale * (code + minimum / scale), so that minimums meet the weights as
            // they were rounded: where values of one sign are a large minimum plus a small code,
            // only then do the two roundings cancel. Without a scale there is only the minimum.
            F scale[N], offset[N], alone[N];
            for (int i = 0; i < N; ++i) {
                const F minimum = V::load_bf16(scales.value_minimum + g * BLOCK + i * W);
                scale[i] = V::load_bf16(scales.value + g * BLOCK + i * W);
                offset[i] = V::if_zero(scale[i], V::zero(), V::div(minimum, scale[i]));
                alone[i] = V::if_zero(scale[i], minimum, V::zero());
            }
            float units[R], minimums[R];
            for (int r = 0; r < R; ++r) {
                const Scaled<V> row(weights + r * BLOCK, scale, LIMIT);
                F sum = V::zero(), rest = V::zero();
#pragma GCC unroll 8
                for (int i = 0; i < N; ++i) {
                    const I number = row.integers(i);
                    const int at = r * BLOCK + i * W;
                    V::store_parts(parts + at, parts + R * BLOCK + at, number);
                    sum = V::fma(V::to_float(number), offset[i], sum);
                    rest = V::fma(V::load(weights + at), alone[i], rest);
                }
                units[r] = row.unit;
                minimums[r] = V::reduce_add(V::fma(sum, V::set1(row.unit), rest));
            }
            for (int d = g * group; d < (g + 1) * group; d += W) {
                const int lanes = min_of(W, (g + 1) * group - d);
                F sums[R];
                dot<R, 2>(head.values + d * 4, 4 * head_dim, BLOCK / 8, lanes, parts, BLOCK,
                          R * BLOCK, head.values + head.values_ahead + d * BLOCK / 2,
                          d * 4 % 64 == 0, sums);
                for (int r = 0; r < R; ++r) {
                    float* to = out + r * stride + d;
                    F kept = V::fma(V::load(to), V::set1(factor[r]), V::set1(minimums[r]));
                    V::store_lanes(to, V::fma(sums[r], V::set1(units[r]), kept), lanes);
                }
            }
        }
    }

    static void widen(const Head& head, float* keys, float* values) {
        const int head_dim = head.head_dim, group = int4_group(head_dim);
        const Scales scales = scales_of(head, group);
        for (int t = 0; t < BLOCK; t += W) {
            float* to = keys + t / (2 * W) * head_dim * 2 * W + t % (2 * W);
            const F broken = nan_of<V>(scales.value + t), middle = V::set1(MIDDLE);
            for (int d = 0; d < head_dim; d += 8) {
                I x = V::iload(head.keys + (d / 8 * BLOCK + t) * 4);
#pragma GCC unroll 8
                for (int i = 0; i < 8; ++i) {
                    F scale = V::set1(bf16_to_float(scales.key[d + i]));
                    F offset = V::add(V::set1(bf16_to_float(scales.key_offset[d + i])), broken);
                    F step = V::sub(V::nibble(x, i % 4 * 8 + i / 4 * 4), middle);
                    V::store(to + (d + i) * 2 * W, V::fma(step, scale, offset));
                }
            }
        }
        for (int d = 0; d < head_dim; d += W) {
            float* to = values + d / (2 * W) * BLOCK * 2 * W + d % (2 * W);
            // A wide vector may lie in two groups.
            const int near = d / group * BLOCK, far = min_of(d + 8, head_dim - 1) / group * BLOCK;
            for (int t = 0; t < BLOCK; t += 8) {
                I x = V::iload_lanes(head.values + (t / 8 * head_dim + d) * 4, head_dim - d);
#pragma GCC unroll 8
                for (int i = 0; i < 8; ++i) {
                    const F scale = V::set_halves(bf16_to_float(scales.value[near + t + i]),
                                                  bf16_to_float(scales.value[far + t + i]));
                    const F minimum = V::set_halves(bf16_to_float(scales.value_minimum[near + t + i]),
                                                    bf16_to_float(scales.value_minimum[far + t + i]));
                    V::store(to + (t + i) * 2 * W,
                             V::fma(V::nibble(x, i % 4 * 8 + i / 4 * 4), scale, minimum));
                }
            }
        }
    }
};

} // namespace
