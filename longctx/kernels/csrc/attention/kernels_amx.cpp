#include "simd/amx.h"
#include "attention/tile_pairs.h"

namespace {

// AMX: tiles of HEIGHT rows and UNIT terms, times tiles of UNIT terms and 16 columns.
struct Amx {
    static void begin() { TileConfig(HEIGHT).load(); }
    static void end() { _tile_release(); }

    static void scores(const uint16_t* query, const uint16_t* keys, int head_dim, float* out) {
        order_memory(keys);
        zero();
        for (int d = 0; d < head_dim; d += UNIT)
            multiply<4>(query + d, head_dim, keys + d * BLOCK, BLOCK);
        store<4>(out, BLOCK);
        order_memory(out);
    }

    static void add(const uint16_t* weights, const uint16_t* values, int head_dim, float* sums) {
        order_memory(weights);
        int d = 0;
        for (; d + 64 <= head_dim; d += 64)
            add_some<4>(weights, values + 2 * d, head_dim, sums + d);
        if (d < head_dim)
            add_some<2>(weights, values + 2 * d, head_dim, sums + d);
        order_memory(sums);
    }

    template <int TILES>
    static void add_some(const uint16_t* weights, const uint16_t* values, int head_dim, float* sums) {
        load<TILES>(sums, head_dim);
        for (int t = 0; t < BLOCK; t += UNIT)
            multiply<TILES>(weights + t, BLOCK, values + t * head_dim, head_dim);
        store<TILES>(sums, head_dim);
    }

    // Tiles 0 to 3 are sums of 16 columns each, 4 has rows, and 5 to 7 have columns by turns.
    template <int TILES>
    static void multiply(const uint16_t* rows, int row_numbers, const uint16_t* columns, int width) {
        const int64_t stride = width * 4;
        _tile_loadd(4, rows, row_numbers * 2);
        _tile_loadd(5, columns, stride);
        _tile_dpbf16ps(0, 4, 5);
        _tile_loadd(6, columns + 32, stride);
        _tile_dpbf16ps(1, 4, 6);
        if (TILES < 4) return;
        _tile_loadd(7, columns + 64, stride);
        _tile_dpbf16ps(2, 4, 7);
        _tile_loadd(5, columns + 96, stride);
        _tile_dpbf16ps(3, 4, 5);
    }

    static void zero() {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }

    template <int TILES> static void load(const float* sums, int width) {
        _tile_loadd(0, sums, width * 4);
        _tile_loadd(1, sums + 16, width * 4);
        if (TILES < 4) return;
        _tile_loadd(2, sums + 32, width * 4);
        _tile_loadd(3, sums + 48, width * 4);
    }

    template <int TILES> static void store(float* sums, int width) {
        _tile_stored(0, sums, width * 4);
        _tile_stored(1, sums + 16, width * 4);
        if (TILES < 4) return;
        _tile_stored(2, sums + 32, width * 4);
        _tile_stored(3, sums + 48, width * 4);
    }
};

} // namespace

const longctx::Kernels longctx::amx_kernels = {"amx", pair_scratch_bytes<Amx>, run_pairs<Amx>};
