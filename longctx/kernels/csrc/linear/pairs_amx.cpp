// Linear layers in bfloat16 with AMX: tiles of up to 16 rows and UNIT inputs, times tiles of UNIT
// inputs and one panel.
#include "simd/amx.h"
#include "linear/pairs_tile.h"

namespace {

constexpr int64_t HEIGHT = 16;              // of a tile
constexpr int64_t WEIGHTS = UNIT * PANEL;   // of a tile
constexpr int ROW_BYTES = 64;               // of a tile

struct Amx {
    static constexpr int64_t TILE_ROWS = HEIGHT, STEP = UNIT, ROWS = 2 * HEIGHT;
    static constexpr bool WHOLE_TILES = true;

    // Tiles 0 to 3 are sums, 4 and 5 rows, 6 and 7 weights.
    static void begin(int64_t rows) {
        TileConfig(rows < HEIGHT ? rows : HEIGHT).load();
    }
    static void end() { _tile_release(); }

    template <int PANELS>
    static void multiply(const PairJob& job, const Part& part, int64_t row) {
        const int64_t height = job.rows < HEIGHT ? job.rows : HEIGHT;
        const uint16_t* x = job.x + row * whole_units(job.inputs) + part.from * height;
        order_memory(x);
        if (row + HEIGHT < job.rows)
            tiles<2, PANELS>(x, height, x + height * whole_units(job.inputs), part, row);
        else
            tiles<1, PANELS>(x, height, nullptr, part, row);
        order_memory(part.sums);
    }

    static void fetch_tile(const uint16_t* weights, int64_t ahead) {
#pragma GCC unroll 16
        for (int line = 0; line < 16; ++line)
            __builtin_prefetch((const char*)weights + ahead + line * 64);
    }

    template <int TILES, int PANELS>
    static void tiles(const uint16_t* x, int64_t height, const uint16_t* below, const Part& part,
                      int64_t row) {
        float* sums = part.sums + row * PANEL;
        float* beside = sums + part.stride;
        if (part.first) {
            _tile_zero(0);
            if (PANELS == 2) _tile_zero(1);
            if (TILES == 2) _tile_zero(2);
            if (TILES * PANELS == 4) _tile_zero(3);
        } else {
            _tile_loadd(0, sums, ROW_BYTES);
            if (PANELS == 2) _tile_loadd(1, beside, ROW_BYTES);
            if (TILES == 2) _tile_loadd(2, sums + HEIGHT * PANEL, ROW_BYTES);
            if (TILES * PANELS == 4) _tile_loadd(3, beside + HEIGHT * PANEL, ROW_BYTES);
        }
        const uint16_t *w0 = part.weights[0], *w1 = part.weights[PANELS - 1];
        for (int64_t unit = 0; unit < part.units; ++unit) {
            if (part.ahead) fetch_tile(w0, part.ahead);
            _tile_loadd(4, x, ROW_BYTES);
            _tile_loadd(6, w0, ROW_BYTES);
            _tile_dpbf16ps(0, 4, 6);
            if (PANELS == 2) {
                if (part.ahead) fetch_tile(w1, part.ahead);
                _tile_loadd(7, w1, ROW_BYTES);
                _tile_dpbf16ps(1, 4, 7);
            }
            if (TILES == 2) {
                _tile_loadd(5, below, ROW_BYTES);
                _tile_dpbf16ps(2, 5, 6);
                if (PANELS == 2) _tile_dpbf16ps(3, 5, 7);
                below += height * UNIT;
            }
            x += height * UNIT, w0 += WEIGHTS, w1 += WEIGHTS;
        }
        _tile_stored(0, sums, ROW_BYTES);
        if (PANELS == 2) _tile_stored(1, beside, ROW_BYTES);
        if (TILES == 2) _tile_stored(2, sums + HEIGHT * PANEL, ROW_BYTES);
        if (TILES * PANELS == 4) _tile_stored(3, beside + HEIGHT * PANEL, ROW_BYTES);
    }
};

} // namespace

const longctx::PairKernels longctx::pairs_amx = pair_kernels<Amx>();
