// The data that linear/linear.cpp shares with the kernels of each instruction set: plain, as in
// attention/attend.h.
#pragma once

#include <cstdint>

namespace longctx {

constexpr int64_t PANEL = 16; // outputs side by side
// Inputs that all rows of a block multiply in turn: a widened panel of them stays in the
// first-level cache.
constexpr int64_t DEPTH = 384;
// Rows of a block: DEPTH inputs of them stay in the second-level cache.
constexpr int64_t BLOCK_ROWS = 96;

// How weights are stored. Those in groups have a scale for each output and 16 or 32 inputs, and some
// a minimum: a weight is scale * code + minimum, rounded once. Scales and minima are halves, or bytes
// that are multiplied by halves which a block of 256 inputs has in common.
enum class Storage : int {
    float32,
    bfloat16,
    bytes_half,
    bytes_half_minimum,
    bytes_block_minimum,
    bytes_block,  // groups of 16
    nibbles_half, // codes from -8 on
    nibbles_half_minimum,
    nibbles_block_minimum,
};
constexpr int STORAGES = 9;

// How the groups of a panel lie, one after another. A group is its scales [PANEL], its minima [PANEL]
// where there are any, and the codes: bytes [inputs][PANEL], or nibbles [inputs / 2][PANEL], those of
// even inputs in the low bits. A block begins with the halves for its scales [PANEL] and minima [PANEL].
struct GroupLayout {
    int inputs, bits;
    bool minimum;
    int block; // inputs of a block, or of a group that is none's

    constexpr bool blocks() const { return block > inputs; }
    constexpr int scale_bytes() const { return blocks() ? 1 : 2; }
    constexpr int codes_at() const { return int(PANEL) * scale_bytes() * (minimum ? 2 : 1); }
    constexpr int bytes() const { return codes_at() + inputs * int(PANEL) * bits / 8; }
    constexpr int groups_at() const { return blocks() ? int(PANEL) * 2 * (minimum ? 2 : 1) : 0; }
    constexpr int block_bytes() const { return groups_at() + block / inputs * bytes(); }
    // From the beginning of a panel to the group of an input.
    constexpr int64_t place(int64_t input) const {
        return input / block * block_bytes() + groups_at() + input % block / inputs * bytes();
    }
};

constexpr GroupLayout group_layout(Storage storage) {
    switch (storage) {
    case Storage::bytes_half: return {32, 8, false, 32};
    case Storage::bytes_half_minimum: return {32, 8, true, 32};
    case Storage::bytes_block_minimum: return {32, 8, true, 256};
    case Storage::bytes_block: return {16, 8, false, 256};
    case Storage::nibbles_half: return {32, 4, false, 32};
    case Storage::nibbles_half_minimum: return {32, 4, true, 32};
    case Storage::nibbles_block_minimum: return {32, 4, true, 256};
    default: return {0, 0, false, 0}; // not in groups
    }
}

// All rows, and some panels that lie side by side.
struct LinearJob {
    const float* x; // [row tiles][inputs][rows of the tile]
    float* y;       // [rows, outputs]
    const void* weight;
    const float* bias; // per output, or null
    int64_t rows, tile_rows, inputs, outputs, first_panel, last_panel;
    float* scratch; // [DEPTH, PANEL]
};

struct LinearKernels {
    int64_t tile_rows;   // rows whose sums the registers hold
    int64_t row_panels;  // panels that a single row takes at once
    void (*run[STORAGES])(const LinearJob&); // by Storage
    // Widens one panel to [inputs][PANEL].
    void (*widen[STORAGES])(const void* panel, int64_t inputs, float* wide);
};

extern const LinearKernels linear_avx2, linear_avx512;

} // namespace longctx
