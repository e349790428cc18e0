#include "layers/around_attention.h"

#include <chrono>
#include <stdexcept>

#include "simd/bfloat16.h"

namespace longctx {
namespace {

// Memory of this thread that is kept: fresh memory would cost more than a short piece of work.
// Numbers from 2 on are of `through_attention`, between whose parts they last.
void* scratch(int number, int64_t bytes) {
    thread_local std::vector<char> kept[5];
    if (int64_t(kept[number].size()) < bytes) kept[number].resize(bytes);
    return kept[number].data();
}

int64_t outputs(const AroundAttention::Layers& layers) {
    int64_t all = 0;
    for (const PackedLinear* layer : layers) all += layer->outputs();
    return all;
}

template <class T>
void multiply(const T* x, const T* y, int64_t stride, int64_t rows, int64_t width, T* to) {
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t i = 0; i < width; ++i)
            to[row * width + i] = product(x[row * width + i], y[row * stride + i]);
}

template <class T>
void add(const T* x, const T* y, int64_t count, T* to) {
    for (int64_t i = 0; i < count; ++i) to[i] = sum(x[i], y[i]);
}

} // namespace

AroundAttention::AroundAttention(Norm before_attention, Layers inputs, const PackedLinear* output,
                                 Norm before_unit, Layers gates, const PackedLinear* last,
                                 const Heads& heads, bool bfloat16)
    : before_attention_(before_attention), before_unit_(before_unit), inputs_(std::move(inputs)),
      gates_(std::move(gates)), output_(output), last_(last), width_(output->outputs()),
      inner_(last->inputs()), heads_(heads), bfloat16_(bfloat16) {
    bool fit = outputs(inputs_) == (heads.query + 2 * heads.kv) * heads.dims &&
               output->inputs() == heads.query * heads.dims && outputs(gates_) == 2 * inner_ &&
               last->outputs() == width_;
    for (const PackedLinear* layer : inputs_) fit = fit && layer->inputs() == width_;
    for (const PackedLinear* layer : gates_) fit = fit && layer->inputs() == width_;
    if (!fit) throw std::invalid_argument("layers that do not fit each other");
}

void AroundAttention::norm(const Norm& norm, const void* x, const void* added, void* sums,
                           int64_t rows, int64_t width, void* y) const {
    if (bfloat16_)
        rms_norm_bfloat16((const uint16_t*)x, (const uint16_t*)added, (uint16_t*)sums, rows, width,
                          norm.weight, norm.epsilon, norm.twice, (uint16_t*)y);
    else
        rms_norm((const float*)x, (const float*)added, (float*)sums, rows, width, norm.weight,
                 norm.epsilon, (float*)y);
}

template <class T>
void AroundAttention::turn(int64_t rows, T* qkv, const Position& position) const {
    const int64_t queries = heads_.query * heads_.dims, kept = heads_.kv * heads_.dims;
    const bool one = inputs_.size() == 1; // whose rows have all of a token
    T* const key = qkv + (one ? queries : rows * queries);
    T* const value = key + (one ? kept : rows * kept);
    const int64_t all = queries + 2 * kept;
    const int64_t query_stride = one ? all : queries, key_stride = one ? all : kept;
    const auto norm_heads = [&](const Norm& each, T* of_token, int64_t heads) {
        if (each.weight) norm(each, of_token, nullptr, nullptr, heads, heads_.dims, of_token);
    };
    for (int64_t row = 0; row < rows; ++row) {
        norm_heads(heads_.query_norm, qkv + row * query_stride, heads_.query);
        norm_heads(heads_.key_norm, key + row * key_stride, heads_.kv);
    }
    turn_heads<T>({qkv, key, value, query_stride, key_stride, key_stride, rows, heads_.query,
                   heads_.kv, heads_.dims, (const T*)position.cosines, (const T*)position.sines,
                   position.turned, (T*)position.pool, position.slots, position.first_slot});
}

void AroundAttention::to_attention(const void* x, int64_t rows, void* qkv,
                                   const Position& position) const {
    void* const normed = scratch(0, rows * width_ * int64_t(sizeof(float)));
    norm(before_attention_, x, nullptr, nullptr, rows, width_, normed);
    PackedLinear::forward_all(inputs_, normed, rows, qkv);
    bfloat16_ ? turn(rows, (uint16_t*)qkv, position) : turn(rows, (float*)qkv, position);
}

void AroundAttention::to_gates(const void* attended, const void* x, int64_t rows, void* sums,
                               void* gates) const {
    const int64_t bytes = rows * width_ * int64_t(sizeof(float));
    void *const mixed = scratch(0, bytes), *const normed = scratch(1, bytes);
    output_->forward(attended, rows, mixed);
    norm(before_unit_, x, mixed, sums, rows, width_, normed);
    PackedLinear::forward_all(gates_, normed, rows, gates);
}

double AroundAttention::through_attention(const void* x, int64_t rows, const Position& position,
                                          const Attend& attend, void* sums, void* gates) const {
    using Clock = std::chrono::steady_clock;
    const int64_t queries = heads_.query * heads_.dims, all = queries + 2 * heads_.kv * heads_.dims;
    void* const qkv = scratch(2, rows * all * int64_t(sizeof(float)));
    float* const out = (float*)scratch(3, rows * queries * int64_t(sizeof(float)));
    to_attention(x, rows, qkv, position);
    const auto began = Clock::now();
    attend(qkv, inputs_.size() == 1 ? all : queries, out);
    const std::chrono::duration<double> taken = Clock::now() - began;
    const void* attended = out;
    if (bfloat16_) {
        uint16_t* const narrow = (uint16_t*)scratch(4, rows * queries * int64_t(sizeof(uint16_t)));
        for (int64_t i = 0; i < rows * queries; ++i) narrow[i] = rounded(out[i]);
        attended = narrow;
    }
    to_gates(attended, x, rows, sums, gates);
    return taken.count();
}

void AroundAttention::from_gates(const void* activated, const void* up, int64_t up_stride,
                                 const void* sums, int64_t rows, void* y) const {
    void* const passed = scratch(0, rows * inner_ * int64_t(sizeof(float)));
    void* const result = scratch(1, rows * width_ * int64_t(sizeof(float)));
    const auto compute = [&](auto* type) {
        using T = decltype(type);
        multiply((const std::remove_pointer_t<T>*)activated, (const std::remove_pointer_t<T>*)up,
                 up_stride, rows, inner_, (T)passed);
        last_->forward(passed, rows, result);
        add((const std::remove_pointer_t<T>*)sums, (const std::remove_pointer_t<T>*)result,
            rows * width_, (T)y);
    };
    bfloat16_ ? compute((uint16_t*)nullptr) : compute((float*)nullptr);
}

} // namespace longctx
