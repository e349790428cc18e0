// Layers that multiply integers: their rows are rounded once for all layers that take them.
#include <omp.h>

#include <algorithm>

#include "linear/linear.h"
#include "memory.h"

namespace longctx {
namespace {

// So few rows are rounded by one thread before the others begin.
constexpr int64_t FEW_ROWS = 4;

constexpr int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// Places for rounded rows, one part after another; returns the bytes of all.
int64_t lay_out(char* memory, int64_t rows, int64_t inputs, IntegerRows& x) {
    int64_t end = 0;
    const auto part = [&](auto*& pointer, int64_t count) {
        pointer = (std::remove_reference_t<decltype(pointer)>)(memory + end);
        end += aligned(count * sizeof *pointer);
    };
    const int64_t groups = inputs / GROUP_INPUTS;
    part(x.steps, rows * inputs);
    part(x.totals, rows * groups);
    part(x.scales, rows * groups);
    part(x.weighted, rows * groups);
    return end;
}

IntegerRows place_of(const IntegerRows& x, int64_t row, int64_t inputs) {
    const int64_t group = row * (inputs / GROUP_INPUTS);
    return {x.steps + row * inputs, x.totals + group, x.scales + group, x.weighted + group};
}

} // namespace

void PackedLinear::forward_integers(const std::vector<const PackedLinear*>& layers, const void* x,
                                    int64_t rows, void* y) {
    const int64_t inputs = layers[0]->inputs_;
    const bool bfloat16 = layers[0]->pairs_;
    const int64_t number = bfloat16 ? sizeof(uint16_t) : sizeof(float);
    thread_local Memory memory;
    IntegerRows rounded;
    lay_out(memory.of(lay_out(nullptr, rows, inputs, rounded)), rows, inputs, rounded);
    const auto round = [&](int64_t row) {
        integer_kernels.round((const char*)x + row * inputs * number, bfloat16, inputs,
                              place_of(rounded, row, inputs));
    };
    const bool few = rows <= FEW_ROWS;
    for (int64_t row = 0; few && row < rows; ++row) round(row);
#pragma omp parallel if (products(layers, rows) >= PARALLEL_PRODUCTS)
    {
        if (!few) {
#pragma omp for schedule(static)
            for (int64_t row = 0; row < rows; ++row) round(row);
        }
        char* to = (char*)y;
        for (const PackedLinear* layer : layers) {
            const int64_t step = few ? 4 : 1;
#pragma omp for schedule(dynamic) nowait
            for (int64_t panel = 0; panel < layer->panels_; panel += step)
                integer_kernels.run[int(layer->storage_)](
                    {rounded, to, bfloat16, layer->weight_.get(), layer->bias_.get(), rows, inputs,
                     layer->outputs_, panel, std::min(panel + step, layer->panels_)});
            to += rows * layer->outputs_ * number;
        }
    }
}

} // namespace longctx
