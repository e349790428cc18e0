#include "linear.h"

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <new>
#include <numeric>
#include <stdexcept>
#include <vector>

namespace longctx {
namespace {

constexpr size_t HUGE_PAGE = 2 << 20;
// With fewer products a second thread costs more than it saves.
constexpr int64_t PARALLEL_PRODUCTS = 1 << 16;

const LinearKernels& kernels_of(const std::string& instruction_set) {
    if (instruction_set.rfind("avx512", 0) == 0) return linear_avx512;
    if (instruction_set == "avx2") return linear_avx2;
    throw std::invalid_argument("linear layers know no " + instruction_set);
}

// What the inputs of a panel take.
size_t panel_size(Storage storage, int64_t inputs) {
    const GroupLayout layout = group_layout(storage);
    if (layout.inputs) return inputs / layout.inputs * layout.bytes();
    return inputs * PANEL * (storage == Storage::float32 ? 4 : storage == Storage::bfloat16 ? 2 : 1);
}

// Calls f with a null pointer of the type that `storage` names, which is not in groups.
template <class Function>
void with_element(Storage storage, Function f) {
    if (storage == Storage::float32)
        f((float*)nullptr);
    else if (storage == Storage::bfloat16)
        f((uint16_t*)nullptr);
    else
        f((int8_t*)nullptr);
}

// Packs x [rows, inputs] as [row tiles][inputs][rows of the tile]; the threads of a region share
// the work.
void pack_rows(const float* x, int64_t rows, int64_t inputs, int64_t tile_rows, float* packed) {
#pragma omp for schedule(static)
    for (int64_t top = 0; top < rows; top += tile_rows) {
        const int64_t height = std::min(tile_rows, rows - top);
        float* to = packed + top * inputs;
        const float* from = x + top * inputs;
        for (int64_t k = 0; k < inputs; ++k)
            for (int64_t r = 0; r < height; ++r) to[k * height + r] = from[r * inputs + k];
    }
}

} // namespace

PackedLinear::PackedLinear(const void* weight, const float* scales, const float* bias,
                           int64_t outputs, int64_t inputs, Storage storage,
                           const std::string& instruction_set)
    : kernels_(kernels_of(instruction_set)), outputs_(outputs), inputs_(inputs),
      panels_((outputs + PANEL - 1) / PANEL), storage_(storage),
      bytes_(panels_ * panel_size(storage, inputs)), weight_(allocate(bytes_)),
      scales_(padded(scales)), bias_(padded(bias)) {
    with_element(storage, [&](auto* type) {
        const auto* from = (decltype(type))weight;
        auto* packed = (decltype(type))weight_.get();
#pragma omp parallel for schedule(static)
        for (int64_t p = 0; p < panels_; ++p)
            for (int64_t k = 0; k < inputs_; ++k)
                for (int64_t output = p * PANEL; output < (p + 1) * PANEL; ++output)
                    packed[p * inputs_ * PANEL + k * PANEL + output % PANEL] =
                        output < outputs_ ? from[output * inputs_ + k] : 0;
    });
}

PackedLinear::PackedLinear(const float* bias, int64_t outputs, int64_t inputs, Storage storage,
                           const std::string& instruction_set)
    : kernels_(kernels_of(instruction_set)), outputs_(outputs), inputs_(inputs),
      panels_((outputs + PANEL - 1) / PANEL), storage_(storage),
      bytes_(panels_ * panel_size(storage, inputs)), weight_(allocate(bytes_)),
      bias_(padded(bias)) {
    const int group = group_layout(storage).inputs;
    if (!group || inputs % group) throw std::invalid_argument("inputs are no whole groups");
    std::memset(weight_.get(), 0, bytes_);
}

void PackedLinear::fill(int64_t first, int64_t rows, const int8_t* codes, const void* scales,
                        const void* minima) {
    const GroupLayout layout = group_layout(storage_);
    const int64_t groups = inputs_ / layout.inputs, size = layout.scale_bytes;
    if (first % PANEL || first + rows > outputs_ || layout.minimum != (minima != nullptr))
        throw std::invalid_argument("weights that do not fit");
#pragma omp parallel for schedule(static)
    for (int64_t top = 0; top < rows; top += PANEL) {
        uint8_t* panel = (uint8_t*)weight_.get() + (first + top) / PANEL * panel_bytes();
        for (int64_t lane = 0; lane < std::min(PANEL, rows - top); ++lane)
            for (int64_t g = 0; g < groups; ++g) {
                uint8_t* group = panel + g * layout.bytes();
                const int64_t from = ((top + lane) * groups + g) * size;
                std::memcpy(group + lane * size, (const char*)scales + from, size);
                if (minima)
                    std::memcpy(group + (PANEL + lane) * size, (const char*)minima + from, size);
                const int8_t* code = codes + (top + lane) * inputs_ + g * layout.inputs;
                uint8_t* to = group + layout.codes_at() + lane;
                for (int64_t k = 0; k < layout.inputs; ++k)
                    if (layout.bits == 8)
                        to[k * PANEL] = uint8_t(code[k]);
                    else
                        to[k / 2 * PANEL] |= uint8_t(code[k] & 15) << (k % 2 * 4);
            }
    }
}

void PackedLinear::forward(const float* x, int64_t rows, float* y) const {
    const int64_t tiles = (rows + kernels_.tile_rows - 1) / kernels_.tile_rows;
    const int64_t tile_rows = tiles ? (rows + tiles - 1) / tiles : 1; // 8 rows: 4 and 4, not 6 and 2
    thread_local std::vector<float> storage;
    if (rows > 1 && int64_t(storage.size()) < rows * inputs_) storage.resize(rows * inputs_);
    float* const packed = storage.data(); // of this thread, in the others too
    const int64_t step = tiles > 1 ? 2 * kernels_.row_panels : kernels_.row_panels;
#pragma omp parallel if (outputs_ * inputs_ * rows >= PARALLEL_PRODUCTS)
    {
        if (rows > 1) pack_rows(x, rows, inputs_, tile_rows, packed);
        alignas(64) float scratch[DEPTH * PANEL];
        // Threads take shares as they get to them: another process may hold a core for a while.
#pragma omp for schedule(dynamic)
        for (int64_t panel = 0; panel < panels_; panel += step)
            kernels_.run[int(storage_)]({rows > 1 ? packed : x, y, weight_.get(), scales_.get(),
                                         bias_.get(), rows, tile_rows, inputs_, outputs_, panel,
                                         std::min(panel + step, panels_), scratch});
    }
}

void PackedLinear::unpack(float* weight) const {
    std::vector<int64_t> ids(outputs_);
    std::iota(ids.begin(), ids.end(), 0);
    rows(ids.data(), outputs_, weight);
}

void PackedLinear::rows(const int64_t* ids, int64_t count, float* weight) const {
#pragma omp parallel if (count * inputs_ >= PARALLEL_PRODUCTS)
    {
        std::vector<float> wide(inputs_ * PANEL);
        int64_t held = -1; // the panel that is widened
#pragma omp for schedule(static)
        for (int64_t i = 0; i < count; ++i) {
            const int64_t panel = ids[i] / PANEL, lane = ids[i] % PANEL;
            if (panel != held)
                kernels_.widen[int(storage_)]((const char*)weight_.get() + panel * panel_bytes(),
                                              inputs_, wide.data());
            held = panel;
            for (int64_t k = 0; k < inputs_; ++k) {
                const float value = wide[k * PANEL + lane];
                weight[i * inputs_ + k] = scales_ ? value * scales_.get()[ids[i]] : value;
            }
        }
    }
}

void* PackedLinear::allocate(size_t bytes) {
    void* memory = nullptr;
    if (posix_memalign(&memory, bytes >= HUGE_PAGE ? HUGE_PAGE : 64, bytes)) throw std::bad_alloc();
    // Huge pages miss the page table less; the rest that does not fill one stays on small ones.
    if (bytes >= HUGE_PAGE) madvise(memory, bytes / HUGE_PAGE * HUGE_PAGE, MADV_HUGEPAGE);
    return memory;
}

PackedLinear::Floats PackedLinear::padded(const float* values) const {
    if (!values) return nullptr;
    Floats copy((float*)allocate(panels_ * PANEL * sizeof(float)));
    std::copy(values, values + outputs_, copy.get());
    std::fill(copy.get() + outputs_, copy.get() + panels_ * PANEL, 0.0f);
    return copy;
}

void PackedLinear::Free::operator()(void* memory) const { std::free(memory); }

void rms_norm(const float* x, int64_t rows, int64_t width, const float* weight, float epsilon,
              float* y) {
    constexpr int LANES = 8; // sums side by side, which the compiler makes a vector of
#pragma omp parallel for schedule(static) if (rows * width >= PARALLEL_PRODUCTS)
    for (int64_t row = 0; row < rows; ++row) {
        const float* from = x + row * width;
        float* to = y + row * width;
        float sums[LANES] = {};
        int64_t i = 0;
        for (; i + LANES <= width; i += LANES)
            for (int lane = 0; lane < LANES; ++lane) sums[lane] += from[i + lane] * from[i + lane];
        for (; i < width; ++i) sums[0] += from[i] * from[i];
        float total = 0;
        for (float sum : sums) total += sum;
        const float factor = 1 / std::sqrt(total / float(width) + epsilon);
        for (i = 0; i < width; ++i) to[i] = from[i] * factor * weight[i];
    }
}

} // namespace longctx
