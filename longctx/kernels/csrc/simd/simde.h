// AVX-512 in software (SIMDe), for test builds: any CPU can test the code that is written for it.
#pragma once

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>
#include <simde/x86/fma.h>

// These functions are missing in SIMDe 0.7 and are made of halves; at the end, an alias is mended
// to which it gives the arguments of another function.
namespace {

template <class From, class To, To (*HALF)(From)> simde__m512i by_halves(simde__m512i x) {
    alignas(64) From in[2];
    alignas(64) To out[2];
    static_assert(sizeof in == sizeof x && sizeof out == sizeof x);
    simde_mm512_store_si512(in, x);
    out[0] = HALF(in[0]), out[1] = HALF(in[1]);
    return simde_mm512_load_si512(out);
}
inline simde__m512 software_cvtepi32_ps(simde__m512i x) {
    simde__m512i y = by_halves<__m256i, __m256, _mm256_cvtepi32_ps>(x);
    return simde_mm512_castsi512_ps(y);
}
inline simde__m512i software_cvtps_epi32(simde__m512 x) {
    return by_halves<__m256, __m256i, _mm256_cvtps_epi32>(simde_mm512_castps_si512(x));
}
inline simde__m512i software_cvtepu16_epi32(__m256i x) {
    alignas(64) __m256i out[2] = {_mm256_cvtepu16_epi32(_mm256_castsi256_si128(x)),
                                  _mm256_cvtepu16_epi32(_mm256_extracti128_si256(x, 1))};
    return simde_mm512_load_si512(out);
}
inline simde__m512i software_cvtepi8_epi32(__m128i x) {
    alignas(64) __m256i out[2] = {_mm256_cvtepi8_epi32(x),
                                  _mm256_cvtepi8_epi32(_mm_srli_si128(x, 8))};
    return simde_mm512_load_si512(out);
}
inline simde__m512i software_cvtepu8_epi32(__m128i x) {
    alignas(64) __m256i out[2] = {_mm256_cvtepu8_epi32(x), _mm256_cvtepu8_epi32(_mm_srli_si128(x, 8))};
    return simde_mm512_load_si512(out);
}
inline simde__m512 software_cvtph_ps(__m256i x) {
    alignas(64) __m256 out[2] = {_mm256_cvtph_ps(_mm256_castsi256_si128(x)),
                                 _mm256_cvtph_ps(_mm256_extracti128_si256(x, 1))};
    return simde_mm512_load_ps(out);
}
inline simde__m512i software_srai_epi32(simde__m512i x, int count) {
    alignas(64) int32_t lanes[16];
    simde_mm512_store_si512(lanes, x);
    for (int32_t& lane : lanes)
        lane >>= count;
    return simde_mm512_load_si512(lanes);
}
inline __m128i software_cvtepi32_epi8(simde__m512i x) {
    alignas(64) int32_t lanes[16];
    alignas(16) int8_t bytes[16];
    simde_mm512_store_si512(lanes, x);
    for (int i = 0; i < 16; ++i)
        bytes[i] = (int8_t)lanes[i];
    return _mm_load_si128((const __m128i*)bytes);
}
inline simde__m512i software_dpwssd_epi32(simde__m512i sum, simde__m512i a, simde__m512i b) {
    alignas(64) __m256i x[2], y[2], sums[2];
    simde_mm512_store_si512(x, a), simde_mm512_store_si512(y, b);
    simde_mm512_store_si512(sums, sum);
    for (int i = 0; i < 2; ++i)
        sums[i] = _mm256_add_epi32(sums[i], _mm256_madd_epi16(x[i], y[i]));
    return simde_mm512_load_si512(sums);
}

} // namespace

#undef _mm512_dpwssd_epi32
#define _mm512_dpwssd_epi32 software_dpwssd_epi32
#define _mm512_cvtepi32_ps software_cvtepi32_ps
#define _mm512_cvtps_epi32 software_cvtps_epi32
#define _mm512_cvtepi8_epi32 software_cvtepi8_epi32
#define _mm512_cvtepu16_epi32 software_cvtepu16_epi32
#undef _mm512_cvtepu8_epi32
#define _mm512_cvtepu8_epi32 software_cvtepu8_epi32
#undef _mm512_cvtph_ps
#define _mm512_cvtph_ps software_cvtph_ps
#define _mm512_srai_epi32 software_srai_epi32
#define _mm512_cvtepi32_epi8 software_cvtepi32_epi8
#undef _mm512_madd_epi16
#define _mm512_madd_epi16 simde_mm512_madd_epi16
