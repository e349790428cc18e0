// The data of linear layers that multiply integers: weights in groups are codes of 8 or 4 bits, and
// their rows are rounded to 16 bits, each group of GROUP_INPUTS inputs by its largest number. So a sum
// of products within a group is exact, and only the sums of groups are float32, added in order: a
// row's result is the same bits in every batch.
//
// Codes lie in lanes of 32 bits for that, GroupLayout but for the order of the codes: bytes
// [inputs / 4][PANEL][4], nibbles [inputs / 8][PANEL][4], of 8 inputs the first four in the low bits.
#pragma once

#include "linear/kernels.h"

namespace longctx {

constexpr int64_t GROUP_INPUTS = 32;
constexpr int LARGEST_STEP = 32767; // of a group's largest number

// Where the code of an input is, from the first code of its group on, and in which bits.
struct CodePlace {
    int64_t byte;
    int shift;
};
constexpr CodePlace integer_place(int bits, int64_t input, int64_t lane) {
    const int64_t lanes = bits == 8 ? input / 4 : input / 8;
    return {(lanes * PANEL + lane) * 4 + input % 4, bits == 4 && input % 8 >= 4 ? 4 : 0};
}
constexpr CodePlace plain_place(int bits, int64_t input, int64_t lane) {
    return {(bits == 8 ? input : input / 2) * PANEL + lane, bits == 4 && input % 2 ? 4 : 0};
}

// Rounded rows. A number is scale * step; `steps` has inputs 0, 2, 1, 3 of each four, as instructions
// take two of them.
struct IntegerRows {
    int16_t* steps;  // [rows, inputs]
    int32_t* totals; // of steps [rows, groups]
    float* scales;   // [rows, groups]
    float* weighted; // scale * total [rows, groups]
};

struct IntegerJob {
    IntegerRows x;
    void* y; // [rows, outputs], bfloat16 or float32
    bool bfloat16;
    const void* weight;
    const float* bias; // per output, or null
    int64_t rows, inputs, outputs, first_panel, last_panel;
};

struct IntegerKernels {
    // Rounds one row; `to` is its place.
    void (*round)(const void* x, bool bfloat16, int64_t inputs, const IntegerRows& to);
    void (*run[STORAGES])(const IntegerJob&); // by Storage; null for what has no groups
};

extern const IntegerKernels integer_kernels; // for CPUs with VNNI

} // namespace longctx
