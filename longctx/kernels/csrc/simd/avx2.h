// AVX2, FMA and F16C as the vector type that the kernels are written in.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace {

struct Avx2 {
    using F = __m256;
    using I = __m256i;
    static constexpr int W = 8;          // floats, or quads of bytes, in a vector
    static constexpr int TILE_BLOCK = 6; // query rows whose scores stay in registers

    // Keeps a sum in its register: left alone, gcc moves some of them through the stack.
    static void pin(F& x) { asm volatile("" : "+x"(x)); }
    static void pin(I& x) { asm volatile("" : "+x"(x)); }
    static F zero() { return _mm256_setzero_ps(); }
    static F set1(float x) { return _mm256_set1_ps(x); }
    static F load(const float* p) { return _mm256_loadu_ps(p); }
    static void store(float* p, F x) { _mm256_storeu_ps(p, x); }
    static void store_lanes(float* p, F x, int) { store(p, x); } // 8 or more
    // Lanes 0 to 7 are `low`; there are no others.
    static F set_halves(float low, float) { return set1(low); }
    static F add(F a, F b) { return _mm256_add_ps(a, b); }
    static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
    static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
    static F div(F a, F b) { return _mm256_div_ps(a, b); }
    static F max(F a, F b) { return _mm256_max_ps(a, b); }
    static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
    // Takes `a` where `x` is 0, else `b`.
    static F if_zero(F x, F a, F b) {
        return _mm256_blendv_ps(b, a, _mm256_cmp_ps(x, zero(), _CMP_EQ_OQ));
    }
    // Takes `a` where `x` is below `limit`, else `b`.
    static F if_below(F x, float limit, F a, F b) {
        return _mm256_blendv_ps(b, a, _mm256_cmp_ps(x, set1(limit), _CMP_LT_OQ));
    }
    static float first(F x) { return _mm256_cvtss_f32(x); }
    static float reduce_max(F x) {
        __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
        y = _mm_max_ps(y, _mm_movehl_ps(y, y));
        return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
    }
    static float reduce_add(F x) {
        __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
        y = _mm_add_ps(y, _mm_movehl_ps(y, y));
        return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
    }
    // Returns the sum of each of eight vectors.
    static __m256 sums(const F x[8]) {
        F a = _mm256_hadd_ps(_mm256_hadd_ps(x[0], x[1]), _mm256_hadd_ps(x[2], x[3]));
        F b = _mm256_hadd_ps(_mm256_hadd_ps(x[4], x[5]), _mm256_hadd_ps(x[6], x[7]));
        return _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
    }
    // 2^x by a minimax polynomial on [-1/2, 1/2], relative error 1e-7; 0 below 2^-126, NaN for NaN.
    static F exp2(F x) {
        x = _mm256_max_ps(set1(-127.f), x); // gives its second operand where one is NaN
        __m256i n = _mm256_cvtps_epi32(x);
        F f = _mm256_sub_ps(x, _mm256_cvtepi32_ps(n));
        F p = fma(set1(1.327647043e-03f), f, set1(9.675541618e-03f));
        p = fma(p, f, set1(5.550713281e-02f));
        p = fma(p, f, set1(2.402211972e-01f));
        p = fma(p, f, set1(6.931469671e-01f));
        p = fma(p, f, set1(1.f));
        __m256i power = _mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23);
        return _mm256_mul_ps(p, _mm256_castsi256_ps(power));
    }
    static F load_bf16(const uint16_t* p) {
        __m256i x = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
        return _mm256_castsi256_ps(_mm256_slli_epi32(x, 16));
    }
    static F load_f16(const uint16_t* p) {
        return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
    }
    // Exchanges x[i][j] and x[j][i].
    static void transpose(F x[8]) {
        F a[8], b[8];
        for (int i = 0; i < 8; i += 2) {
            a[i] = _mm256_unpacklo_ps(x[i], x[i + 1]);
            a[i + 1] = _mm256_unpackhi_ps(x[i], x[i + 1]);
        }
        for (int i = 0; i < 8; i += 4) {
            b[i] = _mm256_shuffle_ps(a[i], a[i + 2], 0x44);
            b[i + 1] = _mm256_shuffle_ps(a[i], a[i + 2], 0xee);
            b[i + 2] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0x44);
            b[i + 3] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0xee);
        }
        for (int i = 0; i < 4; ++i) {
            x[i] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x20);
            x[i + 4] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x31);
        }
    }

    // Integers. A vector holds W quads of bytes or W pairs of bfloat16, one per lane.
    static I izero() { return _mm256_setzero_si256(); }
    static I iload(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
    static I iload_lanes(const void* p, int lanes) {
        __m256i at = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        return _mm256_maskload_epi32((const int*)p, _mm256_cmpgt_epi32(_mm256_set1_epi32(lanes), at));
    }
    static F even_bf16(I x) { return _mm256_castsi256_ps(_mm256_slli_epi32(x, 16)); }
    static F odd_bf16(I x) {
        return _mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32(0xffff0000)));
    }
    // Returns signed byte `i` of each quad.
    static F byte(I x, int i) {
        return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(x, 24 - 8 * i), 24));
    }
    // Returns four bits of each lane, from bit `shift` on.
    static F nibble(I x, int shift) {
        I bits = _mm256_and_si256(_mm256_srli_epi32(x, shift), _mm256_set1_epi32(15));
        return _mm256_cvtepi32_ps(bits);
    }
    static I low_nibbles(I x) { return _mm256_and_si256(x, _mm256_set1_epi8(15)); }
    static I high_nibbles(I x) { return low_nibbles(_mm256_srli_epi16(x, 4)); }
    static I quad16(const void* p) { return _mm256_set1_epi64x(*(const int64_t*)p); }
    static I quad8(const void* p) { return _mm256_set1_epi32(*(const int32_t*)p); }
    // Loads 2 W signed bytes as 16-bit numbers.
    static I words(const void* p) { return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p)); }
    // Adds pairwise products of 16-bit numbers to acc.
    static I dot16(I acc, I a, I b) { return _mm256_add_epi32(acc, _mm256_madd_epi16(a, b)); }
    // Returns the sums of pairs in two vectors of 32-bit numbers, in order.
    static F pair_sums(I a, I b) {
        return _mm256_cvtepi32_ps(_mm256_permute4x64_epi64(_mm256_hadd_epi32(a, b), 0xd8));
    }
    // Adds pairwise products of unsigned with signed bytes to acc, in 16 bits: four bits by eight,
    // at most eight times before `flush`.
    static I dot_u8s8(I acc, I a, I b) { return _mm256_add_epi16(acc, _mm256_maddubs_epi16(a, b)); }
    // Adds to acc, in each lane, scale times the sum of its pair of 16-bit sums.
    static I flush(I acc, I sums, int scale) {
        return _mm256_add_epi32(acc, _mm256_madd_epi16(sums, _mm256_set1_epi16((short)scale)));
    }
    static F to_float(I x) { return _mm256_cvtepi32_ps(x); }
    static I to_int(F x) { return _mm256_cvtps_epi32(x); }
    static void store16(int16_t* p, I x) {
        I packed = _mm256_permute4x64_epi64(_mm256_packs_epi32(x, x), 0xd8);
        _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(packed));
    }
    // Stores numbers up to 127 * 128 as two bytes each: number = 128 * high + low.
    static void store_parts(uint8_t* high, uint8_t* low, I x) {
        I upper = _mm256_srai_epi32(_mm256_add_epi32(x, _mm256_set1_epi32(64)), 7);
        I lower = _mm256_sub_epi32(x, _mm256_slli_epi32(upper, 7));
        I bytes = _mm256_packs_epi16(_mm256_packs_epi32(upper, lower), izero()); // u0-3 l0-3 per half
        bytes = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 3, 6, 7));
        _mm_storel_epi64((__m128i*)high, _mm256_castsi256_si128(bytes));
        _mm_storel_epi64((__m128i*)low, _mm_srli_si128(_mm256_castsi256_si128(bytes), 8));
    }
};

} // namespace
