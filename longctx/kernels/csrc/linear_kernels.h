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

// How weights are stored. Those in groups have a scale for each output and 16 or 32 inputs, in half
// or single precision, and some a minimum: a weight is scale * code + minimum, rounded once.
enum class Storage : int {
    float32,
    bfloat16,
    int8, // with one scale per output
    bytes_half,
    bytes_half_minimum,
    bytes_single_minimum,
    bytes_single, // groups of 16
    nibbles_half, // codes from -8 on
    nibbles_half_minimum,
    nibbles_single_minimum,
};
constexpr int STORAGES = 10;

// A panel's group: scales [PANEL], minima [PANEL] where there are any, then the codes: bytes
// [inputs][PANEL], or nibbles [inputs / 2][PANEL], those of even inputs in the low bits.
struct GroupLayout {
    int inputs, bits, scale_bytes;
    bool minimum;

    constexpr int codes_at() const { return int(PANEL) * scale_bytes * (minimum ? 2 : 1); }
    constexpr int bytes() const { return codes_at() + inputs * int(PANEL) * bits / 8; }
};

constexpr GroupLayout group_layout(Storage storage) {
    switch (storage) {
    case Storage::bytes_half: return {32, 8, 2, false};
    case Storage::bytes_half_minimum: return {32, 8, 2, true};
    case Storage::bytes_single_minimum: return {32, 8, 4, true};
    case Storage::bytes_single: return {16, 8, 4, false};
    case Storage::nibbles_half: return {32, 4, 2, false};
    case Storage::nibbles_half_minimum: return {32, 4, 2, true};
    case Storage::nibbles_single_minimum: return {32, 4, 4, true};
    default: return {0, 0, 0, false}; // not in groups
    }
}

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
    void (*run[STORAGES])(const LinearJob&); // by Storage
    // Widens one panel to [inputs][PANEL], without the scales of outputs.
    void (*widen[STORAGES])(const void* panel, int64_t inputs, float* wide);
};

extern const LinearKernels linear_avx2, linear_avx512;

} // namespace longctx
