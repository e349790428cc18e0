// Prefill in bfloat16: rows of queries, and softmax weights, are multiplied with keys and values in
// pairs, HEIGHT rows at once. Queries are the model's own numbers; keys and values are rounded to
// bfloat16, which those of `raw` and `bf16` pages are already, and weights too. Sums, and the softmax
// between, are float32, as in attention/tile.h.
//
// `Products` multiplies: `scores(query, keys, head_dim, out)` of query [HEIGHT, head_dim] gives out
// [HEIGHT, BLOCK]; `add(weights, values, head_dim, sums)` adds weights [HEIGHT, BLOCK] times values
// to sums [HEIGHT, head_dim]. Keys lie as [head_dim / 2, BLOCK, 2], values as [BLOCK / 2, head_dim,
// 2], as in the records of `bf16` pages, which are read in place. A thread calls `begin` before its
// first product, and `end` after its last.
#pragma once

#include "simd/avx512.h"
#include "simd/pairs.h"
#include "attention/tile.h"

namespace {

constexpr int HEIGHT = 16;
constexpr int UNIT = 32; // dims, or tokens, that are multiplied at once; head_dim is a multiple

using Vector = Avx512<true>; // every CPU with bfloat16 instructions has VNNI

struct PairPage {
    const uint16_t *keys, *values;
};

// Room for one page of pairs, and for what it is made of.
struct PairRoom {
    float *wide_keys, *wide_values;
    uint16_t *keys, *values;
};

// Rounds a page to pairs; tokens that no row sees become zeros, since 0 times what is there need not
// be 0.
inline PairPage make_pairs(const Job& job, const View& view, const Head& head, const PairRoom& room) {
    const int head_dim = head.head_dim, whole = 2 * Vector::W;
    job.kind(view).widen(head, room.wide_keys, room.wide_values);
    const __m512 zero = Vector::zero();
    for (int t = 0; t < BLOCK; t += Vector::W) {
        const float* from = room.wide_keys + t / whole * head_dim * whole + t % whole;
        const bool seen = t < view.end && t + Vector::W > view.begin;
        for (int d = 0; d < head_dim; d += 2)
            store_pairs(room.keys + d * BLOCK + 2 * t, seen ? Vector::load(from + d * whole) : zero,
                        seen ? Vector::load(from + (d + 1) * whole) : zero);
    }
    for (int d = 0; d < head_dim; d += Vector::W) {
        const float* from = room.wide_values + d / whole * BLOCK * whole + d % whole;
        const auto value = [&](int t) {
            return t >= view.begin && t < view.end ? Vector::load(from + t * whole) : zero;
        };
        for (int t = 0; t < BLOCK; t += 2)
            store_pairs(room.values + t * head_dim + 2 * d, value(t), value(t + 1));
    }
    return {room.keys, room.values};
}

// Copies query row `n` of a key head as it is, where rows are ordered [rows, group].
inline void copy_query(const Job& job, int kv_head, int n, uint16_t* to) {
    const Layer& layer = job.layer;
    const int64_t token = job.tile.chunk->row_begin + job.tile.row + n / layer.group;
    const int64_t head = kv_head * layer.group + n % layer.group;
    const auto* from = (const uint16_t*)job.call.query + token * job.call.query_token_stride +
                       head * job.call.query_head_stride;
    for (int d = 0; d < layer.head_dim; ++d)
        to[d] = from[d];
}

template <class Products>
void prefill_pairs(const Job& job, const Result& result, uint8_t* scratch) {
    const Layer& layer = job.layer;
    const Tile& tile = job.tile;
    const int head_dim = layer.head_dim, rows = tile.rows * layer.group;
    const int padded = round_up(rows, HEIGHT), kv_head = tile.kv_begin;
    auto* const query = (uint16_t*)take(scratch, padded * head_dim * 2);
    auto* const sums = (float*)take(scratch, padded * head_dim * 4);
    auto* const row_max = (float*)take(scratch, padded * 4);
    auto* const total = (float*)take(scratch, padded * 4);
    PairRoom room;
    room.wide_keys = (float*)take(scratch, BLOCK * head_dim * 4);
    room.wide_values = (float*)take(scratch, BLOCK * head_dim * 4);
    room.keys = (uint16_t*)take(scratch, BLOCK * head_dim * 2);
    room.values = (uint16_t*)take(scratch, BLOCK * head_dim * 2);
    auto* const scores = (float*)take(scratch, HEIGHT * BLOCK * 4);
    auto* const weights = (uint16_t*)take(scratch, HEIGHT * BLOCK * 2);
    for (int i = 0; i < padded * head_dim; ++i)
        query[i] = 0, sums[i] = 0;
    for (int i = 0; i < HEIGHT * BLOCK; ++i)
        weights[i] = 0; // of rows that are not there
    for (int n = 0; n < rows; ++n) {
        copy_query(job, kv_head, n, query + n * head_dim);
        row_max[n] = NO_KEY;
        total[n] = 0;
    }
    const float softcap = job.call.softcap;
    const float scale = softcap > 0 ? job.call.scaling / softcap : job.call.scaling * LOG2E;
    Products::begin();
    job.pages([&](const View& view) {
        const Head head = job.head(view, kv_head);
        const bool in_place = !view.own && layer.codec == Codec::bf16 && view.begin == 0 && view.end == BLOCK;
        const PairPage page = in_place ? PairPage{(const uint16_t*)head.keys, (const uint16_t*)head.values}
                                       : make_pairs(job, view, head, room);
        for (int begin = 0; begin < rows; begin += HEIGHT) {
            const int count = min_of(HEIGHT, rows - begin);
            Products::scores(query + begin * head_dim, page.keys, head_dim, scores);
            for (int m = 0; m < count; ++m) {
                const int n = begin + m;
                uint16_t* const to = weights + m * BLOCK;
                Columns columns;
                if (view.masked)
                    columns = job.columns(view, n / layer.group);
                const float factor = online_softmax<Vector>(
                    scores + m * BLOCK, scale, view.masked ? &columns : nullptr, softcap,
                    row_max[n], total[n], [&](int i, __m512 x) {
                        _mm256_storeu_si256((__m256i*)(to + i * Vector::W), (__m256i)_mm512_cvtneps_pbh(x));
                    });
                float* const sum = sums + n * head_dim;
                if (factor != 1)
                    for (int d = 0; d < head_dim; d += Vector::W)
                        Vector::store(sum + d, Vector::mul(Vector::load(sum + d), Vector::set1(factor)));
            }
            Products::add(weights, page.values, head_dim, sums + begin * head_dim);
        }
    });
    Products::end();
    for (int n = 0; n < rows; ++n)
        finish_row<Vector>(job, result, kv_head, n, sums + n * head_dim, row_max[n], total[n]);
}

template <class Products> int64_t pair_scratch_bytes(const Layer& layer) {
    const int64_t head_dim = layer.head_dim, rows = TILE_ROWS + HEIGHT;
    const int64_t pairs = rows * (head_dim * 6 + 8) + BLOCK * head_dim * 12 + HEIGHT * BLOCK * 6 + 16 * 64;
    const int64_t others = scratch_bytes<Vector>(layer);
    return pairs > others ? pairs : others;
}

template <class Products>
void run_pairs(const Call& call, const Item& item, const Result& result, uint8_t* scratch) {
    const Layer& layer = *call.layer;
    const bool narrow = call.query_dtype == Dtype::bfloat16 && layer.dtype == Dtype::bfloat16;
    if (!narrow || layer.head_dim % UNIT || item.tile->rows * layer.group <= DECODE_ROWS)
        return run<Vector>(call, item, result, scratch);
    const PageKind& raw = raw_kinds<Vector>[(int)layer.dtype];
    const PageKind& packed = layer.codec == Codec::raw ? raw : record_kinds<Vector>[(int)layer.codec];
    prefill_pairs<Products>({call, layer, item, *item.tile, raw, packed}, result, scratch);
}

} // namespace
