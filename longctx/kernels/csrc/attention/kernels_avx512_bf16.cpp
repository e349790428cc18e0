#include "attention/tile_pairs.h"

namespace {

// `vdpbf16ps`: a pair of a row times those of 16 columns in one instruction, ROWS rows at once.
struct Avx512Bf16 {
    static constexpr int ROWS = 4, MOST = 4; // vectors of columns

    static void begin() {}
    static void end() {}

    static void scores(const uint16_t* query, const uint16_t* keys, int head_dim, float* out) {
        for (int row = 0; row < HEIGHT; row += ROWS)
            multiply<BLOCK / Vector::W, false>(query + row * head_dim, head_dim, head_dim / 2, keys,
                                               BLOCK, out + row * BLOCK, BLOCK);
    }

    static void add(const uint16_t* weights, const uint16_t* values, int head_dim, float* sums) {
        for (int row = 0; row < HEIGHT; row += ROWS)
            for (int d = 0; d < head_dim;) {
                const uint16_t* from = weights + row * BLOCK;
                float* const to = sums + row * head_dim + d;
                if (head_dim - d >= MOST * Vector::W) {
                    multiply<MOST, true>(from, BLOCK, BLOCK / 2, values + 2 * d, head_dim, to, head_dim);
                    d += MOST * Vector::W;
                } else {
                    multiply<2, true>(from, BLOCK, BLOCK / 2, values + 2 * d, head_dim, to, head_dim);
                    d += 2 * Vector::W;
                }
            }
    }

    // Multiplies ROWS rows of `pairs` pairs with N vectors of columns, `width` of which lie between
    // one pair and the next, and adds to what is there or writes anew.
    template <int N, bool ADDS>
    static void multiply(const uint16_t* rows, int stride, int pairs, const uint16_t* columns,
                         int width, float* to, int to_stride) {
        __m512 sums[ROWS][N];
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
            for (int n = 0; n < N; ++n)
                sums[r][n] = ADDS ? Vector::load(to + r * to_stride + n * Vector::W) : Vector::zero();
        for (int p = 0; p < pairs; ++p, columns += 2 * width) {
            __m512bh those[N];
#pragma GCC unroll 4
            for (int n = 0; n < N; ++n)
                those[n] = load_pairs(columns + n * 2 * Vector::W);
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; ++r) {
                const __m512bh pair = spread_pair(rows + r * stride + 2 * p);
#pragma GCC unroll 4
                for (int n = 0; n < N; ++n)
                    sums[r][n] = _mm512_dpbf16_ps(sums[r][n], those[n], pair);
            }
        }
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
            for (int n = 0; n < N; ++n)
                Vector::store(to + r * to_stride + n * Vector::W, sums[r][n]);
    }
};

} // namespace

const longctx::Kernels longctx::avx512_bf16_kernels = {"avx512_bf16", pair_scratch_bytes<Avx512Bf16>,
                                                       run_pairs<Avx512Bf16>};
