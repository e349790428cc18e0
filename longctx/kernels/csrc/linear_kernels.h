// The data that linear.cpp shares with the kernels of each instruction set: plain, as in attend.h.
#pragma once

#include <cstdint>

namespace longctx {

constexpr int64_t PANEL = 16; // outputs side by side
// Inputs that all rows of a block multiply in turn: a widened panel of them stays in the
// first-level cache.
constexpr int64_t DEPTH = 384;
// Rows of a block: DEPTH inputs of them stay in the second-level cache.
constexpr int64_t BLOCK_ROWS = 96;

enum class Storage : int { float32, bfloat16, int8 };

// All rows, and some panels that lie side by side.
struct LinearJob {
    const float* x; // [row tiles][inputs][rows of the tile]
    float* y;       // [rows, outputs]
    const void* weight;
    const float* scales; // per output, or null
    const float* bias;   // per output, or null
    int64_t rows, tile_rows, inputs, outputs, first_panel, last_panel;
    float* scratch; // [DEPTH, PANEL]
};

struct LinearKernels {
    int64_t tile_rows;   // rows whose sums the registers hold
    int64_t row_panels;  // panels that a single row takes at once
    void (*run[3])(const LinearJob&); // by Storage
};

extern const LinearKernels linear_avx2, linear_avx512;

} // namespace longctx
