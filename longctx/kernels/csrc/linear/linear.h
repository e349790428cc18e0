// Linear layers y = x W^T + b over weights that are repacked once, for few rows and for many.
//
// W is cut into panels of 16 outputs: panel p holds, for each input k in turn, the 16 weights
// W[16p : 16p + 16, k], zero beyond the last output. So one row streams the weights once, in
// order, and many rows multiply out of the first-level cache. A weight is stored as float32,
// bfloat16 or in groups, as in the files of quantized models (`Storage`), and widened in registers;
// sums are float32.
//
// Every result is one chain of fused multiply-adds over k = 0, 1, 2, ..., whatever the number of
// rows, of threads or of cache blocks: a row's result is the same bits in every batch.
//
// Layers of groups may multiply integers, their rows rounded to 16 bits by groups
// (`linear/integers.h`): several times faster, and as independent.
//
// With instructions for bfloat16 there are layers whose rows and results are bfloat16
// (`linear/pairs.h`); theirs is a chain of pairs or of tiles, and as independent.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "linear/integers.h"
#include "linear/pairs.h"

namespace longctx {

// The instruction sets of layers that compute in bfloat16 which this CPU has, the fastest last.
std::vector<std::string> bfloat16_sets();

// Whether this CPU has the instructions of layers that multiply integers.
bool multiplies_integers();

// With fewer products a second thread costs more than it saves.
constexpr int64_t PARALLEL_PRODUCTS = 1 << 16;

class PackedLinear {
public:
    // `weight` [outputs, inputs] in the type of `storage`, which is none of groups; `bias` [outputs] or
    // null. Both are copied. `instruction_set` as attention names it, or one of `bfloat16_sets()`,
    // which decides the type of the layer's rows.
    PackedLinear(const void* weight, const float* bias, int64_t outputs, int64_t inputs,
                 Storage storage, const std::string& instruction_set);

    // One whose weights are stored in groups, all zero until `fill` is called; inputs are a multiple
    // of the block's. It multiplies `integers`, or floats.
    PackedLinear(const float* bias, int64_t outputs, int64_t inputs, Storage storage,
                 const std::string& instruction_set, bool integers);

    // Scales or minima of groups: `own` [rows, groups], halves, or bytes with a sign where there are
    // blocks, which then have the halves `common` [rows, blocks]. Null where the storage has none.
    struct Numbers {
        const char* own;
        const uint16_t* common;
    };

    // Stores the weights of `rows` outputs from `first` on, a multiple of PANEL. `codes` [rows,
    // inputs], a byte for each, nibbles too.
    void fill(int64_t first, int64_t rows, const uint8_t* codes, const Numbers& scales,
              const Numbers& minima);

    // Computes `y` [rows, outputs] from `x` [rows, inputs], both contiguous and of the layer's type.
    void forward(const void* x, int64_t rows, void* y) const;

    // The same for several layers of one type over the same rows, as one piece of work: `y` has the
    // results of each, one after another. Layers of other inputs than the first's are refused.
    static void forward_all(const std::vector<const PackedLinear*>& layers, const void* x,
                            int64_t rows, void* y);

    // Writes the weights as float32 [outputs, inputs], scaled.
    void unpack(float* weight) const;

    // Writes the weights of some outputs, `ids` [count], as float32 [count, inputs].
    void rows(const int64_t* ids, int64_t count, float* weight) const;

    size_t bytes() const { return bytes_; } // of the packed weights
    int64_t outputs() const { return outputs_; }
    int64_t inputs() const { return inputs_; }

private:
    struct Free {
        void operator()(void* memory) const;
    };
    using Floats = std::unique_ptr<float, Free>;

    static void* allocate(size_t bytes);
    static int64_t products(const std::vector<const PackedLinear*>& layers, int64_t rows);
    Floats padded(const float* values) const;
    const void* plain_panel(int64_t panel, std::vector<uint8_t>& to) const;
    size_t panel_bytes() const { return bytes_ / panels_; }
    static void forward_floats(const std::vector<const PackedLinear*>& layers, const float* x,
                               int64_t rows, float* y);
    static void forward_integers(const std::vector<const PackedLinear*>& layers, const void* x,
                                 int64_t rows, void* y);
    static void forward_pairs(const std::vector<const PackedLinear*>& layers, const uint16_t* x,
                              int64_t rows, uint16_t* y);

    const LinearKernels& kernels_;
    const PairKernels* pairs_; // null where rows are float32
    const bool integers_;
    int64_t outputs_, inputs_, panels_;
    Storage storage_;
    size_t bytes_;
    std::unique_ptr<void, Free> weight_; // [panels, inputs, PANEL], or [panels, groups]
    Floats bias_;                        // [panels * PANEL] or null
};

// Computes `y` from `x` [rows, width]: x / sqrt(mean(x^2) + epsilon) * weight, each row by itself.
// Where there is `added` [rows, width], `sums` becomes x + added, and `y` the norm of that.
void rms_norm(const float* x, const float* added, float* sums, int64_t rows, int64_t width,
              const float* weight, float epsilon, float* y);

// The same for bfloat16 rows, computed in float32. What is normalized is rounded to bfloat16 before
// it is multiplied with `weight` where `twice` says so, sums and the result in any case.
void rms_norm_bfloat16(const uint16_t* x, const uint16_t* added, uint16_t* sums, int64_t rows,
                       int64_t width, const float* weight, float epsilon, bool twice, uint16_t* y);

} // namespace longctx
