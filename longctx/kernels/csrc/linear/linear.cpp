#include "linear/linear.h"

#include <omp.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#include <cpuid.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <stdexcept>
#include <vector>

#include "simd/bfloat16.h"
#include "memory.h"

namespace longctx {
namespace {

// Up to so many rows in bfloat16, the time is that of reading the weights.
constexpr int64_t FEW_ROWS = 32;
constexpr int64_t MOST_TILE_ROWS = 32; // that kernels multiply at once

// The kernels for bfloat16, or null where the name is not one of theirs.
const PairKernels* pairs_of(const std::string& instruction_set) {
#ifdef LONGCTX_BF16
    for (const std::string& name : bfloat16_sets())
        if (name == instruction_set) return name == "amx" ? &pairs_amx : &pairs_avx512_bf16;
#endif
    return nullptr;
}

const LinearKernels& kernels_of(const std::string& instruction_set) {
    const bool pairs = pairs_of(instruction_set);
    if (pairs || instruction_set == "avx512" || instruction_set == "avx512_vnni") return linear_avx512;
    if (instruction_set == "avx2") return linear_avx2;
    throw std::invalid_argument("linear layers know no " + instruction_set);
}

// What the inputs of a panel take.
size_t panel_size(Storage storage, int64_t inputs, bool pairs) {
    const GroupLayout layout = group_layout(storage);
    if (pairs && storage == Storage::bfloat16) inputs = whole_units(inputs);
    if (layout.inputs) return inputs / layout.block * layout.block_bytes();
    return inputs * PANEL * (storage == Storage::float32 ? 4 : 2);
}

// Calls f with a null pointer of the type that `storage` names, which is not in groups.
template <class Function>
void with_element(Storage storage, Function f) {
    if (storage == Storage::float32)
        f((float*)nullptr);
    else
        f((uint16_t*)nullptr);
}

// Packs x [rows, inputs] as PairJob wants it, up to `filled` rows and whole units with zeros; the
// threads of a region share the work.
void pack_pairs(const uint16_t* x, int64_t rows, int64_t filled, int64_t inputs,
                const PairKernels& kernels, uint16_t* packed) {
    const int64_t width = whole_units(inputs), step = kernels.step;
#pragma omp for schedule(static)
    for (int64_t top = 0; top < filled; top += kernels.tile_rows) {
        const int64_t height = std::min(kernels.tile_rows, filled - top);
        uint16_t* to = packed + top * width;
        for (int64_t r = 0; r < height; ++r) {
            const uint16_t* from = x + (top + r) * inputs;
            for (int64_t k = 0; k < width; k += step) {
                const int64_t there = top + r < rows ? std::clamp<int64_t>(inputs - k, 0, step) : 0;
                uint16_t* some = to + k * height + r * step;
                if (there == step) { // of known sizes, these are no calls
                    step == UNIT ? std::memcpy(some, from + k, UNIT * sizeof *some)
                                 : std::memcpy(some, from + k, 2 * sizeof *some);
                    continue;
                }
                std::fill(some, some + step, uint16_t(0));
                std::copy(from + k, from + k + there, some);
            }
        }
    }
}

// Where a weight is stored in pairs.
int64_t pair_index(int64_t panel, int64_t input, int64_t lane, int64_t inputs) {
    return (panel * whole_units(inputs) + input / 2 * 2) * PANEL + lane * 2 + input % 2;
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

// One over the root of the mean of the squares.
float rms_factor(const float* row, int64_t width, float epsilon) {
    constexpr int LANES = 8; // sums side by side, which the compiler makes a vector of
    float sums[LANES] = {};
    int64_t i = 0;
    for (; i + LANES <= width; i += LANES)
        for (int lane = 0; lane < LANES; ++lane) sums[lane] += row[i + lane] * row[i + lane];
    for (; i < width; ++i) sums[0] += row[i] * row[i];
    float total = 0;
    for (float sum : sums) total += sum;
    return 1 / std::sqrt(total / float(width) + epsilon);
}

// Whether the CPU has AMX for bfloat16 and the system lets this process use it.
bool amx_here() {
#if defined(__linux__) && defined(LONGCTX_BF16)
    constexpr unsigned AMX_BF16 = 1u << 22, AMX_TILE = 1u << 24;
    constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18; // of asm/prctl.h, which may be older
    static const bool here = [] {
        unsigned a, b, c, d;
        return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & AMX_BF16) && (d & AMX_TILE) &&
               syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
    }();
    return here;
#else
    return false;
#endif
}

} // namespace

std::vector<std::string> bfloat16_sets() {
    std::vector<std::string> names;
#ifdef LONGCTX_BF16 // else the compiler, or the build, has no such instructions
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512vl") ||
        !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512bf16"))
        return names;
    names.emplace_back("avx512_bf16");
    if (amx_here()) names.emplace_back("amx");
#endif
    return names;
}

bool multiplies_integers() {
#ifdef LONGCTX_SIMDE
    return true;
#else
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
#endif
}

PackedLinear::PackedLinear(const void* weight, const float* bias, int64_t outputs, int64_t inputs,
                           Storage storage, const std::string& instruction_set)
    : kernels_(kernels_of(instruction_set)), pairs_(pairs_of(instruction_set)), integers_(false),
      outputs_(outputs), inputs_(inputs), panels_((outputs + PANEL - 1) / PANEL), storage_(storage),
      bytes_(panels_ * panel_size(storage, inputs, pairs_)), weight_(allocate(bytes_)),
      bias_(padded(bias)) {
    if (group_layout(storage).inputs) throw std::invalid_argument("weights in groups are filled in");
    if (pairs_ && storage == Storage::bfloat16) {
        const auto* from = (const uint16_t*)weight;
        auto* packed = (uint16_t*)weight_.get();
#pragma omp parallel for schedule(static)
        for (int64_t p = 0; p < panels_; ++p)
            for (int64_t k = 0; k < whole_units(inputs_); ++k)
                for (int64_t lane = 0; lane < PANEL; ++lane) {
                    const int64_t output = p * PANEL + lane;
                    const bool there = output < outputs_ && k < inputs_;
                    packed[pair_index(p, k, lane, inputs_)] = there ? from[output * inputs_ + k] : 0;
                }
        return;
    }
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
                           const std::string& instruction_set, bool integers)
    : kernels_(kernels_of(instruction_set)), pairs_(pairs_of(instruction_set)),
      integers_(integers), outputs_(outputs), inputs_(inputs),
      panels_((outputs + PANEL - 1) / PANEL), storage_(storage),
      bytes_(panels_ * panel_size(storage, inputs, pairs_)), weight_(allocate(bytes_)),
      bias_(padded(bias)) {
    const int block = group_layout(storage).block;
    if (!block || inputs % block) throw std::invalid_argument("inputs are no whole blocks");
    if (integers && !multiplies_integers()) throw std::invalid_argument("this CPU has no VNNI");
    std::memset(weight_.get(), 0, bytes_);
}

void PackedLinear::fill(int64_t first, int64_t rows, const uint8_t* codes, const Numbers& scales,
                        const Numbers& minima) {
    const GroupLayout layout = group_layout(storage_);
    const int64_t groups = inputs_ / layout.inputs, size = layout.scale_bytes();
    const int64_t blocks = inputs_ / layout.block;
    const auto fit = [&](const Numbers& numbers, bool there) {
        return there == (numbers.own != nullptr) && (there && layout.blocks()) == (numbers.common != nullptr);
    };
    if (first % PANEL || first + rows > outputs_ || !fit(scales, true) || !fit(minima, layout.minimum))
        throw std::invalid_argument("weights that do not fit");
#pragma omp parallel for schedule(static)
    for (int64_t top = 0; top < rows; top += PANEL) {
        uint8_t* panel = (uint8_t*)weight_.get() + (first + top) / PANEL * panel_bytes();
        for (int64_t lane = 0; lane < std::min(PANEL, rows - top); ++lane) {
            const int64_t row = top + lane;
            for (int64_t b = 0; layout.blocks() && b < blocks; ++b) {
                auto* common = (uint16_t*)(panel + b * layout.block_bytes()) + lane;
                common[0] = scales.common[row * blocks + b];
                if (layout.minimum) common[PANEL] = minima.common[row * blocks + b];
            }
            for (int64_t g = 0; g < groups; ++g) {
                uint8_t* group = panel + layout.place(g * layout.inputs);
                const int64_t from = (row * groups + g) * size;
                std::memcpy(group + lane * size, scales.own + from, size);
                if (layout.minimum)
                    std::memcpy(group + (PANEL + lane) * size, minima.own + from, size);
                const uint8_t* code = codes + row * inputs_ + g * layout.inputs;
                for (int64_t k = 0; k < layout.inputs; ++k) {
                    const CodePlace place = integers_ ? integer_place(layout.bits, k, lane)
                                                      : plain_place(layout.bits, k, lane);
                    uint8_t& to = group[layout.codes_at() + place.byte];
                    if (layout.bits == 8)
                        to = code[k];
                    else
                        to |= uint8_t(code[k] & 15) << place.shift;
                }
            }
        }
    }
}

void PackedLinear::forward(const void* x, int64_t rows, void* y) const {
    forward_all({this}, x, rows, y);
}

void PackedLinear::forward_all(const std::vector<const PackedLinear*>& layers, const void* x,
                               int64_t rows, void* y) {
    if (layers.empty()) return;
    bool alike = true;
    for (const PackedLinear* layer : layers) {
        if (layer->inputs_ != layers[0]->inputs_ || layer->pairs_ != layers[0]->pairs_)
            throw std::invalid_argument("layers that do not take the same rows");
        alike &= layer->integers_ == layers[0]->integers_;
    }
    if (!alike) {
        for (const PackedLinear* layer : layers) {
            forward_all({layer}, x, rows, y);
            y = (char*)y + rows * layer->outputs_ * (layer->pairs_ ? sizeof(uint16_t) : sizeof(float));
        }
    } else if (layers[0]->integers_)
        forward_integers(layers, x, rows, y);
    else if (layers[0]->pairs_)
        forward_pairs(layers, (const uint16_t*)x, rows, (uint16_t*)y);
    else
        forward_floats(layers, (const float*)x, rows, (float*)y);
}

void PackedLinear::forward_pairs(const std::vector<const PackedLinear*>& layers, const uint16_t* x,
                                 int64_t rows, uint16_t* y) {
    const PairKernels& kernels = *layers[0]->pairs_;
    const int64_t inputs = layers[0]->inputs_, width = whole_units(inputs), tile = kernels.tile_rows;
    const auto whole = [&](int64_t count) { return (count + tile - 1) / tile * tile; };
    thread_local Memory packed_memory;
    for (int64_t top = 0; top < rows; top += PAIR_ROWS) {
        const int64_t some = std::min(PAIR_ROWS, rows - top);
        const int64_t filled = kernels.whole_tiles && some > tile ? whole(some) : some;
        auto* const packed = (uint16_t*)packed_memory.of(filled * width * sizeof(uint16_t));
        const uint16_t* const from = x + top * inputs;
#pragma omp parallel if (products(layers, some) >= PARALLEL_PRODUCTS)
        {
            pack_pairs(from, some, filled, inputs, kernels, packed);
            thread_local Memory own; // kept: fresh memory would cost more than a small layer
            uint16_t* to = y;
            for (const PackedLinear* layer : layers) {
                // Few rows wait for the weights alone. Many share a panel's with as many panels as
                // leave each thread several shares.
                const int64_t shares = layer->panels_ / (4 * omp_get_num_threads()) / 2 * 2;
                const int64_t step = some <= FEW_ROWS ? 2 : std::clamp<int64_t>(shares, 2, PAIR_PANELS);
                constexpr int64_t SCRATCH = 2 * PIECE * PANEL * sizeof(uint16_t);
                const int64_t sums = step * PANEL * (some + MOST_TILE_ROWS) * sizeof(float);
                char* const scratch = own.of(SCRATCH + sums);
#pragma omp for schedule(dynamic) nowait
                for (int64_t panel = 0; panel < layer->panels_; panel += step)
                    kernels.run[int(layer->storage_)](
                        {packed, to + top * layer->outputs_, layer->weight_.get(),
                         layer->bias_.get(), some, inputs, layer->outputs_, panel,
                         std::min(panel + step, layer->panels_), (uint16_t*)scratch,
                         (float*)(scratch + SCRATCH)});
                to += rows * layer->outputs_;
            }
            kernels.end();
        }
    }
}

void PackedLinear::forward_floats(const std::vector<const PackedLinear*>& layers, const float* x,
                                  int64_t rows, float* y) {
    const LinearKernels& kernels = layers[0]->kernels_;
    const int64_t inputs = layers[0]->inputs_;
    const int64_t tiles = (rows + kernels.tile_rows - 1) / kernels.tile_rows;
    const int64_t tile_rows = tiles ? (rows + tiles - 1) / tiles : 1; // 8 rows: 4 and 4, not 6 and 2
    thread_local std::vector<float> storage;
    if (rows > 1 && int64_t(storage.size()) < rows * inputs) storage.resize(rows * inputs);
    float* const packed = storage.data(); // of this thread, in the others too
    const int64_t step = tiles > 1 ? 2 * kernels.row_panels : kernels.row_panels;
#pragma omp parallel if (products(layers, rows) >= PARALLEL_PRODUCTS)
    {
        if (rows > 1) pack_rows(x, rows, inputs, tile_rows, packed);
        alignas(64) float scratch[DEPTH * PANEL];
        float* to = y;
        for (const PackedLinear* layer : layers) {
            // Threads take shares as they get to them: another process may hold a core for a while.
#pragma omp for schedule(dynamic) nowait
            for (int64_t panel = 0; panel < layer->panels_; panel += step)
                kernels.run[int(layer->storage_)](
                    {rows > 1 ? packed : x, to, layer->weight_.get(), layer->bias_.get(), rows,
                     tile_rows, inputs, layer->outputs_, panel,
                     std::min(panel + step, layer->panels_), scratch});
            to += rows * layer->outputs_;
        }
    }
}

int64_t PackedLinear::products(const std::vector<const PackedLinear*>& layers, int64_t rows) {
    int64_t count = 0;
    for (const PackedLinear* layer : layers) count += layer->outputs_ * layer->inputs_ * rows;
    return count;
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
        std::vector<uint8_t> plain(integers_ ? panel_bytes() : 0);
        int64_t held = -1; // the panel that is widened
#pragma omp for schedule(static)
        for (int64_t i = 0; i < count; ++i) {
            const int64_t panel = ids[i] / PANEL, lane = ids[i] % PANEL;
            if (pairs_ && storage_ == Storage::bfloat16) {
                const auto* packed = (const uint16_t*)weight_.get();
                for (int64_t k = 0; k < inputs_; ++k) {
                    const uint32_t bits = uint32_t(packed[pair_index(panel, k, lane, inputs_)]) << 16;
                    std::memcpy(weight + i * inputs_ + k, &bits, sizeof bits);
                }
                continue;
            }
            if (panel != held)
                kernels_.widen[int(storage_)](plain_panel(panel, plain), inputs_, wide.data());
            held = panel;
            for (int64_t k = 0; k < inputs_; ++k) weight[i * inputs_ + k] = wide[k * PANEL + lane];
        }
    }
}

// Returns a panel as the kernels for floats read it, in `to` where it is stored otherwise.
const void* PackedLinear::plain_panel(int64_t panel, std::vector<uint8_t>& to) const {
    const auto* from = (const uint8_t*)weight_.get() + panel * panel_bytes();
    if (!integers_) return from;
    const GroupLayout layout = group_layout(storage_);
    std::copy(from, from + panel_bytes(), to.begin());
    for (int64_t begin = 0; begin < inputs_; begin += layout.inputs) {
        const int64_t codes = layout.place(begin) + layout.codes_at();
        std::fill_n(to.begin() + codes, layout.inputs * PANEL * layout.bits / 8, uint8_t(0));
        for (int64_t k = 0; k < layout.inputs; ++k)
            for (int64_t lane = 0; lane < PANEL; ++lane) {
                const CodePlace place = integer_place(layout.bits, k, lane);
                const CodePlace wanted = plain_place(layout.bits, k, lane);
                const uint8_t code = from[codes + place.byte] >> place.shift;
                to[codes + wanted.byte] |= layout.bits == 8 ? code : uint8_t((code & 15) << wanted.shift);
            }
    }
    return to.data();
}

void* PackedLinear::allocate(size_t bytes) { return longctx::allocate(bytes); }

PackedLinear::Floats PackedLinear::padded(const float* values) const {
    if (!values) return nullptr;
    Floats copy((float*)allocate(panels_ * PANEL * sizeof(float)));
    std::copy(values, values + outputs_, copy.get());
    std::fill(copy.get() + outputs_, copy.get() + panels_ * PANEL, 0.0f);
    return copy;
}

void PackedLinear::Free::operator()(void* memory) const { std::free(memory); }

void rms_norm(const float* x, const float* added, float* sums, int64_t rows, int64_t width,
              const float* weight, float epsilon, float* y) {
#pragma omp parallel for schedule(static) if (rows * width >= PARALLEL_PRODUCTS)
    for (int64_t row = 0; row < rows; ++row) {
        const float* from = x + row * width;
        if (added) {
            float* sum = sums + row * width;
            for (int64_t i = 0; i < width; ++i) sum[i] = from[i] + added[row * width + i];
            from = sum;
        }
        float* to = y + row * width;
        const float factor = rms_factor(from, width, epsilon);
        for (int64_t i = 0; i < width; ++i) to[i] = from[i] * factor * weight[i];
    }
}

void rms_norm_bfloat16(const uint16_t* x, const uint16_t* added, uint16_t* sums, int64_t rows,
                       int64_t width, const float* weight, float epsilon, bool twice, uint16_t* y) {
#pragma omp parallel if (rows * width >= PARALLEL_PRODUCTS)
    {
        std::vector<float> wide(width);
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; ++row) {
            const uint16_t* from = x + row * width;
            if (added) {
                uint16_t* sum = sums + row * width;
                for (int64_t i = 0; i < width; ++i)
                    sum[i] = rounded(widened(from[i]) + widened(added[row * width + i]));
                from = sum;
            }
            uint16_t* to = y + row * width;
            for (int64_t i = 0; i < width; ++i) wide[i] = widened(from[i]);
            const float factor = rms_factor(wide.data(), width, epsilon);
            if (twice)
                for (int64_t i = 0; i < width; ++i)
                    to[i] = rounded(weight[i] * widened(rounded(wide[i] * factor)));
            else
                for (int64_t i = 0; i < width; ++i) to[i] = rounded(wide[i] * factor * weight[i]);
        }
    }
}

} // namespace longctx
