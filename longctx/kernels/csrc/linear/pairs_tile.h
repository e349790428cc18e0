// What the bfloat16 kernels of linear layers share: the order of the work, and weights made pairs.
//
// An instruction set `S` has ROWS, the rows that it multiplies at once, and
// `multiply<PANELS>(job, part, row)`.
#pragma once

#include "linear/avx512.h"
#include "linear/pairs.h"
#include "linear/tile.h"
#include "simd/pairs.h"

namespace {

constexpr int64_t PAIR = 2;

// Weights that lie in pairs already and are multiplied where they are.
struct Pairs : Plain<Avx512, uint16_t> {};

template <class Type>
constexpr bool in_place = false;
template <>
constexpr bool in_place<Pairs> = true;

// Bytes of a panel up to an input, at which a block begins.
template <class Type>
constexpr int64_t bytes_up_to(int64_t input) {
    static_assert(PIECE % Type::BLOCK == 0);
    return Type::elements(input) * int64_t(sizeof(typename Type::Element));
}

// Rounds `depth` inputs of a panel to pairs, from the beginning of a block on, and adds zeros up to a
// whole unit. `ahead` bytes further on is what is wanted next.
template <class Type>
void make_pairs(const typename Type::Element* packed, int64_t depth, uint16_t* pairs,
                int64_t ahead) {
    int64_t k = 0;
    if constexpr (Type::GROUP == 1) {
        for (; k < depth; k += PAIR) {
            const auto* from = packed + k * PANEL;
            if (k % (2 * PAIR) == 0) __builtin_prefetch((const char*)from + ahead);
            store_pairs(pairs + k * PANEL, Type::widen(from, 0, Type::scales(from, 0)),
                        k + 1 < depth ? Type::widen(from + PANEL, 0, Type::scales(from, 1))
                                      : _mm512_setzero_ps());
        }
    } else {
        for (; k < depth; k += Type::GROUP) {
            const auto* group = Type::group(packed, k);
            const auto scales = Type::scales(packed, k);
            fetch<Type>(group, ahead);
#pragma GCC unroll 8
            for (int64_t i = 0; i < Type::GROUP; i += PAIR)
                store_pairs(pairs + (k + i) * PANEL, Type::widen(group, i, scales),
                            Type::widen(group, i + 1, scales));
        }
    }
    for (; k < whole_units(depth); k += PAIR)
        store_pairs(pairs + k * PANEL, _mm512_setzero_ps(), _mm512_setzero_ps());
}

// A piece of one or two panels and their sums.
struct Part {
    const uint16_t* weights[2]; // pairs
    int64_t from, units;
    float* sums; // [panels][stride]
    int64_t stride;
    bool first;
    int64_t ahead; // in bytes from the weights, what to fetch meanwhile; 0 for nothing
};

// Writes sums [rows][PANEL] as results.
void finish(const PairJob& job, const float* sums, int64_t row, int64_t panel, int64_t rows) {
    const int64_t width = job.outputs - panel * PANEL;
    const __mmask16 mask = width >= PANEL ? 0xffff : (1 << width) - 1;
    const float* bias = job.bias ? job.bias + panel * PANEL : nullptr;
    uint16_t* y = job.y + row * job.outputs + panel * PANEL;
    for (int64_t r = 0; r < rows; ++r) {
        __m512 sum = _mm512_loadu_ps(sums + r * PANEL);
        if (bias) sum = _mm512_add_ps(sum, _mm512_loadu_ps(bias));
        _mm256_mask_storeu_epi16(y + r * job.outputs, mask, (__m256i)_mm512_cvtneps_pbh(sum));
    }
}

template <class S, class Type, int PANELS>
void multiply_part(const PairJob& job, int64_t panel, int64_t from, float* sums, int64_t stride) {
    const int64_t depth = from + PIECE < job.inputs ? PIECE : job.inputs - from;
    const int64_t panel_bytes = bytes_up_to<Type>(in_place<Type> ? whole_units(job.inputs) : job.inputs);
    // A few rows wait for memory, in the order of one panel; many for the panels to come.
    const int64_t ahead = job.rows > S::ROWS ? PANELS * panel_bytes : AHEAD_BYTES;
    Part part{{}, from, whole_units(depth) / UNIT, sums, stride, from == 0, in_place<Type> ? ahead : 0};
    for (int p = 0; p < PANELS; ++p) {
        const char* weights =
            (const char*)job.weight + (panel + p) * panel_bytes + bytes_up_to<Type>(from);
        part.weights[p] = (const uint16_t*)weights;
        if constexpr (!in_place<Type>) {
            uint16_t* scratch = job.scratch + p * PIECE * PANEL;
            make_pairs<Type>((const typename Type::Element*)weights, depth, scratch, ahead);
            part.weights[p] = scratch;
        }
    }
    for (int64_t row = 0; row < job.rows; row += S::ROWS) {
        S::template multiply<PANELS>(job, part, row);
        part.ahead = 0;
        if (from + depth < job.inputs) continue;
        for (int p = 0; p < PANELS; ++p)
            finish(job, sums + p * stride + row * PANEL, row, panel + p,
                   row + S::ROWS < job.rows ? S::ROWS : job.rows - row);
    }
}

template <class S, class Type>
void run(const PairJob& job) {
    S::begin(job.rows);
    const int64_t stride = (job.rows + S::ROWS - 1) / S::ROWS * S::ROWS * PANEL;
    for (int64_t from = 0; from < job.inputs; from += PIECE)
        for (int64_t panel = job.first_panel; panel < job.last_panel; panel += 2) {
            float* sums = job.sums + (panel - job.first_panel) * stride;
            if (panel + 2 <= job.last_panel)
                multiply_part<S, Type, 2>(job, panel, from, sums, stride);
            else
                multiply_part<S, Type, 1>(job, panel, from, sums, stride);
        }
}

template <class S, class... Types>
constexpr PairKernels kernels_of_pairs() {
    static_assert(sizeof...(Types) == STORAGES);
    return {S::TILE_ROWS, S::STEP, S::WHOLE_TILES, {run<S, Types>...}, S::end};
}

// In the order of Storage.
template <class S>
constexpr PairKernels pair_kernels() {
    using V = Avx512;
    return kernels_of_pairs<
        S, Float32<V>, Pairs, Grouped<V, Storage::bytes_half>, Grouped<V, Storage::bytes_half_minimum>,
        Grouped<V, Storage::bytes_block_minimum>,
        Grouped<V, Storage::bytes_block>, Grouped<V, Storage::nibbles_half>,
        Grouped<V, Storage::nibbles_half_minimum>, Grouped<V, Storage::nibbles_block_minimum>>();
}

} // namespace
