// The data that linear/linear.cpp shares with the kernels that compute in bfloat16: plain, as in
// linear/kernels.h.
//
// Weights that are bfloat16 lie in panels [inputs / 2][PANEL][2]: the weights of two inputs side by
// side, as the instructions for bfloat16 take them. UNIT inputs of a panel are one tile of AMX; a
// panel is filled up to whole units with zeros. Other storages lie as for float32 and are rounded to
// such pairs, a piece of a panel after another. Sums are float32 and run over the inputs in order,
// in the same steps for any number of rows.
#pragma once

#include "linear/kernels.h"

namespace longctx {

constexpr int64_t UNIT = 32;
// Inputs of a piece: those of two panels stay in the first-level cache.
constexpr int64_t PIECE = 256;
// Rows of a block: a piece of them stays in the second-level cache, beside their sums.
constexpr int64_t PAIR_ROWS = 512;
// Panels of a job, at most: they share a piece of the rows before the next piece is read.
constexpr int64_t PAIR_PANELS = 16;

constexpr int64_t whole_units(int64_t inputs) { return (inputs + UNIT - 1) / UNIT * UNIT; }

// Up to PAIR_ROWS rows, and up to PAIR_PANELS panels that lie side by side.
struct PairJob {
    const uint16_t* x; // [row tiles][whole units of inputs / step][rows of the tile][step]
    uint16_t* y;       // [rows, outputs]
    const void* weight;
    const float* bias; // per output, or null
    int64_t rows, inputs, outputs, first_panel, last_panel;
    uint16_t* scratch; // [2][PIECE][PANEL], for weights that are made pairs
    float* sums;       // [panels][rows, a whole number of tiles][PANEL]
};

struct PairKernels {
    int64_t tile_rows; // of x
    int64_t step;      // inputs of a row that lie side by side in a tile
    bool whole_tiles;  // more rows than a tile's are filled up to whole tiles
    void (*run[STORAGES])(const PairJob&); // by Storage
    void (*end)(); // each thread calls it after its last job
};

extern const PairKernels pairs_avx512_bf16, pairs_amx;

} // namespace longctx
