// The kernels of linear layers, for any instruction set `V`. It has a vector of PANEL floats, the
// operations on it, TILE_ROWS, and how many panels go together for a number of rows.
#pragma once

#include "linear_kernels.h"

namespace {

using namespace longctx;

// How far ahead a few rows fetch: the prefetchers of the hardware do not keep them fed, since there
// are few streams and each ends with its page of memory.
constexpr int64_t AHEAD_BYTES = 1024;

template <class V>
struct Float32 {
    using Element = float;
    static typename V::F widen(const float* p) { return V::load(p); }
};

template <class V>
struct BFloat16 {
    using Element = uint16_t;
    static typename V::F widen(const uint16_t* p) { return V::load_bf16(p); }
};

template <class V>
struct Int8 {
    using Element = int8_t;
    static typename V::F widen(const int8_t* p) { return V::load_int8(p); }
};

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
    for (int64_t k = 0; k < depth; ++k) {
        typename V::F weights[PANELS];
#pragma GCC unroll 8
        for (int p = 0; p < PANELS; ++p) {
            const auto* at = w + p * stride + k * PANEL;
            weights[p] = Type::widen(at);
            if (ROWS > 1) __builtin_prefetch(at + ahead);
        }
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; ++r) {
            const typename V::S value = V::broadcast(x + k * ROWS + r);
#pragma GCC unroll 8
            for (int p = 0; p < PANELS; ++p) sums[r][p] = V::fma(value, weights[p], sums[r][p]);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
        for (int p = 0; p < PANELS; ++p) {
            const int64_t output = (pass.panel + p) * PANEL;
            typename V::F result = sums[r][p];
            if (pass.last && job.scales) result = V::mul(result, V::load(job.scales + output));
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
    const int64_t stride = job.inputs * PANEL, step = V::panels(int(job.rows));
    for (int64_t panel = job.first_panel; panel < job.last_panel; panel += step) {
        const int64_t panels = panel + step <= job.last_panel ? step : job.last_panel - panel;
        tiles<V, Type, V::TILE_ROWS>({job, 0, panel, true, true}, job.rows, panels, job.x,
                                     weight + panel * stride, stride, job.inputs,
                                     AHEAD_BYTES / int64_t(sizeof(Element)));
    }
}

// Multiplies many tiles of rows: a panel is widened once for all tiles of a block.
template <class V, class Type>
void many_rows(const LinearJob& job) {
    using Element = typename Type::Element;
    const int64_t stride = job.inputs * PANEL;
    const int64_t block_rows = BLOCK_ROWS / job.tile_rows * job.tile_rows;
    for (int64_t top = 0; top < job.rows; top += block_rows) {
        const int64_t bottom = top + block_rows < job.rows ? top + block_rows : job.rows;
        for (int64_t from = 0; from < job.inputs; from += DEPTH) {
            const int64_t depth = from + DEPTH < job.inputs ? DEPTH : job.inputs - from;
            for (int64_t panel = job.first_panel; panel < job.last_panel; ++panel) {
                const Element* packed = (const Element*)job.weight + panel * stride + from * PANEL;
                const float* wide = job.scratch;
                int64_t ahead = 0;
                if constexpr (sizeof(Element) == sizeof(float)) {
                    wide = packed;
                    ahead = stride; // the first tile fetches the next panel
                } else {
                    for (int64_t k = 0; k < depth; ++k) {
                        V::store(job.scratch + k * PANEL, Type::widen(packed + k * PANEL));
                        __builtin_prefetch(packed + k * PANEL + stride, 0, 2);
                    }
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

template <class V>
constexpr LinearKernels linear_kernels() {
    return {V::TILE_ROWS, V::panels(1), {run<V, Float32<V>>, run<V, BFloat16<V>>, run<V, Int8<V>>}};
}

} // namespace
