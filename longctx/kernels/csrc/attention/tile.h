// One item of work: the rows of a tile attend to its pages, which are read in place (decode) or
// widened to float32 (prefill). Softmax goes page by page, with a running maximum of each row.
// Source: Online normalizer calculation for softmax, https://arxiv.org/abs/1805.02867
#pragma once

#include "attention/job.h"

namespace {

constexpr float LN2 = 0.6931471805599453f;
constexpr float NO_KEY = -1e30f; // the running maximum of a row that has seen no key

// Turns the scores of one row [BLOCK], times `scale`, into weights relative to its running maximum,
// and returns the factor by which earlier sums must be multiplied, since the maximum may have grown.
// `store(i, x)` is given the weights, a vector after another.
//
// Worked example, in powers of 2: after scores 3 and 1 the maximum is 3 and the total 1 + 2^-2. A
// page with a single score of 5 raises the maximum to 5: the factor is 2^-2, the new weight 1, and
// the total (1 + 2^-2) * 2^-2 + 1 = 1.3125.
template <class V, class Store>
float online_softmax(float* scores, float scale, const Columns* columns, float softcap,
                     float& row_max, float& total, const Store& store) {
    using F = typename V::F;
    constexpr int N = BLOCK / V::W;
    F x[N];
    if (columns) {
        for (int t = 0; t < columns->begin; ++t)
            scores[t] = -__builtin_inff();
        for (int t = columns->end; t < BLOCK; ++t)
            scores[t] = -__builtin_inff();
    }
    F peak = V::set1(-__builtin_inff());
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
        x[i] = V::load(scores + i * V::W);
        if (scale != 1)
            x[i] = V::mul(x[i], V::set1(scale));
        if (softcap > 0) { // cap * tanh(x), tanh = 1 - 2 / (1 + e^2x); the mask stays below all
            F e = V::exp2(V::mul(x[i], V::set1(2 * LOG2E)));
            F y = V::sub(V::set1(1.f), V::div(V::set1(2.f), V::add(V::set1(1.f), e)));
            y = V::mul(y, V::set1(softcap * LOG2E));
            x[i] = V::if_below(x[i], NO_KEY, x[i], y);
        }
        peak = V::max(peak, x[i]);
    }
    const float page_max = V::reduce_max(peak);
    float factor = 1;
    if (page_max > row_max) {
        factor = V::first(V::exp2(V::set1(row_max - page_max)));
        row_max = page_max;
    }
    const F base = V::set1(row_max);
    F sum = V::zero();
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
        x[i] = V::exp2(V::sub(x[i], base));
        sum = V::add(sum, x[i]);
        store(i, x[i]);
    }
    total = total * factor + V::reduce_add(sum);
    return factor;
}

// The same for scores that are scaled already; the weights take their place.
template <class V>
float online_softmax(float* scores, const Columns* columns, float softcap, float& row_max,
                     float& total) {
    return online_softmax<V>(scores, 1, columns, softcap, row_max, total,
                             [&](int i, typename V::F x) { V::store(scores + i * V::W, x); });
}

template <class V>
void finish_row(const Job& job, const Result& result, int kv_head, int n, const float* sums,
                float row_max, float total) {
    const int row = n / job.layer.group, head = kv_head * job.layer.group + n % job.layer.group;
    float* out = result.out + row * result.out_row + head * job.layer.head_dim;
    const bool empty = row_max == NO_KEY && total == 0; // of NaN scores alone, the total is NaN
    const float scale = empty ? 0.f : 1.f / total;
    for (int d = 0; d < job.layer.head_dim; ++d)
        out[d] = sums[d] * scale;
    result.lse[row * result.lse_row + head] =
        empty ? -__builtin_inff() : (row_max + __builtin_log2f(total)) * LN2;
}

inline uint8_t* take(uint8_t*& scratch, int64_t bytes) {
    uint8_t* taken = scratch;
    scratch += (bytes + 63) / 64 * 64;
    return taken;
}

template <class V> void decode(const Job& job, const Result& result, uint8_t* scratch) {
    const Layer& layer = job.layer;
    const Tile& tile = job.tile;
    const int head_dim = layer.head_dim, stride = row_floats(head_dim);
    const int rows = tile.rows * layer.group;
    const int all_rows = rows * (tile.kv_end - tile.kv_begin);
    float* query = (float*)take(scratch, all_rows * stride * 4);
    float* sums = (float*)take(scratch, all_rows * stride * 4);
    float* row_max = (float*)take(scratch, all_rows * 4);
    float* total = (float*)take(scratch, all_rows * 4);
    float* scores = (float*)take(scratch, rows * BLOCK * 4);
    for (int i = 0; i < all_rows; ++i) {
        job.load_query<V>(tile.kv_begin + i / rows, i % rows, query + i * stride);
        row_max[i] = NO_KEY;
        total[i] = 0;
    }
    for (int i = 0; i < all_rows * stride; ++i)
        sums[i] = 0;
    job.pages([&](const View& view) {
        const PageKind& kind = job.kind(view);
        for (int kv_head = tile.kv_begin; kv_head < tile.kv_end; ++kv_head) {
            const Head head = job.head(view, kv_head);
            const int first = (kv_head - tile.kv_begin) * rows;
            const int steps = (rows + IN_PLACE - 1) / IN_PLACE; // as even as they come
            for (int step = 0; step < steps; ++step) {
                const int begin = rows * step / steps, count = rows * (step + 1) / steps - begin;
                kind.scores[count - 1](head, query + (first + begin) * stride,
                                       scores + begin * BLOCK);
            }
            float factor[DECODE_ROWS];
            for (int n = 0; n < rows; ++n) {
                const Columns columns = job.columns(view, n / layer.group);
                factor[n] = online_softmax<V>(scores + n * BLOCK, view.masked ? &columns : nullptr,
                                      job.call.softcap, row_max[first + n], total[first + n]);
            }
            for (int step = 0; step < steps; ++step) {
                const int begin = rows * step / steps, count = rows * (step + 1) / steps - begin;
                kind.add[count - 1](head, scores + begin * BLOCK, factor + begin,
                                    sums + (first + begin) * stride);
            }
        }
    });
    for (int i = 0; i < all_rows; ++i)
        finish_row<V>(job, result, tile.kv_begin + i / rows, i % rows, sums + i * stride, row_max[i],
                      total[i]);
}

// Computes scores [M, BLOCK] of M packed query rows [head_dim, M] with `panels` of widened keys.
template <class V, int M>
void tile_scores(const float* query, const float* keys, int head_dim, int panels, float* scores) {
    using F = typename V::F;
    for (int panel = 0; panel < panels; ++panel) {
        F acc[M][2];
        for (auto& row : acc)
            row[0] = row[1] = V::zero();
        const float* key = keys + (int64_t)panel * head_dim * 2 * V::W;
        for (int d = 0; d < head_dim; ++d, key += 2 * V::W) {
            const F near = V::load(key), far = V::load(key + V::W);
#pragma GCC unroll 16
            for (int m = 0; m < M; ++m) {
                const F q = V::set1(query[d * M + m]);
                acc[m][0] = V::fma(q, near, acc[m][0]);
                acc[m][1] = V::fma(q, far, acc[m][1]);
            }
        }
        for (int m = 0; m < M; ++m) {
            V::store(scores + m * BLOCK + panel * 2 * V::W, acc[m][0]);
            V::store(scores + m * BLOCK + panel * 2 * V::W + V::W, acc[m][1]);
        }
    }
}

// Sets sums [M, stride] to sums * factor + weights [M, BLOCK] * values, of tokens begin to end.
template <class V, int M>
void tile_add(const float* weights, const float* values, int begin, int end, int stride,
              const float* factor, float* sums) {
    using F = typename V::F;
    for (int d = 0; d < stride; d += 2 * V::W) {
        F acc[M][2];
        for (int m = 0; m < M; ++m) {
            const F f = V::set1(factor[m]);
            acc[m][0] = V::mul(V::load(sums + m * stride + d), f);
            acc[m][1] = V::mul(V::load(sums + m * stride + d + V::W), f);
        }
        const float* value = values + (int64_t)d * BLOCK + begin * 2 * V::W;
        for (int t = begin; t < end; ++t, value += 2 * V::W) {
            const F near = V::load(value), far = V::load(value + V::W);
#pragma GCC unroll 16
            for (int m = 0; m < M; ++m) {
                const F w = V::set1(weights[m * BLOCK + t]);
                acc[m][0] = V::fma(w, near, acc[m][0]);
                acc[m][1] = V::fma(w, far, acc[m][1]);
            }
        }
        for (int m = 0; m < M; ++m) {
            V::store(sums + m * stride + d, acc[m][0]);
            V::store(sums + m * stride + d + V::W, acc[m][1]);
        }
    }
}

template <class V> void prefill(const Job& job, const Result& result, uint8_t* scratch) {
    constexpr int M = V::TILE_BLOCK;
    const Layer& layer = job.layer;
    const Tile& tile = job.tile;
    const int head_dim = layer.head_dim, stride = round_up(head_dim, 2 * V::W);
    const int rows = tile.rows * layer.group, padded = round_up(rows, M);
    float* query = (float*)take(scratch, padded * head_dim * 4);
    float* sums = (float*)take(scratch, padded * stride * 4);
    float* row_max = (float*)take(scratch, padded * 4);
    float* total = (float*)take(scratch, padded * 4);
    float* keys = (float*)take(scratch, BLOCK * head_dim * 4);
    float* values = (float*)take(scratch, BLOCK * stride * 4);
    float* scores = (float*)take(scratch, M * BLOCK * 4);
    float* row = (float*)take(scratch, row_floats(head_dim) * 4);
    const int kv_head = tile.kv_begin;
    for (int n = 0; n < padded; ++n) {
        if (n < rows)
            job.load_query<V>(kv_head, n, row);
        else
            for (int d = 0; d < head_dim; ++d)
                row[d] = 0;
        const int64_t at = (int64_t)(n / M) * M * head_dim + n % M;
        for (int d = 0; d < head_dim; ++d)
            query[at + d * M] = row[d];
        row_max[n] = NO_KEY;
        total[n] = 0;
    }
    for (int i = 0; i < padded * stride; ++i)
        sums[i] = 0;
    for (int i = 0; i < BLOCK * stride; ++i)
        values[i] = 0; // columns beyond head_dim stay so
    job.pages([&](const View& view) {
        job.kind(view).widen(job.head(view, kv_head), keys, values);
        for (int begin = 0; begin < rows; begin += M) {
            const int last = min_of(begin + M, rows) - 1;
            const int end = view.masked ? job.columns(view, last / layer.group).end : BLOCK;
            const int panels = (end + 2 * V::W - 1) / (2 * V::W);
            tile_scores<V, M>(query + begin * head_dim, keys, head_dim, panels, scores);
            float factor[M];
            for (int m = 0; m < M; ++m) {
                const int n = min_of(begin + m, last);
                const Columns columns = job.columns(view, n / layer.group);
                factor[m] = online_softmax<V>(scores + m * BLOCK, view.masked ? &columns : nullptr,
                                      job.call.softcap, row_max[begin + m], total[begin + m]);
            }
            tile_add<V, M>(scores, values, view.begin, end, stride, factor, sums + begin * stride);
        }
    });
    for (int n = 0; n < rows; ++n)
        finish_row<V>(job, result, kv_head, n, sums + n * stride, row_max[n], total[n]);
}

template <class V> int64_t scratch_bytes(const Layer& layer) {
    const int64_t stride = row_floats(layer.head_dim);
    const int64_t decode_rows = DECODE_ROWS * layer.kv_heads;
    const int64_t tile_rows = TILE_ROWS + V::TILE_BLOCK;
    const int64_t decoding = decode_rows * (stride * 4 * 2 + 8) + DECODE_ROWS * BLOCK * 4;
    const int64_t prefilling = tile_rows * (stride * 4 * 2 + 8) + BLOCK * stride * 4 * 2 +
                               V::TILE_BLOCK * BLOCK * 4 + stride * 4;
    return (decoding > prefilling ? decoding : prefilling) + 16 * 64; // and what alignment takes
}

template <class V>
void run(const Call& call, const Item& item, const Result& result, uint8_t* scratch) {
    const Layer& layer = *call.layer;
    const PageKind& raw = raw_kinds<V>[(int)layer.dtype];
    const PageKind& packed =
        layer.codec == Codec::raw ? raw : record_kinds<V>[(int)layer.codec];
    const Job job = {call, layer, item, *item.tile, raw, packed};
    if (item.tile->rows * layer.group <= DECODE_ROWS)
        decode<V>(job, result, scratch);
    else
        prefill<V>(job, result, scratch);
}

} // namespace
