// The shape of AMX's tiles.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace {

// Compilers are not told that instructions for tiles read and write memory (gcc 12): what was stored
// before this is there, and what is loaded after it is loaded then.
inline void order_memory(const void* p) { __asm__ volatile("" : : "r"(p) : "memory"); }

// All eight tiles are 64 bytes wide and 16 rows high, but for tiles 0 to 5 that may have fewer.
struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};

    explicit TileConfig(int64_t rows_of_first_six) {
        for (int tile = 0; tile < 8; ++tile) {
            row_bytes[tile] = 64;
            rows[tile] = uint8_t(tile < 6 ? rows_of_first_six : 16);
        }
    }
    void load() const {
        order_memory(this);
        _tile_loadconfig(this);
    }
};

} // namespace
