// bfloat16 numbers in pairs, as the instructions for them multiply: two terms of a sum side by side.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace {

// Rounds 16 first terms and 16 second ones, and stores them by turns.
inline void store_pairs(uint16_t* p, __m512 first, __m512 second) {
    alignas(64) static constexpr uint16_t BY_TURNS[32] = {
        0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
        8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh(second, first);
    _mm512_storeu_si512(p, _mm512_permutexvar_epi16(_mm512_load_si512(BY_TURNS), halves));
}

inline __m512bh load_pairs(const uint16_t* p) { return (__m512bh)_mm512_loadu_si512(p); }

// One pair in all lanes.
inline __m512bh spread_pair(const uint16_t* p) {
    int pair;
    __builtin_memcpy(&pair, p, sizeof pair);
    return (__m512bh)_mm512_set1_epi32(pair);
}

} // namespace
