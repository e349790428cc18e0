// AVX-512 (F, BW, VL, DQ) as the vector type that the kernels are written in; with VNNI, integer
// products are summed by the instruction that makes them. Tested in software too (simd/simde.h).
#pragma once

#ifdef LONGCTX_SIMDE
#include "simd/simde.h"
#else
#include <immintrin.h>
#endif

#include <cstdint>

#include "simd/avx2.h"

namespace {

template <bool VNNI> struct Avx512 {
    using F = __m512;
    using I = __m512i;
    static constexpr int W = 16;
    static constexpr int TILE_BLOCK = 12;

    static void pin(F&) {} // gcc has no trouble with 32 registers
    static void pin(I&) {}
    static F zero() { return _mm512_setzero_ps(); }
    static F set1(float x) { return _mm512_set1_ps(x); }
    static F load(const float* p) { return _mm512_loadu_ps(p); }
    static void store(float* p, F x) { _mm512_storeu_ps(p, x); }
    // Stores 16 lanes or 8: head_dim and groups are multiples of 8.
    static void store_lanes(float* p, F x, int lanes) {
        if (lanes >= W)
            store(p, x);
        else
            _mm256_storeu_ps(p, lower(x));
    }
    static F set_halves(float low, float high) {
        return _mm512_mask_blend_ps((__mmask16)0xff00, set1(low), set1(high));
    }
    static F add(F a, F b) { return _mm512_add_ps(a, b); }
    static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
    static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
    static F div(F a, F b) { return _mm512_div_ps(a, b); }
    static F max(F a, F b) { return _mm512_max_ps(a, b); }
    static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
    static F if_zero(F x, F a, F b) {
        return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, zero(), _CMP_EQ_OQ), b, a);
    }
    static F if_below(F x, float limit, F a, F b) {
        return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, set1(limit), _CMP_LT_OQ), b, a);
    }
    static float first(F x) { return _mm_cvtss_f32(_mm512_castps512_ps128(x)); }
    static __m256 lower(F x) { return _mm512_castps512_ps256(x); }
    static __m256 upper(F x) {
        return _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(x), 1));
    }
    static float reduce_max(F x) { return Avx2::reduce_max(_mm256_max_ps(lower(x), upper(x))); }
    static float reduce_add(F x) { return Avx2::reduce_add(_mm256_add_ps(lower(x), upper(x))); }
    static __m256 sums(const F x[8]) {
        __m256 halves[8];
        for (int i = 0; i < 8; ++i)
            halves[i] = _mm256_add_ps(lower(x[i]), upper(x[i]));
        return Avx2::sums(halves);
    }
    static F exp2(F x) { // as Avx2::exp2
        x = _mm512_max_ps(set1(-127.f), x);
        I n = _mm512_cvtps_epi32(x);
        F f = _mm512_sub_ps(x, _mm512_cvtepi32_ps(n));
        F p = fma(set1(1.327647043e-03f), f, set1(9.675541618e-03f));
        p = fma(p, f, set1(5.550713281e-02f));
        p = fma(p, f, set1(2.402211972e-01f));
        p = fma(p, f, set1(6.931469671e-01f));
        p = fma(p, f, set1(1.f));
        I power = _mm512_slli_epi32(_mm512_add_epi32(n, _mm512_set1_epi32(127)), 23);
        return _mm512_mul_ps(p, _mm512_castsi512_ps(power));
    }
    static F load_bf16(const uint16_t* p) {
        I x = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
        return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16));
    }
    static F join(__m256 low, __m256 high) {
        return _mm512_castpd_ps(_mm512_insertf64x4(_mm512_castps_pd(_mm512_castps256_ps512(low)),
                                                   _mm256_castps_pd(high), 1));
    }
    static F load_f16(const uint16_t* p) { return join(Avx2::load_f16(p), Avx2::load_f16(p + 8)); }
    static void transpose(F x[16]) { // by quarters, of which the two off the diagonal change place
        __m256 quarter[2][2][8];
        for (int i = 0; i < 16; ++i) {
            quarter[0][i / 8][i % 8] = lower(x[i]);
            quarter[1][i / 8][i % 8] = upper(x[i]);
        }
        for (auto& half : quarter)
            for (auto& rows : half)
                Avx2::transpose(rows);
        for (int i = 0; i < 16; ++i)
            x[i] = join(quarter[i / 8][0][i % 8], quarter[i / 8][1][i % 8]);
    }

    static I izero() { return _mm512_setzero_si512(); }
    static I iload(const void* p) { return _mm512_loadu_si512(p); }
    static I iload_lanes(const void* p, int lanes) {
        if (lanes >= W)
            return iload(p);
        return _mm512_inserti64x4(izero(), _mm256_loadu_si256((const __m256i*)p), 0);
    }
    static F even_bf16(I x) { return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16)); }
    static F odd_bf16(I x) {
        return _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32((int)0xffff0000)));
    }
    static F byte(I x, int i) {
        __m128i left = _mm_cvtsi32_si128(24 - 8 * i);
        return _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_sll_epi32(x, left), 24));
    }
    static F nibble(I x, int shift) {
        I bits = _mm512_srl_epi32(x, _mm_cvtsi32_si128(shift));
        return _mm512_cvtepi32_ps(_mm512_and_si512(bits, _mm512_set1_epi32(15)));
    }
    static I low_nibbles(I x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
    static I high_nibbles(I x) { return low_nibbles(_mm512_srli_epi16(x, 4)); }
    static I quad16(const void* p) { return _mm512_set1_epi64(*(const int64_t*)p); }
    static I quad8(const void* p) { return _mm512_set1_epi32(*(const int32_t*)p); }
    static I words(const void* p) {
        return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)p));
    }
    static I dot16(I acc, I a, I b) {
        if constexpr (VNNI)
            return _mm512_dpwssd_epi32(acc, a, b);
        return _mm512_add_epi32(acc, _mm512_madd_epi16(a, b));
    }
    static F pair_sums(I a, I b) {
        I even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
        I odd = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
        return _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_permutex2var_epi32(a, even, b),
                                                   _mm512_permutex2var_epi32(a, odd, b)));
    }
    static I dot_u8s8(I acc, I a, I b) {
        if constexpr (VNNI)
            return _mm512_dpbusd_epi32(acc, a, b);
        return _mm512_add_epi16(acc, _mm512_maddubs_epi16(a, b));
    }
    static I flush(I acc, I sums, int scale) {
        if constexpr (VNNI) // the sums have 32 bits already; the scale is 1 or 128
            return _mm512_add_epi32(acc, scale == 1 ? sums : _mm512_slli_epi32(sums, 7));
        return _mm512_add_epi32(acc, _mm512_madd_epi16(sums, _mm512_set1_epi16((short)scale)));
    }
    static F to_float(I x) { return _mm512_cvtepi32_ps(x); }
    static I to_int(F x) { return _mm512_cvtps_epi32(x); }
    static void store16(int16_t* p, I x) {
        _mm256_storeu_si256((__m256i*)p, _mm512_cvtsepi32_epi16(x));
    }
    static void store_parts(uint8_t* high, uint8_t* low, I x) {
        I upper = _mm512_srai_epi32(_mm512_add_epi32(x, _mm512_set1_epi32(64)), 7);
        I lower = _mm512_sub_epi32(x, _mm512_slli_epi32(upper, 7));
        _mm_storeu_si128((__m128i*)high, _mm512_cvtepi32_epi8(upper));
        _mm_storeu_si128((__m128i*)low, _mm512_cvtepi32_epi8(lower));
    }
};

} // namespace
