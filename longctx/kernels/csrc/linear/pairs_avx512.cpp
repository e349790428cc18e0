// Linear layers in bfloat16 with `vdpbf16ps`: a pair of inputs times a panel's in one instruction.
#include "linear/pairs_tile.h"

namespace {

struct Avx512Bf16 {
    static constexpr int64_t TILE_ROWS = 12, STEP = PAIR, ROWS = TILE_ROWS;
    static constexpr bool WHOLE_TILES = false;

    static void begin(int64_t) {}
    static void end() {}

    template <int PANELS>
    static void multiply(const PairJob& job, const Part& part, int64_t row) {
        const int64_t rows = row + ROWS < job.rows ? ROWS : job.rows - row;
        const uint16_t* x = job.x + row * whole_units(job.inputs) + part.from * rows;
        tiles<ROWS, PANELS>(x, rows, part, part.sums + row * PANEL);
    }

    // Calls `tile` for a number of rows that is known only at run time.
    template <int COUNT, int PANELS>
    static void tiles(const uint16_t* x, int64_t rows, const Part& part, float* sums) {
        if constexpr (COUNT > 0) {
            if (rows < COUNT) return tiles<COUNT - 1, PANELS>(x, rows, part, sums);
            tile<COUNT, PANELS>(x, part, sums);
        }
    }

    template <int COUNT, int PANELS>
    static void tile(const uint16_t* x, const Part& part, float* to) {
        __m512 sums[COUNT][PANELS];
#pragma GCC unroll 16
        for (int r = 0; r < COUNT; ++r)
#pragma GCC unroll 2
            for (int p = 0; p < PANELS; ++p)
                sums[r][p] = part.first ? _mm512_setzero_ps()
                                        : _mm512_loadu_ps(to + p * part.stride + r * PANEL);
        for (int64_t k = 0; k < part.units * UNIT; k += PAIR) {
            __m512bh weights[PANELS];
#pragma GCC unroll 2
            for (int p = 0; p < PANELS; ++p) {
                const uint16_t* from = part.weights[p] + k * PANEL;
                if (part.ahead) __builtin_prefetch((const char*)from + part.ahead);
                weights[p] = load_pairs(from);
            }
#pragma GCC unroll 16
            for (int r = 0; r < COUNT; ++r) {
                const __m512bh pair = spread_pair(x + k * COUNT + r * PAIR);
#pragma GCC unroll 2
                for (int p = 0; p < PANELS; ++p)
                    sums[r][p] = _mm512_dpbf16_ps(sums[r][p], weights[p], pair);
            }
        }
#pragma GCC unroll 16
        for (int r = 0; r < COUNT; ++r)
#pragma GCC unroll 2
            for (int p = 0; p < PANELS; ++p)
                _mm512_storeu_ps(to + p * part.stride + r * PANEL, sums[r][p]);
    }
};

} // namespace

const longctx::PairKernels longctx::pairs_avx512_bf16 = pair_kernels<Avx512Bf16>();
