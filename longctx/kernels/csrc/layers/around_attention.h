// What a layer does around its attention, for a few rows, in few calls. A step that decodes is many
// small pieces of work: called one by one from Python, they take less time than the calls.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "layers/heads.h"
#include "linear/linear.h"

namespace longctx {

// A layer that adds `last(activation(gate) * up)` to the sum of its rows and its attention's result,
// each of rows that a norm made. Rows are bfloat16 where the layers compute in it, else float32.
// Every result has the bits that the same calls give one by one.
class AroundAttention {
public:
    struct Norm {
        const float* weight; // [width], kept by the caller; null for no norm
        float epsilon;
        bool twice;
    };
    struct Heads {
        int64_t query, kv, dims;
        Norm query_norm, key_norm; // of each head
    };
    using Layers = std::vector<const PackedLinear*>; // kept by the caller

    // `inputs` are for queries, keys and values, or one for all; `gates` for gate and up, or one for
    // both; throws std::invalid_argument where their widths do not follow from each other.
    AroundAttention(Norm before_attention, Layers inputs, const PackedLinear* output, Norm before_unit,
                    Layers gates, const PackedLinear* last, const Heads& heads, bool bfloat16);

    // Where the new rows are and are kept, as HeadsJob has them.
    struct Position {
        const void *cosines, *sines;
        int64_t turned;
        void* pool;
        const int64_t* slots;
        int64_t first_slot;
    };

    // Makes queries, keys and values of `x` [rows, width], as the inputs' results one after another.
    void to_attention(const void* x, int64_t rows, void* qkv, const Position& position) const;

    // Adds the output of `attended` [rows, heads * dims] to `x`: `sums` [rows, width], and makes
    // `gates` of that, the results one after another.
    void to_gates(const void* attended, const void* x, int64_t rows, void* sums, void* gates) const;

    // Attends queries of `rows` rows, `stride` numbers from row to row, and makes `out` [rows, heads *
    // dims] of them.
    using Attend = std::function<void(const void* query, int64_t stride, float* out)>;

    // What `to_attention`, `attend` and `to_gates` do, one after another; returns the seconds of
    // `attend`.
    double through_attention(const void* x, int64_t rows, const Position& position,
                             const Attend& attend, void* sums, void* gates) const;

    // Makes `y` [rows, width] of what passed the gates, `activated` [rows, inner] times `up`, whose
    // rows are `up_stride` numbers apart.
    void from_gates(const void* activated, const void* up, int64_t up_stride, const void* sums,
                    int64_t rows, void* y) const;

private:
    template <class T>
    void turn(int64_t rows, T* qkv, const Position& position) const;
    void norm(const Norm& norm, const void* x, const void* added, void* sums, int64_t rows,
              int64_t width, void* y) const;

    Norm before_attention_, before_unit_;
    Layers inputs_, gates_;
    const PackedLinear *output_, *last_;
    int64_t width_, inner_;
    Heads heads_;
    bool bfloat16_;
};

} // namespace longctx
