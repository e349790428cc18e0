// bfloat16 numbers as they lie in memory, one at a time; kernels take whole vectors of them.
#pragma once

#include <cstdint>
#include <cstring>

namespace longctx {

inline float widened(uint16_t value) {
    const uint32_t bits = uint32_t(value) << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof wide);
    return wide;
}

// To the nearest bfloat16 number, to even.
inline uint16_t rounded(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const uint16_t nearest = uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    return value == value ? nearest : uint16_t(0x7fc0); // rounding could carry a NaN into the sign
}

// As torch computes them in either type: in float32, rounded once.
inline float product(float x, float y) { return x * y; }
inline float sum(float x, float y) { return x + y; }
inline uint16_t product(uint16_t x, uint16_t y) { return rounded(widened(x) * widened(y)); }
inline uint16_t sum(uint16_t x, uint16_t y) { return rounded(widened(x) + widened(y)); }

} // namespace longctx
