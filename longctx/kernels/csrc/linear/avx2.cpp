// Linear layers with AVX2 and FMA: PANEL floats are two registers of the 16.
#include <immintrin.h>

#include "linear/tile.h"

namespace {

struct Avx2 {
    struct F {
        __m256 low, high;
    };
    using S = __m256;
    static constexpr int TILE_ROWS = 6; // 12 sums, 2 weights and a value of x fill the registers
    // With few rows several panels go together: 8 sums hide the latency of one.
    static constexpr int panels(int rows) { return rows == 1 ? 4 : rows <= 3 ? 2 : 1; }

    static F zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
    static F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
    static void store(float* p, F x) {
        _mm256_storeu_ps(p, x.low);
        _mm256_storeu_ps(p + 8, x.high);
    }
    static S broadcast(const float* p) { return _mm256_broadcast_ss(p); }
    static F fma(S a, F b, F c) {
        return {_mm256_fmadd_ps(a, b.low, c.low), _mm256_fmadd_ps(a, b.high, c.high)};
    }
    static F fma(F a, F b, F c) {
        return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
    }
    static F set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
    static F sub(F a, F b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
    static F load_half(const uint16_t* p) { return {half(p), half(p + 8)}; }
    static F low_nibbles(const uint8_t* p) { return {low(p), low(p + 8)}; }
    static F high_nibbles(const uint8_t* p) { return {high(p), high(p + 8)}; }
    static F mul(F a, F b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
    static F add(F a, F b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
    static F load_bf16(const uint16_t* p) { return {bf16(p), bf16(p + 8)}; }
    static F load_int8(const int8_t* p) { return {int8(p), int8(p + 8)}; }

    static __m256 half(const uint16_t* p) {
        return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
    }
    static __m256i wide_bytes(const uint8_t* p) {
        return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
    }
    static __m256 low(const uint8_t* p) {
        return _mm256_cvtepi32_ps(_mm256_and_si256(wide_bytes(p), _mm256_set1_epi32(15)));
    }
    static __m256 high(const uint8_t* p) {
        return _mm256_cvtepi32_ps(_mm256_srli_epi32(wide_bytes(p), 4));
    }
    static __m256 bf16(const uint16_t* p) {
        __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
        return _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
    }
    static __m256 int8(const int8_t* p) {
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
    }
};

} // namespace

const longctx::LinearKernels longctx::linear_avx2 = linear_kernels<Avx2>();
