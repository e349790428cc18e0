// A register of PANEL floats with AVX-512, one of the 32.
#pragma once

#ifdef LONGCTX_SIMDE
#include "simd/simde.h"
#else
#include <immintrin.h>
#endif

#include <cstdint>

namespace {

struct Avx512 {
    using F = __m512;
    using S = __m512;
    static constexpr int TILE_ROWS = 12;
    static constexpr int panels(int rows) { return rows <= 3 ? 4 : rows <= 6 ? 2 : 1; }

    static F zero() { return _mm512_setzero_ps(); }
    static F load(const float* p) { return _mm512_loadu_ps(p); }
    static void store(float* p, F x) { _mm512_storeu_ps(p, x); }
    static S broadcast(const float* p) { return _mm512_set1_ps(*p); }
    static F fma(S a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
    static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
    static F add(F a, F b) { return _mm512_add_ps(a, b); }
    static F set1(float x) { return _mm512_set1_ps(x); }
    static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
    static F load_half(const uint16_t* p) {
        return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
    }
    static __m512i wide_bytes(const uint8_t* p) {
        return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
    }
    static F low_nibbles(const uint8_t* p) {
        return _mm512_cvtepi32_ps(_mm512_and_si512(wide_bytes(p), _mm512_set1_epi32(15)));
    }
    static F high_nibbles(const uint8_t* p) {
        return _mm512_cvtepi32_ps(_mm512_srli_epi32(wide_bytes(p), 4));
    }
    static F load_bf16(const uint16_t* p) {
        __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
        return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
    }
    static F load_int8(const int8_t* p) {
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
    }
};

} // namespace
