#include "layers/heads.h"

#include <algorithm>

#include "simd/bfloat16.h"

namespace longctx {
namespace {

// With fewer numbers a second thread costs more than it saves.
constexpr int64_t PARALLEL_NUMBERS = 1 << 16;

float negative(float x) { return -x; }
uint16_t negative(uint16_t x) { return x ^ 0x8000; }

template <class T>
void turn(T* head, const T* cosines, const T* sines, int64_t turned) {
    const int64_t half = turned / 2;
    for (int64_t i = 0; i < half; ++i) {
        const T x = head[i], y = head[i + half];
        head[i] = sum(product(x, cosines[i]), product(negative(y), sines[i]));
        head[i + half] = sum(product(y, cosines[i + half]), product(x, sines[i + half]));
    }
}

} // namespace

template <class T>
void turn_heads(const HeadsJob<T>& job) {
    const int64_t numbers = job.tokens * (job.heads + 2 * job.kv_heads) * job.dims;
    const int64_t kept = job.kv_heads * job.dims;
#pragma omp parallel for schedule(static) if (numbers >= PARALLEL_NUMBERS)
    for (int64_t token = 0; token < job.tokens; ++token) {
        const T* const cosines = job.cosines + token * job.turned;
        const T* const sines = job.sines + token * job.turned;
        T* const query = job.query + token * job.query_stride;
        T* const key = job.key + token * job.key_stride;
        for (int64_t head = 0; head < job.heads; ++head)
            turn(query + head * job.dims, cosines, sines, job.turned);
        for (int64_t head = 0; head < job.kv_heads; ++head)
            turn(key + head * job.dims, cosines, sines, job.turned);
        if (!job.pool) continue;
        const int64_t slot = job.slots ? job.slots[token] : job.first_slot + token;
        T* const to = job.pool + slot * 2 * kept;
        std::copy(key, key + kept, to);
        const T* const value = job.value + token * job.value_stride;
        std::copy(value, value + kept, to + kept);
    }
}

template void turn_heads(const HeadsJob<float>&);
template void turn_heads(const HeadsJob<uint16_t>&);

} // namespace longctx
