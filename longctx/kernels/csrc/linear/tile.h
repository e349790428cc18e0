// The kernels of linear layers, for any instruction set `V`. It has a vector of PANEL floats, the
// operations on it, TILE_ROWS, and how many panels go together for a number of rows.
#pragma once

#include "linear/kernels.h"

namespace {

using namespace longctx;

// How far ahead a few rows fetch: the prefetchers of the hardware do not keep them fed, since there
// are few streams and each ends with its page of memory.
constexpr int64_t AHEAD_BYTES = 1024;

// What a storage is to the loops below: groups of GROUP inputs that take SIZE elements of a panel,
// some of them in blocks of BLOCK inputs; what a group has for all its inputs, and the weights of one
// input. `w` is where a block begins, and inputs count from there.
template <class V, class E>
struct Plain {
    using Element = E;
    struct Scales {};
    static constexpr int64_t GROUP = 1, SIZE = PANEL, BLOCK = 1;
    static constexpr int64_t elements(int64_t inputs) { return inputs * PANEL; }
    static const E* group(const E* w, int64_t begin) { return w + begin * PANEL; }
    static Scales scales(const E*, int64_t) { return {}; }
};

template <class V>
struct Float32 : Plain<V, float> {
    static typename V::F widen(const float* p, int64_t, const auto&) { return V::load(p); }
};

template <class V>
struct BFloat16 : Plain<V, uint16_t> {
    static typename V::F widen(const uint16_t* p, int64_t, const auto&) { return V::load_bf16(p); }
};

template <class V, Storage STORAGE>
struct Grouped {
    static constexpr GroupLayout LAYOUT = group_layout(STORAGE);
    static constexpr int64_t GROUP = LAYOUT.inputs, SIZE = LAYOUT.bytes(), BLOCK = LAYOUT.block;
    using Element = uint8_t;
    struct Scales {
        typename V::F scale, minimum;
    };

    static constexpr int64_t elements(int64_t inputs) { return inputs / BLOCK * LAYOUT.block_bytes(); }
    static const uint8_t* group(const uint8_t* w, int64_t begin) { return w + LAYOUT.place(begin); }
    // Scales, or minima: number 0 and 1.
    static typename V::F numbers(const uint8_t* w, int64_t begin, int64_t which) {
        const uint8_t* own = group(w, begin) + which * PANEL * LAYOUT.scale_bytes();
        if constexpr (LAYOUT.blocks()) {
            const uint8_t* common = w + elements(begin) + which * PANEL * 2;
            return V::mul(V::load_half((const uint16_t*)common), V::load_int8((const int8_t*)own));
        } else {
            return V::load_half((const uint16_t*)own);
        }
    }
    static Scales scales(const uint8_t* w, int64_t begin) {
        const typename V::F scale = numbers(w, begin, 0);
        if constexpr (LAYOUT.minimum)
            return {scale, numbers(w, begin, 1)};
        else // of nibbles less 8: scale * code - scale * 8 is rounded once, as 8 is a power of two
            return {scale, LAYOUT.bits == 8 ? V::zero() : V::mul(scale, V::set1(-8))};
    }
    static typename V::F code(const uint8_t* p, int64_t input) {
        const uint8_t* codes = p + LAYOUT.codes_at();
        if constexpr (LAYOUT.bits == 8)
            return V::load_int8((const int8_t*)codes + input * PANEL);
        else
            return input % 2 ? V::high_nibbles(codes + input / 2 * PANEL)
                             : V::low_nibbles(codes + input / 2 * PANEL);
    }
    static typename V::F widen(const uint8_t* p, int64_t input, const Scales& scales) {
        if constexpr (!LAYOUT.minimum && LAYOUT.bits == 8)
            return V::mul(scales.scale, code(p, input));
        else
            return V::fma(scales.scale, code(p, input), scales.minimum);
    }
};

constexpr int64_t LINE = 64;

// Fetches what lies `ahead` elements behind a group.
template <class Type>
void fetch(const typename Type::Element* group, int64_t ahead) {
    const char* at = (const char*)(group + ahead);
    for (int64_t byte = 0; byte < Type::SIZE * int64_t(sizeof(*group)); byte += LINE)
        __builtin_prefetch(at + byte);
}

// The beginning of a tile of results, and whether its inputs are the first and the last ones.
struct Pass {
    const LinearJob& job;
    int64_t row, panel;
    bool first, last;
};

template <class V>
typename V::F load_some(const float* p, int64_t count) {
    if (count >= PANEL) return V::load(p);
    float all[PANEL] = {};
    for (int64_t i = 0; i < count; ++i) all[i] = p[i];
    return V::load(all);
}

template <class V>
void store_some(float* p, typename V::F values, int64_t count) {
    if (count >= PANEL) return V::store(p, values);
    float all[PANEL];
    V::store(all, values);
    for (int64_t i = 0; i < count; ++i) p[i] = all[i];
}

// Adds x[k][row] * w[panel][k] to y[row][panel], for each k in order. `stride`, from panel to
// panel, and `ahead`, the place to fetch meanwhile, are in elements of `w`.
template <class V, class Type, int ROWS, int PANELS>
void tile(const Pass& pass, const float* x, const typename Type::Element* w, int64_t stride,
          int64_t depth, int64_t ahead) {
    const LinearJob& job = pass.job;
    typename V::F sums[ROWS][PANELS];
    float* const y = job.y + pass.row * job.outputs + pass.panel * PANEL;
    const int64_t width = job.outputs - pass.panel * PANEL;
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
        for (int p = 0; p < PANELS; ++p)
            sums[r][p] = pass.first ? V::zero()
                                    : load_some<V>(y + r * job.outputs + p * PANEL, width - p * PANEL);
    for (int64_t begin = 0; begin < depth; begin += Type::GROUP) {
        const typename Type::Element* groups[PANELS];
        typename Type::Scales scales[PANELS];
#pragma GCC unroll 8
        for (int p = 0; p < PANELS; ++p) {
            groups[p] = Type::group(w + p * stride, begin);
            scales[p] = Type::scales(w + p * stride, begin);
            if (ROWS > 1) fetch<Type>(groups[p], ahead);
        }
#pragma GCC unroll 2
        for (int64_t k = 0; k < Type::GROUP; ++k) {
            typename V::F weights[PANELS];
#pragma GCC unroll 8
            for (int p = 0; p < PANELS; ++p) weights[p] = Type::widen(groups[p], k, scales[p]);
#pragma GCC unroll 16
            for (int r = 0; r < ROWS; ++r) {
                const typename V::S value = V::broadcast(x + (begin + k) * ROWS + r);
#pragma GCC unroll 8
                for (int p = 0; p < PANELS; ++p) sums[r][p] = V::fma(value, weights[p], sums[r][p]);
            }
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
        for (int p = 0; p < PANELS; ++p) {
            const int64_t output = (pass.panel + p) * PANEL;
            typename V::F result = sums[r][p];
            if (pass.last && job.bias) result = V::add(result, V::load(job.bias + output));
            store_some<V>(y + r * job.outputs + p * PANEL, result, width - p * PANEL);
        }
}

// Calls `tile` for numbers of rows and panels that are known only at run time.
template <class V, class Type, int ROWS>
void tiles(const Pass& pass, int64_t rows, int64_t panels, const float* x,
           const typename Type::Element* w, int64_t stride, int64_t depth, int64_t ahead) {
    if constexpr (ROWS > 0) {
        if (rows < ROWS)
            return tiles<V, Type, ROWS - 1>(pass, rows, panels, x, w, stride, depth, ahead);
        constexpr int together = V::panels(ROWS);
        if (panels == together)
            return tile<V, Type, ROWS, together>(pass, x, w, stride, depth, ahead);
        for (int64_t p = 0; p < panels; ++p)
            tile<V, Type, ROWS, 1>({pass.job, pass.row, pass.panel + p, pass.first, pass.last}, x,
                                   w + p * stride, stride, depth, ahead);
    }
}

// Multiplies one tile of rows, straight from the packed weights.
template <class V, class Type>
void few_rows(const LinearJob& job) {
    using Element = typename Type::Element;
    const Element* weight = (const Element*)job.weight;
    const int64_t stride = Type::elements(job.inputs), step = V::panels(int(job.rows));
    for (int64_t panel = job.first_panel; panel < job.last_panel; panel += step) {
        const int64_t panels = panel + step <= job.last_panel ? step : job.last_panel - panel;
        tiles<V, Type, V::TILE_ROWS>({job, 0, panel, true, true}, job.rows, panels, job.x,
                                     weight + panel * stride, stride, job.inputs,
                                     AHEAD_BYTES / int64_t(sizeof(Element)));
    }
}

// Widens some inputs of a panel, from the beginning of a block on.
template <class V, class Type>
void widen_panel(const typename Type::Element* packed, int64_t depth, float* wide, int64_t ahead) {
    for (int64_t begin = 0; begin < depth; begin += Type::GROUP) {
        const auto* group = Type::group(packed, begin);
        const auto scales = Type::scales(packed, begin);
        fetch<Type>(group, ahead);
        for (int64_t k = 0; k < Type::GROUP; ++k)
            V::store(wide + (begin + k) * PANEL, Type::widen(group, k, scales));
    }
}

// Multiplies many tiles of rows: a panel is widened once for all tiles of a block.
template <class V, class Type>
void many_rows(const LinearJob& job) {
    using Element = typename Type::Element;
    constexpr int64_t STEP = DEPTH / Type::BLOCK * Type::BLOCK;
    const int64_t stride = Type::elements(job.inputs);
    const int64_t block_rows = BLOCK_ROWS / job.tile_rows * job.tile_rows;
    for (int64_t top = 0; top < job.rows; top += block_rows) {
        const int64_t bottom = top + block_rows < job.rows ? top + block_rows : job.rows;
        for (int64_t from = 0; from < job.inputs; from += STEP) {
            const int64_t depth = from + STEP < job.inputs ? STEP : job.inputs - from;
            for (int64_t panel = job.first_panel; panel < job.last_panel; ++panel) {
                const Element* packed =
                    (const Element*)job.weight + panel * stride + Type::elements(from);
                const float* wide = job.scratch;
                int64_t ahead = 0;
                if constexpr (sizeof(Element) == sizeof(float)) {
                    wide = packed;
                    ahead = stride; // the first tile fetches the next panel
                } else {
                    widen_panel<V, Type>(packed, depth, job.scratch, stride);
                }
                for (int64_t row = top; row < bottom; row += job.tile_rows) {
                    const int64_t rest = bottom - row;
                    const int64_t rows = rest < job.tile_rows ? rest : job.tile_rows;
                    tiles<V, Float32<V>, V::TILE_ROWS>(
                        {job, row, panel, from == 0, from + depth == job.inputs}, rows, 1,
                        job.x + row * job.inputs + from * rows, wide, 0, depth, ahead);
                    ahead = 0;
                }
            }
        }
    }
}

template <class V, class Type>
void run(const LinearJob& job) {
    job.rows <= V::TILE_ROWS ? few_rows<V, Type>(job) : many_rows<V, Type>(job);
}

template <class V, class Type>
void widen(const void* panel, int64_t inputs, float* wide) {
    widen_panel<V, Type>((const typename Type::Element*)panel, inputs, wide, 0);
}

template <class V, class... Types>
constexpr LinearKernels kernels_of_types() {
    static_assert(sizeof...(Types) == STORAGES);
    return {V::TILE_ROWS, V::panels(1), {run<V, Types>...}, {widen<V, Types>...}};
}

// In the order of Storage.
template <class V>
constexpr LinearKernels linear_kernels() {
    return kernels_of_types<
        V, Float32<V>, BFloat16<V>, Grouped<V, Storage::bytes_half>,
        Grouped<V, Storage::bytes_half_minimum>, Grouped<V, Storage::bytes_block_minimum>,
        Grouped<V, Storage::bytes_block>, Grouped<V, Storage::nibbles_half>,
        Grouped<V, Storage::nibbles_half_minimum>, Grouped<V, Storage::nibbles_block_minimum>>();
}

} // namespace
